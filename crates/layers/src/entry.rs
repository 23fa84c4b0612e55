//! One entry of the archive, checked and in our own terms.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Gid, Timespec, Timestamps, Uid};
use tar::EntryType;

use crate::{LayerError, Limits};

/// Prefix of whiteouts (OCI image spec, layer.md, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// Prefix of AUFS' own files, which mean nothing elsewhere.
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const XATTR: &[u8] = b"SCHILY.xattr.";

/// A path inside the layer: relative, of normal components only. Empty for the root.
pub(crate) type LayerPath = PathBuf;

/// What an entry does.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Hides `name` of the layers below.
    Whiteout {
        parent: LayerPath,
        name: OsString,
    },
    /// Hides all that the layers below have in this directory.
    Opaque(LayerPath),
    Create {
        path: LayerPath,
        node: Node,
    },
    /// Nothing to do: a global header, or AUFS bookkeeping.
    Skip,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Node {
    File,
    Directory,
    Symlink(OsString),
    /// The target's path inside the layer or those below it.
    Hardlink(LayerPath),
    /// Device or FIFO.
    Special {
        kind: FileType,
        major: u32,
        minor: u32,
    },
}

/// Ownership, mode, times, extended attributes.
#[derive(Debug)]
pub(crate) struct Meta {
    pub(crate) uid: Uid,
    pub(crate) gid: Gid,
    /// Permission bits with setuid, setgid and sticky.
    pub(crate) mode: u32,
    pub(crate) times: Timestamps,
    pub(crate) xattrs: Vec<(OsString, Vec<u8>)>,
}

/// At most 256 bytes of a name, for messages.
pub(crate) fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(&name[..name.len().min(256)]).into_owned()
}

fn bad(name: &[u8], reason: impl Into<String>) -> LayerError {
    LayerError::BadArchive { entry: shown(name), reason: reason.into() }
}

/// A name of the archive as a path inside the layer. Leading slashes count for nothing; `..` is
/// refused, since no builder writes it.
pub(crate) fn layer_path(name: &[u8], entry: &[u8], limits: &Limits) -> Result<LayerPath, LayerError> {
    if name.contains(&0) {
        return Err(bad(entry, "name contains a NUL byte"));
    }
    if name.len() >= 4096 {
        return Err(LayerError::Limit { entry: shown(entry), limit: "path longer than 4095 bytes".into() });
    }
    let mut path = PathBuf::new();
    let mut depth = 0;
    for component in name.split(|b| *b == b'/') {
        match component {
            b"" | b"." => {}
            b".." => return Err(bad(entry, "\"..\" in a path")),
            name if name.len() > 255 => {
                return Err(LayerError::Limit {
                    entry: shown(entry),
                    limit: "path component longer than 255 bytes".into(),
                });
            }
            name => {
                depth += 1;
                path.push(OsStr::from_bytes(name));
            }
        }
    }
    if depth > limits.path_depth {
        let limit = format!("path deeper than {} directories", limits.path_depth);
        return Err(LayerError::Limit { entry: shown(entry), limit });
    }
    Ok(path)
}

/// Decides what an entry does.
pub(crate) fn action<R: Read>(entry: &tar::Entry<'_, R>, limits: &Limits) -> Result<Action, LayerError> {
    let kind = entry.header().entry_type();
    if kind.is_pax_global_extensions() {
        return Ok(Action::Skip);
    }
    let name = entry.path_bytes();
    let path = layer_path(&name, &name, limits)?;
    if let Some(action) = whiteout(&path, &name)? {
        return Ok(action);
    }
    let link = || -> Result<Vec<u8>, LayerError> {
        match entry.link_name_bytes() {
            Some(target) if target.is_empty() => Err(bad(&name, "link without a target")),
            Some(target) if target.contains(&0) => Err(bad(&name, "link target contains a NUL byte")),
            Some(target) if target.len() >= 4096 => Err(LayerError::Limit {
                entry: shown(&name),
                limit: "link target longer than 4095 bytes".into(),
            }),
            Some(target) => Ok(target.into_owned()),
            None => Err(bad(&name, "link without a target")),
        }
    };
    let node = match kind {
        // Before ustar a directory was a regular file whose name ends with a slash.
        EntryType::Regular | EntryType::Continuous if name.ends_with(b"/") => Node::Directory,
        EntryType::Regular | EntryType::Continuous => Node::File,
        EntryType::Directory => Node::Directory,
        EntryType::Symlink => Node::Symlink(OsString::from_vec(link()?)),
        EntryType::Link => {
            let target = layer_path(&link()?, &name, limits)?;
            if target.as_os_str().is_empty() {
                return Err(bad(&name, "hard link to the root"));
            }
            Node::Hardlink(target)
        }
        EntryType::Char => special(entry, &name, FileType::CharacterDevice)?,
        EntryType::Block => special(entry, &name, FileType::BlockDevice)?,
        EntryType::Fifo => Node::Special { kind: FileType::Fifo, major: 0, minor: 0 },
        EntryType::GNUSparse => {
            return Err(LayerError::Unsupported(format!("sparse file {:?}", shown(&name))));
        }
        other => {
            let code = char::from(other.as_byte());
            return Err(LayerError::Unsupported(format!("entry {:?} of type {code:?}", shown(&name))));
        }
    };
    if path.as_os_str().is_empty() && node != Node::Directory {
        return Err(bad(&name, "the root of the layer can only be a directory"));
    }
    Ok(Action::Create { path, node })
}

fn special<R: Read>(entry: &tar::Entry<'_, R>, name: &[u8], kind: FileType) -> Result<Node, LayerError> {
    let number = |n: std::io::Result<Option<u32>>| {
        n.map_err(|e| bad(name, e.to_string()))?.ok_or_else(|| bad(name, "device without a number"))
    };
    let (major, minor) = (number(entry.header().device_major())?, number(entry.header().device_minor())?);
    if major >= 1 << 12 || minor >= 1 << 20 {
        return Err(bad(name, format!("device number {major}:{minor} out of range")));
    }
    Ok(Node::Special { kind, major, minor })
}

fn whiteout(path: &Path, entry: &[u8]) -> Result<Option<Action>, LayerError> {
    let Some(last) = path.file_name() else { return Ok(None) };
    let parent = path.parent().map(Path::to_owned).unwrap_or_default();
    for component in parent.iter() {
        let component = component.as_bytes();
        if component.starts_with(WHITEOUT_META) {
            return Ok(Some(Action::Skip));
        }
        if component.starts_with(WHITEOUT) {
            return Err(bad(entry, "a whiteout as a directory"));
        }
    }
    let last = last.as_bytes();
    if last == OPAQUE {
        if parent.as_os_str().is_empty() {
            // Overlayfs ignores the mark on the root of a lower directory.
            return Err(LayerError::Unsupported("opaque whiteout of the layer's root".into()));
        }
        return Ok(Some(Action::Opaque(parent)));
    }
    if last.starts_with(WHITEOUT_META) {
        return Ok(Some(Action::Skip));
    }
    match last.strip_prefix(WHITEOUT) {
        None => Ok(None),
        Some(b"" | b"." | b"..") => Err(bad(entry, "whiteout of no file")),
        Some(name) => Ok(Some(Action::Whiteout { parent, name: OsStr::from_bytes(name).to_owned() })),
    }
}

/// Reads ownership, mode, times and attributes of an entry.
pub(crate) fn meta<R: Read>(entry: &mut tar::Entry<'_, R>, limits: &Limits) -> Result<Meta, LayerError> {
    let name = entry.path_bytes().into_owned();
    let header = entry.header();
    // Empty fields are 0, as for other tar programs.
    let number = |what: &str, raw: &[u8], n: std::io::Result<u64>| match n {
        Err(_) if raw.iter().all(|b| matches!(b, 0 | b' ')) => Ok(0),
        n => n.map_err(|e| bad(&name, format!("{what}: {e}"))),
    };
    let old = header.as_old();
    let uid = number("uid", &old.uid, header.uid())?;
    let gid = number("gid", &old.gid, header.gid())?;
    let mode = (number("mode", &old.mode, header.mode().map(u64::from))? & 0o7777) as u32;
    let mtime = number("mtime", &old.mtime, header.mtime())?.min(i64::MAX as u64) as i64;
    let mut mtime = Timespec { tv_sec: mtime, tv_nsec: 0 };
    let mut atime = None;
    let mut xattrs = Vec::new();
    let extensions = entry.pax_extensions().map_err(|e| bad(&name, e.to_string()))?;
    for extension in extensions.into_iter().flatten() {
        let extension = extension.map_err(|e| bad(&name, e.to_string()))?;
        let (key, value) = (extension.key_bytes(), extension.value_bytes());
        match key {
            b"mtime" => mtime = time(value).ok_or_else(|| bad(&name, "bad mtime"))?,
            b"atime" => atime = Some(time(value).ok_or_else(|| bad(&name, "bad atime"))?),
            key if key.starts_with(b"GNU.sparse.") => {
                return Err(LayerError::Unsupported(format!("sparse file {:?}", shown(&name))));
            }
            key => {
                let Some(attribute) = key.strip_prefix(XATTR) else { continue };
                if attribute.is_empty() || attribute.len() > 255 || attribute.contains(&0) {
                    return Err(bad(&name, "bad name of an extended attribute"));
                }
                if value.len() > limits.xattr_bytes {
                    let limit = format!("extended attribute larger than {} bytes", limits.xattr_bytes);
                    return Err(LayerError::Limit { entry: shown(&name), limit });
                }
                if xattrs.len() >= limits.xattrs {
                    let limit = format!("more than {} extended attributes", limits.xattrs);
                    return Err(LayerError::Limit { entry: shown(&name), limit });
                }
                xattrs.push((OsStr::from_bytes(attribute).to_owned(), value.to_owned()));
            }
        }
    }
    let id = |what: &str, id: u64| match u32::try_from(id) {
        // The highest one means "leave as it is" to chown(2).
        Ok(id) if id != u32::MAX => Ok(id),
        _ => Err(bad(&name, format!("{what} {id} out of range"))),
    };
    Ok(Meta {
        uid: Uid::from_raw(id("uid", uid)?),
        gid: Gid::from_raw(id("gid", gid)?),
        mode,
        times: Timestamps { last_access: atime.unwrap_or(mtime), last_modification: mtime },
        xattrs,
    })
}

/// Seconds with an optional fraction, as PAX headers write times.
fn time(value: &[u8]) -> Option<Timespec> {
    let text = std::str::from_utf8(value).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = seconds.parse().ok()?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let digits = &fraction[..fraction.len().min(9)];
    let nanoseconds: i64 = format!("{digits:0<9}").parse().ok()?;
    if text.starts_with('-') && nanoseconds > 0 {
        return Some(Timespec { tv_sec: seconds.checked_sub(1)?, tv_nsec: 1_000_000_000 - nanoseconds });
    }
    Some(Timespec { tv_sec: seconds, tv_nsec: nanoseconds })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let limits = Limits::default();
        let ok = |name: &str| layer_path(name.as_bytes(), b"", &limits).unwrap();
        assert_eq!(ok("/etc//passwd/"), Path::new("etc/passwd"));
        assert_eq!(ok("./a/./b"), Path::new("a/b"));
        assert_eq!(ok("./"), Path::new(""));
        for name in ["..", "a/..", "../a", "a\0b", &"x".repeat(256), &"d/".repeat(300), &"d/".repeat(3000)] {
            assert!(layer_path(name.as_bytes(), b"", &limits).is_err(), "{name:?}");
        }
    }

    #[test]
    fn whiteouts() {
        let get = |name: &str| whiteout(Path::new(name), name.as_bytes());
        assert_eq!(get("a/.wh.b").unwrap(), Some(Action::Whiteout { parent: "a".into(), name: "b".into() }));
        assert_eq!(get("a/.wh..wh..opq").unwrap(), Some(Action::Opaque("a".into())));
        assert_eq!(get(".wh..wh.plnk/12.34").unwrap(), Some(Action::Skip));
        assert_eq!(get("a/.wh..wh.aufs").unwrap(), Some(Action::Skip));
        assert_eq!(get("a/.whb").unwrap(), None);
        for name in [".wh.", ".wh..", ".wh...", "a/.wh...", ".wh.b/c", ".wh..wh..opq"] {
            assert!(get(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn times() {
        let at = |text: &str| time(text.as_bytes()).map(|t| (t.tv_sec, t.tv_nsec));
        assert_eq!(at("12"), Some((12, 0)));
        assert_eq!(at("12.5"), Some((12, 500_000_000)));
        assert_eq!(at("12.1234567899"), Some((12, 123_456_789)));
        assert_eq!(at("-1.25"), Some((-2, 750_000_000)));
        for bad in ["", "x", "1.x", "1.-5", "99999999999999999999"] {
            assert_eq!(at(bad), None, "{bad:?}");
        }
    }
}
