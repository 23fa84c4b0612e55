//! Exec and attach: a process and the client's channels, whichever the transport.

use std::{future::pending, time::Duration};

use bytes::{BufMut, BytesMut};
use futures::future::join;
use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    select,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    ExecSession, Process, ProcessInput, ProcessOutput, Resize, SessionError, Streams, Timeouts,
    backlog::Inbound,
    link::{CHUNK, Channel, Link, Outbound},
    negotiate::Version,
    spdy::{Accept, Connection, Headers, NewStream},
    status::{Kind, Outcome, error_stream},
};

/// SPDY streams of an exec or attach: five, and room for what a client opens needlessly.
const MAX_STREAMS: usize = 16;
/// Output taken after the process has ended, in bytes: more than any pipe holds.
const MAX_DRAIN: usize = 16 << 20;
/// Unparsed bytes of resize messages.
const MAX_RESIZE: usize = 4096;
/// How long a client that was idle, or is cut off by a stop of the server, has to take the status.
const CUT_OFF: Duration = Duration::from_secs(2);

/// The client's channels. Stdin and resize are there to be read, the others to be written.
pub(crate) struct CommandChannels {
    pub(crate) version: Version,
    pub(crate) error: Outbound,
    pub(crate) stdin: Option<Channel>,
    pub(crate) stdout: Option<Outbound>,
    pub(crate) stderr: Option<Outbound>,
    pub(crate) resize: Option<Channel>,
}

/// An exec or attach whose client has connected.
pub(crate) struct Command {
    pub(crate) kind: Kind,
    pub(crate) session: Box<dyn ExecSession>,
    pub(crate) channels: CommandChannels,
    pub(crate) link: Link,
    pub(crate) timeouts: Timeouts,
    /// The server stops.
    pub(crate) stopping: CancellationToken,
}

/// Waits for the SPDY streams that the CRI request calls for: they come in any order. Others are answered, and ignored.
pub(crate) async fn collect_streams(
    connection: &mut Connection,
    wanted: Streams,
    version: Version,
) -> Option<CommandChannels> {
    let resizable = wanted.tty && version >= Version::V3;
    let [mut error, mut stdin, mut stdout, mut stderr, mut resize] = [const { None::<Channel> }; 5];
    loop {
        let complete = error.is_some()
            && stdin.is_some() == wanted.stdin
            && stdout.is_some() == wanted.stdout
            && stderr.is_some() == wanted.stderr
            && resize.is_some() == resizable;
        if complete {
            let error = error?;
            let out = |channel: Option<Channel>| channel.map(|channel| channel.outbound);
            let (stdout, stderr) = (out(stdout), out(stderr));
            if let (Some(stdin), Version::V1) = (&stdin, version) {
                // Clients of version 1 copy from stdin as well, until its end.
                let _ = stdin.outbound.end().await;
            }
            return Some(CommandChannels { version, error: error.outbound, stdin, stdout, stderr, resize });
        }
        let NewStream { headers, channel, .. } = connection.streams.recv().await?;
        let slot = match headers.get("streamtype") {
            Some("error") => &mut error,
            Some("stdin") if wanted.stdin => &mut stdin,
            Some("stdout") if wanted.stdout => &mut stdout,
            Some("stderr") if wanted.stderr => &mut stderr,
            Some("resize") if resizable => &mut resize,
            _ => continue,
        };
        slot.get_or_insert(channel);
    }
}

/// Which SPDY streams are taken: all, as what isn't known is only not counted. A process may take its time to read its
/// input: behind that waits nothing but its terminal's size.
pub(crate) const ACCEPT: Accept = Accept { limit: MAX_STREAMS, check: |_: &Headers| true, stalled: None };

/// How driving a process ended.
enum End {
    Outcome(Outcome),
    /// The client was cut off.
    Cut(SessionError),
    Gone,
}

impl Command {
    /// Runs the session to its end.
    pub(crate) async fn run(self) {
        let Self { kind, session, channels, link, timeouts, stopping } = self;
        let CommandChannels { version, error, stdin, stdout, stderr, resize } = channels;
        let (stdin, stdin_back) = split(stdin);
        let (resize, resize_back) = split(resize);
        let end = match session.start().await {
            Ok(process) => {
                let io = Io { stdin, stdout: stdout.clone(), stderr: stderr.clone(), resize };
                drive(process, io, &link, &timeouts, &stopping).await
            }
            // The inputs are dropped: what still comes is discarded.
            Err(error) => End::Outcome(Outcome::Failed(error)),
        };
        let (outcome, wait) = match end {
            End::Outcome(outcome) => (outcome, timeouts.close),
            End::Cut(error) => (Outcome::Failed(error), CUT_OFF),
            End::Gone => return,
        };
        let text = error_stream(&outcome, kind, version >= Version::V4);
        let tell = async {
            // No more input: late bytes would wait in the client's and our queues.
            for input in [stdin_back, resize_back].into_iter().flatten() {
                input.reset().await?;
            }
            if !text.is_empty() {
                error.write(text.into()).await?;
            }
            for output in [stdout, stderr].into_iter().flatten() {
                output.end().await?;
            }
            error.end().await
        };
        select! {
            result = timeout(wait, tell) => if !matches!(result, Ok(Ok(()))) { return },
            () = link.gone() => return,
        }
        link.finish(wait).await;
    }
}

fn split(channel: Option<Channel>) -> (Option<Inbound>, Option<Outbound>) {
    channel.map(|channel| (channel.inbound, channel.outbound)).unzip()
}

/// The client's side of the process's streams.
struct Io {
    stdin: Option<Inbound>,
    stdout: Option<Outbound>,
    stderr: Option<Outbound>,
    resize: Option<Inbound>,
}

async fn drive(
    process: Process,
    io: Io,
    link: &Link,
    timeouts: &Timeouts,
    stopping: &CancellationToken,
) -> End {
    let Process { stdin, stdout, stderr, resize, exit, kill } = process;
    let exited = CancellationToken::new();
    let ended = async {
        let guard = KillGuard(Some(kill));
        let result = exit.await;
        guard.disarm();
        exited.cancel();
        result
    };
    let output = join(
        pump_output(stdout, io.stdout, &exited, timeouts.drain),
        pump_output(stderr, io.stderr, &exited, timeouts.drain),
    );
    let input = async {
        join(pump_input(io.stdin, stdin), pump_sizes(io.resize, resize)).await;
        pending::<()>().await;
    };
    select! {
        (result, _) = join(ended, output) => End::Outcome(match result {
            Ok(code) => Outcome::Exited(code),
            Err(error) => Outcome::Failed(error),
        }),
        () = input => End::Gone,
        () = link.gone() => End::Gone,
        () = link.idle(timeouts.idle) => End::Cut(SessionError::new(format!("idle for {:?}", timeouts.idle))),
        () = stopping.cancelled() => End::Cut(SessionError::new("the container runtime is stopping")),
    }
}

/// Calls `kill` when the session is dropped before the process has ended.
struct KillGuard(Option<Box<dyn FnOnce() + Send>>);

impl KillGuard {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for KillGuard {
    fn drop(&mut self) {
        if let Some(kill) = self.0.take() {
            kill();
        }
    }
}

/// Copies the client's input until its end or until the process doesn't take it; then what comes is discarded.
async fn pump_input(from: Option<Inbound>, to: Option<ProcessInput>) {
    let (Some(mut from), Some(mut to)) = (from, to) else { return };
    while let Some(bytes) = from.next().await {
        let written = async {
            to.write_all(&bytes).await?;
            to.flush().await
        };
        if written.await.is_err() {
            return;
        }
    }
    let _ = to.shutdown().await;
}

/// Copies output until its end. Once the process has exited, children that it left may hold the output open for ever
/// (CVE-2026-53495): from then on it is waited for no longer than `drain` in all.
async fn pump_output(
    from: Option<ProcessOutput>,
    to: Option<Outbound>,
    exited: &CancellationToken,
    mut drain: Duration,
) {
    let (Some(mut from), Some(to)) = (from, to) else { return };
    let mut buffer = BytesMut::new();
    let mut drained = 0;
    while drained < MAX_DRAIN {
        if buffer.capacity() < 4096 {
            buffer.reserve(CHUNK);
        }
        let mut space = (&mut buffer).limit(CHUNK);
        let read = from.read_buf(&mut space);
        let read = if exited.is_cancelled() {
            let start = Instant::now();
            let Ok(read) = timeout(drain, read).await else { return };
            drain = drain.saturating_sub(start.elapsed());
            read
        } else {
            select! {
                biased;
                read = read => read,
                () = exited.cancelled() => continue,
            }
        };
        match read {
            Ok(0) | Err(_) => return,
            Ok(length) if exited.is_cancelled() => drained += length,
            Ok(_) => {}
        }
        if to.write(buffer.split().freeze()).await.is_err() {
            return;
        }
    }
}

/// A terminal's size, as the clients send it.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
pub(crate) struct Size {
    #[serde(rename = "Width", alias = "width")]
    width: u16,
    #[serde(rename = "Height", alias = "height")]
    height: u16,
}

/// Applies the sizes that the client sends: JSON objects one after another.
async fn pump_sizes(from: Option<Inbound>, resize: Option<Resize>) {
    let (Some(mut from), Some(resize)) = (from, resize) else { return };
    let mut text = Vec::new();
    while let Some(bytes) = from.next().await {
        text.extend_from_slice(&bytes);
        let Some(size) = take_sizes(&mut text) else { return };
        if let Some(Size { width, height }) = size {
            resize(width, height);
        }
    }
}

/// Takes the whole objects off the text: the last usable size, if any; `None` if the text is no sizes at all.
pub(crate) fn take_sizes(text: &mut Vec<u8>) -> Option<Option<Size>> {
    let mut last = None;
    let mut sizes = serde_json::Deserializer::from_slice(text).into_iter::<Size>();
    loop {
        match sizes.next() {
            Some(Ok(size)) if size.width > 0 && size.height > 0 => last = Some(size),
            Some(Ok(_)) => {}
            Some(Err(error)) if error.is_eof() => break,
            Some(Err(_)) => return None,
            None => break,
        }
    }
    let used = sizes.byte_offset();
    text.drain(..used);
    (text.len() <= MAX_RESIZE).then_some(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_come_in_any_pieces() {
        let mut text = b"{\"Width\":80,\"Height\":24}\n{\"Width\":100,\"Height\":30}{\"Wid".to_vec();
        assert_eq!(take_sizes(&mut text), Some(Some(Size { width: 100, height: 30 })));
        assert_eq!(text, b"{\"Wid");
        text.extend_from_slice(b"th\":0,\"Height\":9}\n");
        assert_eq!(take_sizes(&mut text), Some(None));
        assert_eq!(take_sizes(&mut b"{\"Width\":80000,\"Height\":24}".to_vec()), None);
        assert_eq!(take_sizes(&mut b"nonsense".to_vec()), None);
        assert_eq!(take_sizes(&mut [b"{\"".as_slice(), &[b'x'; 5000]].concat()), None);
    }
}
