//! Tells when something changes in a directory that may not exist yet.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Directories below that are watched, too: one has the plugins of a list of CNI 1.1, and is called as its network.
const BELOW: usize = 64;

/// Armed once, for the first change.
#[derive(Debug)]
pub(crate) struct Watch {
    inotify: AsyncFd<OwnedFd>,
    /// By watch descriptor: the name that counts; none: every name.
    names: HashMap<i32, Option<OsString>>,
}

impl Watch {
    /// Watches `dir`, and the nearest directory above it, since it may come, go or be renamed.
    pub(crate) fn new(dir: &Path) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let mut names = HashMap::new();
        let gone = WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF | WatchFlags::ONLYDIR;
        let moved = WatchFlags::CREATE | WatchFlags::MOVED_FROM | WatchFlags::MOVED_TO | WatchFlags::DELETE;
        let mut below = dir;
        // From above, so that what is made meanwhile is seen by one of the two.
        while let Some(parent) = below.parent() {
            match inotify::add_watch(&inotify, parent, gone | moved) {
                Ok(watch) => {
                    names.insert(watch, below.file_name().map(OsString::from));
                    break;
                }
                Err(Errno::NOENT | Errno::NOTDIR) => below = parent,
                Err(errno) => return Err(errno.into()),
            }
        }
        let mut all =
            |dir: &Path| match inotify::add_watch(&inotify, dir, gone | moved | WatchFlags::CLOSE_WRITE) {
                Ok(watch) => {
                    names.insert(watch, None);
                    Ok(())
                }
                Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
                Err(errno) => Err(io::Error::from(errno)),
            };
        all(dir)?;
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        for below in entries.map(|entry| entry.path()).filter(|path| path.is_dir()).take(BELOW) {
            all(&below)?;
        }
        Ok(Self { inotify: register(inotify)?, names })
    }

    /// Waits for a change.
    pub(crate) async fn changed(&self) -> io::Result<()> {
        loop {
            let mut guard = self.inotify.readable().await?;
            if self.read()? {
                return Ok(());
            }
            guard.clear_ready();
        }
    }

    /// Takes all events. True: one of them counts.
    fn read(&self) -> io::Result<bool> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(self.inotify.get_ref(), &mut buffer);
        let mut counts = false;
        loop {
            match reader.next() {
                Ok(event) => {
                    let own = ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::IGNORED;
                    counts |= event.events().intersects(own | ReadFlags::QUEUE_OVERFLOW)
                        || match self.names.get(&event.wd()) {
                            Some(Some(name)) => {
                                event.file_name().is_some_and(|other| other.to_bytes() == name.as_bytes())
                            }
                            Some(None) => true,
                            None => false,
                        };
                }
                Err(Errno::AGAIN) => return Ok(counts),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
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
    use std::time::Duration;

    async fn seen(dir: &Path, change: impl FnOnce()) -> bool {
        let watch = Watch::new(dir).unwrap();
        change();
        tokio::time::timeout(Duration::from_millis(300), watch.changed()).await.is_ok()
    }

    #[tokio::test]
    async fn a_directory_that_comes_changes_and_goes() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("cni/net.d");
        assert!(!seen(&dir, || fs::write(top.path().join("other"), "").unwrap()).await, "not ours");
        assert!(seen(&dir, || fs::create_dir(top.path().join("cni")).unwrap()).await);
        assert!(seen(&dir, || fs::create_dir(&dir).unwrap()).await);
        assert!(seen(&dir, || fs::write(dir.join("10.conf"), "x").unwrap()).await);
        assert!(seen(&dir, || fs::rename(dir.join("10.conf"), dir.join("20.conf")).unwrap()).await);
        assert!(seen(&dir, || std::os::unix::fs::symlink("x", dir.join("l")).unwrap()).await);
        let plugins = dir.join("network");
        assert!(seen(&dir, || fs::create_dir(&plugins).unwrap()).await);
        assert!(seen(&dir, || fs::write(plugins.join("10.conf"), "x").unwrap()).await);
        let away = top.path().join("cni/net.d1");
        assert!(seen(&dir, || fs::rename(&dir, &away).unwrap()).await);
        assert!(!seen(&dir, || fs::write(away.join("30.conf"), "x").unwrap()).await);
        assert!(seen(&dir, || fs::rename(&away, &dir).unwrap()).await);
        assert!(seen(&dir, || fs::remove_dir_all(&dir).unwrap()).await);
        assert!(seen(&dir, || fs::remove_dir(top.path().join("cni")).unwrap()).await);
        assert!(!seen(&dir, || ()).await);
    }

    /// As volumes of ConfigMaps are: each file is a link through another one, which is replaced.
    #[tokio::test]
    async fn links_that_are_replaced_are_seen() {
        use std::os::unix::fs::symlink;
        let top = tempfile::tempdir().unwrap();
        let path = |name: &str| top.path().join(name);
        for dir in ["one", "two", "dir"] {
            fs::create_dir(path(dir)).unwrap();
        }
        symlink("../one", path("dir/..data")).unwrap();
        symlink("..data/10.conf", path("dir/10.conf")).unwrap();
        let replace = |to: &str, link: &str| {
            symlink(to, path("new")).unwrap();
            fs::rename(path("new"), path(link)).unwrap();
        };
        assert!(seen(&path("dir"), || replace("../two", "dir/..data")).await);
        // The directory itself is a link.
        symlink("one", path("link")).unwrap();
        assert!(seen(&path("link"), || fs::write(path("one/10.conf"), "x").unwrap()).await);
        assert!(seen(&path("link"), || replace("two", "link")).await);
        assert!(seen(&path("link"), || fs::write(path("two/10.conf"), "x").unwrap()).await);
        assert!(!seen(&path("link"), || fs::write(path("one/10.conf"), "y").unwrap()).await);
    }
}
