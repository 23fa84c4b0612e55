use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::fs::{child_dirs, write};
use crate::{CgroupError, Layout};

/// How long a kill waits for the last process to be gone.
pub(crate) const KILL_LIMIT: Duration = Duration::from_secs(5);

/// Kills all processes of the given directories, which show one cgroup in several hierarchies, and
/// of the cgroups below; returns when they are gone or zombies left their cgroup.
pub(crate) fn kill_all(v2: Option<&Path>, v1: &[(String, PathBuf)]) -> Result<(), CgroupError> {
    if let Some(dir) = v2 {
        // Since Linux 5.14; older kernels get the loop below, which also tells what stays after another error.
        match write(&dir.join("cgroup.kill"), "1") {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %dir.display(), %error, "cgroup.kill failed, killing one by one");
            }
            _ => {}
        }
    }
    // Processes that were never put into the cgroup2 mount, and hosts without one.
    let dirs: Vec<&Path> = v2.into_iter().chain(v1.iter().map(|(_, dir)| dir.as_path())).collect();
    kill_one_by_one(&dirs, KILL_LIMIT)
}

/// Like [`kill_all`], without `cgroup.kill`: once that has been written, the kernel (6.18) kills what is cloned into the
/// cgroup later.
pub(crate) fn kill_one_by_one(dirs: &[&Path], limit: Duration) -> Result<(), CgroupError> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        let mut left = Vec::new();
        for dir in dirs {
            kill_procs(dir, &mut left)?;
        }
        let Some((path, _)) = left.first().cloned() else { return Ok(()) };
        if start.elapsed() >= limit {
            let waited_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
            let pids = left.into_iter().take(8).map(|(_, pid)| pid).collect();
            return Err(CgroupError::Busy { path, waited_ms, pids });
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Kills what `cgroup.procs` lists in a cgroup and below it, and adds it to `left`.
fn kill_procs(dir: &Path, left: &mut Vec<(PathBuf, String)>) -> Result<(), CgroupError> {
    let file = dir.join("cgroup.procs");
    let text = match fs::read_to_string(&file) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        // NODEV: removed while open. OPNOTSUPP: a threaded cgroup, whose processes the one above lists.
        Err(e)
            if [Errno::NODEV, Errno::OPNOTSUPP]
                .iter()
                .any(|n| e.raw_os_error() == Some(n.raw_os_error())) =>
        {
            return Ok(());
        }
        Err(e) => return Err(CgroupError::io("read", file, e)),
    };
    for line in text.lines() {
        let Some(pid) = line.parse::<u32>().ok().and_then(|pid| Pid::from_raw(pid.try_into().ok()?)) else {
            // 0: a process that is not in our PID namespace, which we can't kill.
            left.push((dir.to_path_buf(), line.to_owned()));
            continue;
        };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(Errno::SRCH) => continue,
            Err(errno) => return Err(CgroupError::io("pidfd_open of a process of", dir, errno.into())),
        };
        // The pid may have been reused before we held the fd: ask again now that it can't be.
        let still = fs::read_to_string(&file).unwrap_or_default();
        if still.lines().any(|l| l == line) {
            left.push((dir.to_path_buf(), line.to_owned()));
            if let Err(errno) = pidfd_send_signal(&fd, Signal::KILL)
                && errno != Errno::SRCH
            {
                return Err(CgroupError::io("pidfd_send_signal to a process of", dir, errno.into()));
            }
        }
    }
    for child in child_dirs(dir).map_err(|e| CgroupError::io("read directory", dir, e))? {
        kill_procs(&child, left)?;
    }
    Ok(())
}

/// A controller that a cgroup does not pass on to its children.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) controller: String,
    /// the cgroup's directory
    pub(crate) dir: PathBuf,
    pub(crate) source: io::Error,
}

/// Turns on controllers for the children of every cgroup from the mount down to `path`, and gives those that were
/// refused. Missing ones are left out: a limit that needs one fails with its name later.
pub(crate) fn enable_controllers(layout: &Layout, path: &str, wanted: &[&str]) -> Vec<Refused> {
    let mut refused = Vec::new();
    let Some(mount) = layout.v2() else { return refused };
    let mut dir = mount.to_path_buf();
    let mut parts = path.split('/').filter(|p| !p.is_empty());
    loop {
        let available = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
        let file = dir.join("cgroup.subtree_control");
        let enabled = fs::read_to_string(&file).unwrap_or_default();
        let has = |list: &str, name: &str| list.split_ascii_whitespace().any(|c| c == name);
        let missing: Vec<&str> =
            wanted.iter().copied().filter(|c| has(&available, c) && !has(&enabled, c)).collect();
        if !missing.is_empty() {
            let all = missing.iter().map(|c| format!("+{c}")).collect::<Vec<_>>().join(" ");
            let result = write(&file, &all);
            if let Err(error) = &result
                && error.kind() == io::ErrorKind::ResourceBusy
            {
                // It has processes. One by one, cpu and pids would be accepted, and that makes a threaded cgroup of it,
                // whose children take no containers.
                tracing::debug!(path = %file.display(), %error, "cgroup controllers not enabled");
                let refused_here = missing.iter().map(|controller| Refused {
                    controller: (*controller).to_owned(),
                    dir: dir.clone(),
                    source: Errno::BUSY.into(),
                });
                refused.extend(refused_here);
                return refused;
            }
            if result.is_err() {
                // One that can't be enabled must not keep the others off.
                for controller in &missing {
                    if let Err(source) = write(&file, &format!("+{controller}")) {
                        tracing::debug!(path = %file.display(), controller, error = %source, "cgroup controller not enabled");
                        let controller = (*controller).to_owned();
                        refused.push(Refused { controller, dir: dir.clone(), source });
                    }
                }
            }
        }
        match parts.next() {
            Some(part) => dir.push(part),
            None => return refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(dirs: &[&str], controllers: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for dir in dirs {
            let dir = root.path().join(dir);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("cgroup.controllers"), controllers).unwrap();
            fs::write(dir.join("cgroup.subtree_control"), "").unwrap();
        }
        root
    }

    #[test]
    fn controllers_are_enabled_down_to_the_pod() {
        let root = tree(&["", "stave", "stave/p1", "stave/p1/c1"], "cpu memory\n");
        let layout = Layout::Unified { mount: root.path().to_path_buf() };
        enable_controllers(&layout, "/stave/p1", &["cpu", "memory", "pids"]);
        let enabled =
            |dir: &str| fs::read_to_string(root.path().join(dir).join("cgroup.subtree_control")).unwrap();
        for dir in ["", "stave", "stave/p1"] {
            assert_eq!(
                enabled(dir),
                "+cpu +memory",
                "{dir:?}: the missing pids must not keep the others off"
            );
        }
        assert_eq!(enabled("stave/p1/c1"), "");
    }

    /// A process in a PID namespace above ours, or beside it, is listed as 0.
    #[test]
    fn what_can_not_be_killed_is_told() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.procs"), "0\n").unwrap();
        let error = kill_one_by_one(&[dir.path()], Duration::from_millis(50)).unwrap_err();
        assert!(matches!(&error, CgroupError::Busy { pids, .. } if *pids == ["0"]), "{error}");
    }

    #[test]
    fn nothing_to_kill_is_success() {
        kill_all(Some(Path::new("/nonexistent/cgroup")), &[("pids".into(), "/nonexistent/v1".into())])
            .unwrap();
    }
}
