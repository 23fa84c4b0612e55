//! Placing processes into cgroups.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use stave_supervisor_proto::v1::Cgroup;
use stave_supervisor_proto::v1::failure::Kind;

use crate::error::{Context, Error, Result};
use crate::leaf::Leaf;

const STAGE: &str = "cgroup";

/// The cgroup2 directory, for CLONE_INTO_CGROUP; none where the host has no cgroup2 mount.
pub(crate) fn open_v2(dir: &Path) -> Result<Option<OwnedFd>> {
    if dir.as_os_str().is_empty() {
        return Ok(None);
    }
    File::open(dir).map(|dir| Some(dir.into())).at(STAGE, || format!("{dir:?}"))
}

/// The way into a container's cgroups. It can be kept as long as the container lives: to make it anew is a fifth of the time
/// of an exec.
#[derive(Debug)]
pub struct Entrances {
    /// Of the v1 hierarchies, none of which a host with cgroup2 alone has.
    tasks: Vec<OwnedFd>,
    /// An exec's that has ended, for the next.
    leaf: RefCell<Option<Leaf>>,
}

impl Entrances {
    /// Opens the `tasks` file of each hierarchy.
    pub fn open(cgroup: &Cgroup) -> Result<Self> {
        let open = |dir: &str| {
            let file = Path::new(dir).join("tasks");
            OpenOptions::new().write(true).open(&file).map(OwnedFd::from).at(STAGE, || format!("{file:?}"))
        };
        let tasks: Result<_> = cgroup.v1.iter().map(|hierarchy| open(&hierarchy.dir)).collect();
        Ok(Self { tasks: tasks?, leaf: RefCell::default() })
    }

    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.tasks.iter().map(AsFd::as_fd)
    }

    /// The leaf that was kept, if there is one.
    pub(crate) fn take_leaf(&self) -> Option<Leaf> {
        self.leaf.take()
    }

    /// Keeps a leaf that is like new, one at a time; gives back any other.
    pub(crate) fn keep_leaf(&self, leaf: Leaf) -> Option<Leaf> {
        let mut kept = self.leaf.borrow_mut();
        if kept.is_some() || !leaf.is_like_new() {
            return Some(leaf);
        }
        *kept = Some(leaf);
        None
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

pub(crate) fn write(file: &Path, content: &str) -> std::io::Result<()> {
    OpenOptions::new().write(true).open(file)?.write_all(content.as_bytes())
}

/// Puts a process that an OCI runtime has made into those of the container's cgroups that it is not in: a runtime may know
/// fewer hierarchies than the host has. One that has ended is in none, which is success.
///
/// `pid` is a child that has not been reaped, so that the number is nobody else's.
pub(crate) fn place(cgroup: &Cgroup, pid: i32) -> Result<()> {
    let number = pid.to_string();
    let v1 = cgroup.v1.iter().map(|hierarchy| &hierarchy.dir);
    for dir in [&cgroup.v2_dir].into_iter().filter(|dir| !dir.is_empty()).chain(v1) {
        if holds(Path::new(dir), &number).at(STAGE, || format!("{dir:?}"))? {
            continue;
        }
        match write(&Path::new(dir).join("cgroup.procs"), &number) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
            other => other.at(STAGE, || format!("move what the runtime has made into {dir:?}"))?,
        }
    }
    Ok(())
}

/// The process is in this directory or below.
fn holds(dir: &Path, pid: &str) -> std::io::Result<bool> {
    let procs = match fs::read_to_string(dir.join("cgroup.procs")) {
        // One that is threaded has no list of processes, one that is being removed has none any more.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENODEV)) => String::new(),
        other => other?,
    };
    if procs.lines().any(|line| line == pid) {
        return Ok(true);
    }
    for entry in fs::read_dir(dir)?.flatten() {
        // What goes away meanwhile holds nothing.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && holds(&entry.path(), pid).unwrap_or(false) {
            return Ok(true);
        }
    }
    Ok(false)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_gone_is_success() {
        kill(Path::new("/sys/fs/cgroup/nonexistent")).unwrap();
        kill_one_by_one(Path::new("/sys/fs/cgroup/nonexistent")).unwrap();
        assert!(kill(Path::new("/tmp")).is_err());
    }
}
