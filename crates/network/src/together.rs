//! Work that is done once for all who wait for it.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Work that takes as long for many pods as for one, such as to replace all rules. Whoever's turn it is does it for all that
/// came meanwhile: when a node is emptied, its pods end together.
#[derive(Debug, Default)]
pub(crate) struct Together {
    turn: Mutex<()>,
    waiting: Mutex<BTreeSet<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Together {
    /// Returns when `work` was done for this pod, by the caller or by another; `work` gets the pods that it is done for. What
    /// failed for another was not done: each does it again, and has its own error.
    pub(crate) fn run<E>(
        &self,
        pod_id: &str,
        work: impl FnOnce(&BTreeSet<String>) -> Result<(), E>,
    ) -> Result<(), E> {
        lock(&self.waiting).insert(pod_id.to_owned());
        let _turn = lock(&self.turn);
        let all = lock(&self.waiting).clone();
        if !all.contains(pod_id) {
            return Ok(());
        }
        let done = work(&all);
        let mut waiting = lock(&self.waiting);
        match done {
            Ok(()) => waiting.retain(|pod| !all.contains(pod)),
            Err(_) => {
                waiting.remove(pod_id);
            }
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const PODS: usize = 20;

    /// What `PODS` pods at once get, the work's first result being `first`, and how often it was done.
    fn run_all(first: Result<(), ()>) -> (Vec<Result<(), ()>>, usize) {
        let (together, times) = (Together::default(), AtomicUsize::new(0));
        let (together, times) = (&together, &times);
        let work = move |pods: &BTreeSet<String>| {
            if times.fetch_add(1, Ordering::SeqCst) > 0 {
                return Ok(());
            }
            while lock(&together.waiting).len() < PODS {
                std::thread::yield_now();
            }
            assert!(!pods.is_empty());
            first
        };
        let results = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..PODS).map(|pod| scope.spawn(move || together.run(&format!("pod{pod}"), work))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(lock(&together.waiting).is_empty());
        (results, times.load(Ordering::SeqCst))
    }

    #[test]
    fn one_does_it_for_all_that_wait() {
        let (results, times) = run_all(Ok(()));
        assert!(results.iter().all(Result::is_ok));
        assert!(times <= 2, "{times}");
    }

    #[test]
    fn a_failure_is_one_pods_and_done_for_nobody() {
        let (results, times) = run_all(Err(()));
        assert_eq!(results.iter().filter(|result| result.is_err()).count(), 1);
        assert_eq!(times, 2);
    }
}
