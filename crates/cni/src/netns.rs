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

/// Names of the files in a directory that a namespace is bound to.
pub(crate) fn bound(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let bound = entries.filter(|entry| is_bound(&entry.path()));
    bound.filter_map(|entry| entry.file_name().into_string().ok()).collect()
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
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // Its directory was mounted over with all that is in it, by `ip netns add` where mounts are not shared: what is
        // below nobody can reach any more, and the pod must not wait for the node's next start.
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
            tracing::warn!(path = %path.display(), "the file of a network namespace can't be removed: it is a mount below another");
            Ok(())
        }
        removed => removed.map_err(failed("remove")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd as _;

    use rustix::mount::MountPropagationFlags;

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

    /// What `ip netns add` does where mounts are not shared: the mounts below are there once more, and the first
    /// ones out of reach.
    #[test]
    fn one_that_is_covered_by_a_mount_of_its_directory_is_released() {
        std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
                .unwrap();
            let top = tempfile::tempdir().unwrap();
            let path = top.path().join("netns/one");
            let own = File::open("/proc/self/ns/net").unwrap();
            bind(own.as_fd(), &path).unwrap();
            let dir = path.parent().unwrap();
            rustix::mount::mount_bind_recursive(dir, dir).unwrap();
            release(&path).unwrap();
            assert!(!is_bound(&path));
            release(&path).unwrap();
            rustix::mount::unmount(dir, UnmountFlags::DETACH).unwrap();
            release(&path).unwrap();
        })
        .join()
        .unwrap();
    }
}
