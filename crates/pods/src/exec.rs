//! ExecSync: a command in a running container, and all that it prints.

use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use prost::Message as _;
use rustix::pipe::PipeFlags;
use stave_supervisor_proto::v1::{self as proto, packet, request};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe::Receiver;

use crate::create::PLAN;
use crate::error::{Code, Error, Result};
use crate::id::new_id;
use crate::metrics::Counters;
use crate::pod::Container;
use crate::pods::{Inner, Pods, blocking};
use crate::stream_exec::ExecGuard;
use crate::supervisor::unexpected;

/// Most bytes that are kept of stdout and stderr together: what fits into the 16 MiB that clients of the CRI
/// take as one message. The rest is read and dropped, so that the command goes on.
pub const OUTPUT_MAX: usize = (16 << 20) - 1024;

/// For output that is on its way when the command ends. Descendants that keep the pipe open are not waited for.
const DRAIN: Duration = Duration::from_millis(500);

/// The supervisor ends a command that runs out of time; it has this long to say so.
const GRACE: Duration = Duration::from_secs(10);

/// Most bytes of a plan: the limit of the supervisor's socket.
const PLAN_MAX: u64 = 16 << 20;

/// What a command printed, and how it ended.
#[derive(Clone, Debug, Default)]
pub struct ExecOutput {
    /// With `stderr` at most [`OUTPUT_MAX`] bytes.
    pub stdout: Vec<u8>,
    /// See `stdout`.
    pub stderr: Vec<u8>,
    /// Exit status, or 128 + signal.
    pub exit_code: i32,
}

impl Pods {
    /// Runs a command in a container and waits for its end. `timeout` zero: for ever.
    ///
    /// Errors: DeadlineExceeded when the time was over; the command and its descendants are dead then.
    pub async fn exec_sync(&self, id: &str, command: &[String], timeout: Duration) -> Result<ExecOutput> {
        if command.first().is_none_or(String::is_empty) {
            return Err(Error::new(Code::InvalidArgument, format!("cmd {command:?}: names no program")));
        }
        let container = self.0.container(id).ok_or_else(|| Error::container_not_found(id))?;
        let supervisor = self.0.running(&container)?;
        let process = stave_spec::exec_process(&*self.0.process(&container).await?, command, false);
        let oci = self.0.oci_process(&container, command, false).await?;
        let exec_id = new_id()?;
        Counters::add(&self.0.counters.exec_sync);

        let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|e| Error::internal("pipe", e));
        let (stdout, stdout_end) = pipe()?;
        let (stderr, stderr_end) = pipe()?;
        let stdin: OwnedFd =
            std::fs::File::open("/dev/null").map_err(|e| Error::internal("/dev/null", e))?.into();
        let exit = supervisor.expect_exec_exit(&exec_id);
        // A request whose client has gone is dropped here, at any await.
        let guard = ExecGuard::new(&supervisor, &exec_id);
        let call = request::Call::Exec(proto::Exec {
            exec_id: exec_id.clone(),
            container_id: container.with(|record| record.id.clone()),
            process: Some(process),
            timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
            oci,
            reply_at_exit: true,
        });
        let call = supervisor.begin(call, &[stdin.as_fd(), stdout_end.as_fd(), stderr_end.as_fd()]).await?;
        // Ours must go, or the pipes would never end.
        drop((stdin, stdout_end, stderr_end));

        let room = AtomicUsize::new(OUTPUT_MAX);
        let mut out = Reading::new(stdout, &room)?;
        let mut err = Reading::new(stderr, &room)?;
        let limit = if timeout.is_zero() { Duration::MAX } else { timeout.saturating_add(GRACE) };
        let ended = async {
            match call.reply().await? {
                (packet::Body::ExecExit(exit), _) => Ok(exit),
                // By an OCI runtime, or an older supervisor: the exit is an event.
                (packet::Body::ExecStarted(_), _) => exit.await.map_err(|_| {
                    Error::new(Code::Internal, "the pod's supervisor ended while the command ran")
                }),
                (other, _) => Err(unexpected("ExecExit", &other)),
            }
        };
        let waited = tokio::time::timeout(limit, async {
            let reading = async { tokio::join!(out.read(), err.read()) };
            tokio::pin!(reading, ended);
            let mut open = true;
            let exit = loop {
                tokio::select! {
                    exit = &mut ended => break exit,
                    _ = &mut reading, if open => open = false,
                }
            };
            if open && exit.is_ok() {
                let _ = tokio::time::timeout(DRAIN, reading).await;
            }
            exit
        })
        .await;
        supervisor.forget_exec(&exec_id);
        let exit = match waited {
            Ok(exit) => exit?,
            Err(_) => {
                return Err(Error::new(
                    Code::DeadlineExceeded,
                    format!("cmd {command:?}: the supervisor did not end it within {GRACE:?} of its timeout"),
                ));
            }
        };
        guard.disarm();
        if exit.timed_out {
            return Err(Error::new(
                Code::DeadlineExceeded,
                format!("cmd {command:?}: did not end within {timeout:?}, and was killed"),
            ));
        }
        Ok(ExecOutput { stdout: out.kept, stderr: err.kept, exit_code: exit.exit_code })
    }
}

impl Inner {
    /// The container's own process, after which others in it are made.
    pub(crate) async fn process(&self, container: &Container) -> Result<Arc<proto::Process>> {
        if let Some(process) = container.process.get() {
            return Ok(Arc::clone(process));
        }
        let path = container.with(|record| self.bundle_dir(&record.pod_id, &record.id).join(PLAN));
        // One trip to another thread; tokio's files make one for each step.
        let plan = blocking(move || {
            let failed =
                |e: &dyn std::fmt::Display| Error::internal(format_args!("plan {}", path.display()), e);
            let mut bytes = Vec::new();
            let file = std::fs::File::open(&path).map_err(|e| failed(&e))?;
            file.take(PLAN_MAX).read_to_end(&mut bytes).map_err(|e| failed(&e))?;
            proto::Plan::decode(bytes.as_slice()).map_err(|e| failed(&e))
        })
        .await?;
        let process = Arc::new(plan.process.unwrap_or_default());
        Ok(Arc::clone(container.process.get_or_init(|| process)))
    }
}

/// One output stream of a command.
struct Reading<'a> {
    pipe: Receiver,
    kept: Vec<u8>,
    /// Bytes that may still be kept, of both streams.
    room: &'a AtomicUsize,
}

impl<'a> Reading<'a> {
    fn new(pipe: OwnedFd, room: &'a AtomicUsize) -> Result<Self> {
        let pipe = Receiver::from_owned_fd(pipe).map_err(|e| Error::internal("pipe", e))?;
        Ok(Self { pipe, kept: Vec::new(), room })
    }

    /// Until the last writer has closed it. May be dropped at any await without loss.
    async fn read(&mut self) {
        let mut chunk = Vec::with_capacity(16 << 10);
        while let Ok(n @ 1..) = self.pipe.read_buf(&mut chunk).await {
            // One task reads both streams, so nobody takes the room in between.
            let keep = n.min(self.room.load(Ordering::Relaxed));
            self.room.fetch_sub(keep, Ordering::Relaxed);
            self.kept.extend_from_slice(&chunk[..keep]);
            chunk.clear();
        }
    }
}
