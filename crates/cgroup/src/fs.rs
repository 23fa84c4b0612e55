use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::CgroupError;

/// How long a removal waits for processes that are dying.
pub(crate) const BUSY_LIMIT: Duration = Duration::from_secs(3);

/// Writes one value in one `write`, and never makes a file.
pub(crate) fn write(path: &Path, value: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    // An empty value must still reach the kernel.
    file.write_all(if value.is_empty() { b"\n" } else { value.as_bytes() })
}

/// Makes a directory and its missing parents below `mount`; one that is there is fine.
pub(crate) fn make_path(mount: &Path, path: &str) -> Result<(), CgroupError> {
    let make = |dir: &Path| match fs::create_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
        _ => Ok(()),
    };
    let whole = dir(mount, path);
    // Mostly the parents are there, and each is another look-up in every hierarchy.
    match make(&whole) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        result => return result.map_err(|e| CgroupError::io("mkdir", whole, e)),
    }
    let mut dir = mount.to_path_buf();
    for part in path.split('/').filter(|p| !p.is_empty()) {
        dir.push(part);
        make(&dir).map_err(|e| CgroupError::io("mkdir", &dir, e))?;
    }
    Ok(())
}

/// The directory of a cgroup path in one hierarchy.
pub(crate) fn dir(mount: &Path, path: &str) -> PathBuf {
    mount.join(path.trim_start_matches('/'))
}

/// Removes a cgroup and those below it, bottom up. A busy one is tried again for a while: the kernel
/// answers EBUSY until the last process is reaped. What is absent is removed.
pub(crate) fn remove_tree(dir: &Path) -> Result<(), CgroupError> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        match remove_once(dir) {
            Ok(()) => return Ok(()),
            Err((_, e)) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err((path, e)) if e.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) => {
                if start.elapsed() >= BUSY_LIMIT {
                    let pids = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
                    let pids = pids.lines().take(8).map(str::to_owned).collect();
                    let waited_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
                    return Err(CgroupError::Busy { path, waited_ms, pids });
                }
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(50));
            }
            Err((path, e)) => return Err(CgroupError::io("rmdir", path, e)),
        }
    }
}

/// One pass of `remove_tree`; children that vanish meanwhile are fine.
fn remove_once(dir: &Path) -> Result<(), (PathBuf, io::Error)> {
    // Most cgroups have no children: one call does it.
    let first = match fs::remove_dir(dir) {
        Ok(()) => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => e,
    };
    let children = child_dirs(dir).map_err(|e| (dir.to_path_buf(), e))?;
    if children.is_empty() {
        return Err((dir.to_path_buf(), first));
    }
    for child in children {
        remove_once(&child)?;
    }
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err((dir.to_path_buf(), e)),
        _ => Ok(()),
    }
}

/// The cgroups right below one; none if it is gone.
pub(crate) fn child_dirs(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}
