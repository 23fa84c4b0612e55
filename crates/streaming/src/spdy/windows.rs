//! How much we may send: the windows of SPDY/3.1 that the client gives, for each stream and for the connection.
//!
//! Go's client knows no windows and would wait for ever behind the 64 KiB that the draft gives every stream. So nothing is
//! held back until the client speaks of windows: by SETTINGS with an initial one, or by a WINDOW_UPDATE. From then on
//! they all hold, and what was sent before counts.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicI64, Ordering},
};

use tokio::sync::Notify;

/// The windows of the connection and of each stream, as long as the client has said nothing else.
const INITIAL: i64 = 64 << 10;
/// A window may not grow beyond this.
const MAX: i64 = i32::MAX as i64;

/// A window over 2^31 - 1.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Overflow;

/// What the streams of a connection have in common.
#[derive(Clone)]
pub(super) struct Windows(Arc<Mutex<Common>>);

struct Common {
    in_force: bool,
    /// What each stream begins with.
    initial: i64,
    /// What may be sent on all streams together. Negative where more was sent before the client spoke.
    connection: i64,
}

impl Default for Windows {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Common { in_force: false, initial: INITIAL, connection: INITIAL })))
    }
}

impl Windows {
    fn common(&self) -> MutexGuard<'_, Common> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// That of a new stream.
    pub(super) fn stream(&self) -> Arc<Window> {
        let (balance, closed, changed) = (AtomicI64::new(0), AtomicBool::new(false), Notify::new());
        Arc::new(Window { windows: self.clone(), balance, closed, changed })
    }

    /// What streams begin with, those that are open included. The caller tells these by [`Window::changed`].
    pub(super) fn set_initial(&self, bytes: u32) {
        let mut common = self.common();
        common.in_force = true;
        common.initial = i64::from(bytes);
    }

    /// The connection gets more. The caller tells the streams by [`Window::changed`].
    pub(super) fn widen(&self, bytes: u32) -> Result<(), Overflow> {
        let mut common = self.common();
        common.in_force = true;
        common.connection += i64::from(bytes);
        if common.connection > MAX { Err(Overflow) } else { Ok(()) }
    }

    /// The client speaks of windows, be it for a stream that has ended.
    pub(super) fn enforce(&self) {
        self.common().in_force = true;
    }

    /// Bytes of a stream that was removed before they were sent.
    pub(super) fn give_back(&self, bytes: usize) {
        self.common().connection += bytes as i64;
    }
}

/// The window of one stream.
pub(crate) struct Window {
    windows: Windows,
    /// What was given beyond the initial window, less what was sent. Changed only while `windows` is locked.
    balance: AtomicI64,
    closed: AtomicBool,
    changed: Notify,
}

impl Window {
    /// The stream gets more.
    pub(super) fn widen(&self, bytes: u32) -> Result<(), Overflow> {
        let mut common = self.windows.common();
        common.in_force = true;
        let before = self.balance.fetch_add(i64::from(bytes), Ordering::Relaxed);
        let overflow = common.initial + before + i64::from(bytes) > MAX;
        drop(common);
        self.changed();
        if overflow { Err(Overflow) } else { Ok(()) }
    }

    /// Whoever waits looks again.
    pub(super) fn changed(&self) {
        self.changed.notify_waiters();
    }

    /// The stream is over: nobody waits for its window any more.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.changed();
    }

    /// Waits until something may be sent, and takes up to `wanted` bytes, which must not be 0. `None`: the stream is over.
    pub(crate) async fn take(&self, wanted: usize) -> Option<Taken<'_>> {
        loop {
            if let Some(taken) = self.try_take(wanted) {
                return taken;
            }
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            // What came between the look and the wait.
            if let Some(taken) = self.try_take(wanted) {
                return taken;
            }
            changed.await;
        }
    }

    /// `None`: not now. `Some(None)`: never.
    fn try_take(&self, wanted: usize) -> Option<Option<Taken<'_>>> {
        if self.closed.load(Ordering::Acquire) {
            return Some(None);
        }
        let mut common = self.windows.common();
        let mut bytes = wanted as i64;
        if common.in_force {
            let own = common.initial + self.balance.load(Ordering::Relaxed);
            bytes = bytes.min(own).min(common.connection);
        }
        if bytes <= 0 {
            return None;
        }
        self.balance.fetch_sub(bytes, Ordering::Relaxed);
        common.connection -= bytes;
        Some(Some(Taken { window: self, bytes }))
    }
}

/// Window that was taken for bytes to send. Given back when dropped, so that a sender that is given up costs the connection nothing.
pub(crate) struct Taken<'a> {
    window: &'a Window,
    bytes: i64,
}

impl Taken<'_> {
    /// The bytes are sent: how many.
    pub(crate) fn spend(mut self) -> usize {
        std::mem::take(&mut self.bytes) as usize
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if self.bytes != 0 {
            let mut common = self.window.windows.common();
            self.window.balance.fetch_add(self.bytes, Ordering::Relaxed);
            common.connection += self.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    async fn takes(window: &Window, wanted: usize) -> Option<usize> {
        timeout(Duration::from_millis(20), window.take(wanted)).await.ok().map(|taken| taken.unwrap().spend())
    }

    #[tokio::test]
    async fn nothing_holds_until_the_client_speaks_and_then_all_that_was_sent_counts() {
        let windows = Windows::default();
        let stream = windows.stream();
        assert_eq!(takes(&stream, 1 << 20).await, Some(1 << 20));
        stream.widen(1).unwrap();
        assert_eq!(takes(&stream, 1).await, None);
        stream.widen(1 << 20).unwrap();
        assert_eq!(takes(&stream, 1).await, None, "the connection's window is used up");
        windows.widen(1 << 20).unwrap();
        assert_eq!(takes(&stream, 1 << 20).await, Some(64 << 10), "the connection's is smaller by one");
    }

    #[tokio::test]
    async fn the_smaller_of_both_windows() {
        let windows = Windows::default();
        windows.set_initial(1000);
        let (one, two) = (windows.stream(), windows.stream());
        assert_eq!(takes(&one, 5000).await, Some(1000));
        assert_eq!(takes(&one, 5000).await, None);
        assert_eq!(takes(&two, 10).await, Some(10));
        windows.set_initial(100);
        assert_eq!(takes(&two, 5000).await, Some(90));
        one.widen(900).unwrap();
        assert_eq!(takes(&one, 5000).await, None, "it was negative");
        one.widen(1).unwrap();
        assert_eq!(takes(&one, 5000).await, Some(1));
        one.widen(1 << 20).unwrap();
        assert_eq!(takes(&one, 1 << 20).await, Some((64 << 10) - 1101));
    }

    #[tokio::test]
    async fn what_is_taken_and_not_sent_is_given_back() {
        let windows = Windows::default();
        windows.set_initial(1 << 20);
        let stream = windows.stream();
        drop(stream.take(64 << 10).await);
        let spent = stream.take(1000).await.unwrap().spend();
        windows.give_back(spent);
        assert_eq!(takes(&stream, 1 << 20).await, Some(64 << 10));
    }

    #[tokio::test]
    async fn who_waits_is_woken_and_at_the_end_as_well() {
        let windows = Windows::default();
        windows.set_initial(0);
        let stream = windows.stream();
        let waiting = |stream: &Arc<Window>| {
            let stream = stream.clone();
            tokio::spawn(async move { stream.take(10).await.map(Taken::spend) })
        };
        let (one, two) = (waiting(&stream), waiting(&stream));
        tokio::time::sleep(Duration::from_millis(10)).await;
        stream.widen(20).unwrap();
        assert_eq!((one.await.unwrap(), two.await.unwrap()), (Some(10), Some(10)));
        let last = waiting(&stream);
        tokio::time::sleep(Duration::from_millis(10)).await;
        stream.close();
        assert_eq!(last.await.unwrap(), None);
    }

    #[test]
    fn no_window_is_larger_than_the_protocol_allows() {
        let windows = Windows::default();
        assert_eq!(windows.widen(i32::MAX as u32 - (64 << 10)), Ok(()));
        assert_eq!(windows.widen(1), Err(Overflow));
        let stream = windows.stream();
        assert_eq!(stream.widen(i32::MAX as u32 - (64 << 10)), Ok(()));
        assert_eq!(stream.widen(1), Err(Overflow));
    }
}
