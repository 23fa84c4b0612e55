//! The streaming server of the CRI: Exec, Attach and PortForward answer with a URL of this server, and the client
//! (kubelet, crictl) connects to it over SPDY/3.1 or WebSocket.
//!
//! It knows nothing of pods and containers: the daemon hands in an [`ExecSession`] or a [`PortForwardSession`] and gets
//! a URL with a single-use token, which is all that authenticates the client.
//!
//! ```text
//! server, token, tls  URLs, connections
//! http, negotiate     a request, its upgrade and its subprotocol
//! spdy, websocket     the transports: both give channels and a link
//! remote_command*     exec and attach on channels, whichever the transport
//! port_forward*       connections on channels, whichever the transport
//! ```

#![forbid(unsafe_code)]

mod backlog;
mod http;
mod link;
mod negotiate;
mod port_forward;
mod port_forward_channels;
mod port_forward_streams;
mod remote_command;
mod remote_command_channels;
mod server;
mod session;
mod socket;
pub mod spdy;
mod status;
mod tls;
mod token;
mod tunnel;
mod websocket;

pub use server::{Config, Error, Server, Timeouts};
pub use session::{
    ExecSession, PortForwardSession, Process, ProcessInput, ProcessOutput, Resize, SessionError, Streams,
};
pub use tls::{TlsError, TlsFiles};
pub use token::TokenError;

/// Takes a WebSocket message apart in each encoding, and as the text of a resize stream: for the fuzz target.
#[cfg(feature = "fuzzing")]
pub fn fuzz_message(data: &[u8]) {
    for encoding in [negotiate::Encoding::Binary, negotiate::Encoding::Base64] {
        for closes in [false, true] {
            let _ = websocket::parse(bytes::Bytes::copy_from_slice(data), encoding, closes);
        }
    }
    let _ = remote_command::take_sizes(&mut data.to_vec());
}
