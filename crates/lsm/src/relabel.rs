//! Giving the files of a volume the label of the container that may use them.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, XattrFlags};

/// The extended attribute that holds a file's label.
const ATTRIBUTE: &str = "security.selinux";

/// Most files of a volume; more take minutes, in which CreateContainer would not answer.
const FILES_MAX: usize = 1 << 20;
/// Deeper trees are no volumes.
const DEPTH_MAX: usize = 256;

/// Directories of the system: with the label of a container on them the host would stop working.
const REFUSED: &[&str] = &[
    "/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib32", "/lib64", "/media", "/mnt", "/opt",
    "/proc", "/root", "/run", "/sbin", "/srv", "/sys", "/tmp", "/usr", "/var", "/var/lib", "/var/log",
    "/var/run",
];
/// And all below these.
const REFUSED_BELOW: &[&str] = &["/bin", "/boot", "/dev", "/lib", "/lib64", "/proc", "/sbin", "/sys", "/usr"];

/// Whether a host path, links resolved, may get another label.
fn allowed(path: &Path) -> bool {
    !REFUSED.iter().any(|dir| path == Path::new(dir))
        && !REFUSED_BELOW.iter().any(|dir| path.starts_with(dir))
        && !["/etc/passwd", "/etc/shadow", "/etc/group", "/etc/pki"]
            .iter()
            .any(|file| path == Path::new(file))
}

/// Writes `label` to the file or directory at `path` and to all below it, but not into other file systems. Links are
/// not followed, but for those that lead to `path`.
///
/// Errors: a directory of the system, too many files, and what the kernel says.
pub fn relabel(path: &Path, label: &str) -> io::Result<()> {
    relabel_at_most(path, label, FILES_MAX)
}

fn relabel_at_most(path: &Path, label: &str, max: usize) -> io::Result<()> {
    let real = std::fs::canonicalize(path)?;
    if !allowed(&real) {
        return Err(io::Error::other(format!("{} is a directory of the system", real.display())));
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = rustix::fs::open(&real, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&top)?;
    let device = stat.st_dev;
    // O_PATH descriptors take no extended attributes, their names in /proc do.
    set(&PathBuf::from(format!("/proc/self/fd/{}", top.as_raw_fd())), label, true)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Ok(());
    }
    let mut left = max;
    let mut queue = VecDeque::from([(top, 0)]);
    // Depth first, so that few directories are open at once.
    while let Some((dir, depth)) = queue.pop_back() {
        children(&dir, depth, device, label, &mut left, &mut queue)?;
    }
    Ok(())
}

fn children(
    dir: &OwnedFd,
    depth: usize,
    device: u64,
    label: &str,
    left: &mut usize,
    queue: &mut VecDeque<(OwnedFd, usize)>,
) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let readable = rustix::fs::openat(dir, ".", flags, Mode::empty())?;
    for entry in Dir::new(readable)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_bytes() == b"." || name.to_bytes() == b".." {
            continue;
        }
        let stat = match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(rustix::io::Errno::NOENT) => continue,
            other => other?,
        };
        if stat.st_dev != device {
            continue;
        }
        *left = left.checked_sub(1).ok_or_else(|| io::Error::other("has too many files to be relabelled"))?;
        let path = format!("/proc/self/fd/{}", dir.as_raw_fd());
        let path = Path::new(&path)
            .join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(name.to_bytes()));
        // By the directory's descriptor and one name: nobody can lead it elsewhere meanwhile.
        match set(&path, label, false) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        }
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            if depth >= DEPTH_MAX {
                return Err(io::Error::other("has too deep directories to be relabelled"));
            }
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match rustix::fs::openat(dir, name, flags, Mode::empty()) {
                Ok(child) => queue.push_back((child, depth + 1)),
                // It has become something else.
                Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
    Ok(())
}

fn set(path: &Path, label: &str, follow: bool) -> io::Result<()> {
    // With its NUL, as setfilecon(3) writes it.
    let mut value = label.as_bytes().to_vec();
    value.push(0);
    let flags = XattrFlags::empty();
    let done = match follow {
        true => rustix::fs::setxattr(path, ATTRIBUTE, &value, flags),
        false => rustix::fs::lsetxattr(path, ATTRIBUTE, &value, flags),
    };
    match done {
        // A file system without labels, such as some network file systems: nothing to be done about it.
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn label(path: &Path) -> Option<String> {
        let mut buffer = vec![0; 256];
        let n = rustix::fs::lgetxattr(path, ATTRIBUTE, &mut buffer[..]).ok()?;
        Some(String::from_utf8(buffer[..n].to_vec()).unwrap())
    }

    /// Root may write labels where SELinux is off, too: what is written is the real attribute.
    #[test]
    fn a_tree_is_relabelled_and_nothing_outside_of_it() {
        assert!(rustix::process::geteuid().is_root(), "this test must run as root");
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let volume = dir.path().join("volume");
        std::fs::create_dir_all(volume.join("a/b")).unwrap();
        std::fs::write(volume.join("a/file"), "x").unwrap();
        std::fs::write(dir.path().join("outside"), "x").unwrap();
        symlink(dir.path().join("outside"), volume.join("link")).unwrap();
        symlink(dir.path(), volume.join("up")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            volume.join("fifo"),
            FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let wanted = "system_u:object_r:container_file_t:s0:c1,c2";
        relabel(&volume, wanted).unwrap();
        for path in ["", "a", "a/b", "a/file", "fifo"] {
            assert_eq!(label(&volume.join(path)), Some(format!("{wanted}\0")), "{path}");
        }
        for path in ["outside", ""] {
            assert_eq!(label(&dir.path().join(path)), None, "{path}");
        }
        // A single file, by a link to it.
        relabel(&volume.join("link"), wanted).unwrap();
        assert_eq!(label(&dir.path().join("outside")), Some(format!("{wanted}\0")));
        assert!(relabel_at_most(&volume, wanted, 3).unwrap_err().to_string().contains("too many files"));
        assert!(relabel(&dir.path().join("missing"), wanted).is_err());
    }

    #[test]
    fn directories_of_the_system_are_refused() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        symlink("/etc", dir.path().join("etc")).unwrap();
        for path in
            ["/", "/etc", "/usr", "/usr/bin", "/var", "/proc/self", "/sys/fs", "/var/../etc", "/etc/passwd"]
        {
            assert!(
                relabel(Path::new(path), "x:y:z").unwrap_err().to_string().contains("of the system"),
                "{path}"
            );
        }
        assert!(relabel(&dir.path().join("etc"), "x:y:z").unwrap_err().to_string().contains("of the system"));
        for path in ["/var/lib/data", "/srv/data", "/etc/app", "/home/someone", "/usrx"] {
            assert!(allowed(Path::new(path)), "{path}");
        }
    }
}
