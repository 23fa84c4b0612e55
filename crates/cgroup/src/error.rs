use std::io;
use std::path::PathBuf;

/// What can go wrong with a cgroup; the message names the path and the value.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CgroupError {
    /// No cgroup hierarchy is mounted.
    #[error("no cgroup hierarchy is mounted: /proc/self/mountinfo lists neither cgroup2 nor cgroup")]
    NoHierarchy,
    /// A cgroup path that we don't accept.
    #[error("invalid cgroup path {path:?}: {reason}")]
    InvalidPath {
        /// the path as given
        path: String,
        /// what is wrong with it
        reason: &'static str,
    },
    /// A path in the form of the systemd driver.
    #[error(
        "cgroup parent {path:?} has the form of the systemd cgroup driver (\".slice\"), but this daemon uses the cgroupfs driver; \
         set the kubelet's cgroupDriver to cgroupfs"
    )]
    SystemdSlice {
        /// the path as given
        path: String,
    },
    /// A path that is not in the form of the systemd driver.
    #[error(
        "cgroup parent {path:?} is no slice: {reason}; this daemon uses the systemd cgroup driver: set the kubelet's \
         cgroupDriver to systemd"
    )]
    NotASlice {
        /// the path as given
        path: String,
        /// what is wrong with it
        reason: String,
    },
    /// A scope that systemd has started is not where it should be.
    #[error("systemd has started the scope, but its cgroup {path} is missing")]
    NoScope {
        /// where its directory should be
        path: PathBuf,
    },
    /// An id that can't name a cgroup.
    #[error("invalid {what} {value:?}: 1 to 255 letters, digits, '-', '_' and '.' are allowed")]
    InvalidName {
        /// which id
        what: &'static str,
        /// the id as given
        value: String,
    },
    /// A value that no cgroup file can hold.
    #[error("invalid {field} {value:?}: {reason}")]
    InvalidValue {
        /// field of the resources
        field: &'static str,
        /// the value as given
        value: String,
        /// what is wrong with it
        reason: &'static str,
    },
    /// The controller behind a limit is missing.
    #[error(
        "{asked} was asked for, but the cgroup controller {controller:?} is not available ({path} is missing)"
    )]
    NoController {
        /// controller
        controller: String,
        /// the limit
        asked: String,
        /// the file that would take the limit
        path: PathBuf,
    },
    /// The kernel does not let a cgroup pass a controller on.
    #[error(
        "{asked} was asked for, but {dir} can't give the cgroup controller {controller:?} to its children: {source}{hint}"
    )]
    NotDelegated {
        /// controller
        controller: String,
        /// the limit
        asked: String,
        /// the cgroup's directory
        dir: PathBuf,
        /// the kernel's answer
        source: io::Error,
        /// why, where that is known
        hint: &'static str,
    },
    /// A key of `unified` without a file.
    #[error("unified resource {key:?}: {reason}")]
    Unified {
        /// the key as given
        key: String,
        /// what is wrong with it
        reason: String,
    },
    /// The cgroup of a container exists already.
    #[error("cgroup {path} exists already")]
    Exists {
        /// its directory
        path: PathBuf,
    },
    /// A write into a cgroup file was refused.
    #[error("writing {value:?} to {path}: {source}")]
    Write {
        /// the file
        path: PathBuf,
        /// the value
        value: String,
        /// the kernel's answer
        source: io::Error,
    },
    /// More is in use than the new limit allows.
    #[error(
        "a memory limit of {limit} bytes is below what {path} can be brought down to; {used} bytes are in use"
    )]
    InUse {
        /// the limit asked for, bytes
        limit: i64,
        /// what is used now, bytes
        used: i64,
        /// the cgroup's directory
        path: PathBuf,
    },
    /// Another call failed.
    #[error("{call} {path}: {source}")]
    Io {
        /// what was tried
        call: &'static str,
        /// on which path
        path: PathBuf,
        /// the kernel's answer
        source: io::Error,
    },
    /// Processes stayed in a cgroup that should be removed or killed.
    #[error("cgroup {path} still has processes or children after {waited_ms} ms (pids {pids:?})")]
    Busy {
        /// its directory
        path: PathBuf,
        /// how long we waited, milliseconds
        waited_ms: u64,
        /// the first few that are left
        pids: Vec<String>,
    },
}

impl CgroupError {
    pub(crate) fn io(call: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io { call, path: path.into(), source }
    }
}
