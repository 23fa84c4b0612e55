//! A ready supervisor: `stave-pod --ready`. It makes the namespaces of a pod to come and waits in them. Told which pod
//! it is for, it starts that pod's supervisor there and ends; told nothing, it ends with the daemon.
//!
//! The supervisor is a new process, and not this one: so it starts in the pod's cgroup, where a process that runs could
//! only be moved (which waits for RCU), it has its arguments in its command line, and nothing that went before is in it.

use std::convert::Infallible;
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::sched::{CloneFlags, unshare};
use prost::Message as _;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use stave_supervisor_proto::v1::ready_packet::Body;
use stave_supervisor_proto::v1::{Became, Become, Failure, Ready, ReadyPacket};
use stave_sys::{Fork, ForkArgs};
use stave_wire::WireError;

use crate::process::{self, Fatal};
use crate::{args, failure, ids, loopback, sysctl};

/// What makes a pod's namespaces, all of its own: SetUpPod finds them made.
pub(crate) const NAMESPACES: CloneFlags =
    CloneFlags::CLONE_NEWNET.union(CloneFlags::CLONE_NEWIPC).union(CloneFlags::CLONE_NEWUTS);

/// Makes the namespaces, with these sysctls, and waits for its pod. Ends without one when the daemon has closed its end.
pub(crate) fn run(sysctls: &[(String, String)]) -> Result<(), Fatal> {
    let socket = process::prepare_ready()?;
    let network_namespace = match make_namespaces(sysctls) {
        Ok(network_namespace) => network_namespace,
        Err(failure) => return send(&socket, Body::Failure(failure), None),
    };
    send(&socket, Body::Ready(Ready {}), Some(network_namespace))?;
    let message = loop {
        match stave_wire::recv(socket.as_fd()) {
            Ok(Some(message)) => break message,
            // Nobody needs it any more.
            Ok(None) | Err(WireError::Closed) => return Ok(()),
            Err(WireError::WouldBlock) => {}
            Err(error) => return Err(Fatal::Wire("receive Become", error)),
        }
        match rustix::event::poll(&mut [PollFd::new(&socket, PollFlags::IN)], None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(Fatal::system("poll")(errno)),
        }
    };
    let answer = Become::decode(&message.payload[..])
        .map_err(|error| failure::invalid(format!("malformed Become: {error}")))
        .and_then(|request| start(&request, message.fds));
    match answer {
        Ok((became, pidfd)) => send(&socket, Body::Became(became), Some(pidfd)),
        Err(failure) => send(&socket, Body::Failure(failure), None),
    }
}

fn send(socket: &OwnedFd, body: Body, fd: Option<OwnedFd>) -> Result<(), Fatal> {
    let packet = ReadyPacket { body: Some(body) }.encode_to_vec();
    let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
    match stave_wire::send(socket.as_fd(), &packet, &fds) {
        // The daemon is gone, and so is the need.
        Ok(()) | Err(WireError::Closed) => Ok(()),
        Err(error) => Err(Fatal::Wire("send to the daemon", error)),
    }
}

fn make_namespaces(sysctls: &[(String, String)]) -> Result<OwnedFd, Failure> {
    unshare(NAMESPACES).map_err(|error| {
        failure::system(format!("unshare {NAMESPACES:?}"), Errno::from_raw_os_error(error as i32))
    })?;
    loopback::set_up().map_err(|errno| failure::system("set the link lo up", errno))?;
    sysctl::write_all(sysctls.iter().map(|(key, value)| (key, value)))?;
    rustix::fs::openat(CWD, "/proc/self/ns/net", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| failure::system("open /proc/self/ns/net", errno))
}

/// Starts the pod's supervisor as a child of the daemon.
fn start(request: &Become, fds: Vec<OwnedFd>) -> Result<(Became, OwnedFd), Failure> {
    ids::check("pod_id", &request.pod_id)?;
    if !Path::new(&request.dir).is_absolute() {
        return Err(failure::invalid(format!("dir {:?} is not an absolute path", request.dir)));
    }
    let mut fds = fds.into_iter();
    let (Some(listener), Some(log)) = (fds.next(), fds.next()) else {
        return Err(failure::invalid("Become came without listening socket and log"));
    };
    let cgroup = fds.next();
    let argument =
        |text: &str| CString::new(text).map_err(|_| failure::invalid(format!("{text:?} has a NUL")));
    let argv = [
        argument("stave-pod")?,
        argument("--id")?,
        argument(&request.pod_id)?,
        argument("--dir")?,
        argument(&request.dir)?,
        argument(args::IN_NAMESPACES)?,
    ];
    // Of the sealed copy that this process runs: no file that anybody could have changed since.
    let program = rustix::fs::openat(CWD, "/proc/self/exe", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| failure::system("open /proc/self/exe", errno))?;
    let fork = ForkArgs { namespaces: 0, cgroup: cgroup.as_ref().map(AsFd::as_fd), sibling: true };
    match stave_sys::fork(&fork).map_err(|error| failure::io("start the supervisor", &error))? {
        Fork::Parent { pid, pidfd } => Ok((Became { pid }, pidfd)),
        Fork::Child => {
            // Its end tells the daemon, in its log what it was; descriptor 1 is /dev/null already.
            let Err(errno) = become_supervisor(&listener, &log, &program, &argv);
            crate::report::report!("start the supervisor: {errno}");
            std::process::exit(1)
        }
    }
}

fn become_supervisor(
    listener: &OwnedFd,
    log: &OwnedFd,
    program: &OwnedFd,
    argv: &[CString],
) -> Result<Infallible, nix::Error> {
    let errno = |errno: Errno| nix::Error::from_raw(errno.raw_os_error());
    rustix::stdio::dup2_stderr(log).map_err(errno)?;
    rustix::stdio::dup2_stdin(listener).map_err(errno)?;
    let environment: [CString; 0] = [];
    nix::unistd::execveat(program, c"", argv, &environment, nix::fcntl::AtFlags::AT_EMPTY_PATH)
}
