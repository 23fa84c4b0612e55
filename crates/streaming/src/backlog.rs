//! What a client has sent on one stream and nobody has taken yet: a bounded queue of bytes.
//!
//! A SPDY client that keeps to the windows that we give it never fills one: a stream that nobody reads costs it that
//! stream alone. Go's client knows no windows, and WebSocket channels have none, so there all streams share the
//! TCP connection's: the backlog lets the connection be read on while one stream is slow, up to its limit.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use tokio::{
    sync::Notify,
    time::{Duration, Instant},
};

/// Bytes that may wait on one stream.
const STREAM: usize = 1 << 20;
/// Bytes that may wait on all streams of a connection.
const CONNECTION: usize = 16 << 20;
/// The window that a stream of SPDY/3.1 has from the beginning.
const INITIAL_WINDOW: usize = 64 << 10;
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
    /// Promised to streams beyond their initial windows.
    promised: AtomicUsize,
    writable: Notify,
}

impl Budget {
    pub(crate) fn new() -> Self {
        Self::with_limits(STREAM, CONNECTION)
    }

    fn with_limits(stream: usize, connection: usize) -> Self {
        Self(Arc::new(Limits {
            stream,
            connection,
            used: AtomicUsize::new(0),
            promised: AtomicUsize::new(0),
            writable: Notify::new(),
        }))
    }

    /// A new, empty backlog: the end that the connection fills, and the end that is read.
    pub(crate) fn backlog(&self) -> (Feed, Inbound) {
        self.make(None)
    }

    /// One whose reader gives the client's stream new window for what it takes. The number is what the client is to be
    /// told at once: a larger window, as long as all of them fit into the connection's limit.
    pub(crate) fn backlog_of(&self, id: u32, credits: Credits) -> (Feed, Inbound, u32) {
        let wanted = self.0.stream.saturating_sub(INITIAL_WINDOW);
        // Nobody else adds.
        let fits = self.0.promised.load(Ordering::Relaxed) + wanted <= self.0.connection;
        let extra = if fits { wanted } else { 0 };
        self.0.promised.fetch_add(extra, Ordering::Relaxed);
        let (feed, inbound) = self.make(Some(Window { id, credits, extra }));
        (feed, inbound, u32::try_from(extra).unwrap_or(0))
    }

    fn make(&self, window: Option<Window>) -> (Feed, Inbound) {
        let shared = Arc::new(Shared {
            limits: self.0.clone(),
            window,
            state: Mutex::new(State {
                chunks: VecDeque::new(),
                cost: 0,
                waiting_since: Instant::now(),
                uncredited: 0,
                ended: false,
                abandoned: false,
            }),
            readable: Notify::new(),
        });
        (Feed(shared.clone()), Inbound(shared))
    }
}

/// Window that the client is to be told of: a number for each stream, so it is bounded by their count.
#[derive(Clone, Default)]
pub(crate) struct Credits(Arc<(Mutex<BTreeMap<u32, u32>>, Notify)>);

impl Credits {
    /// Adds to what stream `id` gets; 0 is the connection.
    pub(crate) fn add(&self, id: u32, bytes: usize) {
        let mut credits = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let credit = credits.entry(id).or_default();
        *credit = credit.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX)).min(i32::MAX as u32);
        drop(credits);
        self.0.1.notify_one();
    }

    /// Resolves when there may be some.
    pub(crate) async fn ready(&self) {
        self.0.1.notified().await;
    }

    /// All there are.
    pub(crate) fn take(&self) -> BTreeMap<u32, u32> {
        std::mem::take(&mut self.0.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

struct Window {
    id: u32,
    credits: Credits,
    /// Beyond the initial window.
    extra: usize,
}

struct Shared {
    limits: Arc<Limits>,
    window: Option<Window>,
    state: Mutex<State>,
    readable: Notify,
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(window) = &self.window {
            self.limits.promised.fetch_sub(window.extra, Ordering::Relaxed);
        }
    }
}

struct State {
    chunks: VecDeque<Bytes>,
    cost: usize,
    /// When the first chunk began to wait, or the one before it was taken.
    waiting_since: Instant,
    /// Taken, and not yet given back to the client's window.
    uncredited: usize,
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
                    if state.cost == 0 {
                        state.waiting_since = Instant::now();
                    }
                    state.cost += cost;
                    state.chunks.push_back(bytes);
                    break;
                }
            }
            self.0.limits.writable.notified().await;
        }
        self.0.readable.notify_one();
    }

    /// How long nothing has been taken of what waits; zero when nothing waits.
    pub(crate) fn stalled(&self) -> Duration {
        let state = self.0.state();
        if state.cost == 0 { Duration::ZERO } else { state.waiting_since.elapsed() }
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
                    state.waiting_since = Instant::now();
                    if let Some(window) = self.0.window.as_ref().filter(|_| !state.ended) {
                        state.uncredited += bytes.len();
                        // Not each byte by itself: that would be a frame for every one of the client's.
                        if state.uncredited >= (INITIAL_WINDOW + window.extra) / 2 {
                            window.credits.add(window.id, std::mem::take(&mut state.uncredited));
                        }
                    }
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
