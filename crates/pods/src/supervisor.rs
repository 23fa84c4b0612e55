//! The daemon's end of the socket to one pod's supervisor.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use prost::Message as _;
use stave_supervisor_proto::v1 as proto;
use stave_supervisor_proto::v1::{packet, request};
use stave_wire::WireError;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use crate::error::{Code, Error, Result};
use crate::jobs::lock;

/// A supervisor answers at once or, for the set-up of a container, when the kernel has done its part. One
/// that says nothing for this long is stuck.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// One that runs answers a hello at once.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

type Reply = (packet::Body, Vec<OwnedFd>);

/// What a supervisor tells unasked. Called in order, on the reader's task: must not block.
pub(crate) trait Events: Send + Sync + 'static {
    /// A container's init has ended. True: recorded, and may be forgotten by the supervisor.
    fn container_exit(&self, exit: proto::ContainerExit) -> bool;
    /// The connection has ended: the supervisor is dead, or has taken a newer connection.
    fn closed(&self);
}

/// The supervisor's process, as its hello told.
struct Peer {
    pid: i32,
    pidfd: AsyncFd<OwnedFd>,
}

/// A connection to a supervisor.
pub(crate) struct Supervisor {
    socket: AsyncFd<OwnedFd>,
    process: OnceLock<Peer>,
    next_seq: AtomicU64,
    calls: Mutex<HashMap<u64, oneshot::Sender<Reply>>>,
    execs: Mutex<HashMap<String, oneshot::Sender<proto::ExecExit>>>,
    attachments: Mutex<HashMap<String, oneshot::Sender<()>>>,
    open: AtomicBool,
}

impl Supervisor {
    /// Connects to the supervisor that listens on `path`. Its events go to `events` from now on.
    pub(crate) async fn connect(path: &Path, events: Arc<dyn Events>) -> Result<Arc<Self>> {
        let supervisor = Self::open(path, events)?;
        let hello = supervisor.begin(hello(), &[]).await.map_err(|e| failed(path, &e))?;
        let greeted = tokio::time::timeout(HELLO_TIMEOUT, supervisor.greet(hello)).await;
        greeted
            .map_err(|_| failed(path, &format_args!("no answer to hello within {HELLO_TIMEOUT:?}")))?
            .map_err(|e| failed(path, &e))?;
        Ok(supervisor)
    }

    /// Like [`Self::connect`], with a first call that does not wait for the answer to the hello. Gives its reply, too.
    pub(crate) async fn connect_and_call(
        path: &Path,
        events: Arc<dyn Events>,
        call: request::Call,
    ) -> Result<(Arc<Self>, Result<Reply>)> {
        let supervisor = Self::open(path, events)?;
        let reply = {
            let hello = supervisor.begin(hello(), &[]).await.map_err(|e| failed(path, &e))?;
            let begun = supervisor.begin(call, &[]).await;
            supervisor.greet(hello).await.map_err(|e| failed(path, &e))?;
            match begun {
                Ok(begun) => begun.reply_in_time().await,
                Err(error) => Err(error),
            }
        };
        Ok((supervisor, reply))
    }

    fn open(path: &Path, events: Arc<dyn Events>) -> Result<Arc<Self>> {
        let failed = |e: &dyn std::fmt::Display| failed(path, e);
        let socket = stave_wire::connect(path).map_err(|e| failed(&e))?;
        let supervisor = Arc::new(Self {
            socket: crate::fd::watch(socket, Interest::READABLE | Interest::WRITABLE)
                .map_err(|e| failed(&e))?,
            process: OnceLock::new(),
            next_seq: AtomicU64::new(1),
            calls: Mutex::default(),
            execs: Mutex::default(),
            attachments: Mutex::default(),
            open: AtomicBool::new(true),
        });
        tokio::spawn(Arc::clone(&supervisor).read(events));
        Ok(supervisor)
    }

    /// Host pid, to be shown to people; never to be signalled. 0 when the supervisor did not tell.
    pub(crate) fn pid(&self) -> i32 {
        self.process.get().map_or(0, |peer| peer.pid)
    }

    /// The connection is up.
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    async fn greet(&self, hello: Call<'_>) -> Result<()> {
        match hello.reply_in_time().await? {
            (packet::Body::Hello(reply), mut fds) => {
                let Some(pidfd) = fds.pop() else {
                    return Err(Error::new(Code::Internal, "its hello came without a pidfd"));
                };
                let pidfd = crate::fd::watch(pidfd, Interest::READABLE)
                    .map_err(|e| Error::internal("watching its pidfd", e))?;
                let _ = self.process.set(Peer { pid: reply.pid, pidfd });
                Ok(())
            }
            (other, _) => Err(unexpected("Hello", &other)),
        }
    }

    /// Sends a request and waits for its reply. A failure that the supervisor reports is an error here.
    pub(crate) async fn call(&self, call: request::Call, fds: &[BorrowedFd<'_>]) -> Result<Reply> {
        self.begin(call, fds).await?.reply_in_time().await
    }

    /// Sends a request, and does not wait for its reply.
    pub(crate) async fn begin(&self, call: request::Call, fds: &[BorrowedFd<'_>]) -> Result<Call<'_>> {
        let seq = self.next_seq.fetch_add(1, Ordering::Relaxed);
        let (sender, reply) = oneshot::channel();
        lock(&self.calls).insert(seq, sender);
        let begun = Call { supervisor: self, seq, reply };
        // The reader drops all waiting calls when it ends; one that comes later must not wait for it.
        if !self.is_open() {
            return Err(closed_error());
        }
        self.send(&proto::Request { seq, call: Some(call) }.encode_to_vec(), fds).await?;
        Ok(begun)
    }

    /// Like [`Self::call`], for calls whose reply is Done.
    pub(crate) async fn call_done(&self, call: request::Call) -> Result<()> {
        match self.call(call, &[]).await? {
            (packet::Body::Done(_), _) => Ok(()),
            (other, _) => Err(unexpected("Done", &other)),
        }
    }

    /// Registers for the exit of an exec, before it is started.
    pub(crate) fn expect_exec_exit(&self, exec_id: &str) -> oneshot::Receiver<proto::ExecExit> {
        let (sender, receiver) = oneshot::channel();
        lock(&self.execs).insert(exec_id.to_owned(), sender);
        receiver
    }

    /// Withdraws [`Self::expect_exec_exit`].
    pub(crate) fn forget_exec(&self, exec_id: &str) {
        lock(&self.execs).remove(exec_id);
    }

    /// Registers for the case that an attachment is dropped since it reads too slowly, before it is made. Told
    /// at most once; nothing is told when the connection ends.
    pub(crate) fn expect_drop(&self, attach_id: &str) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        lock(&self.attachments).insert(attach_id.to_owned(), sender);
        receiver
    }

    /// Withdraws [`Self::expect_drop`].
    pub(crate) fn forget_attachment(&self, attach_id: &str) {
        lock(&self.attachments).remove(attach_id);
    }

    /// Waits until the process has ended.
    pub(crate) async fn ended(&self) {
        let Some(peer) = self.process.get() else { return };
        // A pidfd is readable from the end of its process on; that is never cleared.
        if let Err(error) = peer.pidfd.readable().await {
            tracing::warn!(pid = peer.pid, %error, "waiting for a supervisor's pidfd");
        }
    }

    /// Kills the supervisor itself. What runs in the pod is killed by its cgroup.
    pub(crate) fn kill(&self) {
        let Some(peer) = self.process.get() else { return };
        match rustix::process::pidfd_send_signal(peer.pidfd.get_ref(), rustix::process::Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => tracing::warn!(pid = peer.pid, %error, "killing a supervisor"),
        }
    }

    async fn send(&self, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let socket = self.socket.get_ref().as_fd();
        let failed = |error| Error::internal("sending to the supervisor", error);
        // There is nearly always room: to ask the reactor first is a detour for a socket just connected.
        match stave_wire::send(socket, payload, fds) {
            Err(WireError::WouldBlock) => {}
            done => return done.map_err(failed),
        }
        loop {
            let mut guard =
                self.socket.writable().await.map_err(|e| Error::internal("supervisor socket", e))?;
            match stave_wire::send(socket, payload, fds) {
                Err(WireError::WouldBlock) => guard.clear_ready(),
                done => return done.map_err(failed),
            }
        }
    }

    async fn read(self: Arc<Self>, events: Arc<dyn Events>) {
        loop {
            match self.receive().await {
                Ok(Some((packet, fds))) => self.dispatch(packet, fds, events.as_ref()).await,
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(pid = self.pid(), %error, "supervisor connection");
                    break;
                }
            }
        }
        self.open.store(false, Ordering::Release);
        lock(&self.calls).clear();
        lock(&self.execs).clear();
        lock(&self.attachments).clear();
        events.closed();
    }

    async fn receive(&self) -> Result<Option<(proto::Packet, Vec<OwnedFd>)>> {
        loop {
            let mut guard =
                self.socket.readable().await.map_err(|e| Error::internal("supervisor socket", e))?;
            match stave_wire::recv(self.socket.get_ref().as_fd()) {
                Ok(Some(message)) => {
                    let packet = proto::Packet::decode(message.payload.as_slice())
                        .map_err(|e| Error::internal("supervisor packet", e))?;
                    return Ok(Some((packet, message.fds)));
                }
                Ok(None) => return Ok(None),
                Err(WireError::WouldBlock) => guard.clear_ready(),
                Err(error) => return Err(Error::internal("receiving from the supervisor", error)),
            }
        }
    }

    async fn dispatch(&self, packet: proto::Packet, fds: Vec<OwnedFd>, events: &dyn Events) {
        match packet.body {
            Some(packet::Body::ContainerExit(exit)) if packet.seq == 0 => {
                let container_id = exit.container_id.clone();
                if events.container_exit(exit) {
                    let call = request::Call::AckExit(proto::AckExit { container_id });
                    let seq = self.next_seq.fetch_add(1, Ordering::Relaxed);
                    // Nobody waits for the reply: an exit that is not acknowledged is told again.
                    let payload = proto::Request { seq, call: Some(call) }.encode_to_vec();
                    if let Err(error) = self.send(&payload, &[]).await {
                        tracing::debug!(pid = self.pid(), %error, "acknowledging an exit");
                    }
                }
            }
            Some(packet::Body::ExecExit(exit)) if packet.seq == 0 => {
                if let Some(waiter) = lock(&self.execs).remove(&exit.exec_id) {
                    let _ = waiter.send(exit);
                }
            }
            Some(packet::Body::AttachmentDropped(dropped)) if packet.seq == 0 => {
                tracing::warn!(container = dropped.container_id, "an attached client reads too slowly");
                if let Some(waiter) = lock(&self.attachments).remove(&dropped.attach_id) {
                    let _ = waiter.send(());
                }
            }
            Some(body) => {
                if let Some(waiter) = lock(&self.calls).remove(&packet.seq) {
                    let _ = waiter.send((body, fds));
                }
            }
            None => tracing::warn!(pid = self.pid(), seq = packet.seq, "empty packet from a supervisor"),
        }
    }
}

/// A request that was sent. Dropped, its reply is ignored.
pub(crate) struct Call<'a> {
    supervisor: &'a Supervisor,
    seq: u64,
    reply: oneshot::Receiver<Reply>,
}

impl Call<'_> {
    /// Waits for the reply.
    pub(crate) async fn reply_in_time(self) -> Result<Reply> {
        let pid = self.supervisor.pid();
        tokio::time::timeout(REPLY_TIMEOUT, self.reply()).await.unwrap_or_else(|_| {
            Err(Error::new(
                Code::DeadlineExceeded,
                format!("supervisor (pid {pid}): no reply within {REPLY_TIMEOUT:?}"),
            ))
        })
    }

    /// Waits for the reply, without a limit.
    pub(crate) async fn reply(mut self) -> Result<Reply> {
        match (&mut self.reply).await {
            Ok((packet::Body::Failure(failure), _)) => Err(failure_error(&failure)),
            Ok(reply) => Ok(reply),
            Err(_) => Err(closed_error()),
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        lock(&self.supervisor.calls).remove(&self.seq);
    }
}

fn hello() -> request::Call {
    request::Call::Hello(proto::Hello { version: stave_supervisor_proto::VERSION })
}

fn failed(path: &Path, error: &dyn std::fmt::Display) -> Error {
    Error::internal(format_args!("supervisor {}", path.display()), error)
}

fn closed_error() -> Error {
    Error::new(Code::Internal, "the pod's supervisor has ended")
}

pub(crate) fn unexpected(wanted: &str, body: &packet::Body) -> Error {
    Error::new(Code::Internal, format!("supervisor: expected {wanted}, got {body:?}"))
}

fn failure_error(failure: &proto::Failure) -> Error {
    use proto::failure::Kind;
    let code = match failure.kind() {
        Kind::Internal => Code::Internal,
        Kind::InvalidArgument => Code::InvalidArgument,
        Kind::NotFound => Code::NotFound,
        Kind::FailedPrecondition => Code::FailedPrecondition,
        Kind::ResourceExhausted => Code::ResourceExhausted,
    };
    let exit_code = Some(failure.exit_code).filter(|code| *code != 0);
    Error { exit_code, ..Error::new(code, failure.message.clone()) }
}
