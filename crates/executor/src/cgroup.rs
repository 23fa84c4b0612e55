//! Placing processes into cgroups.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use stave_supervisor_proto::v1::Cgroup;
use stave_supervisor_proto::v1::failure::Kind;

use crate::error::{Context, Error, Result};

const STAGE: &str = "cgroup";

/// The cgroup2 directory, for CLONE_INTO_CGROUP; none where the host has no cgroup2 mount.
pub(crate) fn open_v2(dir: &Path) -> Result<Option<OwnedFd>> {
    if dir.as_os_str().is_empty() {
        return Ok(None);
    }
    File::open(dir).map(|dir| Some(dir.into())).at(STAGE, || format!("{dir:?}"))
}

/// The way into a container's v1 hierarchies, none of which a host with cgroup2 alone has. It can be kept as long as
/// the container lives: to open each file anew is a tenth of the time of an exec.
#[derive(Debug)]
pub struct Entrances {
    tasks: Vec<OwnedFd>,
}

impl Entrances {
    /// Opens the `tasks` file of each hierarchy.
    pub fn open(cgroup: &Cgroup) -> Result<Self> {
        let open = |dir: &str| {
            let file = Path::new(dir).join("tasks");
            OpenOptions::new().write(true).open(&file).map(OwnedFd::from).at(STAGE, || format!("{file:?}"))
        };
        let tasks: Result<_> = cgroup.v1.iter().map(|hierarchy| open(&hierarchy.dir)).collect();
        Ok(Self { tasks: tasks? })
    }

    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.tasks.iter().map(AsFd::as_fd)
    }
}

/// Moves the calling process, which must be single-threaded, into the container's v1 hierarchies.
///
/// It writes "0" to `tasks`, not a pid to `cgroup.procs`: for a single thread that moves itself the
/// kernel skips the lock whose first taker waits for an RCU grace period (some 7 ms).
pub(crate) fn enter_v1(entrances: &Entrances, cgroup: &Cgroup) -> Result<()> {
    for (tasks, hierarchy) in entrances.tasks.iter().zip(&cgroup.v1) {
        rustix::io::write(tasks, b"0").at(STAGE, || format!("{:?}", hierarchy.dir))?;
    }
    Ok(())
}

fn write(file: &Path, content: &str) -> std::io::Result<()> {
    OpenOptions::new().write(true).open(file)?.write_all(content.as_bytes())
}

/// Makes the leaf `exec-<name>` below the container's cgroup2 directory.
pub(crate) fn make_leaf(cgroup: &Cgroup, name: &str) -> Result<Option<PathBuf>> {
    if cgroup.v2_dir.is_empty() {
        return Ok(None);
    }
    let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 200 || !name.chars().all(valid) {
        return Err(Error::invalid(STAGE, format!("name of a process {name:?}")));
    }
    let leaf = Path::new(&cgroup.v2_dir).join(format!("exec-{name}"));
    fs::create_dir(&leaf).at(STAGE, || format!("{leaf:?}"))?;
    Ok(Some(leaf))
}

/// SIGKILL to all processes in a cgroup2 directory and below. A missing directory is success.
pub(crate) fn kill(dir: &Path) -> Result<()> {
    let file = dir.join("cgroup.kill");
    match write(&file, "1") {
        // ENODEV: removed between open and write.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => {
            // Before Linux 5.14.
            if dir.join("cgroup.procs").exists() {
                return kill_one_by_one(dir);
            }
            if dir.exists() {
                return Err(Error::os(STAGE, format!("{file:?}"), e));
            }
            Ok(())
        }
        other => other.at(STAGE, || format!("{file:?}")),
    }
}

/// SIGKILL to all processes in a cgroup directory and below, one by one, again until there are none but those that end.
/// A missing directory is success.
pub(crate) fn kill_one_by_one(dir: &Path) -> Result<()> {
    kill_procs(dir)?;
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            kill_one_by_one(&entry.path())?;
        }
    }
    Ok(())
}

fn kill_procs(dir: &Path) -> Result<()> {
    const ROUNDS: usize = 64;
    let file = dir.join("cgroup.procs");
    let mut killed = BTreeSet::new();
    for _ in 0..ROUNDS {
        let procs = match fs::read_to_string(&file) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => return Ok(()),
            other => other.at(STAGE, || format!("{file:?}"))?,
        };
        let before = killed.len();
        for line in procs.lines() {
            let Some(pid) = line.parse::<i32>().ok().filter(|pid| *pid > 0).and_then(Pid::from_raw) else {
                continue;
            };
            let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
                Err(Errno::SRCH) => continue,
                other => other.at(STAGE, || format!("pidfd_open of a process in {dir:?}"))?,
            };
            // The number may be another process's since: ask again, now that it can't become one.
            let still = fs::read_to_string(&file).unwrap_or_default();
            if still.lines().any(|other| other == line) {
                match pidfd_send_signal(&pidfd, Signal::KILL) {
                    Err(Errno::SRCH) => {}
                    other => other.at(STAGE, || format!("SIGKILL to a process in {dir:?}"))?,
                }
                killed.insert(line.to_owned());
            }
        }
        if killed.len() == before {
            return Ok(());
        }
    }
    Err(Error::new(STAGE, Kind::Internal, format!("{dir:?}: new processes come faster than they are killed")))
}

/// Removes a leaf. Processes that are still in it (a background child that outlived its parent) move
/// up to the container's cgroup.
pub(crate) fn remove_leaf(leaf: &Path) -> Result<()> {
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
            assert_eq!(make_leaf(&cgroup, name).unwrap_err().kind, Kind::InvalidArgument, "{name}");
        }
        assert_eq!(make_leaf(&cgroup, "a").unwrap_err().errno, libc::ENOENT);
        assert_eq!(make_leaf(&Cgroup::default(), "a").unwrap(), None);
    }

    #[test]
    fn what_is_gone_is_success() {
        kill(Path::new("/sys/fs/cgroup/nonexistent")).unwrap();
        kill_one_by_one(Path::new("/sys/fs/cgroup/nonexistent")).unwrap();
        remove_leaf(Path::new("/sys/fs/cgroup/nonexistent")).unwrap();
        assert!(kill(Path::new("/tmp")).is_err());
    }
}
