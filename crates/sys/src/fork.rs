//! clone3(2), used as a fork.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

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
    /// The cgroup2 directory to start in (Linux 5.7); needs no migration, and so no wait for an RCU grace period.
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
    let mut pidfd: i32 = -1;
    let clone = CloneArgs {
        flags: args.namespaces
            | libc::CLONE_PIDFD as u64
            | if args.cgroup.is_some() { CLONE_INTO_CGROUP } else { 0 }
            | if args.sibling { libc::CLONE_PARENT as u64 } else { 0 },
        pidfd: &raw mut pidfd as u64,
        // clone3 refuses one together with CLONE_PARENT.
        exit_signal: if args.sibling { 0 } else { libc::SIGCHLD as u64 },
        cgroup: args.cgroup.map_or(0, |fd| fd.as_raw_fd() as u64),
        ..CloneArgs::default()
    };
    // SAFETY: no CLONE_VM, so the child has a copy of everything, and the process has one thread
    // (checked above), so the copy is consistent. `pidfd` outlives the call.
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

    #[test]
    fn constant_is_not_truncated() {
        assert_eq!(CLONE_INTO_CGROUP, 1 << 33);
        assert_eq!(size_of::<CloneArgs>(), 88);
    }
}
