//! Resolution of paths that a container or an image can influence.
//!
//! Everything here works on file descriptors: a [`Root`] is an `O_PATH` descriptor of a directory,
//! and paths are looked up below it with `openat2(2)` or a walk of our own that never leaves it.
//! No other crate may pass such paths to `std::fs`.
//!
//! Two ways to look up a path:
//! - *in root*: symbolic links are followed as a process chrooted to the root would (absolute links
//!   start at the root, `..` stops there). For container root file systems.
//! - *beneath*: no symbolic link is followed at all and `..` out of the tree is an error. For trees
//!   that we write ourselves, such as a layer being unpacked.
#![forbid(unsafe_code)]

mod error;
mod name;
mod procfs;
mod read;
mod remove;
mod root;
mod walk;

pub use error::PathError;
pub use name::check_component;
pub use procfs::open_own_proc;
pub use read::read_regular;
pub use remove::remove_tree;
pub use root::Root;

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;
