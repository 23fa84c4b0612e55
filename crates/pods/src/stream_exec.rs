//! Exec: a command in a running container, with its streams to a client.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::future::BoxFuture;
use rustix::pipe::PipeFlags;
use stave_streaming::{ExecSession, Process, SessionError, Streams};
use stave_supervisor_proto::v1::{self as proto, packet, request};
use tokio::net::unix::pipe;

use crate::console::Console;
use crate::error::{Code, Error, Result};
use crate::id::new_id;
use crate::metrics::Counters;
use crate::pod::Container;
use crate::pods::{Inner, Pods};
use crate::supervisor::{Supervisor, unexpected};

impl Pods {
    /// A command that runs in a container once a client has come for it.
    ///
    /// Errors: InvalidArgument, NotFound, and FailedPrecondition when the container does not run.
    pub fn exec(&self, id: &str, command: &[String], streams: Streams) -> Result<Box<dyn ExecSession>> {
        if command.first().is_none_or(String::is_empty) {
            return Err(Error::new(Code::InvalidArgument, format!("cmd {command:?}: names no program")));
        }
        let container = self.0.container(id).ok_or_else(|| Error::container_not_found(id))?;
        self.0.running(&container)?;
        Ok(Box::new(Session { inner: Arc::clone(&self.0), container, command: command.to_vec(), streams }))
    }
}

struct Session {
    inner: Arc<Inner>,
    container: Arc<Container>,
    command: Vec<String>,
    streams: Streams,
}

impl ExecSession for Session {
    fn start(self: Box<Self>) -> BoxFuture<'static, std::result::Result<Process, SessionError>> {
        Box::pin(async move { self.run().await.map_err(session_error) })
    }
}

impl Session {
    async fn run(self) -> Result<Process> {
        let Self { inner, container, command, streams } = self;
        let supervisor = inner.running(&container)?;
        let process = stave_spec::exec_process(&*inner.process(&container).await?, &command, streams.tty);
        let oci = inner.oci_process(&container, &command, streams.tty).await?;
        let (ours, theirs) = if streams.tty { (Ours::default(), None) } else { pipes(streams)? };
        let exec_id = new_id()?;
        Counters::add(&inner.counters.exec_stream);
        let exit = supervisor.expect_exec_exit(&exec_id);
        // From here on an error, or a future that is dropped, ends the process.
        let guard = ExecGuard::new(&supervisor, &exec_id);
        let call = request::Call::Exec(proto::Exec {
            exec_id,
            container_id: container.with(|record| record.id.clone()),
            process: Some(process),
            timeout_ms: 0,
            oci,
            reply_at_exit: false,
        });
        let fds: Vec<BorrowedFd<'_>> = theirs.iter().flatten().map(|fd| fd.as_fd()).collect();
        let mut received = match supervisor.call(call, &fds).await? {
            (packet::Body::ExecStarted(_), fds) => fds,
            (other, _) => return Err(unexpected("ExecStarted", &other)),
        };
        drop(fds);
        // Ours must go, or the pipes would never end.
        drop(theirs);
        let failed = |error: std::io::Error| Error::internal("streams of the command", error);
        let mut made = Process {
            stdin: None,
            stdout: None,
            stderr: None,
            resize: None,
            exit: {
                let guard = Arc::clone(&guard);
                Box::pin(async move {
                    let exit = exit
                        .await
                        .map_err(|_| SessionError::new("the pod's supervisor ended while the command ran"))?;
                    guard.disarm();
                    Ok(exit.exit_code)
                })
            },
            kill: Box::new(move || guard.kill()),
        };
        if streams.tty {
            let master = received
                .pop()
                .ok_or_else(|| Error::new(Code::Internal, "the supervisor sent no terminal"))?;
            let console = Console::new(master).map_err(failed)?;
            made.resize = Some(console.resize());
            made.stdin = streams.stdin.then(|| Box::new(console.clone()) as _);
            made.stdout = streams.stdout.then(|| Box::new(console) as _);
        } else {
            if let Some(fd) = ours.stdin {
                made.stdin = Some(Box::new(pipe::Sender::from_owned_fd(fd).map_err(failed)?));
            }
            if let Some(fd) = ours.stdout {
                made.stdout = Some(Box::new(pipe::Receiver::from_owned_fd(fd).map_err(failed)?));
            }
            if let Some(fd) = ours.stderr {
                made.stderr = Some(Box::new(pipe::Receiver::from_owned_fd(fd).map_err(failed)?));
            }
        }
        Ok(made)
    }
}

fn session_error(error: Error) -> SessionError {
    let told = SessionError::new(error.message);
    error.exit_code.map_or(told.clone(), |code| told.with_exit_code(code))
}

/// Our ends of the process's streams.
#[derive(Default)]
struct Ours {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// A pipe for each stream that the client wants, /dev/null for the others.
fn pipes(streams: Streams) -> Result<(Ours, Option<[OwnedFd; 3]>)> {
    let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|e| Error::internal("pipe", e));
    let null = || {
        let file = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null");
        file.map(OwnedFd::from).map_err(|e| Error::internal("/dev/null", e))
    };
    let mut ours = Ours::default();
    let output = |wanted: bool, ours: &mut Option<OwnedFd>| {
        if !wanted {
            return null();
        }
        let (reader, writer) = pipe()?;
        *ours = Some(reader);
        Ok(writer)
    };
    let stdout = output(streams.stdout, &mut ours.stdout)?;
    let stderr = output(streams.stderr, &mut ours.stderr)?;
    let stdin = if streams.stdin {
        let (reader, writer) = pipe()?;
        ours.stdin = Some(writer);
        reader
    } else {
        null()?
    };
    Ok((ours, Some([stdin, stdout, stderr])))
}

/// Ends an exec'd process and its descendants, unless it has ended by itself: nobody would read what it
/// prints, or take its exit code.
pub(crate) struct ExecGuard {
    supervisor: Arc<Supervisor>,
    exec_id: String,
    armed: AtomicBool,
}

impl ExecGuard {
    /// Make it once the exit is expected.
    pub(crate) fn new(supervisor: &Arc<Supervisor>, exec_id: &str) -> Arc<Self> {
        Arc::new(Self {
            supervisor: Arc::clone(supervisor),
            exec_id: exec_id.to_owned(),
            armed: AtomicBool::new(true),
        })
    }

    /// The process has ended.
    pub(crate) fn disarm(&self) {
        self.armed.store(false, Ordering::Release);
    }

    fn kill(&self) {
        if !self.armed.swap(false, Ordering::AcqRel) {
            return;
        }
        self.supervisor.forget_exec(&self.exec_id);
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (supervisor, exec_id) = (Arc::clone(&self.supervisor), self.exec_id.clone());
        runtime.spawn(async move {
            let call = request::Call::KillExec(proto::KillExec { exec_id: exec_id.clone() });
            if let Err(error) = supervisor.call_done(call).await {
                tracing::warn!(exec = exec_id, %error, "ending a command that nobody waits for");
            }
        });
    }
}

impl Drop for ExecGuard {
    fn drop(&mut self) {
        self.kill();
    }
}
