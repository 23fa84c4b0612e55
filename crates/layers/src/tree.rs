//! The tree of a layer while it is written, on descriptors only.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Stat, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use stave_paths::{PathError, Root, remove_tree};

use crate::LayerError;
use crate::entry::{LayerPath, Meta, Node};

const OPAQUE_XATTR: &str = "trusted.overlay.opaque";
const DIR_FLAGS: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// A layer being written, and what can only be settled once its parents are known.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) root: Root,
    /// Directories that the archive only implied.
    pub(crate) implied: BTreeSet<LayerPath>,
    /// Hard links whose target is not in this layer: link to target.
    pub(crate) links: BTreeMap<LayerPath, LayerPath>,
    /// Times of directories; set last, since every new file changes them.
    pub(crate) times: BTreeMap<LayerPath, Timestamps>,
    /// Bytes of regular files written.
    pub(crate) size: u64,
    /// Files and directories made.
    pub(crate) inodes: u64,
    buffer: Vec<u8>,
}

pub(crate) fn io(call: &'static str, path: &Path) -> impl FnOnce(Errno) -> LayerError {
    let path = path.to_owned();
    move |errno| LayerError::Io { call, path, source: errno.into() }
}

fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// `None` if there is nothing of that name.
fn stat_at(dir: BorrowedFd<'_>, name: &OsStr, path: &Path) -> Result<Option<Stat>, LayerError> {
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(io("fstatat", path)(e)),
    }
}

pub(crate) fn set_opaque(dir: &OwnedFd, path: &Path) -> Result<(), LayerError> {
    rustix::fs::fsetxattr(dir, OPAQUE_XATTR, b"y", XattrFlags::empty()).map_err(io("fsetxattr", path))
}

impl Tree {
    pub(crate) fn new(root: Root) -> Tree {
        Tree {
            root,
            implied: BTreeSet::new(),
            links: BTreeMap::new(),
            times: BTreeMap::new(),
            size: 0,
            inodes: 1,
            buffer: vec![0; 256 << 10],
        }
    }

    /// Opens the directory that holds `path`, made with all above it where the archive left them
    /// out. Links inside the layer are followed inside the layer, as in a chroot; whatever else is
    /// in the way is replaced by a directory.
    fn parent<'a>(&mut self, path: &'a Path) -> Result<(OwnedFd, &'a OsStr), LayerError> {
        let name = path.file_name().ok_or_else(|| LayerError::BadArchive {
            entry: path.display().to_string(),
            reason: "no file name".into(),
        })?;
        let parent = path.parent().unwrap_or(Path::new(""));
        Ok((self.directory(parent)?, name))
    }

    /// Opens a directory of the layer, made if it is missing.
    pub(crate) fn directory(&mut self, path: &Path) -> Result<OwnedFd, LayerError> {
        self.directory_after(path, 0)
    }

    /// `links` counts the dangling links followed so far.
    fn directory_after(&mut self, path: &Path, links: usize) -> Result<OwnedFd, LayerError> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        match self.root.open_dir_fd(path) {
            Ok(fd) => return Ok(fd),
            Err(e) if e.is_not_found() || is_errno(&e, Errno::NOTDIR) => {}
            Err(e) if is_errno(&e, Errno::LOOP) => {}
            Err(e) => return Err(e.into()),
        }
        let mut prefix = PathBuf::new();
        let mut here = self.root.open_dir_fd(Path::new("."))?;
        for name in path.iter() {
            prefix.push(name);
            match self.root.open_dir_fd(&prefix) {
                Ok(fd) => {
                    here = fd;
                    continue;
                }
                Err(e) if e.is_not_found() || is_errno(&e, Errno::NOTDIR) || is_errno(&e, Errno::LOOP) => {}
                Err(e) => return Err(e.into()),
            }
            let old = stat_at(here.as_fd(), name, &prefix)?;
            if let Some(stat) = &old {
                // A link to a directory of the layers below: the same directory is made here.
                if links < MAX_LINKS && FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
                    let target =
                        rustix::fs::readlinkat(&here, name, Vec::new()).map_err(io("readlinkat", &prefix))?;
                    let target = link_target(&prefix, OsStr::from_bytes(target.as_bytes()));
                    if target != prefix && !target.starts_with(&prefix) {
                        here = self.directory_after(&target, links + 1)?;
                        continue;
                    }
                }
                self.forget(&prefix);
                remove_tree(&here, name)?;
            }
            rustix::fs::mkdirat(&here, name, Mode::from_raw_mode(0o755)).map_err(io("mkdirat", &prefix))?;
            self.inodes += 1;
            let fd =
                rustix::fs::openat(&here, name, DIR_FLAGS, Mode::empty()).map_err(io("openat", &prefix))?;
            // The umask of the process has no say in what an image holds.
            rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o755)).map_err(io("fchmod", &prefix))?;
            match old {
                Some(old) if is_whiteout(&old) => set_opaque(&fd, &prefix)?,
                _ => {
                    self.implied.insert(prefix.clone());
                }
            }
            here = fd;
        }
        Ok(here)
    }

    /// Drops what was noted for a path that is replaced, and for all below it.
    fn forget(&mut self, path: &Path) {
        fn below<V>(map: &mut BTreeMap<LayerPath, V>, path: &Path) {
            let keys: Vec<_> = map
                .range(path.to_owned()..)
                .map(|(k, _)| k)
                .take_while(|k| k.starts_with(path))
                .cloned()
                .collect();
            for key in keys {
                map.remove(&key);
            }
        }
        below(&mut self.links, path);
        below(&mut self.times, path);
        let implied: Vec<_> =
            self.implied.range(path.to_owned()..).take_while(|k| k.starts_with(path)).cloned().collect();
        for key in implied {
            self.implied.remove(&key);
        }
    }

    pub(crate) fn whiteout(&mut self, parent: &Path, name: &OsStr) -> Result<(), LayerError> {
        let path = parent.join(name);
        let dir = self.directory(parent)?;
        self.links.remove(&path);
        match stat_at(dir.as_fd(), name, &path)? {
            // A whiteout hides the layers below, not what this layer brings itself.
            Some(old) if FileType::from_raw_mode(old.st_mode) == FileType::Directory => {
                let flags = DIR_FLAGS;
                let fd = rustix::fs::openat(&dir, name, flags, Mode::empty()).map_err(io("openat", &path))?;
                self.implied.remove(&path);
                set_opaque(&fd, &path)
            }
            Some(_) => Ok(()),
            None => {
                self.inodes += 1;
                rustix::fs::mknodat(&dir, name, FileType::CharacterDevice, Mode::empty(), 0)
                    .map_err(io("mknodat", &path))
            }
        }
    }

    pub(crate) fn opaque(&mut self, path: &Path) -> Result<(), LayerError> {
        let fd = self.directory(path)?;
        set_opaque(&fd, path)
    }

    /// Makes a file, replacing an earlier one of that name; a directory onto a directory only
    /// changes its attributes.
    pub(crate) fn create(
        &mut self,
        path: &Path,
        node: &Node,
        meta: &Meta,
        content: &mut dyn Read,
    ) -> Result<(), LayerError> {
        if path.as_os_str().is_empty() {
            let fd = self.root.open_dir_fd(Path::new("."))?;
            self.times.insert(PathBuf::new(), meta.times.clone());
            return set_meta(&fd, path, meta);
        }
        let (dir, name) = self.parent(path)?;
        let mut opaque = false;
        if let Some(old) = stat_at(dir.as_fd(), name, path)? {
            let both =
                *node == Node::Directory && FileType::from_raw_mode(old.st_mode) == FileType::Directory;
            if !both {
                opaque = *node == Node::Directory && is_whiteout(&old);
                self.forget(path);
                remove_tree(&dir, name)?;
            }
        } else {
            self.links.remove(path);
        }
        self.implied.remove(path);
        match node {
            Node::File => self.file(&dir, name, path, meta, content),
            Node::Directory => self.subdirectory(&dir, name, path, meta, opaque),
            Node::Symlink(target) => {
                rustix::fs::symlinkat(target.as_os_str(), &dir, name).map_err(io("symlinkat", path))?;
                self.inodes += 1;
                set_meta_at(&dir, name, path, meta, false)
            }
            Node::Hardlink(target) => self.hardlink(&dir, name, path, target),
            Node::Special { kind, major, minor } => {
                let device = rustix::fs::makedev(*major, *minor);
                rustix::fs::mknodat(&dir, name, *kind, Mode::from_raw_mode(0o600), device)
                    .map_err(io("mknodat", path))?;
                self.inodes += 1;
                set_meta_at(&dir, name, path, meta, true)
            }
        }
    }

    fn file(
        &mut self,
        dir: &OwnedFd,
        name: &OsStr,
        path: &Path,
        meta: &Meta,
        content: &mut dyn Read,
    ) -> Result<(), LayerError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd =
            rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o600)).map_err(io("openat", path))?;
        self.inodes += 1;
        loop {
            let n = match content.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(LayerError::Read(e)),
            };
            let mut rest = &self.buffer[..n];
            while !rest.is_empty() {
                let written = rustix::io::write(&fd, rest).map_err(io("write", path))?;
                rest = &rest[written..];
            }
            self.size += n as u64;
        }
        set_meta(&fd, path, meta)?;
        rustix::fs::futimens(&fd, &meta.times).map_err(io("futimens", path))
    }

    fn subdirectory(
        &mut self,
        dir: &OwnedFd,
        name: &OsStr,
        path: &Path,
        meta: &Meta,
        opaque: bool,
    ) -> Result<(), LayerError> {
        match rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(0o700)) {
            Ok(()) => self.inodes += 1,
            Err(Errno::EXIST) => {}
            Err(e) => return Err(io("mkdirat", path)(e)),
        }
        let fd = rustix::fs::openat(dir, name, DIR_FLAGS, Mode::empty()).map_err(io("openat", path))?;
        set_meta(&fd, path, meta)?;
        if opaque {
            set_opaque(&fd, path)?;
        }
        self.times.insert(path.to_owned(), meta.times.clone());
        Ok(())
    }

    /// A hard link to a file of this layer, to the link itself if it is one. What is not there is
    /// looked up in the layers below at commit.
    fn hardlink(
        &mut self,
        dir: &OwnedFd,
        name: &OsStr,
        path: &Path,
        target: &Path,
    ) -> Result<(), LayerError> {
        let refuse = |reason: &str| LayerError::BadArchive {
            entry: path.display().to_string(),
            reason: format!("hard link to {target:?}: {reason}"),
        };
        let below = |tree: &mut Tree| {
            tree.links.insert(path.to_owned(), target.to_owned());
            Ok(())
        };
        if path == target {
            return Err(refuse("it is the link itself"));
        }
        let Some(target_name) = target.file_name() else { return Err(refuse("no file name")) };
        let target_dir = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => match self.root.open_dir_fd(parent) {
                Ok(fd) => fd,
                Err(e) if e.is_not_found() => return below(self),
                Err(e) => return Err(e.into()),
            },
            _ => self.root.open_dir_fd(Path::new("."))?,
        };
        match stat_at(target_dir.as_fd(), target_name, target)? {
            None => return below(self),
            Some(stat) if is_whiteout(&stat) => return Err(refuse("it is removed by a whiteout")),
            Some(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                return Err(refuse("it is a directory"));
            }
            Some(_) => {}
        }
        rustix::fs::linkat(&target_dir, target_name, dir, name, AtFlags::empty()).map_err(io("linkat", path))
    }
}

/// Links followed to make one directory.
const MAX_LINKS: usize = 16;

/// Where a link points to, as a path in the layer; `..` by text, stopping at the root.
fn link_target(link: &Path, target: &OsStr) -> PathBuf {
    let mut path = match target.as_bytes().first() {
        Some(b'/') => PathBuf::new(),
        _ => link.parent().map(Path::to_owned).unwrap_or_default(),
    };
    for component in Path::new(target).components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::ParentDir => {
                path.pop();
            }
            _ => {}
        }
    }
    path
}

pub(crate) fn is_errno(error: &PathError, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

/// Owner, mode and attributes of an open file or directory. In this order: a change of owner clears
/// setuid bits and capabilities.
pub(crate) fn set_meta(fd: &OwnedFd, path: &Path, meta: &Meta) -> Result<(), LayerError> {
    rustix::fs::fchown(fd, Some(meta.uid), Some(meta.gid)).map_err(io("fchown", path))?;
    rustix::fs::fchmod(fd, Mode::from_raw_mode(meta.mode)).map_err(io("fchmod", path))?;
    for (name, value) in &meta.xattrs {
        if !wanted_xattr(name) {
            tracing::debug!(path = %path.display(), name = %name.display(), "extended attribute left out");
            continue;
        }
        match rustix::fs::fsetxattr(fd, name.as_os_str(), value, XattrFlags::empty()) {
            Ok(()) => {}
            // The file system has no such attributes, or the kernel not this one for this file.
            Err(Errno::OPNOTSUPP | Errno::PERM | Errno::INVAL) if !is_capability(name) => {
                tracing::debug!(path = %path.display(), name = %name.display(), "extended attribute not supported");
            }
            Err(e) => return Err(io("fsetxattr", path)(e)),
        }
    }
    Ok(())
}

fn is_capability(name: &OsStr) -> bool {
    name == "security.capability"
}

/// Attributes that an image may bring. Those of overlayfs itself would let a layer point into
/// others; those of security modules belong to the host's policy.
pub(crate) fn wanted_xattr(name: &OsStr) -> bool {
    let bytes = name.as_bytes();
    is_capability(name)
        || (bytes.starts_with(b"user.") && !bytes.starts_with(b"user.overlay."))
        || bytes == b"system.posix_acl_access"
        || bytes == b"system.posix_acl_default"
}

/// For files that can't be opened: links, devices, FIFOs.
fn set_meta_at(dir: &OwnedFd, name: &OsStr, path: &Path, meta: &Meta, chmod: bool) -> Result<(), LayerError> {
    set_owner_at(dir, name, path, meta.uid, meta.gid)?;
    if chmod {
        chmod_at(dir, name, path, meta.mode)?;
    }
    rustix::fs::utimensat(dir, name, &meta.times, AtFlags::SYMLINK_NOFOLLOW).map_err(io("utimensat", path))
}

fn set_owner_at(dir: &OwnedFd, name: &OsStr, path: &Path, uid: Uid, gid: Gid) -> Result<(), LayerError> {
    rustix::fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(io("fchownat", path))
}

/// fchmodat(2) follows links. Nothing else writes to a layer that is being unpacked, and the name is
/// one that we have just made as a device or FIFO.
fn chmod_at(dir: &OwnedFd, name: &OsStr, path: &Path, mode: u32) -> Result<(), LayerError> {
    rustix::fs::chmodat(dir, name, Mode::from_raw_mode(mode), AtFlags::empty()).map_err(io("fchmodat", path))
}
