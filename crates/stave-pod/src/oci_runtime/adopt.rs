//! Taking over what a runtime has made: a process that is our child now, named by a file.

use std::os::fd::OwnedFd;
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
    pub(super) fn adopt(&self, file: &Path) -> Result<Adopted, Failure> {
        let pid = read_pid(file)?;
        if let Some((pid, status)) = self.oci_strays.0.iter().find(|(stray, _)| *stray == pid) {
            return Ok(Adopted::Ended(*pid, *status));
        }
        let refused = |why: &str| failure::internal(format!("pid file {file:?}: process {pid} {why}"));
        let known = self.containers.values().any(|one| one.is_alive() && one.pid == pid)
            || self.execs.values().any(|one| one.pid() == pid)
            || self.runtime_calls.values().any(|one| one.process.pid() == pid)
            || self.pod.init().is_some_and(|(init, _)| init == pid);
        if known {
            return Err(refused("is another one of the pod"));
        }
        let pidfd = Pid::from_raw(pid)
            .ok_or(Errno::SRCH)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()))
            .map_err(|errno| refused(&errno.to_string()))?;
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        match waitid(WaitId::PidFd(std::os::fd::AsFd::as_fd(&pidfd)), options) {
            Ok(_) => Ok(Adopted::Alive(pid, pidfd)),
            Err(_) => Err(refused("is no child of the pod's supervisor")),
        }
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
