//! Taking over what a runtime has made: a process that is our child now, named by a file.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};
use stave_supervisor_proto::v1::Failure;

use super::call::Verb;
use crate::failure;
use crate::reaper::ExitStatus;
use crate::supervisor::Supervisor;

/// Children that ended before anyone told us about them, kept while a runtime is making something.
#[derive(Debug, Default)]
pub(crate) struct Strays(Vec<(i32, ExitStatus)>);

/// Most that are kept.
const MAX_STRAYS: usize = 1024;
/// Longest pid file.
const MAX_FILE: u64 = 32;

/// What became of the process.
#[derive(Debug)]
pub(super) enum Adopted {
    Alive(i32, OwnedFd),
    Ended(i32, ExitStatus),
}

impl Supervisor {
    /// A child that nobody knows has been reaped.
    pub(crate) fn keep_stray(&mut self, pid: i32, status: ExitStatus) {
        let making =
            self.runtime_calls.values().any(|call| matches!(call.verb, Verb::Create | Verb::Exec(_)));
        if making && self.oci_strays.0.len() < MAX_STRAYS {
            self.oci_strays.0.push((pid, status));
        }
    }

    /// Nothing is being made any more.
    pub(super) fn forget_strays(&mut self) {
        if !self.runtime_calls.values().any(|call| matches!(call.verb, Verb::Create | Verb::Exec(_))) {
            self.oci_strays = Strays::default();
        }
    }

    /// Takes over the process whose pid is in the file. It must be a child of ours that is nothing else already.
    pub(super) fn adopt(&mut self, file: &Path) -> Result<Adopted, Failure> {
        let pid = read_pid(file)?;
        let known = self.containers.values().any(|one| one.is_alive() && one.pid == pid)
            || self.execs.values().any(|one| one.pid() == pid)
            || self.runtime_calls.values().any(|one| one.process.pid() == pid)
            || self.pod.init().is_some_and(|(init, _)| init == pid);
        self.oci_strays
            .adopt(pid, known)
            .map_err(|why| failure::internal(format!("pid file {file:?}: process {pid} {why}")))
    }
}

impl Strays {
    /// The child with this number, which may be known as something else, or the end of one. Otherwise what is wrong.
    fn adopt(&mut self, pid: i32, known: bool) -> Result<Adopted, String> {
        let child = match open_child(pid) {
            Ok(_) if known => Err("is another one of the pod".to_owned()),
            other => other,
        };
        // Where there is a child now, one that ended with its number was another process.
        let stray = self.take(pid);
        match (child, stray) {
            (Ok(pidfd), _) => Ok(Adopted::Alive(pid, pidfd)),
            (Err(_), Some(status)) => Ok(Adopted::Ended(pid, status)),
            (Err(why), None) => Err(why),
        }
    }

    /// Forgets the one with this number, and gives its end.
    fn take(&mut self, pid: i32) -> Option<ExitStatus> {
        let at = self.0.iter().position(|(stray, _)| *stray == pid)?;
        Some(self.0.swap_remove(at).1)
    }
}

/// The pidfd of a child that has not been reaped. Otherwise what is wrong with the process.
fn open_child(pid: i32) -> Result<OwnedFd, String> {
    let pidfd = Pid::from_raw(pid)
        .ok_or(Errno::SRCH)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()))
        .map_err(|errno| errno.to_string())?;
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    match waitid(WaitId::PidFd(pidfd.as_fd()), options) {
        Ok(_) => Ok(pidfd),
        Err(_) => Err("is no child of the pod's supervisor".to_owned()),
    }
}

fn read_pid(file: &Path) -> Result<i32, Failure> {
    let mut text = String::new();
    std::fs::File::open(file)
        .and_then(|open| std::io::Read::read_to_string(&mut std::io::Read::take(open, MAX_FILE), &mut text))
        .map_err(|error| failure::io(format!("pid file {file:?}"), &error))?;
    let pid = text.trim().parse::<i32>().ok().filter(|pid| *pid > 1);
    pid.ok_or_else(|| failure::internal(format!("pid file {file:?}: {text:?} is no pid")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_living_child_wins_over_one_that_had_its_number() {
        let mut child = std::process::Command::new("/bin/sleep").arg("1000").spawn().unwrap();
        let pid = child.id() as i32;
        let status = ExitStatus { code: 3, signal: 0 };
        let mut strays = Strays(vec![(pid, status), (1, status)]);
        assert!(matches!(strays.adopt(pid, false), Ok(Adopted::Alive(found, _)) if found == pid));
        assert!(strays.adopt(pid, true).unwrap_err().contains("another one"), "the stray is forgotten");
        strays.0.push((pid, status));
        // The number of a container that lives is a stray's, if there was one.
        assert!(matches!(strays.adopt(pid, true), Ok(Adopted::Ended(..))));
        child.kill().unwrap();
        assert!(matches!(strays.adopt(pid, false), Ok(Adopted::Alive(..))), "it is not reaped yet");
        child.wait().unwrap();
        assert!(matches!(strays.adopt(1, false), Ok(Adopted::Ended(1, _))));
        assert!(strays.adopt(1, false).unwrap_err().contains("no child"));
    }

    #[test]
    fn pid_files_of_rubbish_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        assert!(read_pid(&file).unwrap_err().message.contains("No such file"));
        std::fs::write(&file, "4711\n").unwrap();
        assert_eq!(read_pid(&file).unwrap(), 4711);
        for bad in ["", "x", "1", "0", "-5", "99999999999999", "12 13"] {
            std::fs::write(&file, bad).unwrap();
            assert!(read_pid(&file).unwrap_err().message.contains("is no pid"), "{bad}");
        }
        std::fs::write(&file, [0xff; 64]).unwrap();
        read_pid(&file).unwrap_err();
    }
}
