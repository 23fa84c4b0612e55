//! What went wrong, where, and with which value.

use stave_paths::PathError;
use stave_supervisor_proto::v1::failure::Kind;

/// A failure of the executor, or of a process on its way to execve.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{stage}: {message}")]
pub struct Error {
    /// The step that failed, such as `mount` or `cgroup`.
    pub stage: String,
    /// What, where, which value; ends with the text of `errno` where there is one.
    pub message: String,
    /// errno(3), or 0.
    pub errno: i32,
    /// How the failure is told to the daemon.
    pub kind: Kind,
}

/// The stage of [`Error`] in which the command itself could not be executed.
pub(crate) const EXEC: &str = "exec";

pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(stage: &str, kind: Kind, message: impl Into<String>) -> Error {
        Error { stage: stage.to_owned(), message: message.into(), errno: 0, kind }
    }

    pub(crate) fn invalid(stage: &str, message: impl Into<String>) -> Error {
        Error::new(stage, Kind::InvalidArgument, message)
    }

    /// A refusal of the kernel.
    pub(crate) fn os(stage: &str, what: impl std::fmt::Display, error: impl Into<std::io::Error>) -> Error {
        let error = error.into();
        let errno = error.raw_os_error().unwrap_or(0);
        Error {
            stage: stage.to_owned(),
            message: format!("{what}: {}", text(&error)),
            errno,
            kind: kind(errno),
        }
    }

    /// A path in the container that could not be used. What the path *is* (a link where none may be,
    /// a file where a directory must be) comes from the image or the request: an invalid argument.
    pub(crate) fn path(stage: &str, what: impl std::fmt::Display, error: &PathError) -> Error {
        let errno = error.raw_os_error().unwrap_or(0);
        let kind = match error {
            PathError::Io { .. } => kind(errno),
            _ => Kind::InvalidArgument,
        };
        Error { stage: stage.to_owned(), message: format!("{what}: {error}"), errno, kind }
    }

    /// With a further failure at its end, which came of this one.
    pub(crate) fn and(mut self, next: &Error) -> Error {
        self.message = format!("{}; then {next}", self.message);
        self
    }

    /// What a shell would answer where the command itself can't be executed: 127 if it is not there, 126 if it is no
    /// program or may not be run. `None` for all other failures.
    pub fn exit_code(&self) -> Option<i32> {
        match self.errno {
            _ if self.stage != EXEC => None,
            libc::ENOENT | libc::ENOTDIR => Some(127),
            libc::EACCES | libc::EISDIR | libc::ENOEXEC => Some(126),
            _ => None,
        }
    }

    /// With the kernel's text as Go programs write it.
    pub(crate) fn in_lower_case(mut self) -> Error {
        if let Some(end) = self.message.rfind(": ") {
            let text = self.message.split_off(end).to_lowercase();
            self.message.push_str(&text);
        }
        self
    }

    pub(crate) fn with_kind(mut self, kind: Kind) -> Error {
        self.kind = kind;
        self
    }
}

fn kind(errno: i32) -> Kind {
    match errno {
        libc::ENOMEM | libc::ENOSPC | libc::EDQUOT | libc::EMFILE | libc::ENFILE | libc::EAGAIN => {
            Kind::ResourceExhausted
        }
        libc::ELOOP | libc::ENOTDIR | libc::ENAMETOOLONG => Kind::InvalidArgument,
        _ => Kind::Internal,
    }
}

/// The kernel's text without Rust's "(os error N)".
fn text(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => nix::errno::Errno::from_raw(errno).desc().to_owned(),
        None => error.to_string(),
    }
}

/// Adds stage and value to errors of system calls.
pub(crate) trait Context<T> {
    fn at(self, stage: &str, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<std::io::Error>> Context<T> for std::result::Result<T, E> {
    fn at(self, stage: &str, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error::os(stage, what(), e))
    }
}
