//! SPDY/3.1 as the Kubernetes clients speak it (draft-mbelshe-httpbis-spdy-00, with the version of the 3.1 draft): no
//! flow control, no push, no priorities.

mod connection;
mod dictionary;
mod frame;
mod headers;
mod streams;

pub use frame::{Decoder, Encoder, Frame, FrameError, goaway, reset};
pub use headers::Headers;

pub(crate) use connection::{Accept, Connection, NewStream, start};
