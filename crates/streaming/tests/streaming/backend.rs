//! What stands in for the daemon: real processes and real TCP servers.

use std::{
    fs::File,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use futures::future::{BoxFuture, FutureExt};
use nix::pty::openpty;
use rustix::{
    process::{Pid, Signal, kill_process_group, test_kill_process_group},
    termios::{Winsize, tcsetwinsize},
};
use stave_streaming::{Config, ExecSession, PortForwardSession, Process, Server, SessionError, Timeouts};
use tokio::{
    net::TcpStream,
    process::Command,
    task::JoinHandle,
    time::{Duration, sleep},
};
use tokio_util::sync::CancellationToken;

/// A server that stops with the test.
pub(crate) struct Running {
    pub(crate) server: Arc<Server>,
    pub(crate) stop: CancellationToken,
    pub(crate) task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

pub(crate) async fn serve() -> Running {
    serve_with(Timeouts::default()).await
}

pub(crate) async fn serve_with(timeouts: Timeouts) -> Running {
    let mut config = Config::new([127, 0, 0, 1].into(), 0);
    config.timeouts = timeouts;
    serve_config(config).await
}

pub(crate) async fn serve_config(config: Config) -> Running {
    let server = Arc::new(Server::bind(config).await.unwrap());
    let stop = CancellationToken::new();
    let task = tokio::spawn(server.clone().serve(stop.clone().cancelled_owned()));
    Running { server, stop, task }
}

/// Runs a script with the shell, in a process group of its own.
pub(crate) struct Shell {
    script: String,
    tty: bool,
    group: Arc<AtomicU32>,
}

impl Shell {
    pub(crate) fn new(script: &str) -> Box<Self> {
        Box::new(Self { script: script.to_owned(), tty: false, group: Arc::default() })
    }

    pub(crate) fn tty(script: &str) -> Box<Self> {
        Box::new(Self { tty: true, ..*Self::new(script) })
    }

    /// The process group, once started.
    pub(crate) fn group(&self) -> Group {
        Group(self.group.clone())
    }
}

/// A started process's group.
pub(crate) struct Group(Arc<AtomicU32>);

impl Group {
    fn pid(&self) -> Option<Pid> {
        Pid::from_raw(self.0.load(Ordering::Relaxed) as i32)
    }

    pub(crate) fn started(&self) -> bool {
        self.pid().is_some()
    }

    pub(crate) fn kill(&self) {
        kill_group(self.0.load(Ordering::Relaxed));
    }

    /// Waits until the processes are there, and until all are gone again.
    pub(crate) async fn gone(&self) {
        for _ in 0..1000 {
            if self.pid().is_some_and(|group| test_kill_process_group(group).is_err()) {
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
        panic!("the process lives on: {:?}", self.pid());
    }
}

fn kill_group(group: u32) {
    if let Some(group) = Pid::from_raw(group as i32) {
        let _ = kill_process_group(group, Signal::KILL);
    }
}

impl ExecSession for Shell {
    fn start(self: Box<Self>) -> BoxFuture<'static, Result<Process, SessionError>> {
        async move {
            let mut command = Command::new("setsid");
            if self.tty {
                command.arg("--ctty");
            }
            command.args(["sh", "-c", &self.script]);
            let mut terminal = None;
            if self.tty {
                let pty = openpty(None, None).map_err(std::io::Error::from)?;
                command.stdin(pty.slave.try_clone()?).stdout(pty.slave.try_clone()?).stderr(pty.slave);
                terminal = Some(File::from(pty.master));
            } else {
                command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            }
            let mut child = command.spawn()?;
            drop(command);
            let group = child.id().unwrap();
            self.group.store(group, Ordering::Relaxed);
            let mut process = Process {
                stdin: child.stdin.take().map(|io| Box::new(io) as _),
                stdout: child.stdout.take().map(|io| Box::new(io) as _),
                stderr: child.stderr.take().map(|io| Box::new(io) as _),
                resize: None,
                exit: async move { Ok(child.wait().await?.code().unwrap_or(137)) }.boxed(),
                kill: Box::new(move || kill_group(group)),
            };
            if let Some(terminal) = terminal {
                process.stdin = Some(Box::new(tokio::fs::File::from_std(terminal.try_clone()?)));
                process.stdout = Some(Box::new(tokio::fs::File::from_std(terminal.try_clone()?)));
                process.resize = Some(Box::new(move |ws_col, ws_row| {
                    tcsetwinsize(&terminal, Winsize { ws_col, ws_row, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
                }));
            }
            Ok(process)
        }
        .boxed()
    }
}

/// A session that can't start.
pub(crate) struct Broken;

impl ExecSession for Broken {
    fn start(self: Box<Self>) -> BoxFuture<'static, Result<Process, SessionError>> {
        async { Err(SessionError::new("container is not running")) }.boxed()
    }
}

/// Dials this machine.
pub(crate) struct Loopback;

impl PortForwardSession for Loopback {
    fn connect(&self, port: u16) -> BoxFuture<'_, Result<TcpStream, SessionError>> {
        async move { Ok(TcpStream::connect(("127.0.0.1", port)).await?) }.boxed()
    }

    fn pod(&self) -> String {
        "testpod".to_owned()
    }
}
