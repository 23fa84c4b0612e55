//! Attach: the streams of a running container, to a client.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use stave_streaming::{ExecSession, Process, ProcessInput, SessionError, Streams};
use stave_supervisor_proto::v1::{self as proto, packet, request};
use tokio::io::AsyncWrite;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use crate::console::Console;
use crate::error::{Code, Error, Result};
use crate::id::new_id;
use crate::metrics::Counters;
use crate::pod::Container;
use crate::pods::{Inner, Pods};
use crate::supervisor::{Supervisor, unexpected};

impl Pods {
    /// An attachment to a container, made once a client has come for it.
    ///
    /// Errors: NotFound, and FailedPrecondition when the container does not run.
    pub fn attach(&self, id: &str, streams: Streams) -> Result<Box<dyn ExecSession>> {
        let container = self.0.container(id).ok_or_else(|| Error::container_not_found(id))?;
        self.0.running(&container)?;
        Ok(Box::new(Session { inner: Arc::clone(&self.0), container, streams }))
    }
}

struct Session {
    inner: Arc<Inner>,
    container: Arc<Container>,
    streams: Streams,
}

impl ExecSession for Session {
    fn start(self: Box<Self>) -> BoxFuture<'static, std::result::Result<Process, SessionError>> {
        Box::pin(async move { self.run().await.map_err(|error| SessionError::new(error.message)) })
    }
}

impl Session {
    async fn run(self) -> Result<Process> {
        let Self { inner, container, streams } = self;
        let supervisor = inner.running(&container)?;
        let attach_id = new_id()?;
        Counters::add(&inner.counters.attach);
        let slow = supervisor.expect_drop(&attach_id);
        let expected = Expected { supervisor: Arc::clone(&supervisor), attach_id: attach_id.clone() };
        let call = request::Call::Attach(proto::Attach {
            attach_id,
            container_id: container.with(|record| record.id.clone()),
            stdin: streams.stdin,
            stdout: streams.stdout,
            stderr: streams.stderr,
        });
        let (attached, fds) = match supervisor.call(call, &[]).await? {
            (packet::Body::Attached(attached), fds) => (attached, fds),
            (other, _) => return Err(unexpected("Attached", &other)),
        };
        let mut fds = fds.into_iter();
        let mut next = |what: &str| {
            fds.next()
                .ok_or_else(|| Error::new(Code::Internal, format!("attach: the supervisor sent no {what}")))
        };
        let failed = |error: io::Error| Error::internal("streams of the container", error);

        let ends_input = container.with(|record| record.config.stdin_once && !record.config.tty);
        let (detach, detached) = oneshot::channel();
        let detach = if ends_input { None } else { Some(detach) };
        let (mut stdin, mut resize): (Option<ProcessInput>, _) = (None, None);
        if attached.terminal {
            let console = Console::new(next("terminal")?).map_err(failed)?;
            resize = streams.tty.then(|| console.resize());
            stdin = streams.stdin.then(|| Box::new(Input { to: Some(console), detach }) as _);
        } else if attached.stdin {
            let pipe = pipe::Sender::from_owned_fd(next("stdin")?).map_err(failed)?;
            stdin = Some(Box::new(Input { to: Some(pipe), detach }));
        }
        let mut output = |there: bool, what: &str| -> Result<Option<stave_streaming::ProcessOutput>> {
            if !there {
                return Ok(None);
            }
            let pipe = pipe::Receiver::from_owned_fd(next(what)?).map_err(failed)?;
            Ok(Some(Box::new(pipe)))
        };
        let stdout = output(attached.stdout, "stdout")?;
        let stderr = output(attached.stderr, "stderr")?;
        let exit = Box::pin(async move {
            let _expected = expected;
            tokio::select! {
                () = container.exited() => Ok(0),
                // Errors of both: their other end was dropped unused, and won't ever tell.
                Ok(()) = detached => Ok(0),
                Ok(()) = slow => Err(SessionError::new(
                    "detached: the client reads slower than the container writes, and the container does not wait",
                )),
            }
        });
        // To detach is to close the descriptors, which go with the process.
        Ok(Process { stdin, stdout, stderr, resize, exit, kill: Box::new(|| {}) })
    }
}

/// Withdraws [`Supervisor::expect_drop`].
struct Expected {
    supervisor: Arc<Supervisor>,
    attach_id: String,
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.supervisor.forget_attachment(&self.attach_id);
    }
}

/// The container's input. The end of the client's is the end of the container's with `stdin_once`: then this
/// holds the only write end. Else it detaches the client.
struct Input<T> {
    to: Option<T>,
    detach: Option<oneshot::Sender<()>>,
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Input<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.to {
            Some(to) => Pin::new(to).poll_write(cx, bytes),
            None => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.to = None;
        if let Some(detach) = self.detach.take() {
            // Nobody there: the container has ended.
            let _ = detach.send(());
        }
        Poll::Ready(Ok(()))
    }
}
