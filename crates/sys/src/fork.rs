//! clone3(2), used as a fork.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags, openat};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{WaitId, WaitIdOptions, waitid};

/// Start in the cgroup2 directory `clone_args.cgroup`. The libc constant is a 32-bit integer and
/// becomes 0 when it is cast.
pub const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Flags that [`fork`] accepts: namespaces only. Nothing that shares memory, descriptors or threads.
const NAMESPACE_FLAGS: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWUSER) as u64;

/// What [`fork`] makes.
#[derive(Debug, Clone, Copy, Default)]
pub struct ForkArgs<'a> {
    /// `CLONE_NEW*` of clone(2).
    pub namespaces: u64,
    /// The cgroup2 directory to start in; needs no migration, and so no wait for an RCU grace period. Kernels before
    /// Linux 5.7 can't, and there the new process moves before this returns.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// The new process becomes a child of the caller's parent (CLONE_PARENT), with its exit signal.
    pub sibling: bool,
}

/// Which of the two processes this is.
#[derive(Debug)]
pub enum Fork {
    /// The caller (not the new process's parent, for a sibling).
    Parent {
        /// Pid of the child in the caller's PID namespace.
        pid: i32,
        /// Close-on-exec.
        pidfd: OwnedFd,
    },
    /// The new process.
    Child,
}

/// Layout of `struct clone_args`, CLONE_ARGS_SIZE_VER2 (Linux 5.7).
#[repr(C)]
#[derive(Default)]
pub(crate) struct CloneArgs {
    pub(crate) flags: u64,
    pub(crate) pidfd: u64,
    pub(crate) child_tid: u64,
    pub(crate) parent_tid: u64,
    pub(crate) exit_signal: u64,
    pub(crate) stack: u64,
    pub(crate) stack_size: u64,
    pub(crate) tls: u64,
    pub(crate) set_tid: u64,
    pub(crate) set_tid_size: u64,
    pub(crate) cgroup: u64,
}

/// Forks with clone3(2). Both processes return from it.
///
/// In a process with several threads, a lock that another thread holds (malloc's, say) would stay
/// locked in the child for ever, so such a caller gets an error.
pub fn fork(args: &ForkArgs<'_>) -> io::Result<Fork> {
    // Changes nothing, and fails in a process with several threads (unshare(2)).
    // SAFETY: no memory is passed.
    if unsafe { libc::unshare(libc::CLONE_THREAD) } != 0 {
        return Err(io::Error::other("fork: the process has several threads"));
    }
    if args.namespaces & !NAMESPACE_FLAGS != 0 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    match (clone(args, args.cgroup), args.cgroup) {
        (Err(error), Some(cgroup)) if lacks_into_cgroup(&error) => fork_and_move(args, cgroup),
        (result, _) => result,
    }
}

/// What clone3 says of CLONE_INTO_CGROUP before Linux 5.7: its argument is longer than the kernel knows, or a flag is unknown.
pub(crate) fn lacks_into_cgroup(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::E2BIG | libc::EINVAL))
}

/// The file through which a process moves into the cgroup2 directory `cgroup`, by writing "0".
pub(crate) fn entrance(cgroup: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    Ok(openat(cgroup, c"cgroup.procs", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?)
}

/// As [`fork`] into a cgroup, without CLONE_INTO_CGROUP. The file is opened here, since a new user namespace takes the right to.
fn fork_and_move(args: &ForkArgs<'_>, cgroup: BorrowedFd<'_>) -> io::Result<Fork> {
    let entrance = entrance(cgroup)?;
    let (read, status) = pipe_with(PipeFlags::CLOEXEC)?;
    match clone(args, None)? {
        Fork::Child => match rustix::io::write(&entrance, b"0") {
            Ok(_) => Ok(Fork::Child),
            Err(errno) => {
                let _ = rustix::io::write(&status, &errno.raw_os_error().to_ne_bytes());
                // SAFETY: ends this process, which has run nothing of its caller's.
                unsafe { libc::_exit(127) }
            }
        },
        Fork::Parent { pid, pidfd } => {
            drop(status);
            let mut errno = Vec::with_capacity(4);
            File::from(read).read_to_end(&mut errno)?;
            if errno.is_empty() {
                return Ok(Fork::Parent { pid, pidfd });
            }
            // A sibling is not ours to reap.
            let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
            let errno = errno.as_slice().try_into().map_or(libc::EIO, i32::from_ne_bytes);
            Err(io::Error::from_raw_os_error(errno))
        }
    }
}

/// clone3 with these arguments, but for the cgroup, which is `cgroup`. Only for processes with one thread.
fn clone(args: &ForkArgs<'_>, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Fork> {
    let mut pidfd: i32 = -1;
    let clone = CloneArgs {
        flags: args.namespaces
            | libc::CLONE_PIDFD as u64
            | if cgroup.is_some() { CLONE_INTO_CGROUP } else { 0 }
            | if args.sibling { libc::CLONE_PARENT as u64 } else { 0 },
        pidfd: &raw mut pidfd as u64,
        // clone3 refuses one together with CLONE_PARENT.
        exit_signal: if args.sibling { 0 } else { libc::SIGCHLD as u64 },
        cgroup: cgroup.map_or(0, |fd| fd.as_raw_fd() as u64),
        ..CloneArgs::default()
    };
    // SAFETY: no CLONE_VM, so the child has a copy of everything, and the process has one thread
    // (the callers check), so the copy is consistent. `pidfd` outlives the call.
    match unsafe { clone3(&clone) } {
        0 => Ok(Fork::Child),
        pid if pid > 0 => {
            // SAFETY: the kernel wrote a new descriptor that nobody else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Fork::Parent { pid: pid as i32, pidfd })
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// # Safety
/// As for fork(2): with several threads the child may only make async-signal-safe calls. All
/// addresses in `args` must be valid.
pub(crate) unsafe fn clone3(args: &CloneArgs) -> libc::c_long {
    // SAFETY: the structure has the size that is passed; the rest is the caller's promise.
    unsafe { libc::syscall(libc::SYS_clone3, std::ptr::from_ref(args), size_of::<CloneArgs>()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_with_several_threads() {
        // The test harness itself is a second thread.
        let error = fork(&ForkArgs::default()).unwrap_err();
        assert!(error.to_string().contains("several threads"), "{error}");
    }

    /// The cgroup of a process that the fallback makes, and what it says of a directory that is no cgroup.
    #[test]
    fn without_into_cgroup_the_process_moves_by_itself() {
        let error = io::Error::from_raw_os_error;
        assert!(lacks_into_cgroup(&error(libc::E2BIG)) && lacks_into_cgroup(&error(libc::EINVAL)));
        assert!(!lacks_into_cgroup(&error(libc::EBUSY)) && !lacks_into_cgroup(&error(libc::EAGAIN)));
        let cgroup = crate::test_cgroup::TestCgroup::new("fork");
        let directory = cgroup.open();
        let elsewhere = File::open("/proc").unwrap();
        // The harness has threads, a fork of it has one. It must not allocate much, nor panic.
        // SAFETY: the child only forks once more, reads a file and ends.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let args = ForkArgs::default();
            let status = match fork_and_move(&args, directory.as_fd()) {
                Ok(Fork::Child) => i32::from(!cgroup.holds_this_process()),
                Ok(Fork::Parent { pidfd, .. }) => {
                    let end = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED).ok().flatten();
                    let moved = end.and_then(|status| status.exit_status()) == Some(0);
                    let stayed = !cgroup.holds_this_process();
                    let refused = fork_and_move(&args, elsewhere.as_fd())
                        .is_err_and(|e| e.raw_os_error() == Some(libc::ENOENT));
                    i32::from(!moved) | i32::from(!stayed) << 1 | i32::from(!refused) << 2
                }
                Err(_) => 8,
            };
            // SAFETY: ends the child.
            unsafe { libc::_exit(status) }
        }
        let mut status = 0;
        // SAFETY: our own child, and a place for its status.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
        assert_eq!(
            libc::WEXITSTATUS(status),
            0,
            "bits: not moved, moved the parent, went on elsewhere, failed"
        );
    }

    #[test]
    fn constant_is_not_truncated() {
        assert_eq!(CLONE_INTO_CGROUP, 1 << 33);
        assert_eq!(size_of::<CloneArgs>(), 88);
    }
}
