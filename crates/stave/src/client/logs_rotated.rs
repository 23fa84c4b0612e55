//! The older files of a log that the kubelet rotates: `<name>.<timestamp>`, and `.gz` once it has compressed them.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::Context as _;

use super::log_file::LogFile;
use super::logs_since::Nanos;

/// What was rotated away from a log.
#[derive(Debug, Default)]
pub(crate) struct Rotated {
    /// The newest first.
    pub(crate) files: Vec<LogFile>,
    /// Files that are not read: compressed, or older than one that is. The newest first.
    pub(crate) skipped: Vec<PathBuf>,
}

impl Rotated {
    /// Opens those that may have lines written at or after `since`; all of them without it. `newest` is the
    /// log as it is now.
    pub(crate) fn open(path: &Path, newest: &LogFile, since: Option<Nanos>) -> anyhow::Result<Self> {
        let mut rotated = Self::default();
        let mut start = newest.start()?;
        for path in names(path)? {
            if start.zip(since).is_some_and(|(start, since)| start < since) {
                break;
            }
            if path.as_os_str().as_bytes().ends_with(b".gz") || !rotated.skipped.is_empty() {
                if written_since(&path, since) {
                    rotated.skipped.push(path);
                }
                continue;
            }
            match LogFile::open(&path) {
                // Rotated since the newest was opened.
                Ok(file) if file.is_same(newest) => {}
                Ok(file) => {
                    start = file.start()?;
                    rotated.files.push(file);
                }
                // Compressed or removed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => rotated.skipped.push(path),
                Err(error) => return Err(error).with_context(|| path.display().to_string()),
            }
        }
        Ok(rotated)
    }
}

/// Whether the file may have been written to since then.
fn written_since(path: &Path, since: Option<Nanos>) -> bool {
    let Some(since) = since else { return true };
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified());
    let modified = modified.ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    modified.is_none_or(|time| time.as_nanos() as Nanos >= since)
}

/// The rotated files of a log, the newest first.
fn names(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let entry = entry.with_context(|| directory.display().to_string())?;
        let file = entry.file_name();
        let suffix = file.as_bytes().strip_prefix(name.as_bytes()).and_then(|rest| rest.strip_prefix(b"."));
        if suffix.is_some_and(is_timestamp) {
            found.push(entry.path());
        }
    }
    found.sort_unstable_by(|a, b| b.cmp(a));
    Ok(found)
}

/// `20060102-150405` as Go says it, with or without `.gz`.
fn is_timestamp(suffix: &[u8]) -> bool {
    let time = suffix.strip_suffix(b".gz").unwrap_or(suffix);
    let fits = |(at, byte): (usize, &u8)| if at == 8 { *byte == b'-' } else { byte.is_ascii_digit() };
    time.len() == 15 && time.iter().enumerate().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::logs_since::rfc3339;

    fn line(second: u32) -> String {
        format!("2026-01-01T00:00:{second:02}.000000000Z stdout F {second}\n")
    }

    /// A log whose files start at seconds 10, 20, 30 and 40, the first of them compressed.
    fn log() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        for (name, second) in [
            ("0.log.20260101-000020.gz", 10),
            ("0.log.20260101-000030", 20),
            ("0.log.20260101-000040", 30),
            ("0.log", 40),
            ("0.log.20260101-000040.tmp", 50),
            ("0.log.old", 50),
            ("10.log.20260101-000040", 50),
        ] {
            fs::write(dir.path().join(name), line(second) + &line(second + 5)).unwrap();
        }
        let path = dir.path().join("0.log");
        (dir, path)
    }

    fn starts(rotated: &Rotated) -> Vec<Nanos> {
        let zero = rfc3339("2026-01-01T00:00:00Z").unwrap();
        let seconds = |file: &LogFile| (file.start().unwrap().unwrap() - zero) / 1_000_000_000;
        rotated.files.iter().map(seconds).collect()
    }

    #[test]
    fn as_many_as_are_needed_the_newest_first() {
        let (_dir, path) = log();
        let newest = LogFile::open(&path).unwrap();
        let all = Rotated::open(&path, &newest, None).unwrap();
        assert_eq!(starts(&all), [30, 20]);
        assert_eq!(all.skipped, [path.with_file_name("0.log.20260101-000020.gz")]);
        for (second, expected) in [(45, &[][..]), (40, &[30]), (33, &[30]), (25, &[30, 20])] {
            let since = rfc3339(&line(second)[..30]).unwrap();
            let some = Rotated::open(&path, &newest, Some(since)).unwrap();
            assert_eq!(starts(&some), expected, "{second}");
            assert!(some.skipped.is_empty(), "{second}");
        }
        let since = rfc3339(&line(15)[..30]).unwrap();
        assert_eq!(Rotated::open(&path, &newest, Some(since)).unwrap().skipped.len(), 1);
    }

    #[test]
    fn a_log_that_is_rotated_meanwhile_is_read_once() {
        let (_dir, path) = log();
        let newest = LogFile::open(&path).unwrap();
        fs::rename(&path, path.with_file_name("0.log.20260101-000050")).unwrap();
        assert_eq!(starts(&Rotated::open(&path, &newest, None).unwrap()), [30, 20]);
    }
}
