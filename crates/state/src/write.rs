use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::StateError;

/// Temporary files begin with this; [`crate::load_dir`] sweeps what a crash left.
pub(crate) const TMP: &str = ".stave-tmp-";

/// Whether a record must outlive a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// fsync the file before the rename and the directory after it: some 0.5 ms.
    Fsync,
    /// No fsync, for what a reboot voids anyway. A crash of the daemon loses nothing.
    Volatile,
}

/// Writes `bytes` to `path` whole: a temporary file (0600) in the same directory, renamed over it.
///
/// The directory must exist. On an error the old record is still there.
pub fn write_bytes(path: &Path, bytes: &[u8], durability: Durability) -> Result<(), StateError> {
    let (dir, tmp) = temporary(path)?;
    let written = fill(&tmp, bytes, durability)
        .and_then(|()| fs::rename(&tmp, path).map_err(StateError::io("rename to", path)));
    if let Err(err) = written {
        // The first error is the one to tell; load_dir sweeps what this may leave.
        let _ = fs::remove_file(&tmp);
        return Err(err);
    }
    match durability {
        Durability::Fsync => sync_dir(dir),
        Durability::Volatile => Ok(()),
    }
}

/// Writes `value` to `path` as JSON, as [`write_bytes`] does.
pub fn write_json<T: Serialize + ?Sized>(
    path: &Path,
    value: &T,
    durability: Durability,
) -> Result<(), StateError> {
    let mut bytes =
        serde_json::to_vec(value).map_err(|source| StateError::Encode { path: path.to_owned(), source })?;
    bytes.push(b'\n');
    write_bytes(path, &bytes, durability)
}

/// Removes a record; one that is already gone is success. It may be back after a power cut.
pub fn remove(path: &Path) -> Result<(), StateError> {
    match fs::remove_file(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(StateError::io("remove", path)(err)),
        _ => Ok(()),
    }
}

/// [`remove`], then fsync of the directory: for records that must not be back after a power cut.
pub fn remove_durably(path: &Path) -> Result<(), StateError> {
    remove(path)?;
    match sync_dir(parent(path)?) {
        // The whole directory is gone, and the record with it.
        Err(StateError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn fill(tmp: &Path, bytes: &[u8], durability: Durability) -> Result<(), StateError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(tmp)
        .map_err(StateError::io("create", tmp))?;
    file.write_all(bytes).map_err(StateError::io("write", tmp))?;
    if durability == Durability::Fsync {
        file.sync_all().map_err(StateError::io("fsync", tmp))?;
    }
    Ok(())
}

/// The directory of `path`, and a name in it that no other writer of this process uses.
fn temporary(path: &Path) -> Result<(&Path, PathBuf), StateError> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let dir = parent(path)?;
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    // The record's own name is left out: with it the name could get longer than NAME_MAX.
    Ok((dir, dir.join(format!("{TMP}{}-{count}", std::process::id()))))
}

fn parent(path: &Path) -> Result<&Path, StateError> {
    match (path.parent(), path.file_name()) {
        (Some(dir), Some(_)) if dir.as_os_str().is_empty() => Ok(Path::new(".")),
        (Some(dir), Some(_)) => Ok(dir),
        _ => Err(StateError::BadName { path: path.to_owned() }),
    }
}

pub(crate) fn sync_dir(dir: &Path) -> Result<(), StateError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(StateError::io("fsync", dir))
}
