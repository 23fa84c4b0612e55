//! Interfaces of pods that have been stopped, on their way out.
//!
//! A pod's processes are what keeps its network namespace. When the last has ended, the kernel takes the namespace's
//! devices away by itself, several namespaces in one go, and with the pod's end of a veth goes ours: within a few
//! milliseconds, and nobody waits for it. To delete the link ourselves takes some 20 ms of waiting for RCU. So that is
//! for links that stay: somebody else holds their namespace.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

/// The first and the last pause between two looks at a link.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(16));
/// How long the kernel has for its part. Past that, the link is deleted.
pub(crate) const BY_ITSELF: Duration = Duration::from_millis(100);
/// Pauses between attempts to take away what can't be taken away.
pub(crate) const AGAIN: [Duration; 4] =
    [Duration::from_millis(100), Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(20)];

/// The pods whose interface is leaving.
#[derive(Debug, Default)]
pub(crate) struct Leaving(Mutex<HashMap<String, watch::Receiver<()>>>);

/// Ends with the work: those who wait for it go on.
#[derive(Debug)]
pub(crate) struct Ticket(#[allow(dead_code, reason = "its drop is what counts")] watch::Sender<()>);

impl Leaving {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, watch::Receiver<()>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a pod. None: it is leaving already.
    pub(crate) fn begin(&self, pod_id: &str) -> Option<Ticket> {
        let mut all = self.lock();
        if all.contains_key(pod_id) {
            return None;
        }
        let (sender, receiver) = watch::channel(());
        all.insert(pod_id.to_owned(), receiver);
        Some(Ticket(sender))
    }

    /// Forgets a pod, for good or ill.
    pub(crate) fn end(&self, pod_id: &str, ticket: Ticket) {
        self.lock().remove(pod_id);
        drop(ticket);
    }

    /// Waits until the work for a pod has ended; at once if there is none.
    pub(crate) async fn wait(&self, pod_id: &str) {
        let receiver = self.lock().get(pod_id).cloned();
        if let Some(mut receiver) = receiver {
            // Nothing is ever sent: this is the end of the ticket.
            while receiver.changed().await.is_ok() {}
        }
    }

    /// The pods.
    pub(crate) fn all(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }
}

/// Waits until an interface of the calling thread's network namespace is gone, for some time. Asks by ioctl(2), which
/// does not wait for the lock of all network configuration, as rtnetlink does.
pub(crate) async fn gone(link: &str, limit: Duration) -> bool {
    let end = tokio::time::Instant::now() + limit;
    let (mut pause, longest) = PAUSES;
    loop {
        if !exists(link) {
            return true;
        }
        if tokio::time::Instant::now() >= end {
            return false;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(longest);
    }
}

/// Whether an interface of that name is in the calling thread's network namespace.
pub(crate) fn exists(link: &str) -> bool {
    // Any other error than ENODEV: ask netlink, which tells more.
    !matches!(nix::net::if_::if_nametoindex(link), Err(nix::errno::Errno::ENODEV))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn those_who_wait_go_on_at_the_end() {
        let leaving = std::sync::Arc::new(Leaving::default());
        leaving.wait("a").await;
        let ticket = leaving.begin("a").unwrap();
        assert!(leaving.begin("a").is_none() && leaving.all() == ["a"]);
        let waiter = tokio::spawn({
            let leaving = leaving.clone();
            async move { leaving.wait("a").await }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waiter.is_finished());
        leaving.end("a", ticket);
        waiter.await.unwrap();
        assert!(leaving.all().is_empty());
    }

    #[tokio::test]
    async fn links_are_looked_for() {
        assert!(exists("lo") && !exists("no-such-link"));
        assert!(gone("no-such-link", Duration::ZERO).await);
        assert!(!gone("lo", Duration::from_millis(5)).await);
    }
}
