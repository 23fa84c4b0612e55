//! OOM kills when they happen: one inotify instance for the memory.events of all containers.
//!
//! One for the node: an instance for each supervisor would take all that a user may have (128 by default) from the kubelet.
//! Nothing is lost while no daemon runs, as the files count. cgroup v1 has no such notification through inotify; there the file
//! is read at the container's end, and when somebody asks for the metrics. Whether a container counts as OOMKilled is told by its
//! supervisor, with the exit.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::jobs::lock;
use crate::pod::Container;
use crate::pods::Inner;

/// A container at its limit changes the file a hundred times a second, with or without a kill.
const GATHER: Duration = Duration::from_millis(200);

/// The files that count OOM kills.
#[derive(Debug)]
pub(crate) struct OomFiles {
    /// None: the kernel refused it, which was said.
    inotify: Option<OwnedFd>,
    watched: Mutex<Watched>,
}

#[derive(Debug, Default)]
struct Watched {
    /// By container.
    files: HashMap<String, File>,
    /// Container by watch descriptor.
    containers: HashMap<i32, String>,
}

#[derive(Debug)]
struct File {
    path: PathBuf,
    watch: Option<i32>,
}

/// What changed.
#[derive(Debug, PartialEq, Eq)]
enum Changed {
    These(Vec<String>),
    /// Events were lost.
    Any,
}

impl OomFiles {
    pub(crate) fn new() -> Self {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK);
        let inotify = inotify.inspect_err(
            |error| tracing::warn!(%error, "inotify: OOM kills are noticed at the end of containers only"),
        );
        Self { inotify: inotify.ok(), watched: Mutex::default() }
    }

    /// Watches a container's file from now on.
    fn add(&self, container: &str, path: &Path) {
        let mut watched = lock(&self.watched);
        let watch = self.inotify.as_ref().and_then(|inotify| {
            let added = inotify::add_watch(inotify, path, WatchFlags::MODIFY);
            added
                .inspect_err(|error| {
                    tracing::warn!(container, path = %path.display(), %error, "inotify: OOM kills are noticed at its end only");
                })
                .ok()
        });
        if let Some(watch) = watch {
            watched.containers.insert(watch, container.to_owned());
        }
        watched.files.insert(container.to_owned(), File { path: path.to_owned(), watch });
    }

    /// The kernel drops no watch by itself when a cgroup goes.
    fn remove(&self, container: &str) {
        let mut watched = lock(&self.watched);
        let Some(file) = watched.files.remove(container) else { return };
        if let (Some(watch), Some(inotify)) = (file.watch, &self.inotify) {
            watched.containers.remove(&watch);
            // EINVAL: the kernel has dropped it after all.
            let _ = inotify::remove_watch(inotify, watch);
        }
    }

    /// The number of kills in a container's cgroup and below; none where it is not counted.
    fn kills(&self, container: &str) -> Option<u64> {
        let path = lock(&self.watched).files.get(container)?.path.clone();
        stave_cgroup::oom_kills(&path)
    }

    /// Takes all events.
    fn changed(&self) -> Changed {
        let Some(inotify) = &self.inotify else { return Changed::These(Vec::new()) };
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(inotify, &mut buffer);
        let watched = lock(&self.watched);
        let mut changed = Vec::new();
        let mut lost = false;
        loop {
            match reader.next() {
                Ok(event) => {
                    lost |= event.events().contains(ReadFlags::QUEUE_OVERFLOW);
                    changed.extend(watched.containers.get(&event.wd()).cloned());
                }
                Err(Errno::INTR) => {}
                // EAGAIN: that was all.
                Err(_) => break,
            }
        }
        changed.sort_unstable();
        changed.dedup();
        if lost { Changed::Any } else { Changed::These(changed) }
    }
}

impl Inner {
    /// Counts the OOM kills of a container whose cgroup is there, from now on.
    pub(crate) fn watch_oom(&self, container: &Container, pod_cgroup: &str) {
        let id = container.with(|record| record.id.clone());
        if let Some(file) = self.settings.cgroups.oom_file(pod_cgroup, &id) {
            self.oom.add(&id, &file);
            // Those of the time without a daemon.
            self.count_oom_kills(container);
        }
    }

    /// Looks a last time.
    pub(crate) fn unwatch_oom(&self, container: &Container) {
        self.count_oom_kills(container);
        self.oom.remove(&container.with(|record| record.id.clone()));
    }

    /// The number of processes that the OOM killer has ended in the container.
    pub(crate) fn count_oom_kills(&self, container: &Container) -> u64 {
        let (id, name) = container.with(|record| {
            let metadata = record.config.metadata.as_ref();
            (record.id.clone(), metadata.map(|metadata| metadata.name.clone()).unwrap_or_default())
        });
        let Some(kills) = self.oom.kills(&id) else { return container.oom_kills.load(Ordering::Relaxed) };
        // The larger, as another may be looking.
        let before = container.oom_kills.fetch_max(kills, Ordering::Relaxed);
        if kills > before {
            tracing::warn!(
                container = id,
                name,
                processes = kills - before,
                total = kills,
                "the kernel's OOM killer has ended processes of the container"
            );
        }
        kills.max(before)
    }
}

/// Follows the events until `inner` is gone.
pub(crate) fn follow(inner: &Arc<Inner>) {
    let Some(inotify) = &inner.oom.inotify else { return };
    let inotify = match inotify.as_fd().try_clone_to_owned().and_then(register) {
        Ok(inotify) => inotify,
        Err(error) => {
            tracing::warn!(%error, "inotify: OOM kills are noticed at the end of containers only");
            return;
        }
    };
    let inner = Arc::downgrade(inner);
    tokio::spawn(async move {
        while let Ok(mut ready) = inotify.readable().await {
            let Some(inner) = inner.upgrade() else { return };
            let changed = inner.oom.changed();
            ready.clear_ready();
            let containers: Vec<_> = {
                let all = inner.containers_read();
                match changed {
                    Changed::These(ids) => ids.iter().filter_map(|id| all.get(id)).cloned().collect(),
                    Changed::Any => all.values().cloned().collect(),
                }
            };
            for container in containers {
                inner.count_oom_kills(&container);
            }
            drop(inner);
            tokio::time::sleep(GATHER).await;
        }
    });
}

/// tokio deprecated this because a type may change the descriptor under it. An `OwnedFd` can't.
#[allow(deprecated)]
fn register(inotify: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(inotify, Interest::READABLE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn changes_are_told_by_container_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let files = OomFiles::new();
        let path = |name: &str| dir.path().join(name);
        for name in ["a", "b"] {
            fs::write(path(name), "oom 0\noom_kill 0\n").unwrap();
            files.add(name, &path(name));
        }
        assert_eq!(files.changed(), Changed::These(Vec::new()));
        fs::write(path("b"), "oom 4\noom_kill 3\noom_group_kill 0\n").unwrap();
        assert_eq!(files.changed(), Changed::These(vec!["b".into()]));
        assert_eq!((files.kills("a"), files.kills("b"), files.kills("c")), (Some(0), Some(3), None));
        assert_eq!(files.changed(), Changed::These(Vec::new()));
        files.remove("b");
        files.remove("b");
        fs::write(path("b"), "oom_kill 5\n").unwrap();
        fs::write(path("a"), "oom_kill 5\n").unwrap();
        assert_eq!(files.changed(), Changed::These(vec!["a".into()]));
        assert_eq!(lock(&files.watched).containers.len(), 1);
    }

    #[test]
    fn a_file_that_is_gone_counts_nothing() {
        let files = OomFiles::new();
        files.add("a", Path::new("/nonexistent/memory.events"));
        assert_eq!(files.kills("a"), None);
        files.remove("a");
    }
}
