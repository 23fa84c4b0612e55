//! A directory below which paths are resolved.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::name::check_path;
use crate::walk::{Last, walk};
use crate::{PathError, read_regular};

/// A directory, held by an `O_PATH` descriptor, below which paths are resolved.
///
/// Leading slashes of paths mean the root itself, as for a chrooted process.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
}

impl Root {
    /// Opens a directory of the host as a root. `path` is trusted: its links are followed.
    pub fn open(path: &Path) -> Result<Root, PathError> {
        check_path(path)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| PathError::io("open", path, e))?;
        Ok(Root { fd })
    }

    /// Takes an open directory as a root.
    pub fn from_dir_fd(fd: OwnedFd) -> Result<Root, PathError> {
        let here = Path::new(".");
        let stat = rustix::fs::fstat(&fd).map_err(|e| PathError::io("fstat", here, e))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Err(PathError::kind(here, "directory"));
        }
        Ok(Root { fd })
    }

    /// A second handle on the same root.
    pub fn try_clone(&self) -> Result<Root, PathError> {
        let fd = rustix::io::fcntl_dupfd_cloexec(&self.fd, 3)
            .map_err(|e| PathError::io("fcntl", Path::new("."), e))?;
        Ok(Root { fd })
    }

    /// The descriptor of the root itself.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Opens an existing file in the root, following links inside it. Never creates: see
    /// [`Root::make_file`]. `flags` are those of `open(2)`; `O_CLOEXEC` is added.
    pub fn open_in(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, PathError> {
        check_path(path)?;
        let flags = existing_only(flags);
        self.openat2(path, flags, ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
            .map_err(|e| PathError::io("openat2", path, e))
    }

    /// Resolves a path in the root, links followed, to an `O_PATH` descriptor.
    pub fn resolve(&self, path: &Path) -> Result<OwnedFd, PathError> {
        self.open_in(path, OFlags::PATH)
    }

    /// Opens a directory in the root for reading (`getdents`, `fsync`), links followed.
    pub fn open_dir_fd(&self, path: &Path) -> Result<OwnedFd, PathError> {
        self.open_in(path, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// Opens an existing file of the tree without following any link; leaving the tree or crossing
    /// a link is [`PathError::Escapes`]. With `O_PATH | O_NOFOLLOW` a link as the last component is
    /// opened itself.
    pub fn open_beneath(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, PathError> {
        let relative = relative(path)?;
        let flags = existing_only(flags);
        self.openat2(
            relative,
            flags,
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
        )
        .map_err(|e| PathError::beneath("openat2", path, e))
    }

    /// Makes a directory and all that leads to it, as `mkdir -p` in a chroot would: links are
    /// followed inside the root, dangling ones too. Directories made get `mode` less the umask;
    /// existing ones are left alone. Returns an `O_PATH` descriptor of the last one.
    pub fn make_dir_all(&self, path: &Path, mode: Mode) -> Result<OwnedFd, PathError> {
        check_path(path)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        match self.open_in(path, flags) {
            Ok(fd) => Ok(fd),
            Err(e) if e.is_not_found() => walk(self.fd(), path, Last::Directory, mode),
            Err(e) if e.raw_os_error() == Some(Errno::NOTDIR.raw_os_error()) => {
                Err(PathError::kind(path, "directory"))
            }
            Err(e) => Err(e),
        }
    }

    /// Makes an empty file (0644 less the umask) and the directories that lead to it (0755), links
    /// followed inside the root. What is there already is left alone, unless it is a directory:
    /// that is an error. Returns an `O_PATH` descriptor. For the targets of bind mounts of files.
    pub fn make_file(&self, path: &Path) -> Result<OwnedFd, PathError> {
        check_path(path)?;
        walk(self.fd(), path, Last::File, Mode::from_raw_mode(0o755))
    }

    /// Creates a new regular file open for writing. The parent directory is resolved in the root and
    /// must exist; the last component must not, not even as a link.
    pub fn create_file(&self, path: &Path, mode: Mode) -> Result<File, PathError> {
        check_path(path)?;
        let name = path.file_name().ok_or_else(|| PathError::invalid(path, "no file name"))?;
        let parent = match path.parent() {
            Some(p) if !p.as_os_str().is_empty() => self.open_in(p, OFlags::PATH | OFlags::DIRECTORY)?,
            _ => self.try_clone()?.fd,
        };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd =
            rustix::fs::openat(&parent, name, flags, mode).map_err(|e| PathError::io("openat", path, e))?;
        Ok(File::from(fd))
    }

    /// Reads a whole regular file in the root, at most `max` bytes. The directories that lead to it
    /// may be links; the file itself may not. FIFOs and devices are refused without being opened for
    /// reading.
    pub fn read_limited(&self, path: &Path, max: u64) -> Result<Vec<u8>, PathError> {
        let fd = self.open_in(path, OFlags::PATH | OFlags::NOFOLLOW)?;
        let stat = rustix::fs::fstat(&fd).map_err(|e| PathError::io("fstat", path, e))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(PathError::kind(path, "regular file"));
        }
        // Opened anew by name (an O_PATH descriptor can't be read); the kind is checked again.
        let fd = self.open_in(path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY)?;
        read_regular(fd, path, max)
    }

    /// `openat2(2)` from the root. A lookup that races with a rename is tried again (`EAGAIN`).
    pub(crate) fn openat2(
        &self,
        path: &Path,
        flags: OFlags,
        resolve: ResolveFlags,
    ) -> Result<OwnedFd, Errno> {
        const ATTEMPTS: usize = 128;
        let mut attempt = 0;
        loop {
            match rustix::fs::openat2(&self.fd, path, flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN | Errno::INTR) if attempt < ATTEMPTS => attempt += 1,
                other => return other,
            }
        }
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd()
    }
}

/// Without the flags that create. `O_TMPFILE` contains the bit of `O_DIRECTORY`, which must stay.
fn existing_only(flags: OFlags) -> OFlags {
    let creating = OFlags::CREATE | OFlags::EXCL | OFlags::TMPFILE.difference(OFlags::DIRECTORY);
    flags.difference(creating) | OFlags::CLOEXEC
}

/// Without leading slashes, which `RESOLVE_BENEATH` refuses; the root itself becomes `.`.
fn relative(path: &Path) -> Result<&Path, PathError> {
    check_path(path)?;
    let mut rest = path;
    while let Ok(stripped) = rest.strip_prefix("/") {
        rest = stripped;
    }
    Ok(if rest.as_os_str().is_empty() { Path::new(".") } else { rest })
}
