//! Images: references, registries, pulls, records.
//!
//! An image exists when its record does: `<root>/images/<config digest>.json`, written last, after
//! all its layers are in the layer store. A pull that breaks off leaves nothing.
#![forbid(unsafe_code)]

mod auth;
mod download;
mod error;
mod hosts;
mod image;
mod images;
mod manifest;
mod progress;
mod pull;
mod record;
mod reference;
mod registry;

pub use auth::Auth;
pub use error::{ErrorKind, ImageError};
pub use image::{Image, ImageConfig};
pub use images::{FsInfo, Images};
pub use progress::{LayerProgress, LayerStage, PullState};
pub use reference::Reference;
pub use registry::Patience;
pub use stave_layers::Digest;

/// Reads a manifest, an image's configuration and a hosts.toml: for the fuzz target.
#[cfg(fuzzing)]
pub fn fuzz_documents(data: &[u8]) {
    let _ = manifest::parse(data, None);
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = manifest::config(text);
        let _ = hosts::parse(text, std::path::Path::new("hosts.toml"), "registry.test");
    }
}
