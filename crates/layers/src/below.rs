//! What a layer takes from the layers below it when it is committed.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use stave_paths::{PathError, Root};

use crate::LayerError;
use crate::entry::{Meta, Node};
use crate::tree::{Tree, io, is_errno, set_meta, wanted_xattr};

/// The layers below, top first.
pub(crate) struct Below {
    roots: Vec<Root>,
}

/// A file as the layers below show it together.
struct Found {
    dir: OwnedFd,
    name: OsString,
    stat: Stat,
}

impl Found {
    fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    /// Only for regular files and directories: opening a device or FIFO has effects.
    fn open(&self, path: &Path) -> Result<OwnedFd, LayerError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        rustix::fs::openat(&self.dir, self.name.as_os_str(), flags, Mode::empty()).map_err(io("openat", path))
    }

    fn meta(&self, path: &Path) -> Result<Meta, LayerError> {
        let time = |tv_sec: i64, tv_nsec: u64| Timespec { tv_sec, tv_nsec: tv_nsec as i64 };
        let mut xattrs = Vec::new();
        if matches!(self.kind(), FileType::RegularFile | FileType::Directory) {
            let fd = self.open(path)?;
            let mut names = vec![0u8; 64 << 10];
            let n = match rustix::fs::flistxattr(&fd, &mut names[..]) {
                Ok(n) => n,
                Err(Errno::OPNOTSUPP) => 0,
                Err(e) => return Err(io("flistxattr", path)(e)),
            };
            for name in names[..n].split(|b| *b == 0).filter(|name| !name.is_empty()) {
                let name = OsStr::from_bytes(name);
                if wanted_xattr(name) {
                    let mut value = vec![0u8; 64 << 10];
                    let n =
                        rustix::fs::fgetxattr(&fd, name, &mut value[..]).map_err(io("fgetxattr", path))?;
                    value.truncate(n);
                    xattrs.push((name.to_owned(), value));
                }
            }
        }
        Ok(Meta {
            uid: Uid::from_raw(self.stat.st_uid),
            gid: Gid::from_raw(self.stat.st_gid),
            mode: self.stat.st_mode & 0o7777,
            times: Timestamps {
                last_access: time(self.stat.st_atime, self.stat.st_atime_nsec),
                last_modification: time(self.stat.st_mtime, self.stat.st_mtime_nsec),
            },
            xattrs,
        })
    }
}

impl Below {
    /// `dirs` are the directories of the layers below, top first.
    pub(crate) fn open(dirs: &[PathBuf]) -> Result<Below, LayerError> {
        let roots = dirs.iter().map(|dir| Root::open(dir)).collect::<Result<_, _>>()?;
        Ok(Below { roots })
    }

    /// Looks a path up as overlayfs would: the first layer that has it decides, unless a layer above
    /// hides it with a whiteout, an opaque directory or something that is no directory. Links on the
    /// way are not followed.
    fn find(&self, path: &Path) -> Result<Option<Found>, LayerError> {
        let Some(name) = path.file_name() else { return Ok(None) };
        let parent = path.parent().unwrap_or(Path::new(""));
        'layers: for root in &self.roots {
            let mut opaque = false;
            let mut dir = root.open_beneath(Path::new("."), OFlags::RDONLY | OFlags::DIRECTORY)?;
            let mut prefix = PathBuf::new();
            for component in parent {
                prefix.push(component);
                dir = match root.open_beneath(&prefix, OFlags::RDONLY | OFlags::DIRECTORY) {
                    Ok(fd) => fd,
                    Err(e) if e.is_not_found() && opaque => return Ok(None),
                    Err(e) if e.is_not_found() => continue 'layers,
                    Err(PathError::Escapes { .. }) => return Ok(None),
                    Err(e) if is_errno(&e, Errno::NOTDIR) => return Ok(None),
                    Err(e) => return Err(e.into()),
                };
                opaque |= is_opaque(&dir, &prefix)?;
            }
            match rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat)
                    if FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
                        && stat.st_rdev == 0 =>
                {
                    return Ok(None);
                }
                Ok(stat) => return Ok(Some(Found { dir, name: name.to_owned(), stat })),
                Err(Errno::NOENT) if opaque => return Ok(None),
                Err(Errno::NOENT) => {}
                Err(e) => return Err(io("fstatat", path)(e)),
            }
        }
        Ok(None)
    }

    /// Gives the directories that the archive only implied the attributes that they have below, makes
    /// the hard links to files below, and sets the times of all directories.
    pub(crate) fn settle(&self, tree: &mut Tree) -> Result<(), LayerError> {
        for path in std::mem::take(&mut tree.implied) {
            let Some(found) = self.find(&path)? else { continue };
            if found.kind() != FileType::Directory {
                continue;
            }
            let meta = found.meta(&path)?;
            let fd = tree.root.open_dir_fd(&path)?;
            set_meta(&fd, &path, &meta)?;
            tree.times.entry(path).or_insert(meta.times);
        }
        self.link(tree)?;
        // Deepest first; a directory that is gone again, or reached through a link that changed, is
        // no reason to fail.
        for (path, times) in tree.times.iter().rev() {
            let shown = if path.as_os_str().is_empty() { Path::new(".") } else { path };
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
            match tree.root.open_in(shown, flags) {
                Ok(fd) => rustix::fs::futimens(&fd, times).map_err(io("futimens", path))?,
                Err(e) if e.is_not_found() || is_errno(&e, Errno::NOTDIR) || is_errno(&e, Errno::LOOP) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn link(&self, tree: &mut Tree) -> Result<(), LayerError> {
        // Several links to one file below stay links to each other.
        let mut copied: BTreeMap<PathBuf, PathBuf> = BTreeMap::new();
        for (path, target) in std::mem::take(&mut tree.links) {
            let refuse = |reason: &str| LayerError::BadArchive {
                entry: path.display().to_string(),
                reason: format!("hard link to {target:?}: {reason}"),
            };
            let no_content = &mut std::io::empty();
            if let Some(first) = copied.get(&target) {
                let meta = Meta {
                    uid: Uid::ROOT,
                    gid: Gid::ROOT,
                    mode: 0,
                    times: Timestamps {
                        last_access: Timespec { tv_sec: 0, tv_nsec: 0 },
                        last_modification: Timespec { tv_sec: 0, tv_nsec: 0 },
                    },
                    xattrs: Vec::new(),
                };
                tree.create(&path, &Node::Hardlink(first.clone()), &meta, no_content)?;
                continue;
            }
            let Some(found) = self.find(&target)? else {
                return Err(refuse("no such file in this layer or below"));
            };
            let meta = found.meta(&target)?;
            match found.kind() {
                FileType::RegularFile => {
                    let mut content = File::from(found.open(&target)?);
                    tree.create(&path, &Node::File, &meta, &mut content)?;
                }
                FileType::Symlink => {
                    let text = rustix::fs::readlinkat(&found.dir, found.name.as_os_str(), Vec::new())
                        .map_err(io("readlinkat", &target))?;
                    let text = OsStr::from_bytes(text.as_bytes()).to_owned();
                    tree.create(&path, &Node::Symlink(text), &meta, no_content)?;
                }
                kind @ (FileType::CharacterDevice | FileType::BlockDevice | FileType::Fifo) => {
                    let device = found.stat.st_rdev;
                    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
                    tree.create(&path, &Node::Special { kind, major, minor }, &meta, no_content)?;
                }
                _ => return Err(refuse("it is no file")),
            }
            copied.insert(target, path);
        }
        Ok(())
    }
}

fn is_opaque(dir: &OwnedFd, path: &Path) -> Result<bool, LayerError> {
    let mut value = [0u8; 2];
    match rustix::fs::fgetxattr(dir, "trusted.overlay.opaque", &mut value[..]) {
        Ok(n) => Ok(&value[..n] == b"y"),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(false),
        Err(e) => Err(io("fgetxattr", path)(e)),
    }
}
