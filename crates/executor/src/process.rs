//! The last steps, the same for a container's init and for a further process: user, limits,
//! capabilities, command, execve.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use stave_paths::Root;
use stave_supervisor_proto::v1::Process;
use stave_supervisor_proto::v1::failure::Kind;

use crate::Stdio;
use crate::capabilities::{SYS_ADMIN, Sets};
use crate::control;
use crate::error::{Context, EXEC, Error, Result};
use crate::label::{self, Labels};
use crate::user::{self, Identity};

/// PATH of a process that has none, as execvp(3) of glibc takes it.
const DEFAULT_PATH: &str = "/bin:/usr/bin";
const DEFAULT_UMASK: u32 = 0o022;

/// What can be checked before anything is made.
pub(crate) fn validate(process: &Process) -> Result<()> {
    let invalid = |message: String| Err(Error::invalid("process", message));
    match process.args.first() {
        None => return invalid("args is empty".to_owned()),
        Some(command) if command.is_empty() => return invalid("args[0] is empty".to_owned()),
        Some(_) => {}
    }
    if let Some(arg) = process.args.iter().find(|a| a.contains('\0')) {
        return invalid(format!("args: NUL in {arg:?}"));
    }
    if let Some(env) = process.env.iter().find(|e| e.contains('\0') || e.find('=').is_none_or(|at| at == 0)) {
        return invalid(format!("env: {env:?} is not NAME=value"));
    }
    if !process.cwd.starts_with('/') {
        return invalid(format!("cwd {:?} is not absolute", process.cwd));
    }
    if !process.seccomp_filter.len().is_multiple_of(8) || process.seccomp_filter.len() / 8 > 4096 {
        return invalid(format!(
            "seccomp_filter of {} bytes is not a BPF program",
            process.seccomp_filter.len()
        ));
    }
    label::validate(process)
}

/// The first steps of a freshly forked child: out of its parent's session, descriptors and signals. All descriptors but
/// those of `stdio` (now 0, 1 and 2) and `keep` are closed, so their owners must be forgotten. Allocates nothing.
pub(crate) fn isolate(stdio: Option<&Stdio>, keep: &[BorrowedFd<'_>]) -> Result<()> {
    isolate_in_session(stdio, keep)?;
    rustix::process::setsid().map(drop).at("process", || "setsid".to_owned())
}

/// As [`isolate`], for a child whose own child makes the session.
pub(crate) fn isolate_in_session(stdio: Option<&Stdio>, keep: &[BorrowedFd<'_>]) -> Result<()> {
    const STAGE: &str = "process";
    // The parent isn't dumpable either; said again in case that changes.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).at(STAGE, || "not dumpable".to_owned())?;
    if let Some(Stdio { stdin, stdout, stderr }) = stdio {
        connect([stdin.as_fd(), stdout.as_fd(), stderr.as_fd()])?;
    }
    stave_sys::close_all_but(keep).at(STAGE, || "close_range".to_owned())?;
    stave_sys::reset_signals().at(STAGE, || "signals".to_owned())?;
    rustix::process::umask(Mode::empty());
    Ok(())
}

/// Makes the descriptors 0, 1 and 2.
pub(crate) fn connect(fds: [BorrowedFd<'_>; 3]) -> Result<()> {
    const STAGE: &str = "stdio";
    // Copies above 2 first: one of the sources may itself be 0, 1 or 2.
    let copy = |fd| rustix::io::fcntl_dupfd_cloexec(fd, 3).at(STAGE, || "fcntl".to_owned());
    let [stdin, stdout, stderr]: [Result<OwnedFd>; 3] = fds.map(copy);
    rustix::stdio::dup2_stdin(stdin?).at(STAGE, || "stdin".to_owned())?;
    rustix::stdio::dup2_stdout(stdout?).at(STAGE, || "stdout".to_owned())?;
    rustix::stdio::dup2_stderr(stderr?).at(STAGE, || "stderr".to_owned())
}

/// A keyring of its own, which the process with its SELinux label can use. Kernels without keys, a used-up quota and a
/// policy against it are no reason to fail. Allocates nothing.
pub(crate) fn own_keyring(process: &Process) {
    let label = &process.selinux_label;
    if !label.is_empty() {
        let _ = OpenOptions::new()
            .write(true)
            .custom_flags(OFlags::CLOEXEC.bits() as i32)
            .open("/proc/thread-self/attr/keycreate")
            .and_then(|mut file| file.write_all(label.as_bytes()));
    }
    let _ = stave_sys::join_session_keyring();
}

/// Who the process is, and what it will run.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) identity: Identity,
    sets: Sets,
    keep: u64,
    labels: Labels,
    path: CString,
    argv: Vec<CString>,
    envp: Vec<CString>,
}

/// Makes the working directory where it is missing.
pub(crate) fn make_cwd(root: &Root, process: &Process) -> Result<()> {
    root.make_dir_all(Path::new(&process.cwd), Mode::from_raw_mode(0o755))
        .map(drop)
        .map_err(|e| Error::path("cwd", format!("{:?}", process.cwd), &e))
}

/// Everything but the wait and execve. `root` is the process's root directory; `tty` becomes the user's; `bounding` is the caller's
/// bounding set, where it is known.
pub(crate) fn prepare(
    root: &Root,
    process: &Process,
    labels: Labels,
    tty: Option<BorrowedFd<'_>>,
    bounding: Option<u64>,
) -> Result<Ready> {
    let identity = user::resolve(root, &process.user.clone().unwrap_or_default())?;
    let (argv, envp) = strings(process, &identity)?;
    for limit in &process.rlimits {
        stave_sys::set_rlimit(limit.resource, limit.soft, limit.hard)
            .at("rlimit", || format!("resource {} to {}:{}", limit.resource, limit.soft, limit.hard))?;
    }
    if let Some(tty) = tty {
        rustix::fs::fchown(tty, Some(Uid::from_raw(identity.uid)), None)
            .at("terminal", || format!("chown to {}", identity.uid))?;
    }
    own_pipes(&identity)?;
    change_directory(root, &process.cwd)?;

    let sets = Sets::new(&process.capabilities.unwrap_or_default(), bounding)?;
    // Without no_new_privs a filter needs CAP_SYS_ADMIN, which is kept up to then and used for nothing else.
    let filtered = !process.seccomp_filter.is_empty();
    let keep = if filtered && !process.no_new_privileges { SYS_ADMIN } else { 0 };
    sets.drop_bounding()?;
    become_user(&identity)?;
    sets.apply(keep)?;
    // A change of user resets it.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).at("process", || "not dumpable".to_owned())?;
    let path = find_command(&process.args, &envp)?;
    Ok(Ready { identity, sets, keep, labels, path, argv, envp })
}

/// The pipes of stdio become the user's, who could not open /dev/stdout anew otherwise. Other files are
/// somebody else's: the null device is the host's (CVE-2026-88265).
fn own_pipes(identity: &Identity) -> Result<()> {
    for fd in [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()] {
        let stat = rustix::fs::fstat(fd).at("stdio", || "fstat".to_owned())?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Fifo && stat.st_uid != identity.uid {
            rustix::fs::fchown(fd, Some(Uid::from_raw(identity.uid)), None)
                .map_err(unmapped("stdio", format!("chown to {}", identity.uid)))?;
        }
    }
    Ok(())
}

fn strings(process: &Process, identity: &Identity) -> Result<(Vec<CString>, Vec<CString>)> {
    let string = |s: &str| CString::new(s).map_err(|_| Error::invalid("process", format!("NUL in {s:?}")));
    let argv = process.args.iter().map(|s| string(s)).collect::<Result<_>>()?;
    let mut envp: Vec<CString> = process.env.iter().map(|s| string(s)).collect::<Result<_>>()?;
    if !process.env.iter().any(|e| e.starts_with("HOME=")) {
        envp.push(string(&format!("HOME={}", identity.home))?);
    }
    Ok((argv, envp))
}

/// Into `cwd`, and sure to be inside: magic links (/proc/self/fd/N) are refused (CVE-2024-21626).
fn change_directory(root: &Root, cwd: &str) -> Result<()> {
    const STAGE: &str = "cwd";
    let fd = root
        .open_in(Path::new(cwd), OFlags::PATH | OFlags::DIRECTORY)
        .map_err(|e| Error::path(STAGE, format!("{cwd:?}"), &e))?;
    rustix::process::fchdir(&fd).at(STAGE, || format!("{cwd:?}"))?;
    let actual = rustix::process::getcwd(Vec::new()).at(STAGE, || format!("{cwd:?}"))?;
    // The kernel writes "(unreachable)/..." for a directory outside of the root.
    if actual.as_bytes().first() != Some(&b'/') {
        return Err(Error::invalid(STAGE, format!("{cwd:?} is outside of the container")));
    }
    Ok(())
}

/// An error about an id; one that the user namespace does not have is EINVAL.
fn unmapped(stage: &'static str, what: String) -> impl FnOnce(Errno) -> Error {
    move |e| {
        let error = Error::os(stage, what, e);
        if e == Errno::INVAL { error.with_kind(Kind::InvalidArgument) } else { error }
    }
}

fn become_user(identity: &Identity) -> Result<()> {
    const STAGE: &str = "user";
    let groups: Vec<Gid> = identity.groups.iter().map(|g| Gid::from_raw(*g)).collect();
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    rustix::thread::set_keep_capabilities(true).at(STAGE, || "keep capabilities".to_owned())?;
    rustix::thread::set_thread_groups(&groups)
        .map_err(unmapped(STAGE, format!("setgroups {:?}", identity.groups)))?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)
        .map_err(unmapped(STAGE, format!("setresgid {}", identity.gid)))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)
        .map_err(unmapped(STAGE, format!("setresuid {}", identity.uid)))?;
    rustix::thread::set_keep_capabilities(false).at(STAGE, || "keep capabilities".to_owned())
}

/// The file that args\[0] names, as execvp(3) finds it, with the rights of the process's user. The words of its errors are
/// those of runc, which people and scripts look for.
fn find_command(args: &[String], envp: &[CString]) -> Result<CString> {
    let name = args.first().map(String::as_str).unwrap_or_default();
    let candidate = |path: String| -> std::result::Result<CString, Errno> {
        let path = CString::new(path).map_err(|_| Errno::INVAL)?;
        let stat = rustix::fs::stat(&path)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            _ => return Err(Errno::ACCESS),
        }
        rustix::fs::accessat(CWD, &path, Access::EXEC_OK, AtFlags::empty())?;
        Ok(path)
    };
    let refused = |errno: Errno| Error::os(EXEC, format!("{name:?}"), errno).with_kind(Kind::InvalidArgument);
    if name.contains('/') {
        return candidate(name.to_owned()).map_err(|errno| refused(errno).in_lower_case());
    }
    let path = envp.iter().find_map(|e| e.to_str().ok()?.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    let mut denied = None;
    for dir in path.split(':') {
        let dir = if dir.is_empty() { "." } else { dir };
        match candidate(format!("{dir}/{name}")) {
            Ok(found) => return Ok(found),
            Err(errno @ (Errno::ACCESS | Errno::ISDIR)) => denied = Some(errno),
            Err(_) => {}
        }
    }
    if let Some(errno) = denied {
        return Err(refused(errno).in_lower_case());
    }
    Err(Error { message: format!("{name:?}: executable file not found in $PATH"), ..refused(Errno::NOENT) })
}

/// Gives up the last rights and executes the command. Returns only on failure.
pub(crate) fn execute(ready: &Ready, process: &Process) -> Result<Infallible> {
    rustix::process::umask(Mode::from_raw_mode(process.umask.unwrap_or(DEFAULT_UMASK) & 0o777));
    stave_sys::close_range_cloexec(3).at(EXEC, || "close_range".to_owned())?;
    if process.no_new_privileges {
        rustix::thread::set_no_new_privs(true).at(EXEC, || "no_new_privs".to_owned())?;
    }
    ready.labels.write()?;
    // As late as can be: the filter need not allow what we do to get here, only capset and execve.
    if ready.keep != 0 {
        ready.sets.raise(ready.keep)?;
    }
    if !process.seccomp_filter.is_empty() {
        stave_sys::install_seccomp_filter(&process.seccomp_filter, process.seccomp_flags)
            .at("seccomp", || format!("filter with flags {:#x}", process.seccomp_flags))?;
    }
    if ready.keep != 0 {
        ready.sets.drop_kept()?;
    }
    let error = stave_sys::execve(&ready.path, &ready.argv, &ready.envp);
    let kind = match error.raw_os_error() {
        Some(libc::ENOENT | libc::EACCES | libc::ENOEXEC | libc::ENOTDIR | libc::E2BIG | libc::EINVAL) => {
            Kind::InvalidArgument
        }
        _ => Kind::Internal,
    };
    // The file was there a moment ago: what is missing is what it names.
    let hint = if error.raw_os_error() == Some(libc::ENOENT) { " (or its interpreter)" } else { "" };
    Err(Error::os(EXEC, format!("{:?}{hint}", ready.path), error).with_kind(kind).in_lower_case())
}

/// Runs the child's side: what it returns is reported, and the process ends.
pub(crate) fn run_child(control: BorrowedFd<'_>, body: impl FnOnce() -> Result<Infallible>) -> ! {
    // A panic must not unwind into the supervisor's code, of which this process is a copy.
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
    let error = match result {
        Ok(Ok(never)) => match never {},
        Ok(Err(error)) => error,
        Err(_) => Error::new("process", Kind::Internal, "panic before execve"),
    };
    control::send_failed(control, &error);
    stave_sys::exit_now(error.exit_code().unwrap_or(crate::FAILED))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process() -> Process {
        Process { args: vec!["sh".into()], env: vec!["A=b=c".into()], cwd: "/".into(), ..Process::default() }
    }

    #[test]
    fn bad_processes_are_refused() {
        validate(&process()).unwrap();
        let table = [
            (Process { args: vec![], ..process() }, "args is empty"),
            (Process { args: vec![String::new()], ..process() }, "args[0] is empty"),
            (Process { args: vec!["a\0b".into()], ..process() }, "NUL"),
            (Process { env: vec!["A".into()], ..process() }, "NAME=value"),
            (Process { env: vec!["=A".into()], ..process() }, "NAME=value"),
            (Process { cwd: "tmp".into(), ..process() }, "not absolute"),
            (Process { cwd: String::new(), ..process() }, "not absolute"),
            (Process { seccomp_filter: vec![0; 12], ..process() }, "not a BPF program"),
            (Process { seccomp_filter: vec![0; 8 * 4097], ..process() }, "not a BPF program"),
        ];
        for (process, wanted) in table {
            let error = validate(&process).unwrap_err();
            assert!(error.message.contains(wanted), "{error}");
            assert_eq!(error.kind, Kind::InvalidArgument);
        }
    }

    #[test]
    fn commands_are_found_as_execvp_does() {
        let try_find = |name: &str, env: &[&str]| {
            let envp: Vec<CString> = env.iter().map(|e| CString::new(*e).unwrap()).collect();
            find_command(&[name.to_owned()], &envp)
        };
        let find = |name: &str, env: &[&str]| try_find(name, env).map_err(|e| e.message);
        assert_eq!(find("sh", &["PATH=/nonexistent:/bin"]).unwrap().to_str(), Ok("/bin/sh"));
        assert_eq!(find("sh", &[]).unwrap().to_str(), Ok("/bin/sh"));
        assert_eq!(find("/bin/sh", &["PATH="]).unwrap().to_str(), Ok("/bin/sh"));
        assert_eq!(find("nope", &[]).unwrap_err(), "\"nope\": executable file not found in $PATH");
        assert_eq!(find("/nope", &[]).unwrap_err(), "\"/nope\": no such file or directory");
        assert_eq!(find("passwd", &["PATH=/etc"]).unwrap_err(), "\"passwd\": permission denied");
        assert_eq!(find("/etc", &[]).unwrap_err(), "\"/etc\": is a directory");
        // As a shell has them.
        let code = |name: &str| try_find(name, &["PATH=/etc"]).unwrap_err().exit_code();
        assert_eq!(["nope", "/nope", "passwd", "/etc"].map(code), [127, 127, 126, 126].map(Some));
        assert_eq!(Error::os("mount", "/nope", Errno::NOENT).exit_code(), None);
    }
}
