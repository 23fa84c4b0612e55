use std::io;
use std::path::PathBuf;

/// What went wrong with a record or its directory, and where.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A system call failed.
    #[error("{op} {path}: {source}")]
    Io {
        /// The step that failed: "open", "write", "fsync", ...
        op: &'static str,
        /// The file or directory it was done to.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The value can't be written as JSON.
    #[error("encode {path}: {source}")]
    Encode {
        /// The record that was to be written.
        path: PathBuf,
        /// What serde says.
        source: serde_json::Error,
    },
    /// The file is no JSON, or not of this type.
    #[error("decode {path}: {source}")]
    Decode {
        /// The record.
        path: PathBuf,
        /// What serde says, with line and column.
        source: serde_json::Error,
    },
    /// The record is bigger than [`crate::MAX_RECORD`].
    #[error("{path} has {size} bytes, more than the {limit} that a record may have")]
    TooLarge {
        /// The record.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// A record is a directory, a symbolic link, a FIFO, ...
    #[error("{path} is no regular file")]
    NotRegular {
        /// The path.
        path: PathBuf,
    },
    /// The path can't name a record: no parent or no file name, or not UTF-8.
    #[error("{path:?} can't name a record")]
    BadName {
        /// The path.
        path: PathBuf,
    },
    /// Another process holds the lock.
    #[error("{path} is held by {holder}: another daemon runs on this directory")]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// "pid N" as the holder wrote it, or "an unknown process".
        holder: String,
    },
    /// A directory that must be ours alone is not, and can't be made so.
    #[error("{path} can't be a private directory: {reason}")]
    NotPrivate {
        /// The directory.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

impl StateError {
    pub(crate) fn io(op: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> StateError {
        let path = path.into();
        move |source| StateError::Io { op, path, source }
    }
}
