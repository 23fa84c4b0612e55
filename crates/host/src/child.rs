//! The probes that need a process of their own. The program starts itself once more: no code
//! runs between fork and exec, and no external program is needed.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use nix::sched::{CloneFlags, unshare};
use rustix::process::{WaitId, WaitIdOptions, waitid};

/// One argument, so that a program which does not know it refuses it.
const MARKER: &str = "--stave-host-probe=";
const USER_NAMESPACE: &str = "user-namespace";
const IN_CGROUP: &str = "in-cgroup:";
const READY: &str = "user namespace made";

/// Plays the child's part and returns its exit code when this process was started as the child of
/// a probe. Must be the first call in `main`, before any thread is started.
pub fn run_child_if_asked() -> Option<ExitCode> {
    let argument = std::env::args_os().nth(1)?;
    let part = argument.to_str()?.strip_prefix(MARKER)?;
    Some(match part.strip_prefix(IN_CGROUP) {
        Some(name) => is_in_cgroup(name),
        None if part == USER_NAMESPACE => hold_user_namespace(),
        None => ExitCode::FAILURE,
    })
}

/// Whether this process's cgroup2 directory ends in `name`.
fn is_in_cgroup(name: &str) -> ExitCode {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let there = own.lines().any(|line| line.starts_with("0::") && line.ends_with(name));
    if there { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Makes a user namespace and stays in it until the parent closes the pipe.
#[allow(clippy::print_stdout)] // the pipe to the parent
fn hold_user_namespace() -> ExitCode {
    if let Err(errno) = unshare(CloneFlags::CLONE_NEWUSER) {
        println!("{}", errno.desc());
        return ExitCode::FAILURE;
    }
    println!("{READY}");
    let _ = io::stdin().read_to_end(&mut Vec::new());
    ExitCode::SUCCESS
}

/// The host id that a probe's user namespace has as 0.
pub(crate) const FIRST_ID: u32 = 100_000;
const ID_COUNT: u32 = 65_536;

/// A user namespace with its ids from [`FIRST_ID`] on, held by a child until dropped.
pub(crate) struct UserNamespace {
    child: Child,
    /// `/proc/<pid>/ns/user` of the child.
    pub(crate) namespace: File,
}

impl UserNamespace {
    pub(crate) fn new() -> io::Result<Self> {
        let child = Command::new("/proc/self/exe")
            .arg(format!("{MARKER}{USER_NAMESPACE}"))
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut child = KillOnDrop(Some(child));
        let process = child.0.as_mut().ok_or_else(|| io::Error::other("no child"))?;
        let mut answer = String::new();
        if let Some(stdout) = process.stdout.take() {
            BufReader::new(stdout.take(256)).read_line(&mut answer)?;
        }
        if answer.trim_end() != READY {
            return Err(io::Error::other(match answer.trim() {
                "" => "the probe's child process did not answer".to_owned(),
                reason => format!("unshare(CLONE_NEWUSER): {reason}"),
            }));
        }
        let proc = Path::new("/proc").join(process.id().to_string());
        for map in ["uid_map", "gid_map"] {
            fs::write(proc.join(map), format!("0 {FIRST_ID} {ID_COUNT}\n"))
                .map_err(|error| io::Error::new(error.kind(), format!("write {map}: {error}")))?;
        }
        let namespace = File::open(proc.join("ns/user"))?;
        match child.0.take() {
            Some(child) => Ok(Self { child, namespace }),
            None => Err(io::Error::other("no child")),
        }
    }
}

impl Drop for UserNamespace {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

struct KillOnDrop(Option<Child>);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(child) = self.0.as_mut() {
            end(child);
        }
    }
}

fn end(child: &mut Child) {
    drop(child.stdin.take());
    let _ = child.kill();
    let _ = child.wait();
}

/// Starts a child straight into the cgroup2 directory `cgroup` and waits for its end.
pub(crate) fn start_in_cgroup(cgroup: &Path) -> io::Result<()> {
    let name = cgroup.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let argument = CString::new(format!("{MARKER}{IN_CGROUP}{name}"))?;
    let directory = File::open(cgroup)?;
    let exe = File::open("/proc/self/exe")?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let (_, pidfd) = stave_sys::spawn_into_cgroup(&stave_sys::SpawnArgs {
        exe: exe.as_fd(),
        argv: &[c"stave-host-probe".to_owned(), argument],
        envp: &[],
        stdin: null.as_fd(),
        stdout: null.as_fd(),
        stderr: null.as_fd(),
        extra: &[],
        cgroup: Some(directory.as_fd()),
    })?;
    let status = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)?;
    match status.and_then(|status| status.exit_status()) {
        Some(0) => Ok(()),
        _ => Err(io::Error::other("the child started in another cgroup")),
    }
}
