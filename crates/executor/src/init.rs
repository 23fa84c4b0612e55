//! The init of a container: its own set-up, from clone to execve.

use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::Mode;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use stave_paths::Root;
use stave_supervisor_proto::v1::failure::Kind;
use stave_supervisor_proto::v1::{PidNamespace, Plan, Process};
use stave_sys::{Fork, ForkArgs};

use crate::error::{Context, Error, Result};
use crate::terminal::{self, Terminal};
use crate::{Init, Stdio, cgroup, control, devices, masks, mounts, process, rootfs};

const STAGE: &str = "clone";

/// See [`crate::create`].
pub(crate) fn create(plan: &Plan, stdio: Option<Stdio>, pid_ns: Option<BorrowedFd<'_>>) -> Result<Init> {
    let process = validate(plan, stdio.is_some(), pid_ns.is_some())?;
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
        Fork::Child => process::run_child(theirs.as_fd(), || run(plan, process, stdio, theirs.as_fd())),
    }
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
    setns(pid_ns, CloneFlags::CLONE_NEWPID).map_err(|e| match e {
        nix::errno::Errno::ESRCH => {
            Error::new(STAGE, Kind::FailedPrecondition, "the container's init has ended")
        }
        e => Error::os(STAGE, "setns PID namespace", e),
    })?;
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
    result.map_err(|e| match e.raw_os_error() {
        // What the kernel says about a PID namespace whose init is gone.
        Some(libc::ENOMEM) => Error::os(STAGE, "clone3 (or the init of the PID namespace has ended)", e)
            .with_kind(Kind::FailedPrecondition),
        _ => Error::os(STAGE, "clone3", e),
    })
}

fn run(plan: &Plan, process: &Process, stdio: Option<Stdio>, control: BorrowedFd<'_>) -> Result<Infallible> {
    process::isolate(stdio.as_ref(), &[control])?;
    // Closed there; not to be closed twice.
    std::mem::forget(stdio);
    if let Some(cgroup) = &plan.cgroup {
        cgroup::enter_v1(&cgroup::open_v1(cgroup)?, cgroup)?;
    }
    process::host_side(process)?;
    if plan.cgroup_namespace {
        // Rooted at the cgroups that the process is in now.
        unshare(CloneFlags::CLONE_NEWCGROUP).at("cgroup", || "unshare cgroup namespace".to_owned())?;
    }
    let (root, terminal) = set_up_file_systems(plan, process)?;
    let (master, tty) = match &terminal {
        Some(Terminal { master, terminal }) => (Some(master.as_fd()), Some(terminal.as_fd())),
        None => (None, None),
    };
    let ready = process::prepare(&root, process, tty)?;
    let identity = &ready.identity;
    control::send_ready(control, identity.uid, identity.gid, &identity.groups, master)?;
    drop(terminal);
    if !control::wait_go(control) {
        stave_sys::exit_now(128);
    }
    process::execute(&ready, process)
}

/// Everything that is mounted, and the pivot. Returns the new root, and the terminal where there is one.
fn set_up_file_systems(plan: &Plan, process: &Process) -> Result<(Root, Option<Terminal>)> {
    let rootfs = plan.root.clone().unwrap_or_default();
    let null = devices::open_null()?;
    let mut sources = mounts::open_sources(plan)?;
    rootfs::leave_host_propagation()?;
    mounts::mount_images(plan, &mut sources)?;
    let root = Root::from_dir_fd(rootfs::mount_root(&rootfs)?).map_err(|e| Error::path("rootfs", "/", &e))?;
    for directory in &plan.directories {
        root.make_dir_all(Path::new(directory), Mode::from_raw_mode(0o755))
            .map_err(|e| Error::path("directory", format!("{directory:?}"), &e))?;
    }
    let read_only_later = mounts::mount_all(&root, &plan.mounts, sources)?;
    if !devices::dev_is_bound(&plan.mounts) {
        devices::make_all(&root, &plan.devices)?;
        devices::make_links(&root)?;
    }
    let terminal = process.terminal.then(|| terminal::open(&root)).transpose()?;
    if let Some(terminal) = &terminal {
        terminal.bind_console(&root)?;
        terminal.connect()?;
    }
    process::make_cwd(&root, process)?;
    masks::make_read_only(&root, &plan.readonly_paths)?;
    masks::mask(&root, &plan.masked_paths, null.as_fd())?;
    mounts::make_read_only(&read_only_later)?;
    if rootfs.read_only {
        rootfs::make_read_only(root.fd())?;
    }
    rootfs::pivot(root.fd(), plan.root_propagation())?;
    Ok((root, terminal))
}
