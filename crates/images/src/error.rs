//! The errors of this crate.

use stave_layers::{InvalidDigest, LayerError};
use stave_state::StateError;

/// What sort of failure an [`ImageError`] is; callers choose their status code by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The reference is malformed.
    InvalidReference,
    /// The registry has no such image, or not for this platform.
    NotFound,
    /// The registry wants other credentials.
    Unauthorized,
    /// No host answered in time, or all answered with a server error. Worth a retry.
    RegistryUnavailable,
    /// Content differs from its digest.
    DigestMismatch,
    /// A manifest, config or layer is malformed, too large or of an unsupported type.
    InvalidImage,
    /// The disk is full.
    NoSpace,
    /// hosts.toml can't be used.
    Configuration,
    /// The pull was cancelled.
    Cancelled,
    /// Records or layers on disk, or a bug.
    Internal,
}

/// Why an image could not be pulled or removed. Clonable: all who wait for one pull get the same.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ImageError {
    kind: ErrorKind,
    message: String,
}

impl ImageError {
    /// An error of a kind, with a message that says what, where and which value.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        ImageError { kind, message: message.into() }
    }

    /// The sort of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }

    /// The same failure with its place in front.
    pub(crate) fn context(self, place: impl std::fmt::Display) -> Self {
        ImageError { kind: self.kind, message: format!("{place}: {}", self.message) }
    }
}

impl From<LayerError> for ImageError {
    fn from(error: LayerError) -> Self {
        let kind = match &error {
            e if e.is_no_space() => ErrorKind::NoSpace,
            LayerError::Cancelled => ErrorKind::Cancelled,
            LayerError::DiffIdMismatch { .. } => ErrorKind::DigestMismatch,
            LayerError::Unsupported(_)
            | LayerError::BadArchive { .. }
            | LayerError::Limit { .. }
            | LayerError::Path(_) => ErrorKind::InvalidImage,
            LayerError::Read(_) => ErrorKind::RegistryUnavailable,
            _ => ErrorKind::Internal,
        };
        ImageError::new(kind, error.to_string())
    }
}

impl From<StateError> for ImageError {
    fn from(error: StateError) -> Self {
        LayerError::from(error).into()
    }
}

impl From<InvalidDigest> for ImageError {
    fn from(error: InvalidDigest) -> Self {
        ImageError::new(ErrorKind::InvalidImage, error.to_string())
    }
}
