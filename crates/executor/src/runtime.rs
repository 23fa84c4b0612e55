//! The command line of an OCI runtime, and the bundle that its `create` gets.
//!
//! The bundle's mounts are made in a mount namespace of the runtime's own, which ends with its last process: the
//! container has copied from it by then what it needs, and the host's mount table never shows them.

use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MoveMountFlags, mount_bind, move_mount};
use rustix::process::Pid;
use stave_paths::Root;
use stave_supervisor_proto::v1::failure::Kind;
use stave_supervisor_proto::v1::{Identity, OciProcess, Plan};
use stave_sys::{Fork, ForkArgs};

use crate::error::{Context, Error, Result};
use crate::init::fork_in;
use crate::mounts::new_file_system;
use crate::pod_namespaces::{PodNamespaces, UserNamespace};
use crate::{Init, Stdio, control, host_mounts, mounts, process, rootfs, user};

const STAGE: &str = "bundle";
/// The stage of an error when the runtime's program could not be executed.
const EXECVE: &str = "execute";
/// The runtime's whole environment: some look for helpers of theirs.
const PATH: &CStr = c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// One call of an OCI runtime.
#[derive(Debug)]
pub struct RuntimeCommand<'a> {
    /// Absolute path of the program.
    pub program: &'a str,
    /// All arguments after the program's name.
    pub args: &'a [String],
    /// Its working directory.
    pub dir: &'a Path,
    /// Where the bundle's root file system and volumes are instead of in its directory: covered by a tmpfs in the mount
    /// namespace of each call, since runtimes want the root's path to be there in later calls, too.
    pub stage_dir: Option<&'a Path>,
    /// Its standard streams, which `create` and `exec` hand on to the container.
    pub stdio: Stdio,
}

/// The bundle that is made ready before the runtime's program is executed.
#[derive(Debug)]
pub struct Bundle<'a> {
    /// What to run.
    pub plan: &'a Plan,
    /// The bundle's directory.
    pub dir: &'a Path,
    /// config.json.
    pub config: &'a OciProcess,
    /// The PID namespace for `ns/pid`.
    pub pid_ns: Option<BorrowedFd<'a>>,
}

/// Starts an OCI runtime, as a child that ends with the caller. With a bundle [`Report::Staged`](crate::Report::Staged)
/// comes first. [`Report::ExecDone`](crate::Report::ExecDone): the runtime runs. The caller must be single-threaded.
/// `pod`: the user and time namespaces for `ns/user` and `ns/time`; the runtime itself is in neither.
pub fn runtime(
    command: RuntimeCommand<'_>,
    bundle: Option<&Bundle<'_>>,
    pod: &PodNamespaces,
) -> Result<Init> {
    let invalid = |what: &str| Error::invalid("plan", format!("NUL in {what}"));
    let program = CString::new(command.program).map_err(|_| invalid("the runtime's path"))?;
    let mut argv = vec![program.clone()];
    for arg in command.args {
        argv.push(CString::new(arg.as_str()).map_err(|_| invalid("the runtime's arguments"))?);
    }
    if let Some(bundle) = bundle {
        validate(bundle.plan)?;
    }
    let (ours, theirs) = control::pair()?;
    let caller = rustix::process::getpid();
    match fork_in(None, &ForkArgs::default())? {
        Fork::Parent { pid, pidfd } => Ok(Init { pid, pidfd, control: Some(ours) }),
        Fork::Child => process::run_child(theirs.as_fd(), || {
            run(&program, &argv, command, bundle, pod, theirs.as_fd(), caller)
        }),
    }
}

/// A runtime that outlived its supervisor would have nobody who waits for what it makes.
fn end_with(parent: Pid) -> Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .at(STAGE, || "PR_SET_PDEATHSIG".to_owned())?;
    // One that ended before that sends no signal.
    if rustix::process::getppid() != Some(parent) {
        return Err(Error::new(STAGE, Kind::Internal, "the supervisor has ended"));
    }
    Ok(())
}

fn validate(plan: &Plan) -> Result<()> {
    let missing = |field: &str| Error::invalid("plan", format!("{field} is missing"));
    process::validate(plan.process.as_ref().ok_or_else(|| missing("process"))?)?;
    rootfs::validate(plan.root.as_ref().ok_or_else(|| missing("root"))?)?;
    mounts::validate(&plan.mounts)
}

fn run(
    program: &CStr,
    argv: &[CString],
    command: RuntimeCommand<'_>,
    bundle: Option<&Bundle<'_>>,
    pod: &PodNamespaces,
    control: BorrowedFd<'_>,
    supervisor: Pid,
) -> Result<Infallible> {
    let RuntimeCommand { dir, stage_dir, stdio, .. } = command;
    let namespaces = [bundle.and_then(|bundle| bundle.pid_ns), pod.user_fd(), pod.time_fd()];
    let keep: Vec<BorrowedFd<'_>> =
        std::iter::once(control).chain(namespaces.into_iter().flatten()).collect();
    process::isolate(Some(&stdio), &keep)?;
    // Its descriptors are closed already.
    std::mem::forget(stdio);
    if let Some(user) = &pod.user {
        user.own_pipes()?;
    }
    if let Some(bundle) = bundle {
        let identity = stage(bundle, stage_dir, pod)?;
        control::send_staged(control, &identity)?;
    } else if let Some(stage_dir) = stage_dir {
        unshare(CloneFlags::CLONE_NEWNS).at(STAGE, || "unshare mount namespace".to_owned())?;
        rootfs::leave_host_propagation()?;
        cover(stage_dir)?;
        make_dir(&stage_dir.join("rootfs"))?;
    }
    end_with(supervisor)?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    rustix::process::chdir(dir).at(STAGE, || format!("chdir {dir:?}"))?;
    stave_sys::close_range_cloexec(3).at(STAGE, || "close_range".to_owned())?;
    let error = stave_sys::execve(program, argv, &[PATH.to_owned()]);
    Err(Error::os(EXECVE, format!("{program:?}"), error).with_kind(Kind::FailedPrecondition))
}

/// Everything that the bundle needs. The caller's mount namespace is the host's.
fn stage(bundle: &Bundle<'_>, stage_dir: Option<&Path>, pod: &PodNamespaces) -> Result<Identity> {
    let Bundle { plan, dir, config, pid_ns } = bundle;
    let user = pod.user.as_ref();
    unshare(CloneFlags::CLONE_NEWNS).at(STAGE, || "unshare mount namespace".to_owned())?;
    // Before the tree is cut off the host: only then can a copy be a peer of the host's (bidirectional propagation).
    let mut sources = mounts::open_sources(plan, user)?;
    rootfs::leave_host_propagation()?;
    if let Some(user) = user {
        host_mounts::idmap_layers(plan, user)?;
        host_mounts::delegate_cgroup(plan, user)?;
    }
    mounts::mount_images(plan, &mut sources)?;

    let tree = rootfs::mount_root(&plan.root.clone().unwrap_or_default())?;
    if let Some(place) = stage_dir {
        cover(place)?;
    }
    let stage_dir = stage_dir.unwrap_or(dir);
    let place = stage_dir.join("rootfs");
    make_dir(&place)?;
    move_mount(&tree, "", CWD, &place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .at(STAGE, || format!("{place:?}"))?;
    let root = Root::from_dir_fd(tree).map_err(|e| Error::path(STAGE, "/", &e))?;
    as_root_of(user, || {
        for directory in &plan.directories {
            root.make_dir_all(Path::new(directory), Mode::from_raw_mode(0o755))
                .map_err(|e| Error::path("directory", format!("{directory:?}"), &e))?;
        }
        mounts::make_destinations(&root, &plan.mounts)
    })?;
    let process = plan.process.clone().unwrap_or_default();
    let place = stage_dir.join("mounts");
    make_dir(&place)?;
    let trees = mounts::stage(&place, &plan.mounts, sources.mounts)?;
    if let Some(user) = user {
        let place = stage_dir.join("devices");
        make_dir(&place)?;
        host_mounts::stage_devices(plan, user, &place)?;
    }
    for (name, namespace) in [("pid", *pid_ns), ("user", pod.user_fd()), ("time", pod.time_fd())] {
        if let Some(namespace) = namespace {
            bind_namespace(&dir.join("ns"), name, namespace)?;
        }
    }
    let identity = resolve(plan, &root, &trees)?;
    write_config(&dir.join("config.json"), &user_json(config, &identity, process.umask))?;
    Ok(identity)
}

/// An empty directory that root of a user namespace may pass, over one of the host's: that one may not look into the
/// directories which a bundle is in.
fn cover(place: &Path) -> Result<()> {
    let options = ["mode=0755", "size=64k"].map(str::to_owned);
    let tree = new_file_system("tmpfs", "stave", &options, 0)?;
    move_mount(&tree, "", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .at(STAGE, || format!("tmpfs on {place:?}"))
}

/// Makes files as root of the user namespace: what belongs to root of the node is nobody's in there.
fn as_root_of<T>(user: Option<&UserNamespace>, make: impl FnOnce() -> Result<T>) -> Result<T> {
    let Some(user) = user else { return make() };
    let (uid, gid) = user.root();
    // The capabilities over files go and come with the id (capabilities(7)).
    setfsgid(Gid::from_raw(gid.as_raw()));
    setfsuid(Uid::from_raw(uid.as_raw()));
    let made = make();
    setfsuid(Uid::from_raw(0));
    setfsgid(Gid::from_raw(0));
    made
}

fn bind_namespace(dir: &Path, name: &str, namespace: BorrowedFd<'_>) -> Result<()> {
    match make_dir(dir) {
        Err(error) if error.errno == libc::EEXIST => {}
        other => other?,
    }
    let place = dir.join(name);
    std::fs::File::create(&place).at(STAGE, || format!("{place:?}"))?;
    let source = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&namespace));
    mount_bind(source, &place).at(STAGE, || format!("{place:?}"))
}

fn make_dir(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new().mode(0o755).create(path).at(STAGE, || format!("{path:?}"))
}

fn write_config(path: &Path, content: &[u8]) -> Result<()> {
    std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| std::io::Write::write_all(&mut file, content))
        .at(STAGE, || format!("{path:?}"))
}

/// Looks the user up where the container will see its passwd and group files: perhaps in a volume.
fn resolve(plan: &Plan, root: &Root, trees: &[Option<OwnedFd>]) -> Result<Identity> {
    let read = |name: &str| -> Result<Vec<u8>> {
        let path = format!("/etc/{name}");
        for (mount, tree) in plan.mounts.iter().zip(trees).rev() {
            let Some(tree) = tree else { continue };
            if mount.destination == path {
                return read_file(tree.as_fd(), &path);
            }
            if mount.destination == "/etc" {
                let etc = tree.try_clone().at(STAGE, || path.clone())?;
                let etc = Root::from_dir_fd(etc).map_err(|e| Error::path(STAGE, &path, &e))?;
                return user::read(&etc, &format!("/{name}"));
            }
        }
        user::read(root, &path)
    };
    let process = plan.process.clone().unwrap_or_default();
    let user = process.user.unwrap_or_default();
    let found = user::resolve_in(&user, &read("passwd")?, &read("group")?)?;
    Ok(Identity { uid: found.uid, gid: found.gid, groups: found.groups, home: found.home })
}

/// A file that is mounted on its own.
fn read_file(tree: BorrowedFd<'_>, what: &str) -> Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&tree));
    let stat = rustix::fs::fstat(tree).at(STAGE, || what.to_owned())?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::RegularFile {
        return Err(Error::invalid(STAGE, format!("{what} is no regular file")));
    }
    let file = rustix::fs::open(path, flags, Mode::empty()).at(STAGE, || what.to_owned())?;
    let mut content = Vec::new();
    std::fs::File::from(file)
        .take(user::MAX_FILE + 1)
        .read_to_end(&mut content)
        .at(STAGE, || what.to_owned())?;
    if content.len() as u64 > user::MAX_FILE {
        return Err(Error::invalid(STAGE, format!("{what} has more than {} bytes", user::MAX_FILE)));
    }
    Ok(content)
}

/// The JSON of config.json or of a process, with the user in it.
pub fn user_json(text: &OciProcess, identity: &Identity, umask: Option<u32>) -> Vec<u8> {
    let groups: Vec<String> = identity.groups.iter().map(u32::to_string).collect();
    let mut user =
        format!(r#"{{"uid":{},"gid":{},"additionalGids":[{}]"#, identity.uid, identity.gid, groups.join(","));
    if let Some(umask) = umask {
        user.push_str(&format!(r#","umask":{umask}"#));
    }
    user.push('}');
    let mut all = text.before_user.clone();
    all.extend_from_slice(user.as_bytes());
    all.extend_from_slice(&text.before_home);
    if text.needs_home {
        if !text.before_home.ends_with(b"[") {
            all.push(b',');
        }
        all.extend_from_slice(json_string(&format!("HOME={}", identity.home)).as_bytes());
    }
    all.extend_from_slice(&text.after_home);
    all
}

/// RFC 8259, section 7.
fn json_string(text: &str) -> String {
    let mut json = String::with_capacity(text.len() + 2);
    json.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => json.extend(['\\', c]),
            c if c.is_control() => json.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => json.push(c),
        }
    }
    json.push('"');
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_orphan_is_found_out() {
        // The test's own parent is that of all its threads; the death signal is that of this one only.
        end_with(rustix::process::getppid().unwrap()).unwrap();
        let error = end_with(rustix::process::getpid()).unwrap_err();
        rustix::process::set_parent_process_death_signal(None).unwrap();
        assert!(error.message.contains("has ended"), "{error}");
    }

    #[test]
    fn the_user_comes_between() {
        let identity = Identity { uid: 1, gid: 2, groups: vec![2, 5, 7], home: "/h\"\\\u{1}ä".into() };
        let mut text = OciProcess {
            before_user: b"{\"user\":".to_vec(),
            before_home: b",\"env\":[\"A=b\"".to_vec(),
            after_home: b"]}".to_vec(),
            needs_home: true,
        };
        let json = |text: &OciProcess, umask| String::from_utf8(user_json(text, &identity, umask)).unwrap();
        assert_eq!(
            json(&text, None),
            r#"{"user":{"uid":1,"gid":2,"additionalGids":[2,5,7]},"env":["A=b","HOME=/h\"\\\u0001ä"]}"#
        );
        text.before_home = b",\"env\":[".to_vec();
        assert!(json(&text, Some(18)).contains(r#""umask":18},"env":["HOME="#));
        text.needs_home = false;
        assert!(json(&text, None).ends_with(r#","env":[]}"#));
    }
}
