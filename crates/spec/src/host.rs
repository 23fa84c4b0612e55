//! The real host. The only file of the crate that reads the disk.

use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use stave_supervisor_proto::v1::device::Kind;

use crate::{Host, HostDevice, MountPeers};

/// Asks /dev and /proc/self/mountinfo of this host.
#[derive(Clone, Copy, Debug, Default)]
pub struct LiveHost;

/// Directories of /dev that hold no devices of the host itself, and /dev/console.
const SKIPPED: &[&str] = &["pts", "shm", "fd", "mqueue", "console", ".lxc", ".lxd-mounts", ".udev"];

/// Bounds of a walk.
const DEPTH_MAX: usize = 16;
const DEVICES_MAX: usize = 65536;

impl Host for LiveHost {
    fn devices(&self, path: &Path) -> io::Result<Vec<HostDevice>> {
        let metadata = fs::metadata(path)?;
        if metadata.is_dir() {
            let mut found = Vec::new();
            walk(path, &[], DEPTH_MAX, &mut found)?;
            return Ok(found);
        }
        let device = device(path.to_owned(), &metadata);
        device.map(|device| vec![device]).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    fn all_devices(&self) -> io::Result<Vec<HostDevice>> {
        let mut found = Vec::new();
        walk(Path::new("/dev"), SKIPPED, DEPTH_MAX, &mut found)?;
        Ok(found)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        match fs::metadata(path) {
            Ok(_) => Ok(true),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn apparmor_loaded(&self, name: &str) -> io::Result<bool> {
        stave_lsm::apparmor::is_loaded(name).map_err(io::Error::other)
    }

    fn selinux_label(&self, label: &str) -> io::Result<Option<String>> {
        stave_lsm::selinux::canonical(label)
    }

    fn mount_peers(&self, path: &Path) -> io::Result<MountPeers> {
        let path = fs::canonicalize(path)?;
        Ok(peers_of(&fs::read("/proc/self/mountinfo")?, &path))
    }
}

/// The device at `path`; `None` where it is another kind of file.
fn device(path: PathBuf, metadata: &fs::Metadata) -> Option<HostDevice> {
    let kind = match metadata.file_type() {
        t if t.is_char_device() => Kind::Char,
        t if t.is_block_device() => Kind::Block,
        _ => return None,
    };
    let number = metadata.rdev();
    Some(HostDevice {
        path,
        kind,
        major: libc::major(number),
        minor: libc::minor(number),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
    })
}

/// Gathers the devices below `dir`, without following symlinks. What goes away meanwhile is left out.
fn walk(dir: &Path, skipped: &[&str], depth: usize, found: &mut Vec<HostDevice>) -> io::Result<()> {
    let mut entries = fs::read_dir(dir)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        if skipped.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        let metadata = match entry.metadata() {
            Ok(metadata) => metadata,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        if metadata.is_dir() && depth > 0 {
            match walk(&entry.path(), &[], depth - 1, found) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                done => done?,
            }
        } else if let Some(device) = device(entry.path(), &metadata) {
            if found.len() >= DEVICES_MAX {
                return Err(io::Error::other(format!("more than {DEVICES_MAX} devices")));
            }
            found.push(device);
        }
    }
    Ok(())
}

/// The propagation of the mount that holds `path`, which has no symlinks.
pub(crate) fn peers_of(mountinfo: &[u8], path: &Path) -> MountPeers {
    let mut best = (0, MountPeers::default());
    for line in mountinfo.split(|b| *b == b'\n') {
        // id parent major:minor root mount-point options [tag...] - type source options
        let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
        let Some(point) = fields.get(4) else { continue };
        let point = PathBuf::from(std::ffi::OsString::from_vec(unescape(point)));
        let length = point.as_os_str().as_bytes().len();
        // A later mount on the same point is on top.
        if length >= best.0 && path.starts_with(&point) {
            let tags = fields.iter().skip(6).take_while(|field| **field != b"-");
            let has = |prefix: &[u8]| tags.clone().any(|tag| tag.starts_with(prefix));
            best = (length, MountPeers { shared: has(b"shared:"), slave: has(b"master:") });
        }
    }
    best.1
}

/// Blanks in mountinfo are written as \040 and the like.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| *first == b'\\');
        let byte =
            octal.and_then(|o| std::str::from_utf8(o).ok()).and_then(|o| u8::from_str_radix(o, 8).ok());
        match byte {
            Some(byte) => {
                plain.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                plain.push(*first);
                rest = tail;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_mount_that_holds_a_path() {
        let info = b"22 1 8:1 / / rw shared:1 - ext4 /dev/sda rw\n\
            30 22 0:5 / /a\\040b rw - tmpfs t rw\n\
            31 22 0:6 / /s rw master:2 propagate_from:1 - tmpfs t rw\n\
            32 22 0:7 / /s rw shared:4 master:2 - tmpfs shared: rw\n\
            33 22 0:8 / /sub rw - tmpfs shared:9 rw\n";
        for (path, shared, slave) in [
            ("/x", true, false),
            ("/a b/c", false, false),
            ("/s/t", true, true),
            ("/sub", false, false),
            ("/submarine", true, false),
        ] {
            assert_eq!(peers_of(info, Path::new(path)), MountPeers { shared, slave }, "{path}");
        }
    }

    #[test]
    fn asks_the_kernel() {
        let null = LiveHost.devices(Path::new("/dev/null")).unwrap();
        assert_eq!((null[0].kind, null[0].major, null[0].minor), (Kind::Char, 1, 3));
        let all = LiveHost.all_devices().unwrap();
        assert!(all.iter().any(|d| d.path == Path::new("/dev/null")));
        assert!(all.iter().all(|d| !d.path.starts_with("/dev/pts")));
        let missing = Path::new("/dev/no-such-device");
        assert_eq!(LiveHost.devices(missing).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(
            LiveHost.devices(Path::new("/proc/version")).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        assert!(!LiveHost.exists(missing).unwrap());
        assert!(!LiveHost.exists(Path::new("/dev/null/x")).unwrap());
        assert!(LiveHost.exists(Path::new("/proc/self/exe")).unwrap());
        LiveHost.mount_peers(Path::new("/proc")).unwrap();
    }
}
