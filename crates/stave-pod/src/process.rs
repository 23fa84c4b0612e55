//! What the supervisor's own process needs before it serves.

use std::os::fd::OwnedFd;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::DumpableBehavior;

use crate::report::report;

/// As low as can be without becoming unkillable: the pod's own processes go first.
const OOM_SCORE_ADJ: &str = "-998";

/// Why a supervisor can't run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fatal {
    /// A system call without which there is no supervisor.
    #[error("{what}: {errno}")]
    System {
        /// The call and what it was for.
        what: &'static str,
        /// What the kernel said.
        errno: Errno,
    },
    /// The daemon can't be spoken to.
    #[error("{0}: {1}")]
    Wire(&'static str, stave_wire::WireError),
    /// The exit records have no place.
    #[error("make directory {0:?}: {1}")]
    ExitRecords(std::path::PathBuf, std::io::Error),
}

impl Fatal {
    pub(crate) fn system(what: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::System { what, errno }
    }
}

/// Sets this process up and gives the listening socket that was descriptor 0.
pub(crate) fn prepare() -> Result<OwnedFd, Fatal> {
    let listener = take_listener()?;
    // For the children: an exec is quicker without sixty calls that change nothing.
    stave_sys::note_signals();
    // Orphans of exec'd processes come to us and not to the node's init.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(Fatal::system("PR_SET_CHILD_SUBREAPER"))?;
    // Processes of the node's PID namespace with CAP_SYS_PTRACE must not get at our descriptors
    // by way of /proc before execve.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(Fatal::system("PR_SET_DUMPABLE"))?;
    // It leads a session already when the daemon made one for it.
    let _ = rustix::process::setsid();
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    rustix::process::chdir("/").map_err(Fatal::system("chdir to /"))?;
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ) {
        report!("oom_score_adj stays as it is: {error}");
    }
    Ok(listener)
}

/// Sets a ready supervisor up, and gives the daemon's socket that was descriptor 0.
pub(crate) fn prepare_ready() -> Result<OwnedFd, Fatal> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(Fatal::system("PR_SET_DUMPABLE"))?;
    rustix::process::chdir("/").map_err(Fatal::system("chdir to /"))?;
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)
        .map_err(Fatal::system("descriptor 0 is no socket"))?;
    rustix::net::sockopt::socket_type(&socket).map_err(Fatal::system("descriptor 0 is no socket"))?;
    null_stdio()?;
    Ok(socket)
}

fn null_stdio() -> Result<(), Fatal> {
    let null = rustix::fs::openat(CWD, "/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(Fatal::system("open /dev/null"))?;
    rustix::stdio::dup2_stdin(&null).map_err(Fatal::system("dup2 of /dev/null"))?;
    rustix::stdio::dup2_stdout(&null).map_err(Fatal::system("dup2 of /dev/null"))
}

/// Moves the socket to a descriptor that no child inherits. Descriptors 0 and 1 become /dev/null.
fn take_listener() -> Result<OwnedFd, Fatal> {
    let listener = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)
        .map_err(Fatal::system("descriptor 0 is no listening socket"))?;
    let listens = rustix::net::sockopt::socket_acceptconn(&listener)
        .map_err(Fatal::system("descriptor 0 is no listening socket"))?;
    if !listens {
        return Err(Fatal::System {
            what: "descriptor 0 is a socket that does not listen",
            errno: Errno::INVAL,
        });
    }
    // A wait in accept would stop the pod's log writing.
    rustix::fs::fcntl_getfl(&listener)
        .and_then(|flags| rustix::fs::fcntl_setfl(&listener, flags | OFlags::NONBLOCK))
        .map_err(Fatal::system("make descriptor 0 nonblocking"))?;
    null_stdio()?;
    Ok(listener)
}
