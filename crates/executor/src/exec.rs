//! A further process in a running container.
//!
//! It is cloned in two steps, as runc does it: a helper, outside of the container's PID namespace, closes
//! the supervisor's descriptors and joins the mount namespace; then it clones the process as its
//! sibling. So a tracer in the container (one with CAP_SYS_PTRACE) never sees a process whose root is
//! the host's. The helper stays in the supervisor's cgroup: the supervisor waits for it, and must not
//! wait for a container that is throttled or frozen. As it waits anyway, the helper borrows its memory.
//! The process itself has a copy: what the container may trace must not be able to write to the supervisor.

use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sched::{CloneFlags, setns};
use rustix::fs::{Mode, OFlags};
use rustix::process::{DumpableBehavior, Pid, PidfdFlags, Signal, pidfd_send_signal, set_dumpable_behavior};
use stave_paths::Root;
use stave_supervisor_proto::v1::Process;
use stave_supervisor_proto::v1::failure::Kind;
use stave_sys::{Fork, ForkArgs};

use crate::error::{Context, Error, Result};
use crate::leaf::Leaf;
use crate::oom_score::Lent;
use crate::pod_namespaces::{PodNamespaces, become_root};
use crate::terminal::{self, Terminal};
use crate::{Entrances, Exec, ExecTarget, Stdio, capabilities, cgroup, control, label, process};

const STAGE: &str = "namespaces";

/// See [`crate::exec`].
pub(crate) fn exec(
    target: &ExecTarget<'_>,
    process: &Process,
    stdio: Option<Stdio>,
    pod: &PodNamespaces,
) -> Result<Exec> {
    process::validate(process)?;
    if process.terminal == stdio.is_some() {
        return Err(Error::invalid("plan", "stdio is for processes without a terminal, and only for them"));
    }
    // So that no descriptor of the supervisor's comes along until the terminal is there.
    let stdio = stdio.map_or_else(null_stdio, Ok)?;
    let kept = target.entrances.and_then(Entrances::take_leaf);
    let leaf = match kept {
        Some(leaf) => Some(leaf),
        None => Leaf::make(target.cgroup, target.name)?,
    };
    match start(target, process, stdio, pod, leaf.as_ref().map(AsFd::as_fd)) {
        Ok((pid, pidfd, control)) => Ok(Exec { pid, pidfd, control: Some(control), leaf }),
        Err(error) => {
            let left = leaf.map_or(Ok(()), |leaf| leaf.remove());
            // What went wrong first is what matters.
            Err(match left {
                Ok(()) => error,
                Err(left) => error.and(&left),
            })
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
    pod: &PodNamespaces,
    leaf: Option<BorrowedFd<'_>>,
) -> Result<(i32, OwnedFd, OwnedFd)> {
    let (ours, theirs) = control::pair()?;
    let opened = match target.entrances {
        Some(_) => None,
        None => Some(Entrances::open(target.cgroup)?),
    };
    let entrances = target.entrances.or(opened.as_ref());
    // All that the helper keeps.
    let keep: Vec<BorrowedFd<'_>> = [theirs.as_fd(), target.init]
        .into_iter()
        .chain(leaf)
        .chain(pod.time_fd())
        .chain(entrances.into_iter().flat_map(Entrances::fds))
        .collect();
    set_dumpable_behavior(DumpableBehavior::NotDumpable).at("exec", || "not dumpable".to_owned())?;
    let ended = || Error::new("exec", Kind::Internal, "the helper of an exec ended early");
    // Asked for once, and here: the processes would ask each time.
    let bounding = pod.user.is_none().then(capabilities::supervisors_bounding);
    let mut cloned = Err(ended());
    let score = Lent::set(process)?;
    let helped = stave_sys::help(|| {
        let control = (theirs.as_fd(), bounding);
        cloned = help(target, process, &stdio, pod, leaf, (&keep, entrances), control);
    })
    .at("exec", || "clone of the helper".to_owned());
    let restored = score.restore();
    helped?;
    let pid = cloned?;
    // A child of ours that nobody has reaped, so the number is its own.
    let pidfd =
        rustix::process::pidfd_open(pid, PidfdFlags::empty()).at("exec", || "pidfd_open".to_owned())?;
    if let Err(error) = restored {
        // Reaped as a stray.
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        return Err(error);
    }
    Ok((pid.as_raw_nonzero().get(), pidfd, ours))
}

/// The helper, in the supervisor's memory: it allocates nothing, and ends once it has cloned the process, of which
/// it gives the pid.
fn help(
    target: &ExecTarget<'_>,
    process: &Process,
    stdio: &Stdio,
    pod: &PodNamespaces,
    leaf: Option<BorrowedFd<'_>>,
    (keep, entrances): (&[BorrowedFd<'_>], Option<&Entrances>),
    (control, bounding): (BorrowedFd<'_>, Option<u64>),
) -> Result<Pid> {
    process::isolate_in_session(Some(stdio), keep)?;
    if let Some(user) = &pod.user {
        user.own_pipes()?;
    }
    process::own_keyring(process);
    // Net, ipc and uts are the pod's already, as they are the supervisor's. With the mount namespace
    // come its root and working directory. The cgroup namespace comes later: from inside of it the
    // kernel refuses a clone into the cgroup, as that comes from outside (nsdelegate).
    let mut first = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID;
    // `run` opens the labels before. No tracer inside of the user namespace has a right on what is outside.
    first.set(CloneFlags::CLONE_NEWNS, pod.user.is_none());
    join(target.init, first)?;
    let args = ForkArgs { namespaces: 0, cgroup: leaf, sibling: true };
    match stave_sys::fork(&args).at("clone", || "clone3".to_owned())? {
        Fork::Parent { pid, .. } => Pid::from_raw(pid)
            .ok_or_else(|| Error::new("clone", Kind::Internal, "the process is in no PID namespace of ours")),
        Fork::Child => {
            process::run_child(control, || run(target, process, pod, entrances, (control, bounding)))
        }
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
    pod: &PodNamespaces,
    entrances: Option<&Entrances>,
    (control, bounding): (BorrowedFd<'_>, Option<u64>),
) -> Result<Infallible> {
    if let Some(entrances) = entrances {
        cgroup::enter_v1(entrances, target.cgroup)?;
    }
    // The helper, with memory that is not its own, can't change its clocks.
    pod.join_time()?;
    let labels = label::open(process)?;
    if pod.user.is_some() {
        // Only here: the helper needs its rights for the clone into the cgroup.
        let last = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP | CloneFlags::CLONE_NEWUSER;
        join(target.init, last)?;
        become_root()?;
    } else {
        join(target.init, CloneFlags::CLONE_NEWCGROUP)?;
    }
    let keep: Vec<BorrowedFd<'_>> = labels.fds().chain([control]).collect();
    stave_sys::close_all_but(&keep).at("process", || "close_range".to_owned())?;
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
    let ready = process::prepare(&root, process, labels, tty, bounding)?;
    let identity = &ready.identity;
    control::send_ready(control, identity.uid, identity.gid, &identity.groups, master)?;
    drop(terminal);
    process::execute(&ready, process)
}
