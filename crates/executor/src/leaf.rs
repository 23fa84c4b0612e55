//! The cgroup2 directory of an exec'd process, below its container's.

use std::cell::Cell;
use std::fs;
use std::io::Read as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use stave_supervisor_proto::v1::Cgroup;
use stave_supervisor_proto::v1::failure::Kind;

use crate::cgroup::{self, write};
use crate::error::{Context, Error, Result};

const STAGE: &str = "cgroup";
/// Leaves of one name, as a limit.
const NAMESAKES: usize = 8;

/// What a timeout kills. Making and removing one is a tenth of the time of an exec, and the kernel clears away behind it for
/// longer, so one that nothing was left in is kept for the next process, see [`crate::Entrances`].
#[derive(Debug)]
pub(crate) struct Leaf {
    path: PathBuf,
    dir: OwnedFd,
    /// The kernel kills whatever is cloned into a directory whose `cgroup.kill` was written once.
    killed: Cell<bool>,
}

impl Leaf {
    /// Makes the leaf `exec-<name>` below the container's cgroup2 directory; none where the host has no cgroup2 mount.
    pub(crate) fn make(cgroup: &Cgroup, name: &str) -> Result<Option<Self>> {
        if cgroup.v2_dir.is_empty() {
            return Ok(None);
        }
        let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > 200 || !name.chars().all(valid) {
            return Err(Error::invalid(STAGE, format!("name of a process {name:?}")));
        }
        let parent = Path::new(&cgroup.v2_dir);
        let mut path = parent.join(format!("exec-{name}"));
        // A name may come again while another process is in the leaf that was kept of it.
        for number in 1..NAMESAKES {
            match fs::create_dir(&path) {
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && number + 1 < NAMESAKES => {
                    path = parent.join(format!("exec-{name}.{number}"));
                }
                other => {
                    other.at(STAGE, || format!("{path:?}"))?;
                    break;
                }
            }
        }
        match cgroup::open_v2(&path) {
            Ok(Some(dir)) => Ok(Some(Self { path, dir, killed: Cell::new(false) })),
            Ok(None) => Ok(None),
            Err(error) => Err(match remove(&path) {
                Ok(()) => error,
                Err(left) => error.and(&left),
            }),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// SIGKILL to all that is in it.
    pub(crate) fn kill(&self) -> Result<()> {
        self.killed.set(true);
        cgroup::kill(&self.path)
    }

    /// Whether another process finds it as if it were new: nothing lives in it or below, and nobody has written
    /// `cgroup.kill`. A container that may write to its cgroups may have frozen it, or made directories in it.
    pub(crate) fn is_like_new(&self) -> bool {
        if self.killed.get() {
            return false;
        }
        // A directory of cgroup2 has a link for each in it (and no two names).
        let childless = rustix::fs::fstat(&self.dir).is_ok_and(|stat| stat.st_nlink == 2);
        childless && self.events().is_ok_and(|events| idle(&events))
    }

    fn events(&self) -> std::io::Result<String> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.dir, "cgroup.events", flags, Mode::empty())?;
        let mut events = String::with_capacity(64);
        fs::File::from(file).read_to_string(&mut events)?;
        Ok(events)
    }

    /// Removes it. Processes that are still in it (a background child that outlived its parent) move up to the container's cgroup.
    pub(crate) fn remove(&self) -> Result<()> {
        remove(&self.path)
    }
}

impl AsFd for Leaf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

/// By the content of `cgroup.events`. Kernels before 5.2 don't tell `frozen`.
fn idle(events: &str) -> bool {
    events.lines().any(|line| line == "populated 0") && !events.lines().any(|line| line == "frozen 1")
}

fn remove(leaf: &Path) -> Result<()> {
    const ROUNDS: usize = 16;
    for _ in 0..ROUNDS {
        match fs::remove_dir(leaf) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            other => return other.at(STAGE, || format!("{leaf:?}")),
        }
        let (Some(parent), Ok(procs)) = (leaf.parent(), fs::read_to_string(leaf.join("cgroup.procs"))) else {
            continue;
        };
        let target = parent.join("cgroup.procs");
        for pid in procs.lines() {
            // ESRCH: ended meanwhile. Other errors show as a leaf that stays busy.
            let _ = write(&target, pid);
        }
    }
    Err(Error::new(STAGE, Kind::Internal, format!("{leaf:?} stays busy")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_leaves() {
        let cgroup = Cgroup { v2_dir: "/nonexistent".into(), ..Cgroup::default() };
        for name in ["", "../x", "a/b", "a b", "é", &"x".repeat(201)] {
            assert_eq!(Leaf::make(&cgroup, name).unwrap_err().kind, Kind::InvalidArgument, "{name}");
        }
        assert_eq!(Leaf::make(&cgroup, "a").unwrap_err().errno, libc::ENOENT);
        assert!(Leaf::make(&Cgroup::default(), "a").unwrap().is_none());
    }

    #[test]
    fn what_is_gone_is_success() {
        remove(Path::new("/sys/fs/cgroup/nonexistent")).unwrap();
    }

    #[test]
    fn only_what_says_so_is_idle() {
        for (events, wanted) in [
            ("populated 0\nfrozen 0\n", true),
            ("populated 0\n", true),
            ("populated 1\nfrozen 0\n", false),
            ("populated 0\nfrozen 1\n", false),
            ("frozen 0\n", false),
            ("", false),
        ] {
            assert_eq!(idle(events), wanted, "{events:?}");
        }
    }
}
