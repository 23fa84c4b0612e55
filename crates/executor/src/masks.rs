//! Masked and read-only paths.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::FileType;
use rustix::mount::MountAttrFlags;
use stave_paths::Root;
use stave_sys::{MountAttr, mount_setattr};

use crate::error::{Context, Error, Result};
use crate::mounts::{attach, clone_fd, new_file_system};

const STAGE: &str = "mask";
const RDONLY: u64 = MountAttrFlags::MOUNT_ATTR_RDONLY.bits() as u64;

/// Covers files by `null` (the host's device, checked) and directories by an empty, read-only tmpfs.
pub(crate) fn mask(root: &Root, paths: &[String], null: BorrowedFd<'_>) -> Result<()> {
    // One tmpfs serves all directories: a mount can be copied once it is attached.
    let mut empty: Option<OwnedFd> = None;
    for path in paths {
        let what = || format!("{path:?}");
        let Some(target) = resolve(root, path)? else { continue };
        let stat = rustix::fs::fstat(&target).at(STAGE, what)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            let cover = clone_fd(null, false).at(STAGE, what)?;
            make_private(&cover, 0).at(STAGE, what)?;
            attach(cover.as_fd(), target.as_fd()).at(STAGE, what)?;
            continue;
        }
        let cover = match &empty {
            Some(attached) => clone_fd(attached.as_fd(), false).at(STAGE, what)?,
            None => new_file_system("tmpfs", "tmpfs", &["mode=755".into(), "nr_inodes=1".into()], RDONLY)?,
        };
        attach(cover.as_fd(), target.as_fd()).at(STAGE, what)?;
        empty.get_or_insert(cover);
    }
    Ok(())
}

/// Makes paths read-only, with all that is mounted below.
pub(crate) fn make_read_only(root: &Root, paths: &[String]) -> Result<()> {
    const STAGE: &str = "readonly path";
    for path in paths {
        let what = || format!("{path:?}");
        let Some(target) = resolve(root, path)? else { continue };
        let tree = clone_fd(target.as_fd(), true).at(STAGE, what)?;
        make_private(&tree, RDONLY).at(STAGE, what)?;
        attach(tree.as_fd(), target.as_fd()).at(STAGE, what)?;
    }
    Ok(())
}

fn make_private(tree: &OwnedFd, set: u64) -> std::io::Result<()> {
    let attr = MountAttr { set, propagation: libc::MS_PRIVATE, ..MountAttr::default() };
    mount_setattr(tree.as_fd(), true, &attr)
}

fn resolve(root: &Root, path: &str) -> Result<Option<OwnedFd>> {
    match root.resolve(Path::new(path)) {
        Ok(fd) => Ok(Some(fd)),
        // Paths of other kernels and other images: nothing to hide.
        Err(e) if e.is_not_found() || e.raw_os_error() == Some(libc::ENOTDIR) => Ok(None),
        Err(e) => Err(Error::path(STAGE, format!("{path:?}"), &e)),
    }
}
