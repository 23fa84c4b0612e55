//! The walk that creates what is missing on the way.
//!
//! `openat2(2)` can't create directories, and following a link from the middle of a path needs the
//! root. So the walk keeps the descriptor of each directory from the root down: `..` takes the
//! parent from that list and never asks the kernel for it, an absolute link starts over at the root.
//! Whatever others rename meanwhile, only directories reached from the root are ever used.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::PathError;
use crate::name::{PATH_MAX, check_component};

/// What the last component shall be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Last {
    Directory,
    File,
}

/// Links followed in one lookup, as in the kernel.
const MAX_LINKS: usize = 40;
/// Directories held open at once.
const MAX_DEPTH: usize = 256;

enum Step {
    Down(OsString),
    Up,
}

fn steps(path: &Path) -> Vec<Step> {
    path.components()
        .filter_map(|c| match c {
            Component::Normal(name) => Some(Step::Down(name.to_owned())),
            Component::ParentDir => Some(Step::Up),
            _ => None,
        })
        .collect()
}

pub(crate) fn walk(root: BorrowedFd<'_>, path: &Path, last: Last, mode: Mode) -> Result<OwnedFd, PathError> {
    let mut dirs: Vec<OwnedFd> = Vec::new();
    let mut todo: VecDeque<Step> = steps(path).into();
    let mut links = 0;

    while let Some(step) = todo.pop_front() {
        let name = match step {
            Step::Up => {
                dirs.pop();
                continue;
            }
            Step::Down(name) => name,
        };
        check_component(&name)?;
        if dirs.len() >= MAX_DEPTH {
            return Err(PathError::invalid(path, "more than 256 directories deep"));
        }
        let at_end = todo.is_empty();
        let wanted = if at_end { last } else { Last::Directory };
        let here = dirs.last().map_or(root, AsFd::as_fd);
        let (fd, kind) = enter(here, &name, wanted, mode, path)?;
        match kind {
            FileType::Symlink => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(PathError::io("readlinkat", path, Errno::LOOP));
                }
                let target = read_link(&fd, path)?;
                if target.as_bytes().starts_with(b"/") {
                    dirs.clear();
                }
                for step in steps(Path::new(&target)).into_iter().rev() {
                    todo.push_front(step);
                }
                if todo.len() > PATH_MAX {
                    return Err(PathError::invalid(path, "longer than 4095 bytes"));
                }
            }
            FileType::Directory if wanted == Last::Directory => dirs.push(fd),
            FileType::Directory => return Err(PathError::kind(path, "file")),
            _ if wanted == Last::File => return Ok(fd),
            _ => return Err(PathError::kind(path, "directory")),
        }
    }
    if last == Last::File {
        return Err(PathError::kind(path, "file"));
    }
    match dirs.pop() {
        Some(fd) => Ok(fd),
        None => rustix::io::fcntl_dupfd_cloexec(root, 3).map_err(|e| PathError::io("fcntl", path, e)),
    }
}

/// Opens one component, itself even if it is a link, after making it if it is missing.
fn enter(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    wanted: Last,
    mode: Mode,
    path: &Path,
) -> Result<(OwnedFd, FileType), PathError> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // Something may be removed between our finding that it exists and the open: a few more rounds.
    let mut rounds = 0;
    let fd = loop {
        match rustix::fs::openat(dir, name, flags, Mode::empty()) {
            Ok(fd) => break fd,
            Err(Errno::NOENT) if rounds < 16 => rounds += 1,
            Err(e) => return Err(PathError::io("openat", path, e)),
        }
        let made = match wanted {
            Last::Directory => rustix::fs::mkdirat(dir, name, mode),
            Last::File => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o644)).map(drop)
            }
        };
        match made {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => {
                let call = if wanted == Last::File { "openat" } else { "mkdirat" };
                return Err(PathError::io(call, path, e));
            }
        }
    };
    let stat = rustix::fs::fstat(&fd).map_err(|e| PathError::io("fstat", path, e))?;
    Ok((fd, FileType::from_raw_mode(stat.st_mode)))
}

/// The text of a link that is open by `O_PATH | O_NOFOLLOW`. Links of procfs give text too and are
/// taken by it, inside the root.
fn read_link(fd: &OwnedFd, path: &Path) -> Result<OsString, PathError> {
    let target = rustix::fs::readlinkat(fd, c"", Vec::new())
        .map_err(|e| PathError::io("readlinkat", path, e))?
        .into_bytes();
    if target.is_empty() || target.len() >= PATH_MAX {
        return Err(PathError::invalid(path, "symbolic link with an empty or overlong target"));
    }
    Ok(OsString::from_vec(target))
}
