//! The streams of Exec and Attach, over WebSocket: a channel each, named by the first byte of a message.

use std::io::{self, Read as _};
use std::process::ExitCode;

use anyhow::{Context as _, anyhow, bail};
use futures::{SinkExt as _, StreamExt as _};
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::{Error as WebSocketError, Message};

use super::exec::exit_code;
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
type Socket = WebSocketStream<TcpStream>;

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

/// What follows the scheme in a URL of the streaming server. TLS isn't spoken.
pub(super) fn authority_and_path(url: &str) -> anyhow::Result<&str> {
    if url.starts_with("https://") {
        // Not the whole URL: its token is a secret.
        bail!(
            "the daemon's streaming server speaks TLS (streaming.tls_certificate), which this client doesn't: use crictl"
        );
    }
    url.strip_prefix("http://").with_context(|| format!("{url}: not an http URL"))
}

/// Connects to a URL of the streaming server.
async fn connect(url: &str) -> anyhow::Result<Socket> {
    let rest = authority_and_path(url)?;
    let authority = rest.split('/').next().unwrap_or_default();
    let context = || format!("the daemon's streaming server {authority}");
    let tcp = TcpStream::connect(authority).await.with_context(context)?;
    tcp.set_nodelay(true).with_context(context)?;
    let mut request = format!("ws://{rest}").into_client_request().with_context(context)?;
    request.headers_mut().insert("Sec-WebSocket-Protocol", HeaderValue::from_static(PROTOCOL));
    let (socket, _) = tokio_tungstenite::client_async(request, tcp).await.with_context(context)?;
    Ok(socket)
}

/// Connects our standard streams with those behind `url` until they end; gives the exit code.
pub(crate) async fn run(url: &str, interactive: Interactive) -> anyhow::Result<ExitCode> {
    let Interactive { stdin, tty, detach_keys } = interactive;
    let mut signals = Signals::new()?;
    let (mut sink, mut source) = connect(url).await?.split();
    let raw = if stdin && tty { Some(RawTerminal::enter()?) } else { None };
    let mut input = stdin.then(read_stdin);
    let mut keys = (detach_keys && raw.is_some()).then(DetachKeys::default);
    let mut resized = signal(SignalKind::window_change())?;

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
            };
            if sink.send(message).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    let receiving = async {
        let mut status = Vec::new();
        loop {
            match source.next().await {
                Some(Ok(Message::Binary(bytes))) => match bytes.split_first() {
                    Some((&STDOUT, bytes)) => write(&mut io::stdout().lock(), bytes)?,
                    Some((&STDERR, bytes)) => write(&mut io::stderr().lock(), bytes)?,
                    Some((&STATUS, bytes)) if status.len() + bytes.len() <= MAX_STATUS => {
                        status.extend_from_slice(bytes);
                    }
                    _ => {}
                },
                Some(Ok(_)) => {}
                None | Some(Err(WebSocketError::ConnectionClosed)) => return exit_of(&status),
                // What has come is all that counts.
                Some(Err(_)) if !status.is_empty() => return exit_of(&status),
                Some(Err(error)) => return Err(anyhow!(error).context("the connection to the daemon broke")),
            }
        }
    };
    let result = tokio::select! {
        result = receiving => result,
        () = sending => Ok(Left::Detached),
        number = signals.any() => Ok(Left::Signal(number)),
    };
    // Before a word is printed.
    drop(raw);
    Ok(match result? {
        Left::Ended(code) => exit_code(code),
        Left::Detached => {
            eprintln!("detached");
            ExitCode::SUCCESS
        }
        Left::Signal(number) => exit_code(128 + number),
    })
}

enum Left {
    Ended(i32),
    Detached,
    Signal(i32),
}

fn write(to: &mut impl io::Write, bytes: &[u8]) -> anyhow::Result<()> {
    to.write_all(bytes)?;
    to.flush()?;
    Ok(())
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
struct Signals([(i32, Signal); 4]);

impl Signals {
    fn new() -> io::Result<Self> {
        let make = |kind: SignalKind| Ok::<_, io::Error>((kind.as_raw_value(), signal(kind)?));
        Ok(Self([
            make(SignalKind::terminate())?,
            make(SignalKind::hangup())?,
            make(SignalKind::interrupt())?,
            make(SignalKind::quit())?,
        ]))
    }

    async fn any(&mut self) -> i32 {
        let [one, two, three, four] = &mut self.0;
        tokio::select! {
            _ = one.1.recv() => one.0,
            _ = two.1.recv() => two.0,
            _ = three.1.recv() => three.0,
            _ = four.1.recv() => four.0,
        }
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
        _ => bail!("{}", status.message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tls_is_refused_without_the_token() {
        assert_eq!(authority_and_path("http://[::1]:80/exec/x").unwrap(), "[::1]:80/exec/x");
        let error = authority_and_path("https://127.0.0.1:80/exec/secret").unwrap_err().to_string();
        assert!(error.contains("use crictl") && !error.contains("secret"), "{error}");
    }

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
