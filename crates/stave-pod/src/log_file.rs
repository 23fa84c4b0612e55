//! The log file of a container.

use std::fs::DirBuilder;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use stave_supervisor_proto::v1::Failure;

use crate::log_lines::{OutputKind, PREFIX_LEN, Tag, append_record};
use crate::{clock, failure};

/// How long after a failed write it is tried again to say what was dropped, where no output comes that would be tried.
const SAY_AFTER: Duration = Duration::from_secs(2);

/// Output that no log has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Dropped {
    /// Without what records add to them.
    pub(crate) bytes: u64,
    pub(crate) records: u64,
}

impl std::ops::AddAssign for Dropped {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.records += other.records;
    }
}

/// An open log. Writing never fails for its caller: what can't be written is dropped and counted.
#[derive(Debug)]
pub(crate) struct LogFile {
    path: PathBuf,
    fd: OwnedFd,
    /// The file ends inside a record, since a write was cut short.
    torn: bool,
    dropped: Dropped,
    /// What of `dropped` the log does not say yet, and why the last of it was.
    unsaid: u64,
    reason: Errno,
    /// When to try to say it, if nothing is written before.
    say_at: Instant,
}

impl LogFile {
    /// Opens the file to append to it; makes it (0640) and its directories (0755) if needed.
    pub(crate) fn open(path: &Path) -> Result<Self, Failure> {
        if !path.is_absolute() {
            return Err(failure::invalid(format!("log_path {path:?} is not an absolute path")));
        }
        if let Some(parent) = path.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(parent)
                .map_err(|error| failure::io(format!("log_path: make directory {parent:?}"), &error))?;
        }
        let fd = open_file(path)?;
        Ok(Self::at(path, fd))
    }

    fn at(path: &Path, fd: OwnedFd) -> Self {
        Self {
            path: path.into(),
            fd,
            torn: false,
            dropped: Dropped::default(),
            unsaid: 0,
            reason: Errno::NOSPC,
            say_at: Instant::now(),
        }
    }

    /// Goes on in a new file of the same path, after the old one was renamed. On failure the old
    /// file stays, and no new one is there.
    pub(crate) fn reopen(&mut self) -> Result<(), Failure> {
        self.fd = open_file(&self.path)?;
        self.torn = false;
        Ok(())
    }

    /// What was dropped in all.
    pub(crate) fn dropped(&self) -> Dropped {
        self.dropped
    }

    /// When [`append`](Self::append) is to be tried though there are no records: there may be space again for what it has to
    /// say. `None`: nothing is left to be said.
    pub(crate) fn say_at(&self) -> Option<Instant> {
        (self.unsaid > 0).then_some(self.say_at)
    }

    /// Appends whole records; before them, what was dropped since the last record.
    pub(crate) fn append(&mut self, records: &[u8]) {
        if self.torn {
            // So that the next record starts on a line of its own.
            match self.write(b"\n") {
                Ok(()) => self.torn = false,
                Err(_) => return self.drop_from(records, 0),
            }
        }
        if self.unsaid > 0 {
            let note = self.note();
            if let Err(written) = self.write(&note) {
                self.torn = written > 0;
                return self.drop_from(records, 0);
            }
            self.unsaid = 0;
        }
        if let Err(written) = self.write(records) {
            self.torn = written > 0 && records.get(written - 1) != Some(&b'\n');
            self.drop_from(records, written);
        }
    }

    /// Writes all of it; the error is how many bytes were written.
    fn write(&mut self, bytes: &[u8]) -> Result<(), usize> {
        let mut written = 0;
        while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
            match rustix::io::retry_on_intr(|| rustix::io::write(&self.fd, rest)) {
                // A full disk may take a part first.
                Ok(count) if count > 0 => written += count,
                Ok(_) => return Err(written),
                Err(errno) => {
                    self.reason = errno;
                    return Err(written);
                }
            }
        }
        Ok(())
    }

    /// The record that says what was dropped.
    fn note(&self) -> Vec<u8> {
        let reason = self.reason.to_string();
        // Without the number that Rust puts after the text.
        let reason = reason.split(" (os error").next().unwrap_or_default();
        let text = format!("stave: {} bytes of output were dropped: {reason}", self.unsaid);
        let mut record = Vec::new();
        let now = clock::timestamp(clock::unix_nanos());
        append_record(&mut record, &now, OutputKind::Stderr, Tag::Full, text.as_bytes(), b"");
        record
    }

    /// Counts the content of all records that do not end within the first `written` bytes.
    fn drop_from(&mut self, records: &[u8], written: usize) {
        let whole = records.get(..written).unwrap_or_default();
        let start = whole.iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
        let lost = records.get(start..).unwrap_or_default();
        // Content has no newline, so every line is one record.
        let mut dropped = Dropped::default();
        for record in lost.split_inclusive(|&byte| byte == b'\n') {
            dropped.bytes += record.len().saturating_sub(PREFIX_LEN + 1) as u64;
            dropped.records += 1;
        }
        self.dropped += dropped;
        self.unsaid += dropped.bytes;
        self.say_at = Instant::now() + SAY_AFTER;
    }
}

fn open_file(path: &Path) -> Result<OwnedFd, Failure> {
    // Not blocking, since a FIFO without a reader would.
    let flags = OFlags::WRONLY
        | OFlags::APPEND
        | OFlags::CREATE
        | OFlags::NOFOLLOW
        | OFlags::NOCTTY
        | OFlags::NONBLOCK
        | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP;
    let open = |errno: Errno| failure::system(format!("log_path: open {path:?}"), errno);
    let fd = rustix::fs::open(path, flags, mode).map_err(open)?;
    let stat = rustix::fs::fstat(fd.as_fd()).map_err(open)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(failure::invalid(format!("log_path {path:?} is not a regular file")));
    }
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn records(contents: &[&str]) -> Vec<u8> {
        let mut out = Vec::new();
        for content in contents {
            let timestamp = clock::timestamp(0);
            append_record(&mut out, &timestamp, OutputKind::Stdout, Tag::Full, content.as_bytes(), b"");
        }
        out
    }

    #[test]
    fn made_with_its_directories_and_appended_to() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("a/b/0.log");
        LogFile::open(&path).expect("open").append(&records(&["one"]));
        LogFile::open(&path).expect("open again").append(&records(&["two", ""]));
        assert_eq!(std::fs::read(&path).expect("read"), records(&["one", "two", ""]));
        let mode = |path: &Path| std::fs::metadata(path).expect("stat").permissions().mode() & 0o777;
        assert_eq!(mode(&path) & 0o137, 0, "0640, less the umask");
        assert_eq!(mode(&dir.path().join("a/b")) & 0o022, 0);
    }

    #[test]
    fn reopened_and_not_reopened() {
        let dir = tempfile::tempdir().expect("directory");
        let (path, old) = (dir.path().join("0.log"), dir.path().join("0.log.old"));
        let mut log = LogFile::open(&path).expect("open");
        log.append(&records(&["one"]));
        std::fs::rename(&path, &old).expect("rename");
        log.reopen().expect("reopen");
        log.append(&records(&["two"]));
        assert_eq!(std::fs::read(&old).expect("read"), records(&["one"]));
        assert_eq!(std::fs::read(&path).expect("read"), records(&["two"]));
        std::fs::remove_file(&path).expect("remove");
        std::os::unix::fs::symlink("/nonexistent/target", &path).expect("symlink");
        assert!(log.reopen().is_err(), "a symlink is not followed");
        log.append(&records(&["three"]));
        assert_eq!(log.dropped(), Dropped::default(), "the old file still takes records");
    }

    #[test]
    fn only_regular_files() {
        let dir = tempfile::tempdir().expect("directory");
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .expect("fifo");
        assert!(LogFile::open(&fifo).is_err());
        assert!(
            LogFile::open(Path::new("0.log")).expect_err("refused").message.contains("not an absolute path")
        );
        assert!(LogFile::open(dir.path()).is_err());
    }

    #[test]
    fn a_full_disk_drops_and_counts() {
        // /dev/full takes no byte; open_file would refuse a device.
        let fd = rustix::fs::open("/dev/full", OFlags::WRONLY, Mode::empty()).expect("open");
        let mut log = LogFile::at(Path::new("/dev/full"), fd);
        log.append(&records(&["12345", "", "678"]));
        assert_eq!(log.dropped(), Dropped { bytes: 8, records: 3 });
        assert!(!log.torn, "not a byte was written");
        let note = String::from_utf8(log.note()).expect("UTF-8");
        let text = " stderr F stave: 8 bytes of output were dropped: No space left on device\n";
        assert!(note.ends_with(text) && note.len() == clock::TIMESTAMP_LEN + text.len(), "{note}");
    }

    #[test]
    fn a_torn_record_is_counted_and_ended() {
        // A pipe of two pages is a disk that is full in the middle of a record.
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        assert_eq!(rustix::pipe::fcntl_setpipe_size(&writer, 8192), Ok(8192));
        rustix::fs::fcntl_setfl(&writer, OFlags::NONBLOCK).expect("nonblocking");
        let mut log = LogFile::at(Path::new("/pipe"), writer);
        let content = "y".repeat(3000);
        let five = records(&[content.as_str(); 5]);
        log.append(&five);
        assert!(log.torn);
        assert_eq!(log.dropped(), Dropped { bytes: 3 * 3000, records: 3 }, "two records are whole");
        log.append(&records(&["lost"]));
        assert_eq!(log.dropped(), Dropped { bytes: 3 * 3000 + 4, records: 4 });
        let mut buffer = vec![0; 16384];
        assert_eq!(rustix::io::read(&reader, &mut buffer), Ok(8192));
        assert_eq!(buffer[..8192], five[..8192]);
        log.append(&records(&["after"]));
        let count = rustix::io::read(&reader, &mut buffer).expect("read");
        let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        assert!(lines.len() == 3 && lines[0] == "\n", "{text}");
        assert!(lines[1].contains(" stderr F stave: 9004 bytes of output were dropped: "), "{text}");
        assert_eq!(lines[2].as_bytes(), records(&["after"]));
        assert!(!log.torn);
        log.append(&records(&["more"]));
        let count = rustix::io::read(&reader, &mut buffer).expect("read");
        assert_eq!(buffer[..count], records(&["more"]), "it is said once");
    }
}
