//! Starts a program from a process with many threads, straight into its cgroup.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_int, c_void};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{WaitId, WaitIdOptions, waitid};

use crate::fork::{CLONE_INTO_CGROUP, CloneArgs, clone3, entrance, lacks_into_cgroup};
use crate::process::{pointers, reset_signals_raw};
use crate::stack::Stack;

/// What [`spawn`] starts.
#[derive(Debug)]
pub struct SpawnArgs<'a> {
    /// The program, such as [`crate::sealed_copy`] returns it.
    pub exe: BorrowedFd<'a>,
    /// argv, `argv[0]` included.
    pub argv: &'a [CString],
    /// The whole environment, "NAME=value".
    pub envp: &'a [CString],
    /// Descriptor 0.
    pub stdin: BorrowedFd<'a>,
    /// Descriptor 1.
    pub stdout: BorrowedFd<'a>,
    /// Descriptor 2.
    pub stderr: BorrowedFd<'a>,
    /// Become descriptors 3, 4, ... in this order.
    pub extra: &'a [BorrowedFd<'a>],
    /// A cgroup2 directory to start in. Where the kernel can't (before Linux 5.7), the process moves before execve.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// Starts a program in a session of its own and returns its pid (to be shown, never to be
/// signalled) and a pidfd once execve has succeeded. In it all other descriptors are closed, and
/// signal mask and dispositions are the default. Safe in a process with many threads. Without a cgroup it is a
/// vfork(2): no page table is copied, and no page faults that this program writes to next.
pub fn spawn(args: &SpawnArgs<'_>) -> io::Result<(i32, OwnedFd)> {
    match spawn_by(args, None) {
        Err(error) if args.cgroup.is_some() && lacks_into_cgroup(&error) => spawn_and_move(args),
        result => result,
    }
}

/// As [`spawn`], and an error when the kernel has no CLONE_INTO_CGROUP.
pub fn spawn_into_cgroup(args: &SpawnArgs<'_>) -> io::Result<(i32, OwnedFd)> {
    spawn_by(args, None)
}

/// As [`spawn`], without CLONE_INTO_CGROUP.
fn spawn_and_move(args: &SpawnArgs<'_>) -> io::Result<(i32, OwnedFd)> {
    let entrance = args.cgroup.map(entrance).transpose()?;
    spawn_by(&SpawnArgs { cgroup: None, ..*args }, entrance)
}

/// `entrance`: where the child writes "0", to move.
fn spawn_by(args: &SpawnArgs<'_>, entrance: Option<OwnedFd>) -> io::Result<(i32, OwnedFd)> {
    // Everything that the child needs is made before the clone: it may not allocate.
    let argv = pointers(args.argv);
    let envp = pointers(args.envp);
    let wanted: Vec<BorrowedFd<'_>> =
        [args.stdin, args.stdout, args.stderr].into_iter().chain(args.extra.iter().copied()).collect();
    let count = wanted.len() as c_int;
    // Copies above the range of the final numbers, so that no dup3 overwrites a source.
    let lift = |fd: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, count + 2);
    let sources = wanted.into_iter().map(lift).collect::<Result<Vec<OwnedFd>, _>>()?;
    let exe = lift(args.exe)?;
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    let status = lift(std::os::fd::AsFd::as_fd(&write))?;
    drop(write);
    let entrance = entrance.as_ref().map(|fd| lift(std::os::fd::AsFd::as_fd(fd))).transpose()?;
    let source_numbers: Vec<RawFd> = sources.iter().map(AsRawFd::as_raw_fd).collect();
    let start = Start {
        sources: &source_numbers,
        exe: exe.as_raw_fd(),
        status: status.as_raw_fd(),
        entrance: entrance.as_ref().map_or(-1, AsRawFd::as_raw_fd),
        argv: &argv,
        envp: &envp,
    };
    let stack = Stack::new()?;

    let mut pidfd: i32 = -1;
    // Blocked over the clone, so that no handler of this program runs in the child.
    let old_mask = block_all_signals()?;
    let pid = match args.cgroup {
        // SAFETY: see `vfork`: all is prepared above, and outlives the wait.
        None => i64::from(unsafe { vfork(&start, &stack, &mut pidfd) }),
        Some(cgroup) => {
            let clone = CloneArgs {
                flags: libc::CLONE_PIDFD as u64 | CLONE_INTO_CGROUP,
                pidfd: &raw mut pidfd as u64,
                exit_signal: libc::SIGCHLD as u64,
                cgroup: cgroup.as_raw_fd() as u64,
                ..CloneArgs::default()
            };
            // SAFETY: no CLONE_VM; the child only runs `child`, which makes system calls on memory prepared
            // above and never returns.
            let pid = unsafe { clone3(&clone) };
            if pid == 0 {
                // SAFETY: we are the child; the descriptors and arrays are those prepared above.
                unsafe { child(&start) }
            }
            pid
        }
    };
    let failed = (pid < 0).then(io::Error::last_os_error);
    restore_signals(&old_mask);
    if let Some(error) = failed {
        return Err(error);
    }
    // SAFETY: the kernel wrote a new descriptor that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    drop(status);
    let mut errno = Vec::with_capacity(4);
    File::from(read).read_to_end(&mut errno)?;
    if errno.is_empty() {
        return Ok((pid as i32, pidfd));
    }
    waitid(WaitId::PidFd(std::os::fd::AsFd::as_fd(&pidfd)), WaitIdOptions::EXITED)?;
    let errno = errno.as_slice().try_into().map_or(libc::EIO, i32::from_ne_bytes);
    Err(io::Error::from_raw_os_error(errno))
}

/// What the child works on, all of it the parent's.
struct Start<'a> {
    sources: &'a [RawFd],
    exe: RawFd,
    status: RawFd,
    /// Where to write "0", or -1.
    entrance: RawFd,
    argv: &'a [*const libc::c_char],
    envp: &'a [*const libc::c_char],
}

/// Clones a child that runs [`child`] on the parent's memory and `stack`, and waits until it executes a program or ends.
///
/// # Safety
/// As [`child`]. All signals are blocked.
unsafe fn vfork(start: &Start<'_>, stack: &Stack, pidfd: &mut c_int) -> c_int {
    extern "C" fn run(start: *mut c_void) -> c_int {
        // SAFETY: it is the `start` of a thread that waits meanwhile, and we are its child.
        unsafe { child(&*start.cast::<Start<'_>>()) }
    }
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    let argument = std::ptr::from_ref(start).cast_mut().cast::<c_void>();
    // SAFETY: a stack that nobody else uses and that outlives the child's use of it, as do `start` and `pidfd`: with
    // CLONE_VFORK this thread goes on when the child has left this memory. Other threads run on, and share nothing with
    // it but what the kernel guards: it makes system calls, and its errno is that of this thread, which waits.
    unsafe { libc::clone(run, stack.top(), flags, argument, std::ptr::from_mut(pidfd)) }
}

/// # Safety
/// Only in a child whose parent's thread waits, or that shares no memory. `argv` and `envp` end with a null pointer.
unsafe fn child(start: &Start<'_>) -> ! {
    let Start { sources, exe, status, entrance, argv, envp } = *start;
    // SAFETY: async-signal-safe system calls only; all memory was prepared by the parent.
    unsafe {
        let errno = 'failed: {
            if entrance >= 0 && libc::write(entrance, c"0".as_ptr().cast(), 1) < 0 {
                break 'failed *libc::__errno_location();
            }
            let mut target = 0;
            for source in sources {
                if libc::syscall(libc::SYS_dup3, *source, target, 0) < 0 {
                    break 'failed *libc::__errno_location();
                }
                target += 1;
            }
            let cloexec = libc::CLOSE_RANGE_CLOEXEC as libc::c_uint;
            if libc::syscall(libc::SYS_close_range, target as libc::c_uint, libc::c_uint::MAX, cloexec) != 0 {
                break 'failed *libc::__errno_location();
            }
            if libc::syscall(libc::SYS_setsid) < 0 {
                break 'failed *libc::__errno_location();
            }
            let errno = reset_signals_raw();
            if errno != 0 {
                break 'failed errno;
            }
            libc::syscall(
                libc::SYS_execveat,
                exe,
                c"".as_ptr(),
                argv.as_ptr(),
                envp.as_ptr(),
                libc::AT_EMPTY_PATH,
            );
            *libc::__errno_location()
        };
        libc::syscall(libc::SYS_write, status, (&raw const errno).cast::<u8>(), 4_usize);
        libc::_exit(127)
    }
}

pub(crate) fn block_all_signals() -> io::Result<libc::sigset_t> {
    // SAFETY: both sets are valid memory; sigfillset initialises the first, the call the second.
    unsafe {
        let mut all = std::mem::zeroed();
        let mut old = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        match libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old) {
            0 => Ok(old),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

pub(crate) fn restore_signals(old: &libc::sigset_t) {
    // SAFETY: a set that pthread_sigmask returned; it can't fail with it.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, std::ptr::from_ref(old), std::ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::path::Path;

    type Spawn = fn(&SpawnArgs<'_>) -> io::Result<(i32, OwnedFd)>;

    fn run(script: &str, extra: &[BorrowedFd<'_>], cgroup: Option<BorrowedFd<'_>>) -> (i32, String) {
        run_by(spawn, script, extra, cgroup)
    }

    fn run_by(
        spawn: Spawn,
        script: &str,
        extra: &[BorrowedFd<'_>],
        cgroup: Option<BorrowedFd<'_>>,
    ) -> (i32, String) {
        let exe = crate::sealed_copy(Path::new("/bin/busybox")).unwrap();
        let argv = ["sh", "-c", script].map(|s| CString::new(s).unwrap());
        let envp = [CString::new("A=b").unwrap()];
        let null = File::open("/dev/null").unwrap();
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let args = SpawnArgs {
            exe: exe.as_fd(),
            argv: &argv,
            envp: &envp,
            stdin: null.as_fd(),
            stdout: write.as_fd(),
            stderr: write.as_fd(),
            extra,
            cgroup,
        };
        let (pid, pidfd) = spawn(&args).unwrap();
        drop(write);
        let mut output = String::new();
        File::from(read).read_to_string(&mut output).unwrap();
        let status = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED).unwrap().unwrap();
        assert_eq!(status.exit_status(), Some(0), "{output}");
        (pid, output)
    }

    #[test]
    fn descriptors_environment_session_and_signals() {
        let extra = File::open("/proc/version").unwrap();
        let (pid, output) = run(
            "echo $A; read x <&3; echo $x; ls /proc/$$/fd; cut -d' ' -f6 /proc/$$/stat; grep -E 'SigIgn|SigBlk' /proc/$$/status",
            &[extra.as_fd()],
            None,
        );
        let lines: Vec<&str> = output.lines().collect();
        assert_eq!(lines[0], "b");
        assert!(lines[1].starts_with("Linux version"), "{output}");
        assert_eq!(lines[2..6], ["0", "1", "2", "3"], "{output}");
        assert_eq!(lines[6], pid.to_string());
        assert_eq!(lines[7].split_whitespace().nth(1), Some("0000000000000000"));
        // The shell ignores SIGQUIT by itself; SIGPIPE is what Rust programs ignore.
        let ignored = u64::from_str_radix(lines[8].split_whitespace().nth(1).unwrap(), 16).unwrap();
        assert_eq!(ignored & (1 << (libc::SIGPIPE - 1)), 0, "{output}");
    }

    #[test]
    fn starts_in_the_cgroup() {
        for spawn in [spawn, spawn_into_cgroup, spawn_and_move] {
            let cgroup = crate::test_cgroup::TestCgroup::new("spawn");
            let fd = cgroup.open();
            let output = run_by(spawn, "cat /proc/self/cgroup", &[], Some(fd.as_fd())).1;
            assert!(output.lines().any(|l| l == format!("0::/{}", cgroup.name())), "{output}");
        }
    }

    #[test]
    fn a_cgroup_that_can_not_be_entered_is_an_error() {
        let exe = crate::sealed_copy(Path::new("/bin/busybox")).unwrap();
        let null = File::open("/dev/null").unwrap();
        let elsewhere = File::open("/proc").unwrap();
        let (fd, argv) = (null.as_fd(), [c"true".to_owned()]);
        let args = SpawnArgs {
            exe: exe.as_fd(),
            argv: &argv,
            envp: &[],
            stdin: fd,
            stdout: fd,
            stderr: fd,
            extra: &[],
            cgroup: Some(elsewhere.as_fd()),
        };
        assert_eq!(spawn(&args).unwrap_err().raw_os_error(), Some(libc::EBADF));
        assert_eq!(spawn_and_move(&args).unwrap_err().raw_os_error(), Some(libc::ENOENT));
        // The child's own write fails, on a file that takes none.
        let full = File::options().write(true).open("/dev/full").unwrap();
        let error = spawn_by(&SpawnArgs { cgroup: None, ..args }, Some(full.into())).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    }

    #[test]
    fn the_error_of_execve_comes_back() {
        let exe = File::open("/proc/version").unwrap();
        let argv = [CString::new("x").unwrap()];
        let fd = exe.as_fd();
        let args = SpawnArgs {
            exe: fd,
            argv: &argv,
            envp: &[],
            stdin: fd,
            stdout: fd,
            stderr: fd,
            extra: &[],
            cgroup: None,
        };
        assert_eq!(spawn(&args).unwrap_err().raw_os_error(), Some(libc::EACCES));
    }
}
