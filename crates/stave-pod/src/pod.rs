//! The pod: its namespaces and, where containers share a PID namespace, its init.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use stave_executor::{OwnNamespaces, PodInit, PodInitLabels, PodNamespaces};
use stave_supervisor_proto::v1::{Failure, SetUpPod};

use crate::event_loop::{EventLoop, Source, Watch};
use crate::{failure, loopback, sysctl};

/// Longest name of a host (`__NEW_UTS_LEN`).
const MAX_HOSTNAME: usize = 64;

/// What SetUpPod made.
#[derive(Debug, Default)]
pub(crate) struct Pod {
    stage: Stage,
    /// This process was started in namespaces that were made for the pod.
    in_namespaces: bool,
    network_namespace: Option<OwnedFd>,
    namespaces: PodNamespaces,
    init: Option<(PodInit, Watch)>,
    init_labels: PodInitLabels,
}

#[derive(Debug, Default, PartialEq)]
enum Stage {
    #[default]
    New,
    /// Done, for this request.
    SetUp(Box<SetUpPod>),
    /// It failed half-way: this supervisor is of no use.
    Broken,
}

impl Pod {
    pub(crate) fn new(in_namespaces: bool) -> Self {
        Self { in_namespaces, ..Self::default() }
    }

    /// SetUpPod was done.
    pub(crate) fn is_set_up(&self) -> bool {
        matches!(self.stage, Stage::SetUp(_))
    }

    /// The namespaces that its processes are in, and this one is not.
    pub(crate) fn namespaces(&self) -> &PodNamespaces {
        &self.namespaces
    }

    /// The PID namespace that the pod's containers share, while its init lives.
    pub(crate) fn pid_namespace(&self) -> Option<BorrowedFd<'_>> {
        self.init.as_ref().map(|(init, _)| init.pid_ns.as_fd())
    }

    /// Makes that PID namespace unless it is there.
    pub(crate) fn make_pid_namespace(&mut self, events: &EventLoop) -> Result<(), Failure> {
        if self.init.is_none() {
            let init = self.namespaces.init(&self.init_labels).map_err(|error| failure::executor(&error))?;
            let watch = events.watch_end(init.pidfd.as_fd(), Source::PodInit).map_err(|errno| {
                // Unwatched, it is a stray: killed here and reaped as such.
                let _ = rustix::process::pidfd_send_signal(&init.pidfd, rustix::process::Signal::KILL);
                failure::system("watch the pod's init", errno)
            })?;
            self.init = Some((init, watch));
        }
        Ok(())
    }

    /// The pod's init: its pid, to recognise it when it has ended, and its pidfd.
    pub(crate) fn init(&self) -> Option<(i32, BorrowedFd<'_>)> {
        self.init.as_ref().map(|(init, _)| (init.pid, init.pidfd.as_fd()))
    }

    /// The pod's init has been reaped.
    pub(crate) fn init_ended(&mut self) {
        self.init = None;
    }

    /// Makes the namespaces, once. A repeat of the same request, from a daemon that lost the
    /// reply, is answered again. Gives the pod's network namespace.
    pub(crate) fn set_up(&mut self, request: SetUpPod, events: &EventLoop) -> Result<OwnedFd, Failure> {
        match &self.stage {
            Stage::New => {}
            Stage::SetUp(earlier) if **earlier == request => return self.network_namespace(),
            Stage::SetUp(_) => {
                return Err(failure::precondition("the pod is set up already, in another way"));
            }
            Stage::Broken => return Err(failure::precondition("an earlier set-up of the pod failed")),
        }
        check(&request)?;
        let own = [request.new_network_namespace, request.new_ipc_namespace, request.new_uts_namespace];
        if self.in_namespaces && own.contains(&false) {
            return Err(failure::precondition(
                "the pod shall use namespaces of the node, and has its own already",
            ));
        }
        if self.in_namespaces && request.user_namespace.is_some() {
            return Err(failure::precondition(
                "the pod shall have a user namespace, and its others belong to the node's already",
            ));
        }
        self.stage = Stage::Broken;
        self.namespaces = enter_namespaces(&request, self.in_namespaces)?;
        let network_namespace =
            rustix::fs::openat(CWD, "/proc/self/ns/net", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|errno| failure::system("open /proc/self/ns/net", errno))?;
        self.network_namespace = Some(network_namespace);
        self.init_labels = PodInitLabels {
            process: request.selinux_process_label.clone(),
            root: request.selinux_file_label.clone(),
        };
        if request.pod_pid_namespace {
            self.make_pid_namespace(events)?;
        }
        self.stage = Stage::SetUp(Box::new(request));
        self.network_namespace()
    }

    fn network_namespace(&self) -> Result<OwnedFd, Failure> {
        let fd = self.network_namespace.as_ref().ok_or_else(|| failure::internal("no network namespace"))?;
        fd.try_clone().map_err(|error| failure::io("copy the descriptor of the network namespace", &error))
    }
}

fn check(request: &SetUpPod) -> Result<(), Failure> {
    let hostname = &request.hostname;
    if hostname.len() > MAX_HOSTNAME || hostname.contains('\0') {
        return Err(failure::invalid(format!(
            "hostname {hostname:?} is longer than {MAX_HOSTNAME} bytes or has a NUL"
        )));
    }
    // It would have no rights in the node's, and could mount neither sysfs nor mqueue.
    let all_own = request.new_network_namespace && request.new_ipc_namespace && request.new_uts_namespace;
    if request.user_namespace.is_some() && !all_own {
        return Err(failure::invalid(
            "a user namespace needs network, IPC and UTS namespaces of the pod's own",
        ));
    }
    sysctl::check(request)
}

fn enter_namespaces(request: &SetUpPod, made: bool) -> Result<PodNamespaces, Failure> {
    let errno = |error: nix::Error| Errno::from_raw_os_error(error as i32);
    // Those that were made by a ready supervisor have lo up.
    let own = OwnNamespaces {
        network: request.new_network_namespace && !made,
        ipc: request.new_ipc_namespace && !made,
        uts: request.new_uts_namespace && !made,
    };
    let (user, time) = (request.user_namespace.as_ref(), request.time_namespace.as_ref());
    let namespaces = PodNamespaces::enter(own, user, time).map_err(|error| failure::executor(&error))?;
    // A pod in the node's UTS namespace may have a hostname in its request; it is not set.
    if request.new_uts_namespace && !request.hostname.is_empty() {
        nix::unistd::sethostname(&request.hostname)
            .map_err(|error| failure::system(format!("set hostname {:?}", request.hostname), errno(error)))?;
    }
    if request.new_network_namespace && !made {
        loopback::set_up().map_err(|errno| failure::system("set the link lo up", errno))?;
    }
    sysctl::write_all(&request.sysctls)?;
    Ok(namespaces)
}
