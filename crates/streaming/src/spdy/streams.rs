//! The open streams of a connection: each lives until both sides are done with it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use super::windows::{Overflow, Window, Windows};
use crate::backlog::Feed;

struct Open {
    feed: Arc<Feed>,
    reset: CancellationToken,
    window: Arc<Window>,
    local_done: bool,
    remote_done: bool,
}

/// Shared by the reader, which adds, and the writer, which ends.
#[derive(Clone, Default)]
pub(super) struct Streams {
    open: Arc<Mutex<HashMap<u32, Open>>>,
    windows: Windows,
}

impl Streams {
    fn open(&self) -> MutexGuard<'_, HashMap<u32, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn len(&self) -> usize {
        self.open().len()
    }

    /// Gives the window for what we send.
    pub(super) fn add(&self, id: u32, feed: Feed, reset: CancellationToken) -> Arc<Window> {
        let window = self.windows.stream();
        let open = Open {
            feed: Arc::new(feed),
            reset,
            window: window.clone(),
            local_done: false,
            remote_done: false,
        };
        self.open().insert(id, open);
        window
    }

    /// The client has set what it takes on each stream to begin with.
    pub(super) fn set_initial_window(&self, bytes: u32) {
        self.windows.set_initial(bytes);
        self.open().values().for_each(|open| open.window.changed());
    }

    /// The client takes more, on a stream or (0) on the connection.
    pub(super) fn widen(&self, id: u32, bytes: u32) -> Result<(), Overflow> {
        let streams = self.open();
        if id == 0 {
            let widened = self.windows.widen(bytes);
            streams.values().for_each(|open| open.window.changed());
            return widened;
        }
        match streams.get(&id) {
            Some(open) => open.window.widen(bytes),
            None => {
                self.windows.enforce();
                Ok(())
            }
        }
    }

    /// Data of a stream that has ended meanwhile is not sent.
    pub(super) fn unsent(&self, bytes: usize) {
        self.windows.give_back(bytes);
        self.open().values().for_each(|open| open.window.changed());
    }

    /// Where the client's bytes go; `None` for a stream that is not open for them.
    pub(super) fn feed(&self, id: u32) -> Option<Arc<Feed>> {
        self.open().get(&id).filter(|open| !open.remote_done).map(|open| open.feed.clone())
    }

    /// Streams with bytes of which nobody has taken any for `limit`.
    pub(super) fn stalled(&self, limit: Duration) -> Vec<u32> {
        self.open().iter().filter(|(_, open)| open.feed.stalled() >= limit).map(|(id, _)| *id).collect()
    }

    /// Whether we may still send on the stream.
    pub(super) fn writable(&self, id: u32) -> bool {
        self.open().get(&id).is_some_and(|open| !open.local_done)
    }

    /// The client has half-closed.
    pub(super) fn remote_done(&self, id: u32) {
        let mut streams = self.open();
        if let Some(open) = streams.get_mut(&id) {
            open.feed.end();
            open.remote_done = true;
            if open.local_done {
                streams.remove(&id);
            }
        }
    }

    /// We have half-closed.
    pub(super) fn local_done(&self, id: u32) {
        let mut streams = self.open();
        if let Some(open) = streams.get_mut(&id) {
            open.local_done = true;
            if open.remote_done {
                streams.remove(&id);
            }
        }
    }

    /// Either side has reset the stream. What the client sent before is still delivered.
    pub(super) fn remove(&self, id: u32) -> bool {
        let removed = self.open().remove(&id);
        if let Some(open) = &removed {
            open.feed.end();
            open.window.close();
            open.reset.cancel();
        }
        removed.is_some()
    }

    /// The connection is over: ends all.
    pub(super) fn clear(&self) {
        for (_, open) in self.open().drain() {
            open.feed.end();
            open.window.close();
        }
    }
}
