//! A process that does nothing, where the kernel or systemd wants one for a moment.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Signal, WaitId, WaitIdOptions, waitid};

use crate::fork::{CloneArgs, clone3};
use crate::spawn::{block_all_signals, restore_signals};

/// A child that only waits. It ends when this is dropped, or when the caller dies.
#[derive(Debug)]
pub struct Placeholder {
    pid: i32,
    pidfd: OwnedFd,
    _end: OwnedFd,
}

impl Placeholder {
    /// Starts one. It is a fork without an execve: it shares the caller's memory as long as that does not change,
    /// so it is for moments only. All its descriptors but one are closed. Safe in a process with many threads.
    pub fn start() -> io::Result<Self> {
        let (read, end) = pipe_with(PipeFlags::CLOEXEC)?;
        let mut pidfd: i32 = -1;
        let clone = CloneArgs {
            flags: libc::CLONE_PIDFD as u64,
            pidfd: &raw mut pidfd as u64,
            exit_signal: libc::SIGCHLD as u64,
            ..CloneArgs::default()
        };
        // They stay blocked in the child: a handler of this program must not run there.
        let old_mask = block_all_signals()?;
        // SAFETY: no CLONE_VM; the child only runs `wait`, which makes system calls and never returns.
        let pid = unsafe { clone3(&clone) };
        if pid == 0 {
            // SAFETY: we are the child, and `read` is open.
            unsafe { wait(read.as_raw_fd()) }
        }
        let failed = (pid < 0).then(io::Error::last_os_error);
        restore_signals(&old_mask);
        if let Some(error) = failed {
            return Err(error);
        }
        // SAFETY: the kernel wrote a new descriptor that nobody else owns.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        Ok(Self { pid: pid as i32, pidfd, _end: end })
    }

    /// Its pid, which is its own until this is dropped: it is reaped then.
    pub fn pid(&self) -> i32 {
        self.pid
    }
}

impl Drop for Placeholder {
    /// Kills it, and waits for its end, so that it is in no cgroup afterwards.
    fn drop(&mut self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        let _ = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED);
    }
}

/// # Safety
/// Only in a child that shares no memory.
unsafe fn wait(end: RawFd) -> ! {
    // SAFETY: async-signal-safe system calls only, on a buffer of this function's own.
    unsafe {
        libc::syscall(libc::SYS_prctl, libc::PR_SET_NAME, c"stave-hold".as_ptr(), 0, 0, 0);
        // The other end of the pipe is among those: with the caller, the last one is gone.
        let end = end as libc::c_uint;
        if end > 0 {
            libc::syscall(libc::SYS_close_range, 0 as libc::c_uint, end - 1, 0 as libc::c_uint);
        }
        libc::syscall(libc::SYS_close_range, end + 1, libc::c_uint::MAX, 0 as libc::c_uint);
        let mut byte = 0_u8;
        libc::syscall(libc::SYS_read, end, &raw mut byte, 1_usize);
        libc::_exit(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_waits_without_our_descriptors_and_ends_with_the_drop() {
        let held = Placeholder::start().unwrap();
        let proc = format!("/proc/{}", held.pid());
        // Just after the clone it still has ours.
        let mut fds = usize::MAX;
        for _ in 0..500 {
            fds = std::fs::read_dir(format!("{proc}/fd")).unwrap().count();
            if fds == 1 {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        assert_eq!(fds, 1);
        assert_eq!(std::fs::read_to_string(format!("{proc}/comm")).unwrap(), "stave-hold\n");
        drop(held);
        assert!(!std::path::Path::new(&proc).exists(), "it is reaped");
    }

    #[test]
    fn it_ends_when_its_pipe_does() {
        let mut held = Placeholder::start().unwrap();
        let (_, other) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        // As the death of the caller does it.
        drop(std::mem::replace(&mut held._end, other));
        let ended = waitid(WaitId::PidFd(held.pidfd.as_fd()), WaitIdOptions::EXITED).unwrap().unwrap();
        assert_eq!(ended.exit_status(), Some(0));
    }
}
