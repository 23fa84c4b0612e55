//! From the domain's errors to gRPC status codes.

use stave_images::{ErrorKind, ImageError};
use stave_pods::{Code, Error};
use tonic::Status;

/// Metadata of an error, where a command can't be executed: what a shell would answer, 126 or 127.
pub const EXIT_CODE: &str = "stave-exit-code";

pub(crate) fn pod_error(error: Error) -> Status {
    let code = match error.code {
        Code::InvalidArgument => tonic::Code::InvalidArgument,
        Code::NotFound => tonic::Code::NotFound,
        Code::AlreadyExists => tonic::Code::AlreadyExists,
        Code::FailedPrecondition => tonic::Code::FailedPrecondition,
        Code::Unimplemented => tonic::Code::Unimplemented,
        Code::ResourceExhausted => tonic::Code::ResourceExhausted,
        Code::Unavailable => tonic::Code::Unavailable,
        Code::DeadlineExceeded => tonic::Code::DeadlineExceeded,
        Code::Internal => tonic::Code::Internal,
    };
    let mut status = Status::new(code, error.message);
    if let Some(code) = error.exit_code {
        status.metadata_mut().insert(EXIT_CODE, code.into());
    }
    status
}

pub(crate) fn image_error(error: ImageError) -> Status {
    let message = error.to_string();
    match error.kind() {
        ErrorKind::InvalidReference => Status::invalid_argument(message),
        ErrorKind::NotFound => Status::not_found(message),
        ErrorKind::Unauthorized => Status::permission_denied(message),
        // The kubelet knows this prefix, and only where the code is Unknown.
        ErrorKind::RegistryUnavailable => Status::unknown(format!("RegistryUnavailable: {message}")),
        ErrorKind::DigestMismatch => Status::data_loss(message),
        ErrorKind::InvalidImage => Status::failed_precondition(message),
        ErrorKind::NoSpace => Status::resource_exhausted(message),
        ErrorKind::Configuration => Status::failed_precondition(message),
        ErrorKind::Cancelled => Status::cancelled(message),
        _ => Status::internal(message),
    }
}

/// A request without something that it must have.
pub(crate) fn missing(field: &str) -> Status {
    Status::invalid_argument(format!("{field}: is required"))
}

/// An RPC that is not built yet.
pub(crate) fn unbuilt<T>(rpc: &str) -> Result<T, Status> {
    Err(Status::unimplemented(format!("{rpc} is not built yet in this version of Stave")))
}
