//! What is wrong with a request, by field and value.

use std::fmt;

/// How a caller should see the error; the names are those of gRPC's status codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The value can never be right.
    InvalidArgument,
    /// The value is right, but not on this host or not for this pod.
    FailedPrecondition,
    /// The value is right, but what it asks for is not built.
    Unimplemented,
    /// The value names something that does not exist.
    NotFound,
}

/// A value that a container or pod can't be made from. Displays as `field: value "…": reason`.
// Debug quoting, so that no control character of a request reaches a log line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: value {value:?}: {message}")]
pub struct SpecError {
    /// How a caller should see it.
    pub code: Code,
    /// The field, as a path from the request's config: `config.linux.security_context.run_as_user`.
    pub field: String,
    /// The value, shortened when it is long; empty where the value is missing.
    pub value: String,
    /// Why the value was refused.
    pub message: String,
}

/// Bytes of a value that an error repeats.
const VALUE_MAX: usize = 256;

impl SpecError {
    /// An error about `field`. A value longer than 256 bytes is cut.
    pub fn new(
        code: Code,
        field: impl Into<String>,
        value: impl fmt::Display,
        message: impl Into<String>,
    ) -> Self {
        let mut value = value.to_string();
        if value.len() > VALUE_MAX {
            let end = (0..=VALUE_MAX).rev().find(|&i| value.is_char_boundary(i)).unwrap_or(0);
            value.truncate(end);
            value.push('…');
        }
        Self { code, field: field.into(), value, message: message.into() }
    }

    pub(crate) fn invalid(
        field: impl Into<String>,
        value: impl fmt::Display,
        message: impl Into<String>,
    ) -> Self {
        Self::new(Code::InvalidArgument, field, value, message)
    }

    pub(crate) fn precondition(
        field: impl Into<String>,
        value: impl fmt::Display,
        message: impl Into<String>,
    ) -> Self {
        Self::new(Code::FailedPrecondition, field, value, message)
    }

    pub(crate) fn unimplemented(
        field: impl Into<String>,
        value: impl fmt::Display,
        message: impl Into<String>,
    ) -> Self {
        Self::new(Code::Unimplemented, field, value, message)
    }
}
