//! PID 1 of a PID namespace that a pod's containers share.
//!
//! It reaps, and does nothing else. Containers see it, so there is nothing to find in it: an empty
//! root, no descriptors but a closed stdio, no capabilities, not dumpable.

use std::convert::Infallible;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use rustix::fs::{CWD, OFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, move_mount};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use stave_paths::open_own_proc;
use stave_supervisor_proto::v1::failure::Kind;
use stave_supervisor_proto::v1::{Process, Propagation};
use stave_sys::{Fork, ForkArgs};

use crate::control;
use crate::error::{Context, Error, Result};
use crate::init::fork_in;
use crate::mounts::new_file_system;
use crate::pod_namespaces::{PodNamespaces, fork_inside};
use crate::{PodInit, PodInitLabels, Report, oom_score, process, rootfs};

const STAGE: &str = "pod init";

/// See [`crate::pod_init`].
pub(crate) fn pod_init(pod: &PodNamespaces, labels: &PodInitLabels) -> Result<PodInit> {
    let (ours, theirs) = control::pair()?;
    let namespaces = CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS;
    let (pid, pidfd) = match &pod.user {
        None => {
            let args = ForkArgs { namespaces: namespaces.bits() as u64, ..ForkArgs::default() };
            match fork_in(None, &args)? {
                Fork::Child => process::run_child(theirs.as_fd(), || {
                    prepare(pod, &[theirs.as_fd()])?;
                    run(theirs.as_fd(), labels)
                }),
                Fork::Parent { pid, pidfd } => (pid, pidfd),
            }
        }
        Some(user) => {
            let control = theirs.as_fd();
            let prepare = |handover: BorrowedFd<'_>| prepare(pod, &[control, handover, user.fd()]);
            fork_inside(user, None, namespaces, control, prepare, |_: &()| run(control, labels))?
        }
    };
    drop(theirs);
    match started(pid, &ours) {
        Ok(pid_ns) => Ok(PodInit { pid, pidfd, pid_ns }),
        Err(error) => {
            let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
            let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
            Err(error)
        }
    }
}

/// With the rights of the node's root.
fn prepare(pod: &PodNamespaces, keep: &[BorrowedFd<'_>]) -> Result<()> {
    let keep: Vec<BorrowedFd<'_>> = keep.iter().copied().chain(pod.time_fd()).collect();
    process::isolate(None, &keep)?;
    // With the /proc of the host, so before the mount namespace is the container's.
    let process = Process::default();
    oom_score::set(&process)?;
    process::own_keyring(&process);
    pod.join_time()
}

/// Waits until it is set up: nothing in there waits for anything but the kernel.
fn started(pid: i32, control: &OwnedFd) -> Result<OwnedFd> {
    // Ours until we wait for it, so the number can't be another process.
    let path = format!("/proc/{pid}/ns/pid");
    let pid_ns = File::open(&path).at(STAGE, || path.clone())?;
    let mut fds = [rustix::event::PollFd::new(control, rustix::event::PollFlags::IN)];
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, None)).at(STAGE, || "poll".to_owned())?;
    match control::receive_report(control.as_fd())? {
        // Its end of the socket is the last that it closes.
        Some(Report::Ready { .. }) => control::wait_many(control.as_fd()).map(|_| pid_ns.into()),
        Some(Report::Failed(error)) => Err(error),
        _ => Err(Error::new(STAGE, Kind::Internal, "ended during its set-up")),
    }
}

fn run(control: BorrowedFd<'_>, labels: &PodInitLabels) -> Result<Infallible> {
    stave_sys::close_all_but(&[control]).at(STAGE, || "close_range".to_owned())?;
    rustix::thread::set_name(c"pod-init").at(STAGE, || "name".to_owned())?;
    let mut options = vec!["mode=755".to_owned(), "nr_inodes=1".to_owned()];
    if !labels.root.is_empty() {
        options.push(format!("context={}", labels.root));
    }
    let label = match labels.process.as_str() {
        "" => None,
        label => open_own_proc(Path::new("attr/current"), OFlags::WRONLY).ok().map(|file| (file, label)),
    };
    rootfs::leave_host_propagation()?;
    let root = new_file_system("tmpfs", "tmpfs", &options, 1)?;
    move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .at(STAGE, || "move_mount".to_owned())?;
    rootfs::pivot(root.as_fd(), Propagation::Private)?;
    drop(root);
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).at(STAGE, || "capset".to_owned())?;
    rustix::thread::set_no_new_privs(true).at(STAGE, || "no_new_privs".to_owned())?;
    // It holds the namespace for the supervisor and goes with it, whatever cgroup they are in. After the
    // change of credentials, which may clear it; a supervisor that is gone already fails `send_ready`.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .at(STAGE, || "PR_SET_PDEATHSIG".to_owned())?;
    // Blocked, so that one that comes between the last waitid and sigwait is not lost.
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&children), None).at(STAGE, || "sigprocmask".to_owned())?;
    control::send_ready(control, 0, 0, &[], None)?;
    // Last, since it may not even use the socket then. Containers are to see what is theirs; where the policy
    // won't have it they see less, and it is as harmless.
    if let Some((file, label)) = label {
        let _ = rustix::io::write(&file, label.as_bytes());
    }
    stave_sys::close_all().at(STAGE, || "close_range".to_owned())?;
    loop {
        match waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(Some(_)) | Err(Errno::INTR) => continue,
            Ok(None) | Err(Errno::CHILD) => {}
            Err(e) => return Err(Error::os(STAGE, "waitid", e)),
        }
        let _ = children.wait();
    }
}
