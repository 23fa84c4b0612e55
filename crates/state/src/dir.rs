use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use crate::StateError;

/// Makes `path` a directory that only we may enter (0700), with its parents (0755 by the usual umask).
///
/// One that is there must belong to the effective user; a wider mode is narrowed. Shared directories (sticky, or
/// writable for others, as /tmp is) are refused: narrowing them would break the host. A symbolic link is
/// followed if it is ours.
pub fn private_dir(path: &Path) -> Result<(), StateError> {
    let refuse = |reason: String| StateError::NotPrivate { path: path.to_owned(), reason };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(StateError::io("create", parent))?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {}
        Err(err) => return Err(StateError::io("create", path)(err)),
    }
    let us = rustix::process::geteuid().as_raw();
    let link = fs::symlink_metadata(path).map_err(StateError::io("stat", path))?;
    if link.is_symlink() && link.uid() != us {
        return Err(refuse(format!("it is a symbolic link of user {}, not of {us}", link.uid())));
    }
    // From here by descriptor, so that what is checked is what is changed.
    let dir = File::open(path).map_err(StateError::io("open", path))?;
    let meta = dir.metadata().map_err(StateError::io("stat", path))?;
    let mode = meta.mode() & 0o7777;
    if !meta.is_dir() {
        return Err(refuse("it is no directory".to_owned()));
    }
    if meta.uid() != us {
        return Err(refuse(format!("it belongs to user {}, not to {us}", meta.uid())));
    }
    if mode & 0o1002 != 0 {
        return Err(refuse(format!("it is shared with other users (mode {mode:04o})")));
    }
    if mode != 0o700 {
        dir.set_permissions(fs::Permissions::from_mode(0o700)).map_err(StateError::io("chmod", path))?;
    }
    Ok(())
}
