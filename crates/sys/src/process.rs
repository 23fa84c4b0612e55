//! What a process changes about itself on its way to execve.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use libc::{c_int, c_uint};

fn check(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Ends the process at once: no destructors, no flushing of buffers that a fork has copied.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: _exit(2) has no precondition and does not return.
    unsafe { libc::_exit(status) }
}

/// Sends any signal by pidfd (pidfd_send_signal(2)); rustix knows only the named ones.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: no siginfo is passed, the other arguments are integers.
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            ptr::null::<libc::siginfo_t>(),
            0 as c_uint,
        )
    })
}

/// Closes all descriptors from 3 on, but those given. For a freshly forked child only: values that
/// own a descriptor elsewhere in the program are left dangling, so they must not be used or dropped.
pub fn close_all_but(keep: &[BorrowedFd<'_>]) -> io::Result<()> {
    // In order without sorting, as nothing may be allocated here: see `help`.
    let next = |first: c_uint| keep.iter().map(|fd| fd.as_raw_fd() as c_uint).filter(|fd| *fd >= first).min();
    let mut first = 3;
    while let Some(fd) = next(first) {
        if first < fd {
            close_range(first, fd - 1, 0)?;
        }
        first = fd + 1;
    }
    close_range(first, c_uint::MAX, 0)
}

/// Closes all descriptors, stdio too. As for [`close_all_but`], for a forked child only.
pub fn close_all() -> io::Result<()> {
    close_range(0, c_uint::MAX, 0)
}

/// Marks all descriptors from `first` on close-on-exec.
pub fn close_range_cloexec(first: u32) -> io::Result<()> {
    close_range(first, c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as c_uint)
}

fn close_range(first: c_uint, last: c_uint, flags: c_uint) -> io::Result<()> {
    // SAFETY: no memory is passed. What closing means for their owners is told at the callers.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) })
}

/// All signals to their default disposition, none blocked. (Rust programs ignore SIGPIPE, and what
/// is ignored stays so over execve.)
pub fn reset_signals() -> io::Result<()> {
    // SAFETY: async-signal-safe system calls on local memory.
    let result = unsafe { reset_signals_raw() };
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

/// Signals whose disposition [`reset_signals`] has to change, as bits from 0 for signal 1 on.
static NOT_DEFAULT: AtomicU64 = AtomicU64::new(u64::MAX);

/// Notes which signals are not at their default disposition, so that [`reset_signals`] need not ask the kernel for each
/// of the others, here and in children. No disposition may be changed after that.
pub fn note_signals() {
    let mut found = 0;
    for signal in 1..=64 {
        let mut action = [0_u64; 8];
        // SAFETY: the buffer is at least as large as the kernel's structure on any architecture.
        let result = unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, ptr::null::<u64>(), action.as_mut_ptr(), 8_usize)
        };
        // The first member is the handler, on all architectures but MIPS; where in doubt it is reset.
        if result != 0 || action != [0; 8] {
            found |= 1 << (signal - 1);
        }
    }
    NOT_DEFAULT.store(found, Ordering::Relaxed);
}

/// Returns 0 or an errno. Async-signal-safe.
///
/// # Safety
/// Handlers must not be relied upon any more by this process.
pub(crate) unsafe fn reset_signals_raw() -> c_int {
    // The kernel's struct sigaction (not libc's), all zero: SIG_DFL, no flags, empty mask.
    let default = [0_u64; 8];
    let changed = NOT_DEFAULT.load(Ordering::Relaxed);
    for signal in (1..=64).filter(|signal| changed & (1 << (signal - 1)) != 0) {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        // SAFETY: the buffer is at least as large as the kernel's structure on any architecture.
        let result = unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), ptr::null::<u64>(), 8_usize)
        };
        if result != 0 {
            // SAFETY: errno of this thread.
            return unsafe { *libc::__errno_location() };
        }
    }
    // SAFETY: as above; an empty signal set of 8 bytes.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            default.as_ptr(),
            ptr::null::<u64>(),
            8_usize,
        )
    };
    // SAFETY: errno of this thread.
    if result == 0 { 0 } else { unsafe { *libc::__errno_location() } }
}

/// A new anonymous session keyring, so that the process doesn't hold its parent's keys (keyctl(2)).
pub fn join_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: c_int = 1;
    // SAFETY: a null name is allowed: anonymous.
    let result =
        unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, ptr::null::<libc::c_char>()) };
    if result >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes a terminal the controlling one of the session that the caller leads (TIOCSCTTY).
pub fn make_controlling_terminal(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the argument is an integer.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) }.into())
}

/// Sets RLIMIT_* `resource`; where the hard limit may not be raised (no CAP_SYS_RESOURCE), the soft
/// one is raised as far as it goes. Returns whether both were set as given.
pub fn set_rlimit(resource: u32, soft: u64, hard: u64) -> io::Result<bool> {
    let prlimit = |new: *const libc::rlimit64, old: *mut libc::rlimit64| {
        // SAFETY: each pointer is null or valid for the call.
        check(unsafe { libc::syscall(libc::SYS_prlimit64, 0, resource, new, old) })
    };
    let wanted = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    match prlimit(&raw const wanted, ptr::null_mut()) {
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => {}
        other => return other.map(|()| true),
    }
    let mut now = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    prlimit(ptr::null(), &raw mut now)?;
    let clamped = libc::rlimit64 { rlim_cur: soft.min(now.rlim_max), rlim_max: hard.min(now.rlim_max) };
    prlimit(&raw const clamped, ptr::null_mut())?;
    Ok(false)
}

/// Installs a classic BPF program, `struct sock_filter[]` in memory order, as seccomp filter
/// (seccomp(2)). `flags`: SECCOMP_FILTER_FLAG_…; those that make a descriptor are invalid. Needs no_new_privs or
/// CAP_SYS_ADMIN.
pub fn install_seccomp_filter(program: &[u8], flags: u32) -> io::Result<()> {
    const SECCOMP_SET_MODE_FILTER: c_uint = 1;
    /// LOG and SPEC_ALLOW; TSYNC and the flags of listeners change what the call returns.
    const FLAGS: u32 = 2 | 4;
    let (instructions, rest) = program.as_chunks::<8>();
    let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
    if !rest.is_empty() || instructions.is_empty() || flags & !FLAGS != 0 {
        return Err(invalid());
    }
    let len = u16::try_from(instructions.len()).map_err(|_| invalid())?;
    let mut filter: Vec<libc::sock_filter> = instructions
        .iter()
        .map(|[c0, c1, jt, jf, k @ ..]| libc::sock_filter {
            code: u16::from_ne_bytes([*c0, *c1]),
            jt: *jt,
            jf: *jf,
            k: u32::from_ne_bytes(*k),
        })
        .collect();
    let prog = libc::sock_fprog { len, filter: filter.as_mut_ptr() };
    // SAFETY: `prog` and the instructions it points to are valid for the call.
    check(unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &raw const prog) })
}

/// execve(2); returns only on failure.
pub fn execve(path: &CStr, argv: &[CString], envp: &[CString]) -> io::Error {
    let (argv, envp) = (pointers(argv), pointers(envp));
    // SAFETY: the arrays end with a null pointer and their strings live through the call.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    io::Error::last_os_error()
}

/// The array of pointers that execve takes.
pub(crate) fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ragged_filter_is_invalid() {
        for program in [&[][..], &[0; 7], &[0; 9], &vec![0; 8 * 65536]] {
            assert_eq!(install_seccomp_filter(program, 0).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        }
    }

    #[test]
    fn an_unknown_resource_is_invalid() {
        assert_eq!(set_rlimit(9999, 1, 1).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn a_rlimit_is_set_or_clamped() {
        // RLIMIT_CORE of the test process: nothing depends on it.
        assert!(set_rlimit(libc::RLIMIT_CORE, 0, 4096).unwrap());
        let raised = set_rlimit(libc::RLIMIT_CORE, 8192, 8192).unwrap();
        let mut now = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `now` is valid for the call.
        unsafe { libc::getrlimit64(libc::RLIMIT_CORE, &raw mut now) };
        assert_eq!(now.rlim_cur, if raised { 8192 } else { 4096 });
    }
}
