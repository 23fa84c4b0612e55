//! What a session sees of its connection, whichever the transport: channels with an input and an output, and the link
//! that says when the client has gone.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{backlog::Inbound, spdy::Window};

/// Bytes that a session sends at a time.
pub(crate) const CHUNK: usize = 32 * 1024;
/// What may wait for the connection's writer.
pub(crate) const QUEUE: usize = 16;

/// What a session sends; the connection's writer puts it into frames or messages.
#[derive(Debug)]
pub(crate) enum Outgoing {
    /// Bytes on a channel.
    Data { channel: u32, bytes: Bytes },
    /// The output of a channel has ended. WebSocket has no word for it.
    End { channel: u32 },
    /// A channel is done with in both directions. WebSocket has no word for it.
    Reset { channel: u32 },
    /// The session is over: a WebSocket is closed with code 1000; SPDY leaves closing to the client.
    Finished,
    /// The connection is over.
    Close,
}

/// The connection has gone.
#[derive(Debug)]
pub(crate) struct Gone;

/// The output of one channel.
#[derive(Clone)]
pub(crate) struct Outbound {
    channel: u32,
    queue: mpsc::Sender<Outgoing>,
    /// What the client takes, where the transport has a word for it.
    window: Option<Arc<Window>>,
}

impl Outbound {
    pub(crate) fn new(channel: u32, queue: mpsc::Sender<Outgoing>) -> Self {
        Self { channel, queue, window: None }
    }

    pub(crate) fn with_window(channel: u32, queue: mpsc::Sender<Outgoing>, window: Arc<Window>) -> Self {
        Self { channel, queue, window: Some(window) }
    }

    /// Sends at most [`CHUNK`] bytes; waits while the connection is slower, or until the client takes as much. What is for a
    /// stream that has ended is discarded.
    pub(crate) async fn write(&self, mut bytes: Bytes) -> Result<(), Gone> {
        let channel = self.channel;
        let Some(window) = self.window.as_ref().filter(|_| !bytes.is_empty()) else {
            return self.send(Outgoing::Data { channel, bytes }).await;
        };
        while !bytes.is_empty() {
            let Some(taken) = window.take(bytes.len()).await else {
                return if self.queue.is_closed() { Err(Gone) } else { Ok(()) };
            };
            let place = self.queue.reserve().await.map_err(|_| Gone)?;
            place.send(Outgoing::Data { channel, bytes: bytes.split_to(taken.spend()) });
        }
        Ok(())
    }

    pub(crate) async fn end(&self) -> Result<(), Gone> {
        self.send(Outgoing::End { channel: self.channel }).await
    }

    pub(crate) async fn reset(&self) -> Result<(), Gone> {
        self.send(Outgoing::Reset { channel: self.channel }).await
    }

    async fn send(&self, outgoing: Outgoing) -> Result<(), Gone> {
        self.queue.send(outgoing).await.map_err(|_| Gone)
    }
}

/// A channel of the client: a SPDY stream or a WebSocket channel.
pub(crate) struct Channel {
    pub(crate) inbound: Inbound,
    pub(crate) outbound: Outbound,
    /// Cancelled when the client resets this channel.
    pub(crate) reset: CancellationToken,
}

/// When a connection was last used.
#[derive(Clone)]
pub(crate) struct Activity(Arc<(Instant, AtomicU64)>);

impl Activity {
    pub(crate) fn new() -> Self {
        Self(Arc::new((Instant::now(), AtomicU64::new(0))))
    }

    pub(crate) fn touch(&self) {
        self.0.1.store(self.0.0.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Resolves when the connection has been idle for `limit`.
    pub(crate) async fn idle(&self, limit: Duration) {
        loop {
            let last = Duration::from_millis(self.0.1.load(Ordering::Relaxed));
            match (last + limit).checked_sub(self.0.0.elapsed()) {
                Some(left) if !left.is_zero() => sleep(left).await,
                _ => return,
            }
        }
    }
}

/// The connection. Dropping it closes the socket.
pub(crate) struct Link {
    gone: CancellationToken,
    activity: Activity,
    queue: mpsc::Sender<Outgoing>,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

impl Link {
    /// `gone` is cancelled by the tasks when either ends.
    pub(crate) fn new(
        gone: CancellationToken,
        activity: Activity,
        queue: mpsc::Sender<Outgoing>,
        tasks: Vec<AbortOnDropHandle<()>>,
    ) -> Self {
        Self { gone, activity, queue, _tasks: tasks }
    }

    /// Resolves when the client has gone or the connection is broken.
    pub(crate) async fn gone(&self) {
        self.gone.cancelled().await;
    }

    /// Resolves when nothing has passed for `limit`.
    pub(crate) async fn idle(&self, limit: Duration) {
        self.activity.idle(limit).await;
    }

    /// Ends the connection in the order that loses nothing: all that is queued is sent, then the client closes. A socket
    /// closed before would answer the client's next frame with a TCP reset, which discards what it hasn't read yet.
    /// After `wait` the client is cut off.
    pub(crate) async fn finish(self, wait: Duration) {
        let closed = async {
            let _ = self.queue.send(Outgoing::Finished).await;
            self.gone.cancelled().await;
        };
        if timeout(wait, closed).await.is_ok() {
            return;
        }
        let close = async {
            let _ = self.queue.send(Outgoing::Close).await;
            self.gone.cancelled().await;
        };
        let _ = timeout(Duration::from_secs(1), close).await;
    }
}

/// Cancels `gone` when a task of the connection ends, however it ends.
pub(crate) struct GoneGuard(pub(crate) CancellationToken);

impl Drop for GoneGuard {
    fn drop(&mut self) {
        self.0.cancel();
    }
}
