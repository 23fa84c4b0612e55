//! Giving the files of a volume the label of the container that may use them.

use std::ffi::{CStr, OsStr};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, XattrFlags};
use rustix::io::Errno;

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
    let top = open_canonical(&real)?;
    let stat = rustix::fs::fstat(&top)?;
    // O_PATH descriptors take no extended attributes, their names in /proc do.
    set(&PathBuf::from(format!("/proc/self/fd/{}", top.as_raw_fd())), label, true)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Ok(());
    }
    let readable = rustix::fs::openat(&top, ".", DIRECTORY, Mode::empty())?;
    let mut tree = Tree { device: stat.st_dev, label, left: max };
    // Depth first: one directory is open a level.
    let mut open = vec![Dir::new(readable)?];
    while let Some(dir) = open.last_mut() {
        let Some(entry) = dir.next() else {
            open.pop();
            continue;
        };
        let entry = entry?;
        if let Some(child) = tree.relabel(dir.fd()?, entry.file_name())? {
            if open.len() > DEPTH_MAX {
                return Err(io::Error::other("has too deep directories to be relabelled"));
            }
            open.push(Dir::new(child)?);
        }
    }
    Ok(())
}

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Opens a path that has no links: one in its place would lead elsewhere than what was checked.
fn open_canonical(real: &Path) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    Ok(rustix::fs::openat2(CWD, real, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?)
}

/// What is being relabelled.
struct Tree<'a> {
    device: u64,
    label: &'a str,
    /// Files that it may still have.
    left: usize,
}

impl Tree<'_> {
    /// Labels an entry of a directory. Gives it opened, if it is a directory to go on with.
    fn relabel(&mut self, dir: BorrowedFd<'_>, name: &CStr) -> io::Result<Option<OwnedFd>> {
        if name.to_bytes() == b"." || name.to_bytes() == b".." {
            return Ok(None);
        }
        let stat = match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(None),
            other => other?,
        };
        if stat.st_dev != self.device {
            return Ok(None);
        }
        let too_many = || io::Error::other("has too many files to be relabelled");
        self.left = self.left.checked_sub(1).ok_or_else(too_many)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
        // By the directory's descriptor and one name: nobody can lead it elsewhere meanwhile.
        match set(&path.join(OsStr::from_bytes(name.to_bytes())), self.label, false) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        }
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Ok(None);
        }
        let child = match rustix::fs::openat(dir, name, DIRECTORY, Mode::empty()) {
            // It has become something else.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            other => other?,
        };
        let same = rustix::fs::fstat(&child)?.st_dev == self.device;
        Ok(same.then_some(child))
    }
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
        Err(Errno::OPNOTSUPP) => Ok(()),
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

    /// However wide a directory is, and up to a depth.
    #[test]
    fn few_directories_are_open_at_once() {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let wide = dir.path().join("wide");
        for n in 0..400 {
            std::fs::create_dir_all(wide.join(n.to_string())).unwrap();
        }
        let before = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: Some(256), ..before }).unwrap();
        let done = relabel(&wide, "x:y:z");
        setrlimit(Resource::Nofile, before).unwrap();
        done.unwrap();
        assert_eq!(label(&wide.join("399")).as_deref(), Some("x:y:z\0"));

        let deep = |levels| dir.path().join("deep").join("d/".repeat(levels));
        std::fs::create_dir_all(deep(DEPTH_MAX)).unwrap();
        relabel(&dir.path().join("deep"), "x:y:z").unwrap();
        assert_eq!(label(&deep(DEPTH_MAX)).as_deref(), Some("x:y:z\0"));
        std::fs::create_dir_all(deep(DEPTH_MAX + 1)).unwrap();
        let error = relabel(&dir.path().join("deep"), "x:y:z").unwrap_err();
        assert!(error.to_string().contains("too deep"), "{error}");
    }

    /// Who may rename a parent could put a link in its place, between the check and the opening.
    #[test]
    fn a_link_on_the_way_is_not_followed() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let real = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(real.join("parent/volume")).unwrap();
        open_canonical(&real.join("parent/volume")).unwrap();
        std::fs::rename(real.join("parent"), real.join("moved")).unwrap();
        symlink(real.join("moved"), real.join("parent")).unwrap();
        for path in ["parent/volume", "parent"] {
            let error = open_canonical(&real.join(path)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(Errno::LOOP.raw_os_error()), "{path}");
        }
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
