//! What a client has sent on one stream and nobody has taken yet: a bounded queue of bytes.
//!
//! Neither SPDY as the peers speak it nor the WebSocket channels have flow control of a stream, so all streams share the
//! TCP connection's. The backlog lets the connection be read on while one stream is slow, up to its limit.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use tokio::sync::Notify;

/// Bytes that may wait on one stream.
pub(crate) const LIMIT: usize = 1 << 20;
/// Shorter chunks are copied, so that they don't hold the large read buffer that they came in.
const COPY_BELOW: usize = 4096;
/// What a chunk costs besides its bytes.
const CHUNK_COST: usize = 64;

/// A new, empty backlog: the end that the connection fills, and the end that is read.
pub(crate) fn backlog(limit: usize) -> (Feed, Inbound) {
    let shared = Arc::new(Shared {
        limit,
        state: Mutex::new(State::default()),
        readable: Notify::new(),
        writable: Notify::new(),
    });
    (Feed(shared.clone()), Inbound(shared))
}

struct Shared {
    limit: usize,
    state: Mutex<State>,
    readable: Notify,
    writable: Notify,
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
                if state.cost == 0 || state.cost + cost <= self.0.limit {
                    state.cost += cost;
                    state.chunks.push_back(bytes);
                    break;
                }
            }
            self.0.writable.notified().await;
        }
        self.0.readable.notify_one();
    }

    /// No more comes; what waits is still delivered.
    pub(crate) fn end(&self) {
        self.0.state().ended = true;
        self.0.readable.notify_one();
        self.0.writable.notify_one();
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
                    state.cost -= bytes.len() + CHUNK_COST;
                    drop(state);
                    self.0.writable.notify_one();
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
        drop(state);
        self.0.writable.notify_one();
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
        let (feed, mut inbound) = backlog(LIMIT);
        feed.push(Bytes::from_static(b"one")).await;
        feed.push(Bytes::from(vec![7; 5000])).await;
        feed.end();
        assert_eq!(inbound.next().await.unwrap(), "one");
        assert_eq!(inbound.next().await.unwrap().len(), 5000);
        assert_eq!(inbound.next().await, None);
    }

    #[tokio::test]
    async fn a_full_backlog_waits_and_goes_on_when_read() {
        let (feed, mut inbound) = backlog(10_000);
        feed.push(Bytes::from(vec![0; 9_000])).await;
        assert!(timeout(SOON, feed.push(Bytes::from(vec![1; 2_000]))).await.is_err());
        assert_eq!(inbound.next().await.unwrap().len(), 9_000);
        timeout(SOON, feed.push(Bytes::from(vec![1; 2_000]))).await.unwrap();
        assert_eq!(inbound.next().await.unwrap().len(), 2_000);
    }

    #[tokio::test]
    async fn small_chunks_count_for_more_than_their_bytes() {
        let (feed, _inbound) = backlog(6_500);
        for _ in 0..100 {
            timeout(SOON, feed.push(Bytes::from_static(b"x"))).await.unwrap();
        }
        assert!(timeout(SOON, feed.push(Bytes::from_static(b"x"))).await.is_err());
    }

    #[tokio::test]
    async fn an_abandoned_backlog_never_blocks() {
        let (feed, inbound) = backlog(10);
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
