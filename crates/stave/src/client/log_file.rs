//! A log file that may be rotated while it is read: renamed away, and a new one put in its place.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::logs_since::{Nanos, rfc3339};

/// The longest line that is kept together; the runtime cuts at 16 KiB.
const MAX_LINE: usize = 1 << 20;

/// The file as it was opened, and what of it has been read.
#[derive(Debug)]
pub(crate) struct LogFile {
    path: PathBuf,
    file: File,
    /// Device and inode.
    identity: (u64, u64),
    position: u64,
    /// A line whose end has not been read yet.
    pending: Vec<u8>,
}

impl LogFile {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        Ok(Self {
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
            file,
            position: 0,
            pending: Vec::new(),
        })
    }

    /// Hands every whole line that is there, without its newline, to `sink`; says whether anything was read.
    pub(crate) fn read_lines(
        &mut self,
        sink: &mut impl FnMut(&[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<bool> {
        if self.file.metadata()?.len() < self.position {
            // Truncated in place: what is there now is new.
            self.position = self.file.seek(SeekFrom::Start(0))?;
            self.pending.clear();
        }
        let mut buffer = vec![0; 64 << 10];
        let mut any = false;
        loop {
            let length = match self.file.read(&mut buffer) {
                Ok(0) => return Ok(any),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            any = true;
            self.position += length as u64;
            let mut rest = &buffer[..length];
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                if self.pending.is_empty() {
                    sink(&rest[..end])?;
                } else {
                    self.pending.extend(&rest[..end]);
                    sink(&self.pending)?;
                    self.pending.clear();
                }
                rest = &rest[end + 1..];
            }
            self.pending.extend(rest);
            if self.pending.len() > MAX_LINE {
                sink(&self.pending)?;
                self.pending.clear();
            }
        }
    }

    /// When its first line was written; `None` if it has none yet, or one that doesn't say.
    pub(crate) fn start(&self) -> io::Result<Option<Nanos>> {
        let mut buffer = [0; 64];
        let length = self.file.read_at(&mut buffer, 0)?;
        let time = buffer[..length].split(|byte| *byte == b' ').next();
        Ok(time.and_then(|time| rfc3339(std::str::from_utf8(time).ok()?)))
    }

    /// Whether both are the same file, by whatever names.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.identity == other.identity
    }

    /// Whether another file is at the path now. A path with nothing there yet is not rotated.
    pub(crate) fn is_rotated(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) != self.identity)
    }

    /// Opens the file that is at the path now.
    pub(crate) fn reopen(&mut self) -> io::Result<()> {
        *self = Self::open(&self.path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("stave-log-file-{}-{name}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn lines(file: &mut LogFile) -> Vec<String> {
        let mut lines = Vec::new();
        file.read_lines(&mut |line| {
            lines.push(String::from_utf8_lossy(line).into_owned());
            Ok(())
        })
        .unwrap();
        lines
    }

    #[test]
    fn half_lines_wait_for_their_end() {
        let dir = Dir::new("half");
        let path = dir.0.join("0.log");
        let mut writer = File::create(&path).unwrap();
        let mut file = LogFile::open(&path).unwrap();
        write!(writer, "one\ntw").unwrap();
        assert_eq!(lines(&mut file), ["one"]);
        assert!(lines(&mut file).is_empty());
        write!(writer, "o\n\nthree\n").unwrap();
        assert_eq!(lines(&mut file), ["two", "", "three"]);
    }

    #[test]
    fn a_rotated_file_is_read_to_its_end_and_then_the_new_one() {
        let dir = Dir::new("rotated");
        let path = dir.0.join("0.log");
        let mut old = File::create(&path).unwrap();
        let mut file = LogFile::open(&path).unwrap();
        writeln!(old, "a").unwrap();
        assert_eq!(lines(&mut file), ["a"]);
        fs::rename(&path, dir.0.join("0.log.1")).unwrap();
        assert!(!file.is_rotated());
        writeln!(old, "b").unwrap();
        fs::write(&path, "c\n").unwrap();
        assert!(file.is_rotated());
        assert_eq!(lines(&mut file), ["b"]);
        file.reopen().unwrap();
        assert!(!file.is_rotated());
        assert_eq!(lines(&mut file), ["c"]);
    }

    #[test]
    fn a_truncated_file_is_read_again() {
        let dir = Dir::new("truncated");
        let path = dir.0.join("0.log");
        fs::write(&path, "first\nsecond\n").unwrap();
        let mut file = LogFile::open(&path).unwrap();
        assert_eq!(lines(&mut file).len(), 2);
        fs::write(&path, "new\n").unwrap();
        assert_eq!(lines(&mut file), ["new"]);
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let dir = Dir::new("long");
        let path = dir.0.join("0.log");
        fs::write(&path, vec![b'x'; MAX_LINE * 2 + 10]).unwrap();
        let mut file = LogFile::open(&path).unwrap();
        assert!(!lines(&mut file).is_empty());
        assert!(file.pending.len() <= MAX_LINE);
    }
}
