//! What probes make and must take away again: directories and helper threads.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

static COUNTER: AtomicU32 = AtomicU32::new(0);

fn unique_name() -> String {
    format!("stave-probe-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed))
}

/// A directory with whatever is in it; removed on drop.
pub(crate) struct ScratchDir(PathBuf);

impl ScratchDir {
    /// Makes one in the nearest ancestor of `wanted` that exists, so on the file system that
    /// `wanted` will be on.
    pub(crate) fn near(wanted: &Path) -> io::Result<Self> {
        let parent = wanted.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
        let path = parent.join(format!(".{}", unique_name()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Makes a directory inside.
    pub(crate) fn dir(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.0.join(name);
        fs::create_dir_all(&path)?;
        Ok(path)
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        // A mount namespace dies a moment after its last thread; until then the directory is busy.
        for _ in 0..20 {
            match fs::remove_dir_all(&self.0) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                _ => return,
            }
        }
    }
}

/// An empty cgroup; removed on drop.
pub(crate) struct ScratchCgroup(PathBuf);

impl ScratchCgroup {
    pub(crate) fn new(parent: &Path) -> io::Result<Self> {
        let path = parent.join(unique_name());
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for ScratchCgroup {
    fn drop(&mut self) {
        // A process that has just ended still keeps its cgroup busy for a moment.
        for _ in 0..50 {
            match fs::remove_dir(&self.0) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                _ => return,
            }
        }
    }
}

/// Runs `work` on a thread of its own, so that what it unshares goes with it.
pub(crate) fn in_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let handle = std::thread::Builder::new().name("host-probe".into()).spawn_scoped(scope, work)?;
        handle.join().unwrap_or_else(|_| Err(io::Error::other("the probe's thread panicked")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_is_made_in_the_nearest_directory_and_removed() {
        let base = tempfile::tempdir().unwrap();
        let scratch = ScratchDir::near(&base.path().join("not/there")).unwrap();
        let path = scratch.path().to_owned();
        assert_eq!(path.parent(), Some(base.path()));
        fs::write(scratch.dir("a/b").unwrap().join("c"), "x").unwrap();
        drop(scratch);
        assert!(!path.exists());
    }
}
