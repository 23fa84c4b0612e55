use std::fs::{self, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::de::DeserializeOwned;

use crate::StateError;
use crate::write::TMP;

/// The biggest record that is read, in bytes (16 MiB).
pub const MAX_RECORD: u64 = 16 << 20;

/// Where [`load_dir`] moves what it can't decode, inside the directory.
pub const BROKEN: &str = ".broken";

/// A record that [`load_dir`] could not give.
#[derive(Debug)]
pub struct SetAside {
    /// The file, or the directory itself where it could not be listed.
    pub path: PathBuf,
    /// Where it is now; `None` if it is still in its place.
    pub moved_to: Option<PathBuf>,
    /// What is wrong with it.
    pub error: StateError,
}

/// What [`load_dir`] found.
#[derive(Debug)]
pub struct Loaded<T> {
    /// File stem and record, sorted by stem.
    pub records: Vec<(String, T)>,
    /// What could not be read; each is logged as a warning too.
    pub set_aside: Vec<SetAside>,
}

/// Reads one record; `None` if there is none.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StateError> {
    // NOFOLLOW: a record is never a link. NONBLOCK: a FIFO in its place must not hang us.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = match OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path) {
        Ok(file) => file,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(err)
            if [rustix::io::Errno::LOOP, rustix::io::Errno::NXIO]
                .iter()
                .any(|errno| err.raw_os_error() == Some(errno.raw_os_error())) =>
        {
            return Err(StateError::NotRegular { path: path.to_owned() });
        }
        Err(err) => return Err(StateError::io("open", path)(err)),
    };
    let meta = file.metadata().map_err(StateError::io("stat", path))?;
    if !meta.is_file() {
        return Err(StateError::NotRegular { path: path.to_owned() });
    }
    let too_large = |size| StateError::TooLarge { path: path.to_owned(), size, limit: MAX_RECORD };
    if meta.len() > MAX_RECORD {
        return Err(too_large(meta.len()));
    }
    let mut bytes = Vec::with_capacity(meta.len() as usize);
    file.take(MAX_RECORD + 1).read_to_end(&mut bytes).map_err(StateError::io("read", path))?;
    if bytes.len() as u64 > MAX_RECORD {
        return Err(too_large(bytes.len() as u64));
    }
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|source| StateError::Decode { path: path.to_owned(), source })
}

/// Reads every `*.json` of `dir`. What can't be decoded moves to `dir/.broken/`; what the kernel would not
/// read (no descriptors left, an I/O error) stays in its place. Both are logged and returned, and stop nothing.
///
/// A missing directory has no records. Other names and subdirectories are left alone, but temporary files of an
/// interrupted write are removed: call this before anything writes to `dir`.
pub fn load_dir<T: DeserializeOwned>(dir: &Path) -> Loaded<T> {
    let mut loaded = Loaded { records: Vec::new(), set_aside: Vec::new() };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return loaded,
        Err(err) => {
            loaded.report(dir.to_owned(), None, StateError::io("list", dir)(err));
            return loaded;
        }
    };
    for entry in entries {
        let entry = match entry {
            Ok(entry) => entry,
            Err(err) => {
                loaded.report(dir.to_owned(), None, StateError::io("list", dir)(err));
                break;
            }
        };
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(TMP.as_bytes()) {
            if let Err(err) = crate::remove(&path) {
                tracing::warn!(path = %path.display(), "can't remove the rest of an interrupted write: {err}");
            }
            continue;
        }
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let record = match path.file_stem().and_then(|stem| stem.to_str()) {
            Some(stem) => read_json(&path).map(|record| record.map(|record| (stem.to_owned(), record))),
            None => Err(StateError::BadName { path: path.clone() }),
        };
        match record {
            Ok(Some(record)) => loaded.records.push(record),
            // Removed since it was listed.
            Ok(None) => {}
            Err(err @ StateError::Io { .. }) => loaded.report(path, None, err),
            Err(err) => match set_aside(dir, &path) {
                Ok(moved_to) => loaded.report(path, Some(moved_to), err),
                Err(moving) => {
                    tracing::warn!(path = %path.display(), "can't set a broken record aside: {moving}");
                    loaded.report(path, None, err);
                }
            },
        }
    }
    loaded.records.sort_by(|(a, _), (b, _)| a.cmp(b));
    loaded
}

impl<T> Loaded<T> {
    fn report(&mut self, path: PathBuf, moved_to: Option<PathBuf>, error: StateError) {
        match &moved_to {
            Some(to) => tracing::warn!("broken record set aside as {}: {error}", to.display()),
            None => tracing::warn!("record not read: {error}"),
        }
        self.set_aside.push(SetAside { path, moved_to, error });
    }
}

/// Moves `path` to `dir/.broken/`, under a name of its own if an earlier one has that name.
fn set_aside(dir: &Path, path: &Path) -> Result<PathBuf, StateError> {
    let broken = crate::private_dir(&dir.join(BROKEN)).map(|()| dir.join(BROKEN))?;
    let name = path.file_name().ok_or_else(|| StateError::BadName { path: path.to_owned() })?;
    let mut to = broken.join(name);
    for count in 1u32.. {
        let renamed = rustix::fs::renameat_with(
            rustix::fs::CWD,
            path,
            rustix::fs::CWD,
            &to,
            rustix::fs::RenameFlags::NOREPLACE,
        );
        match renamed {
            Ok(()) => return Ok(to),
            Err(rustix::io::Errno::EXIST) if count < 10_000 => {
                let mut numbered = name.to_owned();
                numbered.push(format!(".{count}"));
                to = broken.join(numbered);
            }
            Err(err) => return Err(StateError::io("rename to", to)(err.into())),
        }
    }
    Err(StateError::BadName { path: path.to_owned() })
}
