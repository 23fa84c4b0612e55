//! SPDY/3.1 as the Kubernetes clients speak it (draft-mbelshe-httpbis-spdy-00, with the version of the 3.1 draft): no
//! push, no priorities, and flow control with the clients that know it.

mod connection;
mod dictionary;
mod frame;
mod headers;
mod streams;
mod windows;

pub use frame::{Decoder, Encoder, Frame, FrameError, goaway, reset};
pub use headers::Headers;

pub(crate) use connection::{Accept, Connection, NewStream, start};
pub(crate) use windows::Window;
