//! Interfaces of pods that have been stopped, on their way out.
//!
//! A pod's processes are what keeps its network namespace. When the last has ended, the kernel takes the namespace's
//! devices away by itself, several namespaces in one go, and with the pod's end of a veth goes ours: within a few
//! milliseconds, and nobody waits for it. To delete the link ourselves takes some 20 ms of waiting for RCU. So that is
//! for links that stay: somebody else holds their namespace.

use std::collections::HashMap;
use std::ffi::OsString;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt};
use tokio::sync::watch;

use crate::NetworkError;
use crate::bridge::{Bridge, Inner, blocking, check_pod_id, link_name};
use crate::link::{self, Link};
use crate::rules;

/// The first and the last pause between two looks at a link.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(16));
/// How long the kernel has for its part. Past that, the link is deleted.
const BY_ITSELF: Duration = Duration::from_millis(100);
/// Pauses between attempts to take away what can't be taken away.
const AGAIN: [Duration; 4] =
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

/// Waits until an interface of the calling thread's network namespace is gone, for some time. Does not wait for the lock of
/// all network configuration, as rtnetlink does.
async fn gone(link: &str, limit: Duration) -> bool {
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

/// Whether an interface of that name is in the calling thread's network namespace. Asks by SO_BINDTODEVICE (socket(7)): for a
/// name that is gone, netdevice(7)'s ioctls first run modprobe(8) twice.
pub(crate) fn exists(link: &str) -> bool {
    let bound = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .and_then(|socket| setsockopt(&socket, sockopt::BindToDevice, &OsString::from(link)));
    // Any other error than ENODEV: ask netlink, which tells more.
    !matches!(bound, Err(Errno::ENODEV))
}

impl Bridge {
    /// Takes away what `attach` made: host ports, interface, lease. Goes on past errors and returns the first. The
    /// pod's namespace may be gone; a pod that was never attached is success. All is gone when it returns.
    pub async fn detach(&self, pod_id: &str) -> Result<(), NetworkError> {
        check_pod_id(pod_id)?;
        self.inner.leaving.wait(pod_id).await;
        let ports = self.withdraw(pod_id).await;
        self.inner.remove_link(pod_id).await?;
        // Its lease stays as long as its rules, which lead to its address.
        ports?;
        self.inner.release(pod_id).await
    }

    /// Cuts a pod off whose processes have ended: its host ports are gone and nothing reaches its addresses when it
    /// returns. The interface is left to the kernel, which removes it with the pod's namespace, and the lease ends with
    /// it, in the background; `detach` waits for that. What a daemon that dies leaves undone, its next one finds in
    /// `attached`.
    pub async fn retire(&self, pod_id: &str) -> Result<(), NetworkError> {
        check_pod_id(pod_id)?;
        let Some(ticket) = self.inner.leaving.begin(pod_id) else { return Ok(()) };
        let result = self.cut_off(pod_id).await;
        let inner = self.inner.clone();
        let id = pod_id.to_owned();
        match result {
            Ok(true) => {
                let released = inner.release(&id).await;
                inner.leaving.end(&id, ticket);
                released
            }
            Ok(false) => {
                tokio::spawn(async move {
                    inner.see_off(&id).await;
                    inner.leaving.end(&id, ticket);
                });
                Ok(())
            }
            Err(error) => {
                inner.leaving.end(&id, ticket);
                Err(error)
            }
        }
    }

    /// True: the pod's interface is gone already.
    async fn cut_off(&self, pod_id: &str) -> Result<bool, NetworkError> {
        let ports = self.withdraw(pod_id).await;
        let found = self.inner.own_link(pod_id).await?;
        if let Some(found) = &found {
            link::down(&self.inner.removals.handle(), found.index, &found.name).await?;
        }
        let gone = found.is_none();
        // See `detach`.
        ports.map(|()| gone)
    }

    /// Takes a pod's host ports away.
    async fn withdraw(&self, pod_id: &str) -> Result<(), NetworkError> {
        match self.inner.leases.get(pod_id).filter(|lease| !lease.ports.is_empty()) {
            Some(lease) => self.inner.unpublish(lease).await,
            None => Ok(()),
        }
    }

    /// Waits until all interfaces that `retire` left to the kernel are gone, at most `limit`. False: some are still
    /// there.
    pub async fn drain(&self, limit: Duration) -> bool {
        let all = async {
            for pod_id in self.inner.leaving.all() {
                self.inner.leaving.wait(&pod_id).await;
            }
        };
        tokio::time::timeout(limit, all).await.is_ok()
    }
}

impl Inner {
    /// The pod's interface on the host. A veth of that name in another bridge is not ours.
    async fn own_link(&self, pod_id: &str) -> Result<Option<Link>, NetworkError> {
        let name = self.leases.get(pod_id).map_or_else(|| link_name(pod_id), |l| l.link);
        // Asks without the lock that the kernel holds while it takes other namespaces apart.
        if !exists(&name) {
            return Ok(None);
        }
        // Without a lease the name may be that of another pod with the same start of its id.
        if self.leases.is_of_another(&name, pod_id) {
            return Ok(None);
        }
        let found = link::find(&self.removals.handle(), &name).await?;
        Ok(found.filter(|found| found.controller.is_none_or(|c| c == self.link().index)))
    }

    async fn remove_link(&self, pod_id: &str) -> Result<(), NetworkError> {
        match self.own_link(pod_id).await? {
            Some(found) => link::delete(&self.removals.handle(), found.index, &found.name).await,
            None => Ok(()),
        }
    }

    async fn release(self: &Arc<Self>, pod_id: &str) -> Result<(), NetworkError> {
        let inner = self.clone();
        let id = pod_id.to_owned();
        blocking(move || {
            let limited = inner.leases.get(&id).is_some_and(|lease| rules::policed(&lease).is_some());
            inner.leases.release(&id)?;
            if limited { inner.unpolicing.run(&id, |_| inner.replace_egress()) } else { Ok(()) }
        })
        .await
    }

    /// Waits for the end of a pod's interface, or brings it about, and frees the lease.
    async fn see_off(self: &Arc<Self>, pod_id: &str) {
        let name = self.leases.get(pod_id).map_or_else(|| link_name(pod_id), |l| l.link);
        let by_itself = gone(&name, BY_ITSELF).await;
        let mut pauses = AGAIN.into_iter();
        loop {
            let removed = if by_itself { Ok(()) } else { self.remove_link(pod_id).await };
            let done = match removed {
                Ok(()) => self.release(pod_id).await,
                Err(error) => Err(error),
            };
            let Err(error) = done else { return };
            let Some(pause) = pauses.next() else {
                tracing::error!(pod_id, %error, "the network of a stopped pod was not removed; its removal tries again");
                return;
            };
            tracing::warn!(pod_id, %error, "removing the network of a stopped pod");
            tokio::time::sleep(pause).await;
        }
    }
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
