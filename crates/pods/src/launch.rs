//! How a pod's supervisor is started: by the daemon, or by a ready one.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use tokio::task::JoinHandle;

use crate::error::{Error, Result};
use crate::files;
use crate::pods::Inner;

/// What a supervisor starts with.
pub(crate) struct Launch {
    pub(crate) dir: PathBuf,
    pub(crate) listener: OwnedFd,
    pub(crate) log: OwnedFd,
    /// A cgroup2 directory.
    pub(crate) cgroup: Option<OwnedFd>,
}

impl Inner {
    /// Opens what a pod's supervisor starts with, in a directory that is there. Blocks.
    pub(crate) fn prepare_launch(&self, dir: &Path, cgroup: &str) -> Result<Launch> {
        let socket = dir.join(files::SOCKET);
        let listener = stave_wire::listen(&socket)
            .map_err(|e| Error::internal(format_args!("supervisor socket {}", socket.display()), e))?;
        let log_path = dir.join(files::SUPERVISOR_LOG);
        let log = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&log_path)
            .map_err(|e| Error::internal(log_path.display(), e))?;
        let cgroup = match self.settings.cgroups.supervisor_dir(cgroup) {
            Some(path) => {
                let file = std::fs::File::open(&path).map_err(|e| Error::internal(path.display(), e))?;
                Some(file.into())
            }
            None => None,
        };
        Ok(Launch { dir: dir.to_owned(), listener, log: log.into(), cgroup })
    }

    /// Starts the pod's supervisor with its listening socket. Blocks.
    pub(crate) fn launch(&self, id: &str, launch: &Launch) -> Result<()> {
        let null = null()?;
        let argv = [
            argument(b"stave-pod")?,
            argument(b"--id")?,
            argument(id.as_bytes())?,
            argument(b"--dir")?,
            argument(launch.dir.as_os_str().as_bytes())?,
        ];
        let (pid, pidfd) = stave_sys::spawn(&stave_sys::SpawnArgs {
            exe: self.settings.supervisor.as_fd(),
            argv: &argv,
            envp: &[],
            stdin: launch.listener.as_fd(),
            stdout: null.as_fd(),
            stderr: launch.log.as_fd(),
            extra: &[],
            cgroup: launch.cgroup.as_ref().map(|fd| fd.as_fd()),
        })
        .map_err(|e| Error::internal("starting stave-pod", e))?;
        tracing::debug!(pod = id, pid, "supervisor started");
        reap(pidfd);
        Ok(())
    }
}

pub(crate) fn argument(bytes: &[u8]) -> Result<CString> {
    CString::new(bytes).map_err(|e| Error::internal("supervisor's arguments", e))
}

pub(crate) fn null() -> Result<OwnedFd> {
    let path = Path::new("/dev/null");
    let file = OpenOptions::new().write(true).open(path).map_err(|e| Error::internal(path.display(), e))?;
    Ok(file.into())
}

/// Collects a child when it ends, as long as this daemon is its parent. The task ends with it.
pub(crate) fn reap(pidfd: OwnedFd) -> Option<JoinHandle<()>> {
    let pidfd = crate::fd::watch(pidfd, tokio::io::Interest::READABLE).ok()?;
    Some(tokio::spawn(async move {
        if pidfd.readable().await.is_ok() {
            let id = rustix::process::WaitId::PidFd(pidfd.get_ref().as_fd());
            let options = rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOHANG;
            if let Err(error) = rustix::process::waitid(id, options) {
                tracing::debug!(%error, "reaping a supervisor");
            }
        }
    }))
}
