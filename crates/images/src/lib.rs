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
