//! The error of this crate.

use std::path::PathBuf;

use stave_paths::PathError;
use stave_state::StateError;

use crate::{ChainId, Digest};

/// Why a layer could not be unpacked, committed, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The caller gave up.
    #[error("unpacking was cancelled")]
    Cancelled,
    /// The layer's content is not what its digest says.
    #[error("layer content has diffID {found}, expected {expected}")]
    DiffIdMismatch {
        /// From the image config.
        expected: Digest,
        /// Of the bytes read.
        found: Digest,
    },
    /// A compression or archive feature that we can't read.
    #[error("unsupported layer: {0}")]
    Unsupported(String),
    /// The archive breaks the tar format or a rule of the image spec, or tries to leave its tree.
    #[error("bad layer archive: entry {entry:?}: {reason}")]
    BadArchive {
        /// The path of the entry, cut to 256 bytes; empty before the first.
        entry: String,
        /// What is wrong.
        reason: String,
    },
    /// The archive exceeds a limit.
    #[error("layer archive exceeds a limit: entry {entry:?}: {limit}")]
    Limit {
        /// The path of the entry, cut to 256 bytes.
        entry: String,
        /// Which limit.
        limit: String,
    },
    /// The reader of the compressed bytes failed: a cut connection, a wrong digest.
    #[error("read layer: {0}")]
    Read(#[source] std::io::Error),
    /// A system call failed.
    #[error("{call} {path:?}: {source}")]
    Io {
        /// The system call.
        call: &'static str,
        /// The file, relative to the layer where it is in one.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A path of the archive could not be used.
    #[error(transparent)]
    Path(#[from] PathError),
    /// A record of the store could not be read or written.
    #[error(transparent)]
    State(#[from] StateError),
    /// A layer that this one stands on is not in the store.
    #[error("parent layer {0} is not in the store")]
    MissingParent(ChainId),
}

impl LayerError {
    /// Whether the disk is full, or a quota of it is used up.
    pub fn is_no_space(&self) -> bool {
        let errno = match self {
            LayerError::Io { source, .. } => source.raw_os_error(),
            LayerError::Path(e) => e.raw_os_error(),
            LayerError::State(StateError::Io { source, .. }) => source.raw_os_error(),
            _ => None,
        };
        let full = [rustix::io::Errno::NOSPC, rustix::io::Errno::DQUOT];
        errno.is_some_and(|n| full.iter().any(|e| e.raw_os_error() == n))
    }
}
