use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags, flock};

use crate::StateError;

/// Between two tries for the lock.
const PAUSE: Duration = Duration::from_millis(10);

/// The one daemon of a root directory: `flock(2)` on `<dir>/lock`, held until dropped or the process ends.
///
/// The holder's pid is in the file for people to read; nothing acts on it. The file stays: removing it would
/// let a third process lock a new file while the second still holds the old one.
#[derive(Debug)]
pub struct RootLock {
    _file: File,
}

impl RootLock {
    /// Takes the lock, waiting at most `patience`; [`StateError::Locked`] names the holder. The directory must exist.
    ///
    /// A killed daemon's lock can outlive it for a moment: a child between clone(2) and execve(2) has the same open
    /// file.
    pub fn acquire(dir: &Path, patience: Duration) -> Result<RootLock, StateError> {
        let path = dir.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(&path)
            .map_err(StateError::io("open", &path))?;
        let end = Instant::now() + patience;
        let locked = loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < end => std::thread::sleep(PAUSE),
                locked => break locked,
            }
        };
        match locked {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                let holder = match file.take(32).read_to_string(&mut text) {
                    Ok(_) if text.trim().parse::<u32>().is_ok() => format!("pid {}", text.trim()),
                    _ => "an unknown process".to_owned(),
                };
                return Err(StateError::Locked { path, holder });
            }
            Err(err) => return Err(StateError::io("lock", &path)(err.into())),
        }
        file.set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(StateError::io("write", &path))?;
        Ok(RootLock { _file: file })
    }
}
