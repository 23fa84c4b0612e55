//! Reading of files that a container may have put there.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::FileType;

use crate::PathError;

/// Most bytes that are reserved on the word of `fstat(2)`.
const PREALLOCATED: u64 = 64 << 10;

/// Reads an open regular file whole, at most `max` bytes. `path` is for messages. The size that
/// `fstat(2)` tells is not trusted: files of procfs say 0, others grow while they are read.
pub fn read_regular(fd: OwnedFd, path: &Path, max: u64) -> Result<Vec<u8>, PathError> {
    let stat = rustix::fs::fstat(&fd).map_err(|e| PathError::io("fstat", path, e))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(PathError::kind(path, "regular file"));
    }
    // With one byte to spare, so that the end of the file is found without growing.
    let size = u64::try_from(stat.st_size).unwrap_or_default().min(max).min(PREALLOCATED);
    let mut content = Vec::with_capacity(size as usize + 1);
    File::from(fd).take(max.saturating_add(1)).read_to_end(&mut content).map_err(|source| PathError::Io {
        call: "read",
        path: path.to_owned(),
        source,
    })?;
    if content.len() as u64 > max {
        return Err(PathError::TooLarge { path: path.to_owned(), max });
    }
    Ok(content)
}
