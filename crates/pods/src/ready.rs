//! A ready supervisor, as the daemon has it: a process that waits in a pod's namespaces for its pod.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use stave_supervisor_proto::v1 as proto;
use stave_supervisor_proto::v1::ready_packet::Body;
use stave_wire::WireError;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use crate::error::{Code, Error, Result};
use crate::launch::{Launch, argument, null, reap};
use crate::network::Prepared;
use crate::pods::{Inner, blocking};

/// It has namespaces to make, or a process to start; no more.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A process that becomes a pod's supervisor, once. It ends when this is dropped.
pub(crate) struct ReadySupervisor {
    socket: AsyncFd<OwnedFd>,
    /// What the network has of the pod to come.
    pub(crate) network: Option<Prepared>,
    ended: Option<JoinHandle<()>>,
}

impl ReadySupervisor {
    /// Starts one, and waits until its namespaces and its interface are there.
    pub(crate) async fn start(inner: &Arc<Inner>) -> Result<Self> {
        let pods = Arc::clone(inner);
        let (ours, pidfd) = blocking(move || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let (ours, theirs) =
                rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
                    .map_err(|e| Error::internal("socketpair", e))?;
            let null = null()?;
            let stderr = std::io::stderr();
            let mut argv = vec![argument(b"stave-pod")?, argument(b"--ready")?];
            for (key, value) in stave_spec::NETWORK_DEFAULTS {
                argv.extend([argument(b"--sysctl")?, argument(format!("{key}={value}").as_bytes())?]);
            }
            let (_, pidfd) = stave_sys::spawn(&stave_sys::SpawnArgs {
                exe: pods.settings.supervisor.as_fd(),
                argv: &argv,
                envp: &[],
                stdin: theirs.as_fd(),
                stdout: null.as_fd(),
                stderr: stderr.as_fd(),
                extra: &[],
                cgroup: None,
            })
            .map_err(|e| Error::internal("starting a ready supervisor", e))?;
            Ok((ours, pidfd))
        })
        .await?;
        let socket =
            crate::fd::watch(ours, Interest::READABLE).map_err(|e| Error::internal("ready supervisor", e))?;
        let mut ready = Self { socket, network: None, ended: reap(pidfd) };
        let netns = match ready.answer().await? {
            (Body::Ready(_), mut fds) if fds.len() == 1 => fds.remove(0),
            (other, _) => return Err(unexpected("Ready with one descriptor", &other)),
        };
        ready.network = inner.settings.network.prepare(netns).await?;
        Ok(ready)
    }

    /// It waits, and its interface is there: nobody has killed it or taken it apart.
    pub(crate) fn is_alive(&self) -> bool {
        self.is_waiting() && self.network.as_ref().is_none_or(Prepared::exists)
    }

    /// Nobody has killed it. Asks nothing of the network, where the kernel may hang.
    pub(crate) fn is_waiting(&self) -> bool {
        matches!(stave_wire::recv(self.socket.get_ref().as_fd()), Err(WireError::WouldBlock))
    }

    /// Makes it start a pod's supervisor. It listens already when this returns, and answers as soon as it is up.
    pub(crate) async fn become_supervisor(self, pod_id: &str, launch: &Launch) -> Result<()> {
        let dir = launch.dir.to_str().ok_or_else(|| {
            Error::new(Code::Internal, format!("pod directory {:?} is not UTF-8", launch.dir))
        })?;
        let request = proto::Become { pod_id: pod_id.to_owned(), dir: dir.to_owned() };
        let mut fds: Vec<BorrowedFd<'_>> = vec![launch.listener.as_fd(), launch.log.as_fd()];
        fds.extend(launch.cgroup.as_ref().map(|fd| fd.as_fd()));
        stave_wire::send(self.socket.get_ref().as_fd(), &request.encode_to_vec(), &fds)
            .map_err(|e| Error::internal("ready supervisor", e))?;
        match self.answer().await? {
            (Body::Became(became), mut fds) if fds.len() == 1 => {
                tracing::debug!(pod = pod_id, pid = became.pid, "supervisor started by a ready one");
                reap(fds.remove(0));
                Ok(())
            }
            (other, _) => Err(unexpected("Became with one descriptor", &other)),
        }
    }

    /// Ends it. Whoever waits for what this returns waits for its end.
    pub(crate) fn end(mut self) -> Option<JoinHandle<()>> {
        self.ended.take()
    }

    async fn answer(&self) -> Result<(Body, Vec<OwnedFd>)> {
        let failed = |e: &dyn std::fmt::Display| Error::internal("ready supervisor", e);
        let receive = async {
            loop {
                let mut guard = self.socket.readable().await.map_err(|e| failed(&e))?;
                match stave_wire::recv(self.socket.get_ref().as_fd()) {
                    Ok(Some(message)) => return Ok(message),
                    Ok(None) => return Err(failed(&"it has ended")),
                    Err(WireError::WouldBlock) => guard.clear_ready(),
                    Err(error) => return Err(failed(&error)),
                }
            }
        };
        let message = tokio::time::timeout(ANSWER_TIMEOUT, receive).await.map_err(|_| {
            Error::new(Code::DeadlineExceeded, format!("ready supervisor: no answer in {ANSWER_TIMEOUT:?}"))
        })??;
        let packet = proto::ReadyPacket::decode(message.payload.as_slice()).map_err(|e| failed(&e))?;
        match packet.body {
            Some(Body::Failure(failure)) => Err(failed(&failure.message)),
            Some(body) => Ok((body, message.fds)),
            None => Err(failed(&"an empty packet")),
        }
    }
}

fn unexpected(wanted: &str, body: &Body) -> Error {
    Error::new(Code::Internal, format!("ready supervisor: expected {wanted}, got {body:?}"))
}
