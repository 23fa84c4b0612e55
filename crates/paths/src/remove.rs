//! Removal of trees that a container or an image filled.

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, Mode, OFlags};
use rustix::io::Errno;

use crate::{PathError, check_component};

/// Directories held open at once. Deeper ones are moved up first, so that no depth exhausts the
/// descriptors or the stack.
const MAX_DEPTH: usize = 32;

/// Removes `name` in `dir` with all that is below it, never following a link or leaving the tree by
/// a mount: a mount point inside is an error (`EBUSY`). What is already gone is success.
///
/// Nobody else may write to the tree meanwhile: files that keep appearing make it fail with
/// `ENOTEMPTY`.
pub fn remove_tree<Fd: AsFd>(dir: Fd, name: &OsStr) -> Result<(), PathError> {
    let shown = Path::new(name);
    check_component(name)?;
    let dir = dir.as_fd();
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        // A directory is EISDIR on Linux; EPERM is what POSIX says.
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(e) => return Err(PathError::io("unlinkat", shown, e)),
    }
    let top = match open_dir(dir, name) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(()),
        Err(e) => return Err(PathError::io("openat", shown, e)),
    };
    let mut moved = 0u64;
    // Each round ends with the top directory empty, or with only directories moved up by it.
    loop {
        let before = moved;
        empty(top.as_fd(), top.as_fd(), 0, &mut moved).map_err(|(call, e)| PathError::io(call, shown, e))?;
        match rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::NOTEMPTY) if moved > before => {}
            Err(e) => return Err(PathError::io("rmdir", shown, e)),
        }
    }
}

fn open_dir<P: rustix::path::Arg>(dir: BorrowedFd<'_>, name: P) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::empty())
}

type Failure = (&'static str, Errno);

fn empty(top: BorrowedFd<'_>, here: BorrowedFd<'_>, depth: usize, moved: &mut u64) -> Result<(), Failure> {
    let mut subdirs: Vec<CString> = Vec::new();
    for entry in Dir::read_from(here).map_err(|e| ("openat", e))? {
        let entry = entry.map_err(|e| ("getdents64", e))?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        match rustix::fs::unlinkat(here, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR | Errno::PERM) => subdirs.push(name.to_owned()),
            Err(e) => return Err(("unlinkat", e)),
        }
    }
    for name in subdirs {
        remove_dir(top, here, &name, depth, moved)?;
    }
    Ok(())
}

fn remove_dir(
    top: BorrowedFd<'_>,
    here: BorrowedFd<'_>,
    name: &CStr,
    depth: usize,
    moved: &mut u64,
) -> Result<(), Failure> {
    match rustix::fs::unlinkat(here, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTEMPTY | Errno::EXIST) => {}
        Err(e) => return Err(("rmdir", e)),
    }
    if depth >= MAX_DEPTH {
        // The number is unique in this run; a name of an earlier, broken-off run is skipped.
        loop {
            *moved += 1;
            let up = format!(".stave-remove-{moved}");
            let flags = rustix::fs::RenameFlags::NOREPLACE;
            match rustix::fs::renameat_with(here, name, top, &up, flags) {
                Ok(()) | Err(Errno::NOENT) => return Ok(()),
                Err(Errno::EXIST) => {}
                Err(e) => return Err(("renameat2", e)),
            }
        }
    }
    let fd = match open_dir(here, name) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(()),
        Err(e) => return Err(("openat", e)),
    };
    empty(top, fd.as_fd(), depth + 1, moved)?;
    match rustix::fs::unlinkat(here, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(("rmdir", e)),
    }
}
