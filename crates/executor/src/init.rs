//! The init of a container: its own set-up, from clone to execve.

use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::Mode;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use stave_paths::Root;
use stave_supervisor_proto::v1::failure::Kind;
use stave_supervisor_proto::v1::{Cgroup, PidNamespace, Plan, Process};
use stave_sys::{Fork, ForkArgs};

use crate::error::{Context, Error, Result};
use crate::label::{self, Labels};
use crate::pod_namespaces::{PodNamespaces, UserNamespace, fork_inside};
use crate::terminal::{self, Terminal};
use crate::{
    Entrances, Init, Stdio, cgroup, control, devices, host_mounts, masks, mounts, oom_score, process, rootfs,
};

const STAGE: &str = "clone";

/// See [`crate::create`].
pub(crate) fn create(
    plan: &Plan,
    stdio: Option<Stdio>,
    pid_ns: Option<BorrowedFd<'_>>,
    pod: &PodNamespaces,
) -> Result<Init> {
    let process = validate(plan, stdio.is_some(), pid_ns.is_some())?;
    if let Some(user) = &pod.user {
        return create_inside(plan, process, stdio, pid_ns, pod, user);
    }
    let (ours, theirs) = control::pair()?;
    let v2_dir = plan.cgroup.as_ref().map_or("", |c| c.v2_dir.as_str());
    let cgroup = cgroup::open_v2(Path::new(v2_dir))?;
    let mut namespaces = libc::CLONE_NEWNS as u64;
    if plan.pid_namespace() == PidNamespace::Container {
        namespaces |= libc::CLONE_NEWPID as u64;
    }
    let args = ForkArgs { namespaces, cgroup: cgroup.as_ref().map(AsFd::as_fd), sibling: false };
    let pid_ns = pid_ns.filter(|_| is_shared(plan.pid_namespace()));
    match fork_in(pid_ns, &args)? {
        Fork::Parent { pid, pidfd } => Ok(Init { pid, pidfd, control: Some(ours) }),
        Fork::Child => process::run_child(theirs.as_fd(), || run(plan, process, stdio, pod, theirs.as_fd())),
    }
}

/// For a pod with a user namespace: with a builder for what the host mounts, see `host_mounts`.
fn create_inside(
    plan: &Plan,
    process: &Process,
    stdio: Option<Stdio>,
    pid_ns: Option<BorrowedFd<'_>>,
    pod: &PodNamespaces,
    user: &UserNamespace,
) -> Result<Init> {
    if plan.pid_namespace() == PidNamespace::Node {
        return Err(Error::invalid("plan", "the node's PID namespace does not go with a user namespace"));
    }
    let (ours, theirs) = control::pair()?;
    let (trees, handed) = control::pair()?;
    let v2_dir = plan.cgroup.as_ref().map_or("", |c| c.v2_dir.as_str());
    let cgroup = cgroup::open_v2(Path::new(v2_dir))?;
    let namespaces = libc::CLONE_NEWNS as u64;
    let builder = match fork_in(None, &ForkArgs { namespaces, ..ForkArgs::default() })? {
        Fork::Child => host_mounts::build(plan, user, trees, theirs),
        Fork::Parent { pidfd, .. } => pidfd,
    };
    drop(trees);
    let mut namespaces = CloneFlags::CLONE_NEWNS;
    namespaces.set(CloneFlags::CLONE_NEWPID, plan.pid_namespace() == PidNamespace::Container);
    let pid_ns = pid_ns.filter(|_| is_shared(plan.pid_namespace()));
    let keep: Vec<BorrowedFd<'_>> =
        [theirs.as_fd(), handed.as_fd(), user.fd()].into_iter().chain(pid_ns).chain(pod.time_fd()).collect();
    let prepare = |handover: BorrowedFd<'_>| {
        process::isolate(stdio.as_ref(), &keep.iter().copied().chain([handover]).collect::<Vec<_>>())?;
        // Closed there; not to be closed twice.
        std::mem::forget(stdio);
        user.own_pipes()?;
        let none = Cgroup::default();
        // Opened by the node's root, whose rights count when they are written to.
        let entrances = Entrances::open(plan.cgroup.as_ref().unwrap_or(&none))?;
        // With the /proc of the host, so before the mount namespace is the container's.
        oom_score::set(process)?;
        process::own_keyring(process);
        pod.join_time()?;
        if let Some(pid_ns) = pid_ns {
            enter_pid_ns(pid_ns)?;
        }
        Ok(entrances)
    };
    let cgroup = cgroup.as_ref().map(AsFd::as_fd);
    let (control, handed) = (theirs.as_fd(), handed.as_fd());
    let body = |entrances: &Entrances| run_inside(plan, process, entrances, handed, control);
    let started = fork_inside(user, cgroup, namespaces, control, prepare, body);
    if started.is_err() {
        // Reaped by the caller, as the init is.
        let _ = rustix::process::pidfd_send_signal(&builder, rustix::process::Signal::KILL);
    }
    let (pid, pidfd) = started?;
    Ok(Init { pid, pidfd, control: Some(ours) })
}

/// The init, as root of the user namespace.
fn run_inside(
    plan: &Plan,
    process: &Process,
    entrances: &Entrances,
    handed: BorrowedFd<'_>,
    control: BorrowedFd<'_>,
) -> Result<Infallible> {
    if let Some(cgroup) = &plan.cgroup {
        cgroup::enter_v1(entrances, cgroup)?;
    }
    stave_sys::close_all_but(&[control, handed]).at("process", || "close_range".to_owned())?;
    let labels = label::open(process)?;
    rustix::process::setsid().at("process", || "setsid".to_owned())?;
    process::own_keyring(process);
    if plan.cgroup_namespace {
        unshare(CloneFlags::CLONE_NEWCGROUP).at("cgroup", || "unshare cgroup namespace".to_owned())?;
    }
    let null = devices::open_null()?;
    let (root, sources) = host_mounts::receive(handed, plan)?;
    rootfs::leave_host_propagation()?;
    rootfs::attach_root(&root)?;
    let (root, terminal) = fill(plan, process, root, sources, null.as_fd())?;
    finish(process, &root, terminal, labels, control)
}

/// The PID namespace is one that others have made.
fn is_shared(namespace: PidNamespace) -> bool {
    matches!(namespace, PidNamespace::Pod | PidNamespace::Target)
}

fn validate(plan: &Plan, has_stdio: bool, has_pid_ns: bool) -> Result<&Process> {
    let missing = |field: &str| Error::invalid("plan", format!("{field} is missing"));
    let process = plan.process.as_ref().ok_or_else(|| missing("process"))?;
    process::validate(process)?;
    rootfs::validate(plan.root.as_ref().ok_or_else(|| missing("root"))?)?;
    mounts::validate(&plan.mounts)?;
    devices::validate(&plan.devices)?;
    if process.terminal == has_stdio {
        return Err(Error::invalid("plan", "stdio is for processes without a terminal, and only for them"));
    }
    if is_shared(plan.pid_namespace()) && !has_pid_ns {
        return Err(Error::new("plan", Kind::FailedPrecondition, "there is no PID namespace to share"));
    }
    Ok(process)
}

/// Forks with a PID namespace for the child that is `pid_ns` (a namespace, or the pidfd of a process
/// in it). A process can't move itself: setns(2) only changes where its children go, so it is set
/// for the fork and put back.
pub(crate) fn fork_in(pid_ns: Option<BorrowedFd<'_>>, args: &ForkArgs<'_>) -> Result<Fork> {
    // Copied with the process: nobody in the container may trace the child while it still holds more
    // than it will end up with (CVE-2016-9962).
    set_dumpable_behavior(DumpableBehavior::NotDumpable).at(STAGE, || "not dumpable".to_owned())?;
    let Some(pid_ns) = pid_ns else {
        return stave_sys::fork(args).at(STAGE, || "clone3".to_owned());
    };
    let own: OwnedFd =
        std::fs::File::open("/proc/self/ns/pid").at(STAGE, || "/proc/self/ns/pid".to_owned())?.into();
    enter_pid_ns(pid_ns)?;
    let result = stave_sys::fork(args);
    if matches!(result, Ok(Fork::Child)) {
        return Ok(Fork::Child);
    }
    if let Err(e) = setns(&own, CloneFlags::CLONE_NEWPID) {
        if let Ok(Fork::Parent { pidfd, .. }) = &result {
            let _ = rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL);
        }
        return Err(Error::os(STAGE, "setns back to the own PID namespace", e));
    }
    result.map_err(cloned_into_pid_ns)
}

/// The children of the calling process go to that PID namespace.
fn enter_pid_ns(pid_ns: BorrowedFd<'_>) -> Result<()> {
    setns(pid_ns, CloneFlags::CLONE_NEWPID).map_err(|e| match e {
        nix::errno::Errno::ESRCH => {
            Error::new(STAGE, Kind::FailedPrecondition, "the container's init has ended")
        }
        e => Error::os(STAGE, "setns PID namespace", e),
    })
}

/// A failed clone3 into a PID namespace of others.
pub(crate) fn cloned_into_pid_ns(error: std::io::Error) -> Error {
    match error.raw_os_error() {
        // What the kernel says about a PID namespace whose init is gone.
        Some(libc::ENOMEM) => Error::os(STAGE, "clone3 (or the init of the PID namespace has ended)", error)
            .with_kind(Kind::FailedPrecondition),
        _ => Error::os(STAGE, "clone3", error),
    }
}

fn run(
    plan: &Plan,
    process: &Process,
    stdio: Option<Stdio>,
    pod: &PodNamespaces,
    control: BorrowedFd<'_>,
) -> Result<Infallible> {
    pod.join_time()?;
    process::isolate(stdio.as_ref(), &[control])?;
    // Closed there; not to be closed twice.
    std::mem::forget(stdio);
    if let Some(cgroup) = &plan.cgroup {
        cgroup::enter_v1(&Entrances::open(cgroup)?, cgroup)?;
    }
    // With the /proc of the host, so before the mount namespace is the container's.
    oom_score::set(process)?;
    process::own_keyring(process);
    if plan.cgroup_namespace {
        // Rooted at the cgroups that the process is in now.
        unshare(CloneFlags::CLONE_NEWCGROUP).at("cgroup", || "unshare cgroup namespace".to_owned())?;
    }
    let labels = label::open(process)?;
    let (root, terminal) = set_up_file_systems(plan, process)?;
    finish(process, &root, terminal, labels, control)
}

/// From the container's root to execve.
fn finish(
    process: &Process,
    root: &Root,
    terminal: Option<Terminal>,
    labels: Labels,
    control: BorrowedFd<'_>,
) -> Result<Infallible> {
    let (master, tty) = match &terminal {
        Some(Terminal { master, terminal }) => (Some(master.as_fd()), Some(terminal.as_fd())),
        None => (None, None),
    };
    let ready = process::prepare(root, process, labels, tty, None)?;
    let identity = &ready.identity;
    control::send_ready(control, identity.uid, identity.gid, &identity.groups, master)?;
    drop(terminal);
    if !control::wait_go(control) {
        stave_sys::exit_now(crate::FAILED);
    }
    process::execute(&ready, process)
}

/// Everything that is mounted, and the pivot. Returns the new root, and the terminal where there is one.
fn set_up_file_systems(plan: &Plan, process: &Process) -> Result<(Root, Option<Terminal>)> {
    let rootfs = plan.root.clone().unwrap_or_default();
    let null = devices::open_null()?;
    let mut sources = mounts::open_sources(plan, None)?;
    rootfs::leave_host_propagation()?;
    mounts::mount_images(plan, &mut sources)?;
    let root = rootfs::mount_root(&rootfs)?;
    fill(plan, process, root, sources, null.as_fd())
}

/// Mounts all but the root file system itself, and pivots into it.
fn fill(
    plan: &Plan,
    process: &Process,
    root: OwnedFd,
    sources: mounts::Sources,
    null: BorrowedFd<'_>,
) -> Result<(Root, Option<Terminal>)> {
    let root = Root::from_dir_fd(root).map_err(|e| Error::path("rootfs", "/", &e))?;
    for directory in &plan.directories {
        root.make_dir_all(Path::new(directory), Mode::from_raw_mode(0o755))
            .map_err(|e| Error::path("directory", format!("{directory:?}"), &e))?;
    }
    let read_only_later = mounts::mount_all(&root, &plan.mounts, sources.mounts)?;
    devices::make_all(&root, plan, sources.devices)?;
    let terminal = process.terminal.then(|| terminal::open(&root)).transpose()?;
    if let Some(terminal) = &terminal {
        terminal.bind_console(&root)?;
        terminal.connect()?;
    }
    process::make_cwd(&root, process)?;
    masks::make_read_only(&root, &plan.readonly_paths)?;
    masks::mask(&root, &plan.masked_paths, null)?;
    mounts::make_read_only(&read_only_later)?;
    if plan.root.as_ref().is_some_and(|root| root.read_only) {
        rootfs::make_read_only(root.fd())?;
    }
    rootfs::pivot(root.fd(), plan.root_propagation())?;
    Ok((root, terminal))
}
