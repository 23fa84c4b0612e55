//! The pool of ready supervisors: what RunPodSandbox need not wait for. Each is used once.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use stave_cri_proto::v1 as cri;
use tokio::sync::Notify;

use crate::jobs::lock;
use crate::net_sysctls::is_of_all_interfaces;
use crate::pods::Inner;
use crate::ready::ReadySupervisor;
use crate::record::PodRecord;

/// The pool is filled when no pod was being started for this long: a start must not wait for the next one's.
const QUIET: Duration = Duration::from_millis(20);
/// But it is not put off for longer than this.
const PATIENCE: Duration = Duration::from_secs(1);
/// Pauses after a failure.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));

/// See the module.
pub(crate) struct Pool {
    size: usize,
    idle: Mutex<VecDeque<ReadySupervisor>>,
    taken: Notify,
    starts: Mutex<Starts>,
    closed: AtomicBool,
    used: AtomicU64,
    missed: AtomicU64,
    error: Mutex<Option<String>>,
}

/// The starts of pods, which the pool keeps out of the way of.
struct Starts {
    under_way: usize,
    /// When one last began or ended.
    last: Instant,
}

/// A start of a pod; it ends when this is dropped.
pub(crate) struct Starting<'a>(&'a Pool);

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        let mut starts = lock(&self.0.starts);
        starts.under_way = starts.under_way.saturating_sub(1);
        starts.last = Instant::now();
    }
}

/// The pool, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolState {
    /// How many there shall be.
    pub size: usize,
    /// How many wait, and have not been killed.
    pub ready: usize,
    /// Pods that got one.
    pub used: u64,
    /// Pods that could have had one, when there was none.
    pub missed: u64,
    /// Why the last one could not be made; None as soon as one can.
    pub error: Option<String>,
}

impl Pool {
    pub(crate) fn new(size: usize) -> Self {
        Self {
            size,
            idle: Mutex::default(),
            taken: Notify::new(),
            starts: Mutex::new(Starts { under_way: 0, last: Instant::now() }),
            closed: AtomicBool::new(false),
            used: AtomicU64::new(0),
            missed: AtomicU64::new(0),
            error: Mutex::default(),
        }
    }

    pub(crate) fn state(&self) -> PoolState {
        let (held, ready) = {
            let idle = lock(&self.idle);
            (idle.len(), idle.iter().filter(|ready| ready.is_waiting()).count())
        };
        if ready < held {
            // Nobody else would notice before a pod wants one.
            self.taken.notify_one();
        }
        PoolState {
            size: self.size,
            ready,
            used: self.used.load(Ordering::Relaxed),
            missed: self.missed.load(Ordering::Relaxed),
            error: lock(&self.error).clone(),
        }
    }

    /// To be kept as long as a pod is being started.
    pub(crate) fn starting(&self) -> Starting<'_> {
        let mut starts = lock(&self.starts);
        starts.under_way += 1;
        starts.last = Instant::now();
        Starting(self)
    }

    /// A ready supervisor for a pod, if there is one and the pod can have it: with namespaces of its own, no user
    /// namespace, no sysctls that its interface inherits, and the default runtime handler.
    pub(crate) fn take(
        &self,
        record: &PodRecord,
        default_handler: Option<&String>,
    ) -> Option<ReadySupervisor> {
        if self.size == 0 || !is_common(record, default_handler) {
            return None;
        }
        let mut dead = Vec::new();
        let found = {
            let mut idle = lock(&self.idle);
            loop {
                match idle.pop_front() {
                    Some(ready) if !ready.is_alive() => dead.push(ready),
                    found => break found,
                }
            }
        };
        if !dead.is_empty() {
            tracing::warn!(count = dead.len(), "ready supervisors were gone when they were wanted");
        }
        self.taken.notify_one();
        let count = if found.is_some() { &self.used } else { &self.missed };
        count.fetch_add(1, Ordering::Relaxed);
        found
    }

    /// Ends all that wait, and takes no more. Waits for their end, at most `limit`.
    pub(crate) async fn close(&self, limit: Duration) {
        self.closed.store(true, Ordering::Release);
        self.taken.notify_one();
        let idle = std::mem::take(&mut *lock(&self.idle));
        // All are told before one is waited for.
        let ends: Vec<_> = idle.into_iter().filter_map(ReadySupervisor::end).collect();
        if tokio::time::timeout(limit, futures::future::join_all(ends)).await.is_err() {
            tracing::warn!("some ready supervisors did not end within {limit:?}");
        }
    }

    /// Forgets those that somebody killed.
    fn wants_one(&self) -> bool {
        // Dropped without the lock: an interface may be to be removed.
        let _dead: VecDeque<_> = {
            let mut idle = lock(&self.idle);
            let (waiting, dead) = idle.drain(..).partition(ReadySupervisor::is_waiting);
            *idle = waiting;
            dead
        };
        !self.closed.load(Ordering::Acquire) && lock(&self.idle).len() < self.size
    }

    /// Waits until there is something to do, at a time when it disturbs nobody. False: the pool is closed.
    async fn wait(&self) -> bool {
        while !self.wants_one() {
            if self.closed.load(Ordering::Acquire) {
                return false;
            }
            self.taken.notified().await;
        }
        let begin = Instant::now();
        loop {
            let (busy, since) = {
                let starts = lock(&self.starts);
                (starts.under_way > 0, starts.last.elapsed())
            };
            if (!busy && since >= QUIET) || begin.elapsed() >= PATIENCE {
                return true;
            }
            tokio::time::sleep(if busy { QUIET } else { QUIET - since }).await;
        }
    }
}

fn is_common(record: &PodRecord, default_handler: Option<&String>) -> bool {
    let options = record.namespaces();
    let user_namespace =
        options.userns_options.as_ref().is_some_and(|user| user.mode() == cri::NamespaceMode::Pod);
    let handler = &record.runtime_handler;
    options.network() == cri::NamespaceMode::Pod
        && options.ipc() == cri::NamespaceMode::Pod
        && !user_namespace
        && !record
            .config
            .linux
            .iter()
            .flat_map(|linux| linux.sysctls.keys())
            .any(|key| is_of_all_interfaces(key))
        && (handler.is_empty() || Some(handler) == default_handler)
}

/// Keeps the pool full until it is closed.
pub(crate) fn fill(inner: &Arc<Inner>) {
    if inner.pool.size == 0 {
        return;
    }
    let (pool, inner) = (Arc::clone(&inner.pool), Arc::downgrade(inner));
    tokio::spawn(async move {
        let mut pause = BACK_OFF.0;
        while pool.wait().await {
            let Some(result) = add_one(&inner).await else { return };
            *lock(&pool.error) = result.as_ref().err().map(ToString::to_string);
            match result {
                Ok(()) => pause = BACK_OFF.0,
                Err(error) => {
                    tracing::warn!(%error, "a supervisor could not be made ready; pods start without, more slowly");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(BACK_OFF.1);
                }
            }
        }
    });
}

/// None: nobody needs it any more.
async fn add_one(inner: &Weak<Inner>) -> Option<crate::error::Result<()>> {
    let inner = inner.upgrade()?;
    Some(ReadySupervisor::start(&inner).await.map(|ready| {
        let mut idle = lock(&inner.pool.idle);
        // It may have been closed meanwhile: then this one ends here.
        if !inner.pool.closed.load(Ordering::Acquire) {
            idle.push_back(ready);
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_is_not_filled_while_a_pod_is_being_started() {
        let pool = Pool::new(1);
        let starting = pool.starting();
        assert!(tokio::time::timeout(QUIET * 5, pool.wait()).await.is_err(), "a start is under way");
        drop(starting);
        let ended = Instant::now();
        assert!(tokio::time::timeout(PATIENCE / 2, pool.wait()).await.unwrap());
        assert!(ended.elapsed() >= QUIET, "{:?}", ended.elapsed());
    }
}
