//! Jobs: what a request started, and what its retries join.
//!
//! A client that gives up (its deadline passes, its connection breaks) does not stop a job half-way;
//! when it asks again for the same identity it waits for the same job and gets its result.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};

use crate::error::{Error, Result};

/// Where a job is, for people who ask why it takes so long.
#[derive(Clone, Debug)]
pub(crate) struct Stage(Arc<Mutex<(&'static str, Instant)>>);

impl Stage {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(("queued", Instant::now()))))
    }

    /// Enters a stage.
    pub(crate) fn set(&self, stage: &'static str) {
        let (before, since) = std::mem::replace(&mut *lock(&self.0), (stage, Instant::now()));
        tracing::debug!(stage = before, elapsed = ?since.elapsed(), next = stage, "stage is over");
    }

    /// The stage, and for how long the job has been in it.
    pub(crate) fn get(&self) -> (&'static str, std::time::Duration) {
        let (stage, since) = *lock(&self.0);
        (stage, since.elapsed())
    }
}

struct Job<C> {
    content: C,
    stage: Stage,
    result: Shared<BoxFuture<'static, Result<String>>>,
}

/// The running jobs, by identity. Each ends with the id of what it made.
pub(crate) struct Jobs<C> {
    running: Arc<Mutex<HashMap<String, Job<C>>>>,
}

impl<C> Default for Jobs<C> {
    fn default() -> Self {
        Self { running: Arc::default() }
    }
}

impl<C: PartialEq + Send + 'static> Jobs<C> {
    /// Runs `make` as a job, or joins the running one with this identity if it has the same content.
    /// `Err(())` in the outer result: a job with this identity, but other content, is running.
    pub(crate) async fn run<F, Fut>(
        &self,
        identity: String,
        content: C,
        make: F,
    ) -> std::result::Result<Result<String>, ()>
    where
        F: FnOnce(Stage) -> Fut,
        Fut: Future<Output = Result<String>> + Send + 'static,
    {
        let result = {
            let mut running = lock(&self.running);
            if let Some(job) = running.get(&identity) {
                if job.content != content {
                    return Err(());
                }
                job.result.clone()
            } else {
                let stage = Stage::new();
                let work = make(stage.clone());
                let (jobs, key) = (Arc::clone(&self.running), identity.clone());
                let task = tokio::spawn(async move {
                    let result = work.await;
                    lock(&jobs).remove(&key);
                    result
                });
                let (jobs, key) = (Arc::clone(&self.running), identity.clone());
                let result = async move {
                    task.await.unwrap_or_else(|error| {
                        lock(&jobs).remove(&key);
                        Err(Error::internal("job", error))
                    })
                }
                .boxed()
                .shared();
                running.insert(identity, Job { content, stage, result: result.clone() });
                result
            }
        };
        Ok(result.await)
    }

    /// Identity, stage and time in it of each running job.
    pub(crate) fn list(&self) -> Vec<(String, &'static str, std::time::Duration)> {
        lock(&self.running)
            .iter()
            .map(|(identity, job)| {
                let (stage, since) = job.stage.get();
                (identity.clone(), stage, since)
            })
            .collect()
    }
}

/// A poisoned lock means that a thread panicked while it held it; what these locks guard is whole
/// after each single change, so go on.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    #[tokio::test]
    async fn a_retry_joins_the_running_job() {
        let jobs = Jobs::default();
        let runs = Arc::new(AtomicUsize::new(0));
        let job = |runs: Arc<AtomicUsize>| {
            move |stage: Stage| async move {
                stage.set("working");
                runs.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(50)).await;
                Ok("id".to_owned())
            }
        };
        let first = jobs.run("pod".into(), 1, job(runs.clone()));
        // A client that gives up: the job goes on.
        assert!(tokio::time::timeout(Duration::from_millis(10), first).await.is_err());
        assert_eq!(jobs.list()[0].1, "working");
        assert!(jobs.run("pod".into(), 2, job(runs.clone())).await.is_err());
        let second = jobs.run("pod".into(), 1, job(runs.clone())).await.unwrap().unwrap();
        assert_eq!(second, "id");
        assert_eq!(runs.load(Ordering::SeqCst), 1);
        assert!(jobs.list().is_empty());
    }

    #[tokio::test]
    async fn a_panic_in_a_job_is_an_error_and_frees_the_identity() {
        let jobs = Jobs::default();
        let result = jobs.run("pod".into(), 1, |_| async { panic!("boom") }).await.unwrap();
        assert!(result.is_err());
        assert!(jobs.list().is_empty());
    }
}
