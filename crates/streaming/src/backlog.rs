//! What a client has sent on one stream and nobody has taken yet: a bounded queue of bytes.
//!
//! Neither SPDY as the peers speak it nor the WebSocket channels have flow control of a stream, so all streams share the
//! TCP connection's. The backlog lets the connection be read on while one stream is slow, up to its limit.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use tokio::sync::Notify;

/// Bytes that may wait on one stream.
const STREAM: usize = 1 << 20;
/// Bytes that may wait on all streams of a connection.
const CONNECTION: usize = 16 << 20;
/// Shorter chunks are copied, so that they don't hold the large read buffer that they came in.
const COPY_BELOW: usize = 4096;
/// What a chunk costs besides its bytes.
const CHUNK_COST: usize = 64;

/// What the backlogs of one connection may hold together. One task fills them all.
#[derive(Clone)]
pub(crate) struct Budget(Arc<Limits>);

struct Limits {
    stream: usize,
    connection: usize,
    used: AtomicUsize,
    writable: Notify,
}

impl Budget {
    pub(crate) fn new() -> Self {
        Self::with_limits(STREAM, CONNECTION)
    }

    fn with_limits(stream: usize, connection: usize) -> Self {
        Self(Arc::new(Limits { stream, connection, used: AtomicUsize::new(0), writable: Notify::new() }))
    }

    /// A new, empty backlog: the end that the connection fills, and the end that is read.
    pub(crate) fn backlog(&self) -> (Feed, Inbound) {
        let shared = Arc::new(Shared {
            limits: self.0.clone(),
            state: Mutex::new(State::default()),
            readable: Notify::new(),
        });
        (Feed(shared.clone()), Inbound(shared))
    }
}

struct Shared {
    limits: Arc<Limits>,
    state: Mutex<State>,
    readable: Notify,
}

#[derive(Default)]
struct State {
    chunks: VecDeque<Bytes>,
    cost: usize,
    ended: bool,
    abandoned: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives back what was taken off.
    fn release(&self, cost: usize) {
        self.limits.used.fetch_sub(cost, Ordering::Relaxed);
        self.limits.writable.notify_one();
    }
}

/// The connection's end. Dropping it ends the stream.
pub(crate) struct Feed(Arc<Shared>);

impl Feed {
    /// Adds a chunk, waiting while the backlog is full. Discards it where the reader has gone or the stream has ended.
    pub(crate) async fn push(&self, bytes: Bytes) {
        let cost = bytes.len() + CHUNK_COST;
        let bytes = if bytes.len() < COPY_BELOW { Bytes::copy_from_slice(&bytes) } else { bytes };
        loop {
            {
                let mut state = self.0.state();
                if state.abandoned || state.ended {
                    return;
                }
                // Nothing else adds to the connection's sum: it can only shrink meanwhile.
                let used = self.0.limits.used.load(Ordering::Relaxed);
                let fits = state.cost == 0 || state.cost + cost <= self.0.limits.stream;
                if fits && (used == 0 || used + cost <= self.0.limits.connection) {
                    self.0.limits.used.fetch_add(cost, Ordering::Relaxed);
                    state.cost += cost;
                    state.chunks.push_back(bytes);
                    break;
                }
            }
            self.0.limits.writable.notified().await;
        }
        self.0.readable.notify_one();
    }

    /// No more comes; what waits is still delivered.
    pub(crate) fn end(&self) {
        self.0.state().ended = true;
        self.0.readable.notify_one();
        self.0.limits.writable.notify_one();
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.end();
    }
}

/// The reader's end. Dropping it discards what waits and all that comes.
pub(crate) struct Inbound(Arc<Shared>);

impl Inbound {
    /// The next chunk, or `None` at the end of the stream. Cancel safe.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        loop {
            {
                let mut state = self.0.state();
                if let Some(bytes) = state.chunks.pop_front() {
                    let cost = bytes.len() + CHUNK_COST;
                    state.cost -= cost;
                    drop(state);
                    self.0.release(cost);
                    return Some(bytes);
                }
                if state.ended {
                    return None;
                }
            }
            self.0.readable.notified().await;
        }
    }
}

impl Drop for Inbound {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.abandoned = true;
        state.chunks.clear();
        let cost = std::mem::take(&mut state.cost);
        drop(state);
        self.0.release(cost);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn delivers_in_order_and_then_ends() {
        let (feed, mut inbound) = Budget::new().backlog();
        feed.push(Bytes::from_static(b"one")).await;
        feed.push(Bytes::from(vec![7; 5000])).await;
        feed.end();
        assert_eq!(inbound.next().await.unwrap(), "one");
        assert_eq!(inbound.next().await.unwrap().len(), 5000);
        assert_eq!(inbound.next().await, None);
    }

    #[tokio::test]
    async fn a_full_backlog_waits_and_goes_on_when_read() {
        let (feed, mut inbound) = Budget::with_limits(10_000, CONNECTION).backlog();
        feed.push(Bytes::from(vec![0; 9_000])).await;
        assert!(timeout(SOON, feed.push(Bytes::from(vec![1; 2_000]))).await.is_err());
        assert_eq!(inbound.next().await.unwrap().len(), 9_000);
        timeout(SOON, feed.push(Bytes::from(vec![1; 2_000]))).await.unwrap();
        assert_eq!(inbound.next().await.unwrap().len(), 2_000);
    }

    #[tokio::test]
    async fn the_connection_s_limit_counts_for_all() {
        let budget = Budget::with_limits(10_000, 15_000);
        let ((one, mut one_in), (two, two_in), (three, _three_in)) =
            (budget.backlog(), budget.backlog(), budget.backlog());
        one.push(Bytes::from(vec![0; 7_000])).await;
        two.push(Bytes::from(vec![0; 7_000])).await;
        assert!(timeout(SOON, three.push(Bytes::from(vec![0; 2_000]))).await.is_err());
        one_in.next().await.unwrap();
        timeout(SOON, three.push(Bytes::from(vec![0; 2_000]))).await.unwrap();
        assert!(timeout(SOON, one.push(Bytes::from(vec![0; 9_000]))).await.is_err());
        drop(two_in);
        timeout(SOON, one.push(Bytes::from(vec![0; 9_000]))).await.unwrap();
    }

    #[tokio::test]
    async fn small_chunks_count_for_more_than_their_bytes() {
        let (feed, _inbound) = Budget::with_limits(6_500, CONNECTION).backlog();
        for _ in 0..100 {
            timeout(SOON, feed.push(Bytes::from_static(b"x"))).await.unwrap();
        }
        assert!(timeout(SOON, feed.push(Bytes::from_static(b"x"))).await.is_err());
    }

    #[tokio::test]
    async fn an_abandoned_backlog_never_blocks() {
        let (feed, inbound) = Budget::with_limits(10, CONNECTION).backlog();
        feed.push(Bytes::from(vec![0; 100])).await;
        let push = tokio::spawn(async move {
            for _ in 0..10 {
                feed.push(Bytes::from(vec![0; 100])).await;
            }
        });
        tokio::time::sleep(Duration::from_millis(10)).await;
        drop(inbound);
        timeout(Duration::from_secs(5), push).await.unwrap().unwrap();
    }
}
