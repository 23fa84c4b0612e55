//! The error of this crate.

use std::path::{Path, PathBuf};

use rustix::io::Errno;

/// Why a path could not be used.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// The path is empty, too long, or holds a NUL byte.
    #[error("invalid path {path:?}: {reason}")]
    Invalid {
        /// The path as given.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The path leaves its root, or goes through a symbolic link where none is allowed.
    #[error("path {path:?} leaves its root or passes a symbolic link")]
    Escapes {
        /// The path as given.
        path: PathBuf,
    },
    /// The file is not of the kind that is wanted here.
    #[error("{path:?} is not a {wanted}")]
    WrongKind {
        /// The path as given.
        path: PathBuf,
        /// What was wanted: `directory`, `regular file`, `file`.
        wanted: &'static str,
    },
    /// The file is larger than the caller accepts.
    #[error("{path:?} is larger than {max} bytes")]
    TooLarge {
        /// The path as given.
        path: PathBuf,
        /// The limit in bytes.
        max: u64,
    },
    /// A system call failed.
    #[error("{call} {path:?}: {source}")]
    Io {
        /// The system call.
        call: &'static str,
        /// The path as given.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
}

impl PathError {
    /// Whether the path, or a directory on the way to it, does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, PathError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    }

    /// The number of the kernel's error, where it was the kernel that refused.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            PathError::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    pub(crate) fn invalid(path: &Path, reason: &'static str) -> Self {
        PathError::Invalid { path: path.to_owned(), reason }
    }

    pub(crate) fn kind(path: &Path, wanted: &'static str) -> Self {
        PathError::WrongKind { path: path.to_owned(), wanted }
    }

    pub(crate) fn io(call: &'static str, path: &Path, errno: Errno) -> Self {
        PathError::Io { call, path: path.to_owned(), source: errno.into() }
    }

    /// For lookups that may not follow links or leave the tree: `openat2(2)` reports those as
    /// `ELOOP` and `EXDEV`.
    pub(crate) fn beneath(call: &'static str, path: &Path, errno: Errno) -> Self {
        match errno {
            Errno::LOOP | Errno::XDEV => PathError::Escapes { path: path.to_owned() },
            other => PathError::io(call, path, other),
        }
    }
}
