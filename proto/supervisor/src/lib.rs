//! The protocol between the daemon and the supervisor of a pod. The definition, with its
//! comments, is `proto/stave/supervisor/v1/`.
#![forbid(unsafe_code)]

/// Version of the protocol that this crate describes, sent in [`v1::Hello`].
pub const VERSION: u32 = 1;

/// Messages of protocol version 1.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/stave.supervisor.v1.rs"));
}
