//! Turns a plan into a process: namespaces, mounts, user, limits, execve. It does no policy.
//!
//! For a single-threaded supervisor that has made the pod's net, ipc and uts namespaces its own.
//! Processes are cloned as children of it, set themselves up, and report over a control socket:
//!
//! 1. [`create`] clones a container's init. Poll [`Init::control`]; [`Init::read_report`] tells
//!    [`Report::Ready`] or [`Report::Failed`].
//! 2. [`Init::start`] lets it go on to execve. The control socket then closes ([`Report::ExecDone`]),
//!    after a [`Report::Failed`] where execve failed.
//!
//! [`exec`] does both in one go. An init whose supervisor dies before the start ends by itself.
//! The caller reaps: all processes made here are its children, and but for the short-lived helpers of an
//! [`exec`] and of all that is cloned into a user namespace nothing here waits for them. The caller is made not dumpable (PR_SET_DUMPABLE).
//!
//! A container that shares the pod's PID namespace and has CAP_SYS_PTRACE can reach the init of another
//! container of its pod while that is being set up, and so the host's root; see [`create`].
#![forbid(unsafe_code)]

mod capabilities;
mod cgroup;
mod control;
mod devices;
mod error;
mod exec;
mod host_mounts;
mod init;
mod label;
mod leaf;
mod masks;
mod mounts;
mod oom_score;
mod pod_init;
mod pod_namespaces;
mod process;
mod rootfs;
mod runtime;
mod terminal;
mod user;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use stave_supervisor_proto::v1::failure::Kind;
use stave_supervisor_proto::v1::{Cgroup, Identity, Plan, Process};

pub use cgroup::Entrances;
pub use error::Error;
use leaf::Leaf;
pub use pod_namespaces::{OwnNamespaces, PodNamespaces};
pub use runtime::{Bundle, RuntimeCommand, runtime, user_json};

/// With which a process ends that does not reach execve: [`Error::exit_code`], or [`FAILED`].
pub const EXIT_CODES: [i32; 3] = [126, 127, FAILED];
pub(crate) const FAILED: i32 = 128;

/// The standard streams of a process without a terminal.
#[derive(Debug)]
pub struct Stdio {
    /// Descriptor 0.
    pub stdin: OwnedFd,
    /// Descriptor 1.
    pub stdout: OwnedFd,
    /// Descriptor 2.
    pub stderr: OwnedFd,
}

/// What a process on its way to execve tells over its control socket.
#[derive(Debug)]
pub enum Report {
    /// Everything up to execve is done; a container's init now waits for [`Init::start`].
    Ready {
        /// As resolved in the container.
        uid: u32,
        /// As resolved in the container.
        gid: u32,
        /// All groups of the process, `gid` included, sorted.
        groups: Vec<u32>,
        /// The master of the pseudo-terminal, for a process with one.
        console: Option<OwnedFd>,
    },
    /// The bundle for an OCI runtime is ready; the runtime's program is executed next.
    Staged(Identity),
    /// It could not go on and ends with [`Error::exit_code`], or 128.
    Failed(Error),
    /// The control socket closed: execve succeeded, or the process was killed before it (its
    /// exit status tells which).
    ExecDone,
}

/// The init of a container, from clone to execve.
#[derive(Debug)]
pub struct Init {
    pid: i32,
    pidfd: OwnedFd,
    control: Option<OwnedFd>,
}

impl Init {
    /// An init that an OCI runtime made: a child of the caller's by now. It reports nothing.
    pub fn adopted(pid: i32, pidfd: OwnedFd) -> Self {
        Self { pid, pidfd, control: None }
    }
    /// Pid in the caller's PID namespace: to be shown, never to be signalled.
    pub fn pid(&self) -> i32 {
        self.pid
    }
    /// Readable once the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
    /// Readable when there is a report; none after the last one.
    pub fn control(&self) -> Option<BorrowedFd<'_>> {
        self.control.as_ref().map(AsFd::as_fd)
    }
    /// The next report, or `None` when there is none yet. Never blocks.
    pub fn read_report(&mut self) -> Result<Option<Report>, Error> {
        read_report(&mut self.control)
    }
    /// Lets a process that reported [`Report::Ready`] go on to execve.
    pub fn start(&mut self) -> Result<(), Error> {
        match &self.control {
            Some(control) => control::send_go(control.as_fd()),
            None => Err(Error::new("control", Kind::FailedPrecondition, "the container's init has ended")),
        }
    }
}

/// A further process in a container, from clone to execve. It needs no start message.
#[derive(Debug)]
pub struct Exec {
    pid: i32,
    pidfd: OwnedFd,
    control: Option<OwnedFd>,
    leaf: Option<Leaf>,
}

impl Exec {
    /// A process that an OCI runtime made: a child of the caller's by now. It reports nothing, and has no leaf.
    pub fn adopted(pid: i32, pidfd: OwnedFd) -> Self {
        Self { pid, pidfd, control: None, leaf: None }
    }
    /// Pid in the caller's PID namespace: to be shown, never to be signalled.
    pub fn pid(&self) -> i32 {
        self.pid
    }
    /// Readable once the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
    /// Readable when there is a report; none after the last one.
    pub fn control(&self) -> Option<BorrowedFd<'_>> {
        self.control.as_ref().map(AsFd::as_fd)
    }
    /// The next report, or `None` when there is none yet. Never blocks.
    pub fn read_report(&mut self) -> Result<Option<Report>, Error> {
        read_report(&mut self.control)
    }
    /// SIGKILL to the process and all its descendants that stayed in its cgroup.
    ///
    /// Without a cgroup2 mount only the process itself.
    pub fn kill(&self) -> Result<(), Error> {
        let leaf = self.leaf.as_ref().map_or(Ok(()), Leaf::kill);
        // Always: it may have been moved elsewhere, and before Linux 5.14 there is no cgroup.kill.
        match rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => leaf,
            Err(e) => Err(Error::os("kill", "pidfd_send_signal", e)),
        }
    }
    /// Removes the cgroup leaf of an ended process; processes still in it move to the container's.
    pub fn remove_cgroup(&self) -> Result<(), Error> {
        self.leaf.as_ref().map_or(Ok(()), Leaf::remove)
    }
    /// Like [`Self::remove_cgroup`], but one in which nothing was left and nothing killed is kept for the container's next process.
    pub fn give_back_cgroup(mut self, entrances: &Entrances) -> Result<(), Error> {
        let refused = self.leaf.take().and_then(|leaf| entrances.keep_leaf(leaf));
        refused.map_or(Ok(()), |leaf| leaf.remove())
    }
    /// The cgroup2 leaf made for the process, where the host has a cgroup2 mount.
    pub fn cgroup_dir(&self) -> Option<&Path> {
        self.leaf.as_ref().map(Leaf::path)
    }
}

/// Where a further process goes.
#[derive(Debug, Clone, Copy)]
pub struct ExecTarget<'a> {
    /// pidfd of the container's init.
    pub init: BorrowedFd<'a>,
    /// The container's cgroup.
    pub cgroup: &'a Cgroup,
    /// Of that cgroup; opened anew when there is none.
    pub entrances: Option<&'a Entrances>,
    /// Name of the leaf in the container's cgroup2 directory, so that a timeout reaches all descendants, unless `entrances`
    /// have one.
    pub name: &'a str,
}

/// What SELinux is to make of a pod's init; empty: nothing.
#[derive(Debug, Clone, Default)]
pub struct PodInitLabels {
    /// The label of the process. It stays the caller's where the policy allows no such change.
    pub process: String,
    /// The label of its root.
    pub root: String,
}

/// PID 1 of a PID namespace that containers of a pod share. It reaps orphans until it is killed.
#[derive(Debug)]
pub struct PodInit {
    /// Pid in the caller's PID namespace: to be shown, never to be signalled.
    pub pid: i32,
    /// Readable once the process has ended.
    pub pidfd: OwnedFd,
    /// The PID namespace, for [`create`].
    pub pid_ns: OwnedFd,
}

/// Clones a container's init and returns at once; the init sets itself up, reports on its control
/// socket and waits for [`Init::start`]. `stdio` is `None` with a terminal. `pid_ns` is what the plan's PID
/// namespace POD or TARGET means: a PID namespace, or the pidfd of a process in it.
/// The caller must be single-threaded.
///
/// In a shared PID namespace the init is visible to the other containers in it from the start. It is not
/// dumpable, which stops all but tracers with CAP_SYS_PTRACE.
pub fn create(plan: &Plan, stdio: Option<Stdio>, pid_ns: Option<BorrowedFd<'_>>) -> Result<Init, Error> {
    PodNamespaces::default().create(plan, stdio, pid_ns)
}

/// Clones a further process into a running container; it proceeds to execve by itself. Waits for a
/// helper, which makes a handful of system calls outside of the container's cgroup. `stdio` is `None` with a
/// terminal, which is made in the container's devpts; [`Report::Ready`] brings its master.
/// The caller must be single-threaded.
pub fn exec(
    target: &ExecTarget<'_>,
    process: &Process,
    stdio: impl Into<Option<Stdio>>,
) -> Result<Exec, Error> {
    PodNamespaces::default().exec(target, process, stdio)
}

/// Starts the init of a shared PID namespace, in the caller's own cgroup.
/// The caller must be single-threaded.
pub fn pod_init() -> Result<PodInit, Error> {
    PodNamespaces::default().init(&PodInitLabels::default())
}

impl PodNamespaces {
    /// As [`create`], in these namespaces. With a user namespace, the overlay, idmapped mounts and device nodes are made by
    /// a further child, which ends by itself and is to be reaped.
    pub fn create(
        &self,
        plan: &Plan,
        stdio: Option<Stdio>,
        pid_ns: Option<BorrowedFd<'_>>,
    ) -> Result<Init, Error> {
        init::create(plan, stdio, pid_ns, self)
    }

    /// As [`exec()`], in these namespaces.
    pub fn exec(
        &self,
        target: &ExecTarget<'_>,
        process: &Process,
        stdio: impl Into<Option<Stdio>>,
    ) -> Result<Exec, Error> {
        exec::exec(target, process, stdio.into(), self)
    }

    /// As [`pod_init()`], in these namespaces.
    pub fn init(&self, labels: &PodInitLabels) -> Result<PodInit, Error> {
        pod_init::pod_init(self, labels)
    }
}

/// SIGKILL to all processes in a cgroup2 directory and below. A missing directory is success.
pub fn kill_cgroup(v2_dir: &Path) -> Result<(), Error> {
    cgroup::kill(v2_dir)
}

/// SIGKILL to all processes in a v1 cgroup directory and below, one by one, for hosts without a cgroup2 mount. A missing
/// directory is success.
pub fn kill_v1_cgroup(dir: &Path) -> Result<(), Error> {
    cgroup::kill_one_by_one(dir)
}

/// Puts a process that an OCI runtime has made into those of the container's cgroups that it is not in. `pid` is that of a
/// child which has not been reaped. One that has ended is success.
pub fn place(cgroup: &Cgroup, pid: i32) -> Result<(), Error> {
    cgroup::place(cgroup, pid)
}

fn read_report(control: &mut Option<OwnedFd>) -> Result<Option<Report>, Error> {
    let Some(socket) = control else { return Ok(None) };
    let report = control::receive_report(socket.as_fd())?;
    if matches!(report, Some(Report::ExecDone)) {
        *control = None;
    }
    Ok(report)
}

/// Looks a user up in the content of passwd and group files: uid, gid and all groups. For the fuzz target.
#[cfg(fuzzing)]
pub fn fuzz_user(
    user: &stave_supervisor_proto::v1::User,
    passwd: &[u8],
    group: &[u8],
) -> Result<(u32, u32, Vec<u32>), Error> {
    user::resolve_in(user, passwd, group).map(|found| (found.uid, found.gid, found.groups))
}
