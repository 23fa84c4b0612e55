//! The content-addressed store of unpacked image layers.
//!
//! A layer is unpacked while its bytes come in ([`Store::unpack`]), on its own and in parallel with
//! others, and becomes part of the store in its turn ([`Store::commit`]), under the chain id that
//! names it together with the layers below. Its directory ([`Store::dir`]) is a lower directory for
//! overlayfs: whiteouts are character devices 0:0, opaque directories carry `trusted.overlay.opaque`.
//!
//! Archives are hostile. The `tar` crate only parses them; files are made with descriptors and
//! `stave-paths`, so that neither links nor `..` lead out of the layer, and [`Limits`] bound them.
#![forbid(unsafe_code)]

mod below;
mod digest;
mod entry;
mod error;
mod limits;
mod reader;
mod store;
mod tree;
mod unpack;

pub use digest::{ChainId, Digest, InvalidDigest};
pub use error::LayerError;
pub use limits::Limits;
pub use reader::Cancel;
pub use store::{Layer, Staged, Store};
pub use unpack::Compression;
