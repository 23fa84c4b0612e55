//! What the daemon provides behind a URL, and what the server asks of it.

use futures::future::BoxFuture;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

/// The streams that the CRI request asked for.
///
/// The CRI layer checks them first: at least one of stdin, stdout and stderr, and no stderr beside a tty.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Streams {
    /// The client sends input.
    pub stdin: bool,
    /// The client wants standard output (all output, with a tty).
    pub stdout: bool,
    /// The client wants standard error; never with a tty.
    pub stderr: bool,
    /// The process has a terminal.
    pub tty: bool,
}

/// Why a session could not start, or how it broke. The text reaches the user behind
/// `error executing command in container:` or `error attaching to container:`.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct SessionError {
    message: String,
    exit_code: Option<i32>,
}

impl SessionError {
    /// An error with the text that the user shall read.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), exit_code: None }
    }

    /// Of a command that can't be executed: what a shell would answer, 126 or 127. It is told beside the text, as a cause
    /// that Kubernetes' own client passes over and others go by.
    #[must_use]
    pub fn with_exit_code(self, exit_code: i32) -> Self {
        Self { exit_code: Some(exit_code), ..self }
    }

    pub(crate) fn exit_code(&self) -> Option<i32> {
        self.exit_code
    }
}

impl From<std::io::Error> for SessionError {
    fn from(error: std::io::Error) -> Self {
        Self::new(error.to_string())
    }
}

/// A writable end of a process: its standard input.
pub type ProcessInput = Box<dyn AsyncWrite + Send + Unpin>;
/// A readable end of a process: one of its outputs.
pub type ProcessOutput = Box<dyn AsyncRead + Send + Unpin>;
/// Sets the size of the terminal: width in columns, height in rows; neither is 0.
pub type Resize = Box<dyn Fn(u16, u16) + Send + Sync>;

/// A running process, or an attachment to one.
pub struct Process {
    /// Standard input. When the client ends its input, the server calls `shutdown` and drops this. An attachment
    /// closes the container's input then (`stdin_once` without a tty) or detaches, by resolving `exit`.
    pub stdin: Option<ProcessInput>,
    /// Standard output, or all output with a tty. EIO, as a terminal answers after the last process, reads as its end.
    pub stdout: Option<ProcessOutput>,
    /// Standard error.
    pub stderr: Option<ProcessOutput>,
    /// Present with a tty.
    pub resize: Option<Resize>,
    /// Resolves when the process has ended, with the exit code (0 to 255; 128 + n for signal n). Of an attachment: when
    /// the container has ended or the client is detached; the code is not told to the client then.
    /// What is left in the outputs is read after this, for a bounded time.
    pub exit: BoxFuture<'static, Result<i32, SessionError>>,
    /// Called once, and only if the session ends before `exit` resolved: the client has gone, was idle for too long, or
    /// the server stops. Exec kills the process and its children; attach detaches. Must not block.
    pub kill: Box<dyn FnOnce() + Send>,
}

/// The daemon's side of an exec or an attach.
pub trait ExecSession: Send + 'static {
    /// Called once, when the client has connected and its streams are there. Runs to its end even if the client goes
    /// away meanwhile (then [`Process::kill`] follows), so it needs deadlines of its own.
    fn start(self: Box<Self>) -> BoxFuture<'static, Result<Process, SessionError>>;
}

/// The daemon's side of a port-forward.
pub trait PortForwardSession: Send + Sync + 'static {
    /// Dials `localhost:port` in the pod's network namespace, IPv4 first, then IPv6. Called once a connection of the
    /// client, many at a time. The future may be dropped.
    fn connect(&self, port: u16) -> BoxFuture<'_, Result<TcpStream, SessionError>>;

    /// The pod, for messages: `error forwarding port 80 to pod NAME`.
    fn pod(&self) -> String;
}
