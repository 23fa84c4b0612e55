//! Messages with file descriptors over `AF_UNIX` `SOCK_SEQPACKET` sockets: what the daemon and the
//! supervisor of a pod use to talk.
//!
//! # Frame
//!
//! One message is one packet. Its first byte is the kind:
//!
//! | kind | rest of the packet | descriptors (`SCM_RIGHTS`) |
//! |---|---|---|
//! | 0 inline | the payload, at most 65536 bytes | those of the message, 0 to 16 |
//! | 1 memfd | length of the payload, 8 bytes, little endian | those of the message, then one memfd |
//!
//! The memfd of kind 1 holds exactly that many bytes from offset 0, 65537 to 16 MiB, and carries the
//! seals `F_SEAL_WRITE`, `F_SEAL_GROW` and `F_SEAL_SHRINK`, so that the bytes can't change under the
//! reader. A packet of no bytes does not exist: `recv` reads it as the end of the connection.
//!
//! Every function leaves blocking to its caller: sockets are nonblocking, and "not now" is
//! [`WireError::WouldBlock`]. Descriptors are received close-on-exec.
#![forbid(unsafe_code)]

mod error;
mod frame;
mod message;
mod socket;

pub use error::WireError;
pub use message::{Message, recv, send};
pub use socket::{accept, connect, listen};

/// Most bytes of a payload.
pub const MAX_PAYLOAD: usize = 16 << 20;
/// Most bytes of a payload that travels inside the packet.
pub const MAX_INLINE: usize = 64 << 10;
/// Most descriptors of a message.
pub const MAX_FDS: usize = 16;
