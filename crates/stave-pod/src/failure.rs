//! Making [`Failure`] replies.

use rustix::io::Errno;
use stave_supervisor_proto::v1::Failure;
use stave_supervisor_proto::v1::failure::Kind;

fn new(kind: Kind, message: String, errno: i32) -> Failure {
    Failure { kind: kind.into(), message, errno, exit_code: 0 }
}

pub(crate) fn invalid(message: impl Into<String>) -> Failure {
    new(Kind::InvalidArgument, message.into(), 0)
}

pub(crate) fn not_found(message: impl Into<String>) -> Failure {
    new(Kind::NotFound, message.into(), 0)
}

pub(crate) fn precondition(message: impl Into<String>) -> Failure {
    new(Kind::FailedPrecondition, message.into(), 0)
}

pub(crate) fn exhausted(message: impl Into<String>) -> Failure {
    new(Kind::ResourceExhausted, message.into(), 0)
}

pub(crate) fn internal(message: impl Into<String>) -> Failure {
    new(Kind::Internal, message.into(), 0)
}

/// `what` failed because the kernel said `errno`.
pub(crate) fn system(what: impl AsRef<str>, errno: Errno) -> Failure {
    new(Kind::Internal, format!("{}: {errno}", what.as_ref()), errno.raw_os_error())
}

/// `what` failed with an I/O error.
pub(crate) fn io(what: impl AsRef<str>, error: &std::io::Error) -> Failure {
    new(Kind::Internal, format!("{}: {error}", what.as_ref()), error.raw_os_error().unwrap_or(0))
}

/// A failure that the executor reported.
pub(crate) fn executor(error: &stave_executor::Error) -> Failure {
    let exit_code = error.exit_code().unwrap_or(0);
    Failure { exit_code, ..new(error.kind, error.to_string(), error.errno) }
}
