//! A further process in a running container.
//!
//! It is cloned in two steps, as runc does it: a helper, outside of the container's PID namespace, closes
//! the supervisor's descriptors and joins the mount namespace; then it clones the process as its
//! sibling. So a tracer in the container (one with CAP_SYS_PTRACE) never sees a process whose root is
//! the host's. The helper stays in the supervisor's cgroup: the supervisor waits for it, and must not
//! wait for a container that is throttled or frozen.

use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sched::{CloneFlags, setns};
use rustix::fs::{Mode, OFlags};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use stave_paths::Root;
use stave_supervisor_proto::v1::Process;
use stave_supervisor_proto::v1::failure::Kind;
use stave_sys::{Fork, ForkArgs};

use crate::error::{Context, Error, Result};
use crate::init::fork_in;
use crate::terminal::{self, Terminal};
use crate::{Exec, ExecTarget, Stdio, cgroup, control, process};

const STAGE: &str = "namespaces";

/// See [`crate::exec`].
pub(crate) fn exec(target: &ExecTarget<'_>, process: &Process, stdio: Option<Stdio>) -> Result<Exec> {
    process::validate(process)?;
    if process.terminal == stdio.is_some() {
        return Err(Error::invalid("plan", "stdio is for processes without a terminal, and only for them"));
    }
    // So that no descriptor of the supervisor's comes along until the terminal is there.
    let stdio = stdio.map_or_else(null_stdio, Ok)?;
    let leaf = cgroup::make_leaf(target.cgroup, target.name)?;
    let started = leaf
        .as_deref()
        .map_or(Ok(None), cgroup::open_v2)
        .and_then(|leaf| start(target, process, stdio, leaf.as_ref().map(AsFd::as_fd)));
    match started {
        Ok((pid, pidfd, control)) => Ok(Exec { pid, pidfd, control: Some(control), leaf }),
        Err(error) => {
            if let Some(leaf) = &leaf {
                cgroup::remove_leaf(leaf)?;
            }
            Err(error)
        }
    }
}

fn null_stdio() -> Result<Stdio> {
    let open = || {
        rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .at("stdio", || "/dev/null of the host".to_owned())
    };
    Ok(Stdio { stdin: open()?, stdout: open()?, stderr: open()? })
}

/// Pid, pidfd, control socket.
fn start(
    target: &ExecTarget<'_>,
    process: &Process,
    stdio: Stdio,
    leaf: Option<BorrowedFd<'_>>,
) -> Result<(i32, OwnedFd, OwnedFd)> {
    let (ours, theirs) = control::pair()?;
    // Of the helper's own: the process may report before the helper does.
    let (handover, helpers) = control::pair()?;
    match fork_in(None, &ForkArgs::default())? {
        Fork::Child => {
            let body = || help(target, process, stdio, leaf, theirs.as_fd(), helpers.as_fd());
            process::run_child(helpers.as_fd(), body)
        }
        Fork::Parent { pidfd: helper, .. } => {
            drop((theirs, helpers, stdio));
            let started = control::receive_started(handover.as_fd());
            rustix::io::retry_on_intr(|| waitid(WaitId::PidFd(helper.as_fd()), WaitIdOptions::EXITED))
                .at("exec", || "wait for the helper".to_owned())?;
            started.map(|(pid, pidfd)| (pid, pidfd, ours))
        }
    }
}

/// The helper. It ends once it has cloned the process.
fn help(
    target: &ExecTarget<'_>,
    process: &Process,
    stdio: Stdio,
    leaf: Option<BorrowedFd<'_>>,
    control: BorrowedFd<'_>,
    handover: BorrowedFd<'_>,
) -> Result<Infallible> {
    let keep: Vec<BorrowedFd<'_>> = [control, handover, target.init].into_iter().chain(leaf).collect();
    process::isolate(Some(stdio), &keep)?;
    process::host_side(process)?;
    let tasks = cgroup::open_v1(target.cgroup)?;
    // Net, ipc and uts are the pod's already, as they are the supervisor's. With the mount namespace
    // come its root and working directory. The cgroup namespace comes later: from inside of it the
    // kernel refuses a clone into the cgroup, as that comes from outside (nsdelegate).
    join(target.init, CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID)?;
    let args = ForkArgs { namespaces: 0, cgroup: leaf, sibling: true };
    match stave_sys::fork(&args).at("clone", || "clone3".to_owned())? {
        Fork::Parent { pid, pidfd } => {
            control::send_started(handover, pid, pidfd.as_fd())?;
            stave_sys::exit_now(0)
        }
        Fork::Child => process::run_child(control, || run(target, process, &tasks, control)),
    }
}

fn join(init: BorrowedFd<'_>, namespaces: CloneFlags) -> Result<()> {
    setns(init, namespaces).map_err(|e| match e {
        nix::errno::Errno::ESRCH => {
            Error::new(STAGE, Kind::FailedPrecondition, "the container's init has ended")
        }
        e => Error::os(STAGE, "setns", e),
    })
}

fn run(
    target: &ExecTarget<'_>,
    process: &Process,
    tasks: &[OwnedFd],
    control: BorrowedFd<'_>,
) -> Result<Infallible> {
    cgroup::enter_v1(tasks, target.cgroup)?;
    join(target.init, CloneFlags::CLONE_NEWCGROUP)?;
    stave_sys::close_all_but(&[control]).at("process", || "close_range".to_owned())?;
    rustix::process::setsid().at("process", || "setsid".to_owned())?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open("/", flags, Mode::empty()).at(STAGE, || "/".to_owned())?;
    let root = Root::from_dir_fd(root).map_err(|e| Error::path(STAGE, "/", &e))?;
    let terminal = process.terminal.then(|| terminal::open(&root)).transpose()?;
    if let Some(terminal) = &terminal {
        terminal.connect()?;
    }
    let (master, tty) = terminal.as_ref().map(Terminal::ends).unzip();
    process::make_cwd(&root, process)?;
    let ready = process::prepare(&root, process, tty)?;
    let identity = &ready.identity;
    control::send_ready(control, identity.uid, identity.gid, &identity.groups, master)?;
    drop(terminal);
    process::execute(&ready, process)
}
