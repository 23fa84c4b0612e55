//! Files of the calling thread in procfs.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use crate::PathError;
use crate::name::check_path;

const PROC_SUPER_MAGIC: u64 = 0x9fa0;

/// Opens `path` below /proc/thread-self, in an instance of procfs that is made for this call and mounted nowhere.
///
/// Whatever an image, a volume or a sibling has put on a container's /proc is not met on the way (CVE-2019-16884,
/// CVE-2023-28642, CVE-2025-52881); that it is procfs is checked on the file itself. Needs CAP_SYS_ADMIN in the user
/// namespace that owns the caller's PID namespace.
pub fn open_own_proc(path: &Path, flags: OFlags) -> Result<OwnedFd, PathError> {
    check_path(path)?;
    let failed = |operation| move |e: Errno| PathError::io(operation, path, e);
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("fsopen proc"))?;
    fsconfig_create(&context).map_err(failed("fsconfig proc"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let proc =
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed("fsmount proc"))?;
    // "thread-self" is a link in text, to "PID/task/TID".
    let full = Path::new("thread-self").join(path);
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
    let flags = flags | OFlags::NOFOLLOW | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::openat2(&proc, &full, flags, Mode::empty(), resolve).map_err(failed("openat2"))?;
    let kind = rustix::fs::fstatfs(&file).map_err(failed("fstatfs"))?.f_type;
    if kind as u64 != PROC_SUPER_MAGIC {
        return Err(PathError::kind(path, "file of procfs"));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read as _;

    use super::*;

    #[test]
    fn the_callers_own_files_and_no_others() {
        let open = |path: &str| open_own_proc(Path::new(path), OFlags::RDONLY);
        let mut status = String::new();
        File::from(open("status").unwrap()).read_to_string(&mut status).unwrap();
        // Of this thread, not of the test's first one.
        let tid = rustix::thread::gettid().as_raw_nonzero();
        assert!(status.lines().any(|line| line == format!("Pid:\t{tid}")), "{status}");
        assert!(open("nothing").unwrap_err().is_not_found());
        for outside in ["root/etc/passwd", "cwd/x", "fd/0", "exe"] {
            assert!(open(outside).is_err(), "{outside}");
        }
        assert!(open_own_proc(Path::new("../../../../etc/passwd"), OFlags::RDONLY).is_err());
    }
}
