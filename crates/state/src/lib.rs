//! Records on disk: one small file each, written whole and renamed, read back one by one.
//!
//! A reader sees the old record or the new one, never a part. What can't be decoded is set aside under
//! [`BROKEN`] and reported, so that one bad file stops nothing. The directories hold the daemon's own
//! files only; paths that a container or an image can influence belong to `stave-paths`.
#![forbid(unsafe_code)]

mod dir;
mod error;
mod load;
mod lock;
mod write;

pub use dir::private_dir;
pub use error::StateError;
pub use load::{BROKEN, Loaded, MAX_RECORD, SetAside, load_dir, read_json};
pub use lock::RootLock;
pub use write::{Durability, remove, remove_durably, write_bytes, write_json};
