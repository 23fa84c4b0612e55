//! The pseudo-terminal of a process.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, fstatfs, major};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use stave_paths::Root;

use crate::error::{Context, Error, Result};
use crate::mounts::{attach, clone_fd};
use crate::process::connect;

const STAGE: &str = "terminal";
const DEVPTS_SUPER_MAGIC: u64 = 0x1cd1;
/// First and last major number of pseudo-terminals (UNIX98_PTY_SLAVE_MAJOR, 8 of them).
const PTY_MAJORS: std::ops::RangeInclusive<u32> = 136..=143;

#[derive(Debug)]
pub(crate) struct Terminal {
    pub(crate) master: OwnedFd,
    pub(crate) terminal: OwnedFd,
}

/// A new terminal of the container's own devpts.
pub(crate) fn open(root: &Root) -> Result<Terminal> {
    let pts = root
        .open_in(Path::new("/dev/pts"), OFlags::PATH | OFlags::DIRECTORY)
        .map_err(|e| Error::path(STAGE, "/dev/pts", &e))?;
    check_devpts(pts.as_fd(), "/dev/pts")?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let master =
        rustix::fs::openat(&pts, "ptmx", flags, Mode::empty()).at(STAGE, || "/dev/pts/ptmx".to_owned())?;
    unlockpt(&master).at(STAGE, || "unlockpt".to_owned())?;
    // By the master's descriptor, not by a name that could be something else (CVE-2025-52565).
    let terminal = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
        .at(STAGE, || "TIOCGPTPEER".to_owned())?;
    check_devpts(terminal.as_fd(), "the terminal")?;
    let stat = rustix::fs::fstat(&terminal).at(STAGE, || "fstat".to_owned())?;
    if !PTY_MAJORS.contains(&major(stat.st_rdev)) {
        return Err(Error::invalid(STAGE, format!("device {} is no terminal", stat.st_rdev)));
    }
    Ok(Terminal { master, terminal })
}

fn check_devpts(fd: BorrowedFd<'_>, what: &str) -> Result<()> {
    let fs = fstatfs(fd).at(STAGE, || what.to_owned())?;
    if fs.f_type as u64 != DEVPTS_SUPER_MAGIC {
        return Err(Error::invalid(STAGE, format!("{what} is not on a devpts file system")));
    }
    Ok(())
}

impl Terminal {
    /// The master and the terminal.
    pub(crate) fn ends(&self) -> (BorrowedFd<'_>, BorrowedFd<'_>) {
        (self.master.as_fd(), self.terminal.as_fd())
    }

    /// Shows the terminal as /dev/console.
    pub(crate) fn bind_console(&self, root: &Root) -> Result<()> {
        let what = || "/dev/console".to_owned();
        let target = root.make_file(Path::new("/dev/console")).map_err(|e| Error::path(STAGE, what(), &e))?;
        let tree = clone_fd(self.terminal.as_fd(), false).at(STAGE, what)?;
        attach(tree.as_fd(), target.as_fd()).at(STAGE, what)
    }

    /// Makes it stdio and the controlling terminal. The caller leads a session.
    pub(crate) fn connect(&self) -> Result<()> {
        let fd = self.terminal.as_fd();
        stave_sys::make_controlling_terminal(fd).at(STAGE, || "TIOCSCTTY".to_owned())?;
        connect([fd, fd, fd])
    }
}
