//! The error of every operation on pods and containers.

use std::fmt;

/// How an operation failed, in the terms of gRPC status codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The request names a bad field or value.
    InvalidArgument,
    /// No such pod, container or image.
    NotFound,
    /// The name is taken by something with other content.
    AlreadyExists,
    /// The object is in the wrong state.
    FailedPrecondition,
    /// Not built yet.
    Unimplemented,
    /// A limit was reached.
    ResourceExhausted,
    /// Something that the daemon needs does not answer now.
    Unavailable,
    /// The time that the request gave is over.
    DeadlineExceeded,
    /// The host, the kernel or a process of ours failed.
    Internal,
}

/// An error with its code. The message says what, where and which value. It can be cloned, because
/// every request that joined a job gets the job's error.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// The class of the error.
    pub code: Code,
    /// For people.
    pub message: String,
    /// Where a command can't be executed: what a shell would answer, 126 or 127.
    pub exit_code: Option<i32>,
}

/// Result of an operation on pods and containers.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), exit_code: None }
    }

    pub(crate) fn internal(what: impl fmt::Display, error: impl fmt::Display) -> Self {
        Self::new(Code::Internal, format!("{what}: {error}"))
    }

    pub(crate) fn pod_not_found(id: &str) -> Self {
        Self::new(Code::NotFound, format!("pod_sandbox_id {id:?}: no such pod"))
    }

    pub(crate) fn container_not_found(id: &str) -> Self {
        Self::new(Code::NotFound, format!("container_id {id:?}: no such container"))
    }
}

impl From<stave_spec::SpecError> for Error {
    fn from(error: stave_spec::SpecError) -> Self {
        let code = match error.code {
            stave_spec::Code::InvalidArgument => Code::InvalidArgument,
            stave_spec::Code::FailedPrecondition => Code::FailedPrecondition,
            stave_spec::Code::Unimplemented => Code::Unimplemented,
            stave_spec::Code::NotFound => Code::NotFound,
        };
        Self::new(code, error.to_string())
    }
}
