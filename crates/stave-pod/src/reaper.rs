//! How processes ended.
//!
//! The event loop's thread is the only one that waits for children: known ones by their pidfd, then
//! whatever else there is, which are orphans of the pod that came to us as their subreaper.

use std::os::fd::BorrowedFd;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions, WaitOptions};

const SIGKILL: i32 = 9;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ExitStatus {
    /// Exit status, or 128 + signal.
    pub(crate) code: i32,
    /// Signal that ended it, or 0.
    pub(crate) signal: i32,
}

impl ExitStatus {
    fn new(status: Option<i32>, signal: Option<i32>) -> Self {
        match (status, signal) {
            (_, Some(signal)) => Self { code: 128 + signal, signal },
            (Some(code), None) => Self { code, signal: 0 },
            // What CRI has for "unknown".
            (None, None) => Self { code: 255, signal: 0 },
        }
    }

    /// As the OOM killer leaves it, or as a shell passes that on.
    pub(crate) fn may_be_oom_kill(self) -> bool {
        self.signal == SIGKILL || self.code == 128 + SIGKILL
    }
}

impl std::fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.signal {
            0 => write!(f, "status {}", self.code),
            signal => write!(f, "signal {signal}"),
        }
    }
}

/// Reaps one child if it has ended.
pub(crate) fn reap(pidfd: BorrowedFd<'_>) -> Option<ExitStatus> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    match rustix::io::retry_on_intr(|| rustix::process::waitid(WaitId::PidFd(pidfd), options)) {
        Ok(Some(status)) => Some(ExitStatus::new(status.exit_status(), status.terminating_signal())),
        Ok(None) => None,
        // It was no child of ours, or somebody else has reaped it: it is gone either way.
        Err(_) => Some(ExitStatus::new(None, None)),
    }
}

/// Whether a child has ended; it is left to be reaped.
pub(crate) fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    let status = rustix::io::retry_on_intr(|| rustix::process::waitid(WaitId::PidFd(pidfd), options));
    !matches!(status, Ok(None))
}

/// What [`reap_any`] found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reaped {
    /// This child had ended.
    Child(i32, ExitStatus),
    /// There are children; all of them live.
    NoneEnded,
    /// There are no children.
    NoChildren,
}

/// Reaps any child that has ended.
pub(crate) fn reap_any() -> Reaped {
    match rustix::io::retry_on_intr(|| rustix::process::wait(WaitOptions::NOHANG)) {
        Ok(Some((pid, status))) => Reaped::Child(
            pid.as_raw_nonzero().get(),
            ExitStatus::new(status.exit_status(), status.terminating_signal()),
        ),
        Ok(None) => Reaped::NoneEnded,
        Err(Errno::CHILD) => Reaped::NoChildren,
        Err(_) => Reaped::NoneEnded,
    }
}

/// Takes over the signals that would end or wake a supervisor. They stay blocked; the executor
/// resets that in children. SIGTERM and the like do nothing: a stop of the daemon's unit must not
/// end pods.
pub(crate) fn take_signals() -> nix::Result<SignalFd> {
    let mut signals = SigSet::empty();
    for signal in [
        Signal::SIGCHLD,
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGPIPE,
        Signal::SIGQUIT,
        Signal::SIGTERM,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGALRM,
        // A limit on file sizes or time that the daemon's unit has: writes to a log fail then.
        Signal::SIGXFSZ,
        Signal::SIGXCPU,
    ] {
        signals.add(signal);
    }
    signals.thread_block()?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses() {
        assert_eq!(ExitStatus::new(Some(3), None), ExitStatus { code: 3, signal: 0 });
        assert_eq!(ExitStatus::new(None, Some(15)), ExitStatus { code: 143, signal: 15 });
        assert_eq!(ExitStatus::new(None, Some(9)).to_string(), "signal 9");
        assert!(ExitStatus::new(None, Some(9)).may_be_oom_kill());
        assert!(ExitStatus::new(Some(137), None).may_be_oom_kill());
        assert!(!ExitStatus::new(None, Some(15)).may_be_oom_kill());
        assert!(!ExitStatus::new(Some(0), None).may_be_oom_kill());
    }
}
