//! The file that a pod's network namespace is bound to while plugins may want it.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::mount::UnmountFlags;

use crate::CniError;

/// `NSFS_MAGIC` of linux/magic.h.
const NSFS: i64 = 0x6e73_6673;

/// Binds a network namespace to a new file.
pub(crate) fn bind(netns: BorrowedFd<'_>, path: &Path) -> Result<(), CniError> {
    let failed = |what| move |source| CniError::Netns { path: path.to_owned(), what, source };
    if let Some(dir) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(dir)
            .map_err(failed("make its directory"))?;
    }
    let flags = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o444)
        .custom_flags(flags)
        .open(path)
        .map_err(failed("make it"))?;
    let source = format!("/proc/self/fd/{}", netns.as_raw_fd());
    rustix::mount::mount_bind(source, path).map_err(|errno| failed("bind")(errno.into()))
}

/// Whether a namespace is bound to it; not so after a reboot.
pub(crate) fn is_bound(path: &Path) -> bool {
    #[allow(clippy::unnecessary_cast, reason = "the type differs between architectures")]
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type as i64 == NSFS)
}

/// Takes the file away. The namespace goes when nobody has it any more. Nothing there is success.
pub(crate) fn release(path: &Path) -> Result<(), CniError> {
    let failed = |what| move |source| CniError::Netns { path: path.to_owned(), what, source };
    // More than once if somebody bound over it.
    for _ in 0..16 {
        if !is_bound(path) {
            break;
        }
        // Whoever still looks at it must not keep the pod from going.
        match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => break,
            Err(errno) => return Err(failed("unmount")(errno.into())),
        }
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove")(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd as _;

    #[test]
    fn bound_and_released() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("netns/one");
        assert!(!is_bound(&path));
        release(&path).unwrap();
        let own = File::open("/proc/self/ns/net").unwrap();
        bind(own.as_fd(), &path).unwrap();
        assert!(is_bound(&path));
        let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
        assert_eq!(inode(&path), inode(Path::new("/proc/self/ns/net")));
        // One that is open is no obstacle.
        let _held = File::open(&path).unwrap();
        release(&path).unwrap();
        assert!(!path.exists());
        // As it is after a reboot where the directory is on a disk.
        fs::write(&path, "").unwrap();
        assert!(!is_bound(&path));
        release(&path).unwrap();
        assert!(!path.exists());
    }
}
