//! The streams of Exec and Attach, over WebSocket: a channel each, named by the first byte of a message.

use std::io::{self, Read as _};
use std::process::ExitCode;

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use futures::future::select_all;
use futures::{FutureExt as _, SinkExt as _, StreamExt as _};
use serde::Deserialize;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::{Error as WebSocketError, Message};

use super::connection::Client;
use super::dial::{self, Location, Transport};
use super::exec::{exit_code, not_executed};
use super::terminal::{self, RawTerminal};

/// Its JSON status carries the exit code, and it can end stdin.
const PROTOCOL: &str = "v5.channel.k8s.io";
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
/// The message that ends a channel.
const END: u8 = 255;
/// Bytes of a status; a message of the daemon is far shorter.
const MAX_STATUS: usize = 64 << 10;
/// Bytes read from standard input at once.
const CHUNK: usize = 32 << 10;

/// A connection to the streaming server.
type Socket = WebSocketStream<Box<dyn Transport>>;

/// What the user has connected.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Interactive {
    /// Standard input goes to the process.
    pub(crate) stdin: bool,
    /// The process has a terminal.
    pub(crate) tty: bool,
    /// Ctrl-P Ctrl-Q leaves the process alone.
    pub(crate) detach_keys: bool,
}

/// Connects to a URL of the streaming server.
async fn connect(client: &mut Client, url: &str) -> anyhow::Result<Socket> {
    let location = Location::of(url)?;
    let transport = dial::dial(client, &location).await?;
    let Location { authority, path, .. } = location;
    let context = || format!("the daemon's streaming server {authority}");
    // Over TLS as well: the connection is there.
    let mut request = format!("ws://{authority}{path}").into_client_request().with_context(context)?;
    request.headers_mut().insert("Sec-WebSocket-Protocol", HeaderValue::from_static(PROTOCOL));
    let (socket, _) = tokio_tungstenite::client_async(request, transport).await.with_context(context)?;
    Ok(socket)
}

/// Connects our standard streams with those behind `url` until they end; gives the exit code.
pub(crate) async fn run(
    client: &mut Client,
    url: &str,
    interactive: Interactive,
) -> anyhow::Result<ExitCode> {
    let Interactive { stdin, tty, detach_keys } = interactive;
    let mut signals = Signals::new()?;
    let mut resized = signal(SignalKind::window_change())?;
    let connected = tokio::select! {
        connected = connect(client, url) => connected?,
        number = signals.any() => return Ok(exit_code(128 + number)),
    };
    let (mut sink, mut source) = connected.split();
    let raw = if stdin && tty { Some(RawTerminal::enter()?) } else { None };
    let mut input = stdin.then(read_stdin);
    let mut keys = (detach_keys && raw.is_some()).then(DetachKeys::default);
    let continued = Notify::new();
    let stopping = stop_and_continue(raw.as_ref(), &continued);
    let printer = Printer::start();

    // Gives the reason to leave: the user's wish. Broken connections are told by the receiver.
    let sending = async {
        let mut sizes = tty;
        if tty && let Some(size) = terminal::size() {
            sizes = sink.send(resize_message(size)).await.is_ok();
        }
        loop {
            let message = tokio::select! {
                bytes = next(&mut input) => match bytes {
                    Some(bytes) => {
                        let (bytes, detach) = match &mut keys {
                            Some(keys) => keys.filter(&bytes),
                            None => (bytes, false),
                        };
                        if detach {
                            return;
                        }
                        message(STDIN, &bytes)
                    }
                    None => {
                        input = None;
                        Message::binary(vec![END, STDIN])
                    }
                },
                _ = resized.recv(), if sizes => match terminal::size() {
                    Some(size) => resize_message(size),
                    None => continue,
                },
                () = continued.notified(), if sizes => match terminal::size() {
                    Some(size) => resize_message(size),
                    None => continue,
                },
            };
            if sink.send(message).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    let receiving = async {
        let mut status = Vec::new();
        let broken = loop {
            match source.next().await {
                Some(Ok(Message::Binary(mut bytes))) if !bytes.is_empty() => {
                    let channel = bytes.split_to(1)[0];
                    if channel == STDOUT || channel == STDERR {
                        if !printer.print(channel, bytes).await {
                            break None;
                        }
                    } else if channel == STATUS && status.len() + bytes.len() <= MAX_STATUS {
                        status.extend_from_slice(&bytes);
                    }
                }
                Some(Ok(_)) => {}
                None | Some(Err(WebSocketError::ConnectionClosed)) => break None,
                // What has come is all that counts.
                Some(Err(_)) if !status.is_empty() => break None,
                Some(Err(error)) => break Some(error),
            }
        };
        printer.finish().await?;
        match broken {
            None => exit_of(&status),
            Some(error) => Err(anyhow!(error).context("the connection to the daemon broke")),
        }
    };
    let result = tokio::select! {
        result = receiving => result,
        () = sending => Ok(Left::Detached),
        number = signals.any() => Ok(Left::Signal(number)),
        () = stopping => Err(anyhow!("no signals")),
    };
    // Before a word is printed.
    drop(raw);
    Ok(match result? {
        Left::Ended(code) => exit_code(code),
        Left::NotExecuted(message, code) => not_executed(&message, code),
        Left::Detached => {
            eprintln!("detached");
            ExitCode::SUCCESS
        }
        Left::Signal(number) => exit_code(128 + number),
    })
}

enum Left {
    Ended(i32),
    /// The command can't be executed: why, and what a shell would answer.
    NotExecuted(String, i32),
    Detached,
    Signal(i32),
}

/// Our standard output and error. A thread of its own writes them, so that a terminal or pipe that stands still keeps no
/// signal waiting, and the end of us neither.
struct Printer {
    queue: mpsc::Sender<(u8, Bytes)>,
    done: oneshot::Receiver<io::Result<()>>,
}

impl Printer {
    fn start() -> Self {
        let (queue, mut printed) = mpsc::channel::<(u8, Bytes)>(4);
        let (tell, done) = oneshot::channel();
        std::thread::spawn(move || {
            let mut result = Ok(());
            while let (Ok(()), Some((channel, bytes))) = (&result, printed.blocking_recv()) {
                result = match channel {
                    STDERR => write(&mut io::stderr().lock(), &bytes),
                    _ => write(&mut io::stdout().lock(), &bytes),
                };
            }
            let _ = tell.send(result);
        });
        Self { queue, done }
    }

    /// False: it can't be written any more.
    async fn print(&self, channel: u8, bytes: Bytes) -> bool {
        self.queue.send((channel, bytes)).await.is_ok()
    }

    /// Waits until all is written.
    async fn finish(self) -> io::Result<()> {
        drop(self.queue);
        self.done.await.unwrap_or(Ok(()))
    }
}

fn write(to: &mut impl io::Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

/// Leaves raw mode while we are stopped by SIGTSTP (no key sends it in raw mode: somebody else does), and takes it up again
/// when we go on, also after a SIGSTOP. Never ends.
async fn stop_and_continue(raw: Option<&RawTerminal>, continued: &Notify) {
    let signals = raw.and_then(|raw| {
        // SIGTSTP and SIGCONT; without them there is only the usual.
        let [stop, go] = [nix::libc::SIGTSTP, nix::libc::SIGCONT].map(|n| signal(SignalKind::from_raw(n)));
        Some((raw, stop.ok()?, go.ok()?))
    });
    let Some((raw, mut stop, mut go)) = signals else { return std::future::pending().await };
    loop {
        tokio::select! {
            _ = stop.recv() => raw.suspend(),
            _ = go.recv() => {
                raw.resume();
                // The terminal may have another size by now.
                continued.notify_one();
            }
        }
    }
}

fn message(channel: u8, bytes: &[u8]) -> Message {
    let mut payload = Vec::with_capacity(bytes.len() + 1);
    payload.push(channel);
    payload.extend_from_slice(bytes);
    Message::binary(payload)
}

fn resize_message((width, height): (u16, u16)) -> Message {
    message(RESIZE, format!("{{\"Width\":{width},\"Height\":{height}}}").as_bytes())
}

/// Standard input. A thread of its own reads it, which ends with the process: a read can't be taken back, and to
/// make the descriptor nonblocking would change it for all who share it, such as the user's shell.
fn read_stdin() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(4);
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut chunk = vec![0; CHUNK];
        loop {
            match stdin.read(&mut chunk) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return,
                Ok(count) => {
                    if sender.blocking_send(chunk.get(..count).unwrap_or_default().to_vec()).is_err() {
                        return;
                    }
                }
            }
        }
    });
    receiver
}

async fn next(input: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match input {
        Some(input) => input.recv().await,
        None => std::future::pending().await,
    }
}

/// Signals that end us: caught, so that the terminal is restored.
struct Signals(Vec<(i32, Signal)>);

impl Signals {
    fn new() -> io::Result<Self> {
        let make = |kind: SignalKind| Ok::<_, io::Error>((kind.as_raw_value(), signal(kind)?));
        let kinds = [
            SignalKind::terminate(),
            SignalKind::hangup(),
            SignalKind::interrupt(),
            SignalKind::quit(),
            SignalKind::alarm(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
        ];
        Ok(Self(kinds.into_iter().map(make).collect::<io::Result<_>>()?))
    }

    async fn any(&mut self) -> i32 {
        let each = self.0.iter_mut().map(|(number, signal)| {
            let number = *number;
            signal.recv().map(move |_| number).boxed_local()
        });
        select_all(each).await.0
    }
}

/// Ctrl-P Ctrl-Q, as other tools have it. A Ctrl-P that is followed by something else is passed on with it.
#[derive(Debug, Default)]
struct DetachKeys {
    pending: bool,
}

impl DetachKeys {
    const FIRST: u8 = 0x10;
    const SECOND: u8 = 0x11;

    /// What is to be sent, and whether to detach.
    fn filter(&mut self, bytes: &[u8]) -> (Vec<u8>, bool) {
        let mut sent = Vec::with_capacity(bytes.len() + 1);
        for &byte in bytes {
            match (self.pending, byte) {
                (true, Self::SECOND) => return (sent, true),
                (false, Self::FIRST) => self.pending = true,
                (true, Self::FIRST) => sent.push(byte),
                (pending, _) => {
                    if pending {
                        sent.push(Self::FIRST);
                    }
                    self.pending = false;
                    sent.push(byte);
                }
            }
        }
        (sent, false)
    }
}

/// `metav1.Status`, as far as exec uses it.
#[derive(Deserialize)]
struct Status {
    status: String,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    details: Details,
}

#[derive(Deserialize, Default)]
struct Details {
    #[serde(default)]
    causes: Vec<Cause>,
}

#[derive(Deserialize)]
struct Cause {
    #[serde(default)]
    reason: String,
    #[serde(default)]
    message: String,
}

fn exit_of(status: &[u8]) -> anyhow::Result<Left> {
    if status.is_empty() {
        bail!("the connection to the daemon ended before the status of the process came");
    }
    let status: Status = serde_json::from_slice(status)
        .with_context(|| format!("status {:?}", String::from_utf8_lossy(status)))?;
    if status.status == "Success" {
        return Ok(Left::Ended(0));
    }
    let code = status.details.causes.iter().find(|cause| cause.reason == "ExitCode");
    match code.and_then(|cause| cause.message.parse().ok()) {
        Some(code) if status.reason == "NonZeroExitCode" => Ok(Left::Ended(code)),
        Some(code) => Ok(Left::NotExecuted(status.message, code)),
        None => bail!("{}", status.message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses() {
        let code = |text: &str| match exit_of(text.as_bytes()) {
            Ok(Left::Ended(code)) => Ok(code),
            Ok(_) => panic!("left in another way"),
            Err(error) => Err(error.to_string()),
        };
        assert_eq!(code(r#"{"status":"Success"}"#), Ok(0));
        let failure = r#"{"status":"Failure","message":"command terminated with non-zero exit code: 3","reason":"NonZeroExitCode",
            "details":{"causes":[{"reason":"ExitCode","message":"3"}]}}"#;
        assert_eq!(code(failure), Ok(3));
        let internal =
            r#"{"status":"Failure","message":"no such command","reason":"InternalError","code":500}"#;
        assert_eq!(code(internal), Err("no such command".to_owned()));
        let missing = r#"{"status":"Failure","message":"exec: \"x\"","reason":"InternalError",
            "details":{"causes":[{"reason":"ExitCode","message":"127"},{"message":"exec: \"x\""}]}}"#;
        let left = exit_of(missing.as_bytes()).unwrap();
        assert!(matches!(left, Left::NotExecuted(message, 127) if message == "exec: \"x\""));
        assert!(code("").unwrap_err().contains("before the status"));
        assert!(code("rubbish").unwrap_err().contains("rubbish"));
    }

    #[test]
    fn the_keys_that_detach() {
        let mut keys = DetachKeys::default();
        assert_eq!(keys.filter(b"ls\r"), (b"ls\r".to_vec(), false));
        assert_eq!(keys.filter(b"a\x10"), (b"a".to_vec(), false));
        assert_eq!(keys.filter(b"b"), (b"\x10b".to_vec(), false), "not lost");
        assert_eq!(keys.filter(b"\x10\x10x"), (b"\x10\x10x".to_vec(), false));
        assert_eq!(keys.filter(b"\x11"), (b"\x11".to_vec(), false));
        assert_eq!(keys.filter(b"a\x10"), (b"a".to_vec(), false));
        assert_eq!(keys.filter(b"\x11rest"), (vec![], true), "in two reads");
        assert_eq!(DetachKeys::default().filter(b"a\x10\x11"), (b"a".to_vec(), true));
    }
}
