//! What an archive says is what is on disk, and what overlayfs shows.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use common::{Archive, Fixture};
use rustix::mount::{MountFlags, UnmountFlags};
use stave_layers::{ChainId, LayerError, Store};
use tar::EntryType;
use tempfile::TempDir;

/// A read-only overlay mount, unmounted when dropped.
struct Overlay(TempDir);

impl Overlay {
    /// `lower`: top first; at least two.
    fn mount(lower: &[PathBuf]) -> Overlay {
        let dir = TempDir::new().unwrap();
        let lower: Vec<_> = lower.iter().map(|p| p.to_str().unwrap()).collect();
        let options = std::ffi::CString::new(format!("lowerdir={}", lower.join(":"))).unwrap();
        rustix::mount::mount("overlay", dir.path(), "overlay", MountFlags::RDONLY, options.as_c_str())
            .unwrap();
        Overlay(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn names(&self, name: &str) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.path(name))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

fn xattr(path: &Path, name: &str) -> Vec<u8> {
    let mut value = vec![0; 256];
    let n = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
    value.truncate(n);
    value
}

const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn all_kinds_of_files_with_their_attributes() {
    let fixture = Fixture::new();
    let long = format!("{}/file", "directory-with-a-name/".repeat(10).trim_end_matches('/'));
    let dir = fixture.one(
        Archive::new()
            .entry(EntryType::Directory, b"./", b"", b"", 0o751, 3, 4, 1_111_111_111)
            .entry(EntryType::Directory, b"tmp/", b"", b"", 0o1777, 0, 0, 1_234_567_890)
            .pax(&[
                ("SCHILY.xattr.security.capability", CAPABILITY),
                ("SCHILY.xattr.user.note", b"a\0b"),
                ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
                ("SCHILY.xattr.user.overlay.opaque", b"y"),
                ("mtime", b"1600000000.25"),
            ])
            .entry(EntryType::Regular, b"tmp/su", b"", b"#!", 0o6755, 1000, 1001, 1)
            .raw(EntryType::Symlink, b"lib", b"usr/lib", b"", 0o777)
            .hardlink("tmp/su2", "/tmp/su")
            .entry(EntryType::Char, b"null", b"", b"", 0o666, 0, 5, 1)
            .entry(EntryType::Block, b"disk", b"", b"", 0o660, 0, 6, 1)
            .entry(EntryType::Fifo, b"fifo", b"", b"", 0o622, 7, 0, 99)
            .raw(EntryType::XGlobalHeader, b"pax_global_header", b"", b"11 a=b12345\n", 0o644)
            .pax(&[("path", b"from-pax"), ("uid", b"3000000"), ("gid", b"3000001")])
            .file("ignored", "pax")
            .file(&long, "long"),
    );
    let root = fs::metadata(&dir).unwrap();
    assert_eq!((root.mode() & 0o7777, root.uid(), root.gid(), root.mtime()), (0o751, 3, 4, 1_111_111_111));
    let tmp = fs::metadata(dir.join("tmp")).unwrap();
    assert_eq!((tmp.mode() & 0o7777, tmp.mtime()), (0o1777, 1_234_567_890));
    let su = fs::metadata(dir.join("tmp/su")).unwrap();
    assert_eq!((su.mode() & 0o7777, su.uid(), su.gid(), su.nlink()), (0o6755, 1000, 1001, 2));
    assert_eq!((su.mtime(), su.mtime_nsec()), (1_600_000_000, 250_000_000));
    assert_eq!(su.ino(), fs::metadata(dir.join("tmp/su2")).unwrap().ino());
    assert_eq!(xattr(&dir.join("tmp/su"), "security.capability"), CAPABILITY);
    assert_eq!(xattr(&dir.join("tmp/su"), "user.note"), b"a\0b");
    let mut names = vec![0; 1024];
    let n = rustix::fs::llistxattr(dir.join("tmp/su"), &mut names[..]).unwrap();
    assert!(!String::from_utf8_lossy(&names[..n]).contains("overlay"));
    assert_eq!(fs::read_link(dir.join("lib")).unwrap(), Path::new("usr/lib"));
    let null = fs::symlink_metadata(dir.join("null")).unwrap();
    assert!(null.file_type().is_char_device());
    assert_eq!((null.rdev(), null.mode() & 0o7777, null.gid()), (rustix::fs::makedev(1, 3), 0o666, 5));
    assert!(fs::symlink_metadata(dir.join("disk")).unwrap().file_type().is_block_device());
    let fifo = fs::symlink_metadata(dir.join("fifo")).unwrap();
    assert!(fifo.file_type().is_fifo());
    assert_eq!((fifo.mode() & 0o7777, fifo.uid(), fifo.mtime()), (0o622, 7, 99));
    let pax = fs::metadata(dir.join("from-pax")).unwrap();
    assert_eq!((pax.uid(), pax.gid()), (3_000_000, 3_000_001));
    assert!(!dir.join("ignored").exists());
    assert_eq!(fs::read(dir.join(&long)).unwrap(), b"long");
    let layer = &fixture.store.list()[0];
    assert_eq!(layer.size, 2 + 3 + 4);
    assert_eq!(layer.inodes, 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 10 + 1);
}

#[test]
fn later_entries_replace_earlier_ones() {
    let fixture = Fixture::new();
    let dir = fixture.one(
        Archive::new()
            .file("a", "1")
            .file("a", "22")
            .file("b/c/d", "x")
            .file("b", "file")
            .file("e", "file")
            .raw(EntryType::Directory, b"e", b"", b"", 0o700)
            .file("e/f", "kept")
            .raw(EntryType::Directory, b"e", b"", b"", 0o711)
            .file("g/h", "x")
            .symlink("g", "e")
            .file("g/i", "through the link"),
    );
    assert_eq!(fs::read(dir.join("a")).unwrap(), b"22");
    assert_eq!(fs::read(dir.join("b")).unwrap(), b"file");
    assert_eq!(fs::metadata(dir.join("e")).unwrap().mode() & 0o777, 0o711);
    assert_eq!(fs::read(dir.join("e/f")).unwrap(), b"kept");
    assert_eq!(fs::read(dir.join("e/i")).unwrap(), b"through the link");
}

#[test]
fn overlayfs_shows_the_image() {
    let fixture = Fixture::new();
    let base = Archive::new()
        .file("etc/removed", "x")
        .file("etc/kept", "base")
        .file("opaque/old", "x")
        .file("opaque/sub/old", "x")
        .file("redone/old", "x")
        .file("redone2/old", "x")
        .file("gone/old", "x")
        .file("file-then", "x")
        .clone();
    let top = Archive::new()
        .file("etc/.wh.removed", "")
        .file("opaque/new", "y")
        .file("opaque/.wh..wh..opq", "")
        // A directory removed and made anew, in both orders.
        .file(".wh.redone", "")
        .file("redone/new", "y")
        .file("redone2/new", "y")
        .file(".wh.redone2", "")
        .file(".wh.gone", "")
        .file(".wh.never-there", "")
        .file("file-then", "new")
        .file(".wh.file-then", "")
        .clone();
    let base = fixture.layer(&base, &[]).unwrap();
    let top = fixture.layer(&top, &[base]).unwrap();
    let image = Overlay::mount(&[fixture.store.dir(&top), fixture.store.dir(&base)]);
    assert_eq!(image.names(""), ["etc", "file-then", "opaque", "redone", "redone2"]);
    assert_eq!(image.names("etc"), ["kept"]);
    assert_eq!(image.names("opaque"), ["new"]);
    assert_eq!(image.names("redone"), ["new"]);
    assert_eq!(image.names("redone2"), ["new"]);
    assert_eq!(fs::read(image.path("file-then")).unwrap(), b"new");
}

#[test]
fn implied_directories_look_as_below() {
    let fixture = Fixture::new();
    let base = Archive::new()
        .pax(&[("SCHILY.xattr.user.note", b"base")])
        .entry(EntryType::Directory, b"srv", b"", b"", 0o2750, 5, 6, 1_000_000_000)
        .entry(EntryType::Directory, b"srv/www", b"", b"", 0o700, 7, 8, 1_000_000_001)
        .clone();
    let base = fixture.layer(&base, &[]).unwrap();
    let middle = fixture.layer(Archive::new().file("unrelated", ""), &[base]).unwrap();
    let top = fixture
        .layer(Archive::new().file("srv/www/index", "x").file("new/file", ""), &[base, middle])
        .unwrap();
    let dir = fixture.store.dir(&top);
    let srv = fs::metadata(dir.join("srv")).unwrap();
    assert_eq!((srv.mode() & 0o7777, srv.uid(), srv.gid(), srv.mtime()), (0o2750, 5, 6, 1_000_000_000));
    assert_eq!(xattr(&dir.join("srv"), "user.note"), b"base");
    let www = fs::metadata(dir.join("srv/www")).unwrap();
    assert_eq!((www.mode() & 0o7777, www.uid(), www.mtime()), (0o700, 7, 1_000_000_001));
    assert_eq!(fs::metadata(dir.join("new")).unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn hard_links_to_files_below_are_copied_in() {
    let fixture = Fixture::new();
    let base = Archive::new()
        .pax(&[("SCHILY.xattr.security.capability", CAPABILITY)])
        .entry(EntryType::Regular, b"bin/ping", b"", b"binary", 0o4755, 1, 2, 1_000_000_000)
        .symlink("bin/link", "/etc/shadow")
        .file("hidden", "x")
        .clone();
    let base = fixture.layer(&base, &[]).unwrap();
    let middle = fixture.layer(Archive::new().file(".wh.hidden", ""), &[base]).unwrap();
    let links = Archive::new()
        .hardlink("ping", "bin/ping")
        .hardlink("ping6", "bin/ping")
        .hardlink("l", "bin/link")
        .clone();
    let top = fixture.layer(&links, &[base, middle]).unwrap();
    let dir = fixture.store.dir(&top);
    let ping = fs::metadata(dir.join("ping")).unwrap();
    assert_eq!((ping.mode() & 0o7777, ping.uid(), ping.gid(), ping.mtime()), (0o4755, 1, 2, 1_000_000_000));
    assert_eq!(ping.ino(), fs::metadata(dir.join("ping6")).unwrap().ino());
    assert_eq!(fs::read(dir.join("ping")).unwrap(), b"binary");
    assert_eq!(xattr(&dir.join("ping"), "security.capability"), CAPABILITY);
    assert_eq!(fs::read_link(dir.join("l")).unwrap(), Path::new("/etc/shadow"));
    for target in ["hidden", "missing", "bin", "bin/link/x"] {
        let error =
            fixture.layer(Archive::new().hardlink("l", target), &[base, middle]).expect_err("accepted");
        assert!(matches!(error, LayerError::BadArchive { .. }), "{target}: {error}");
    }
    fixture.assert_contained();
}

#[test]
fn links_to_directories_below_are_written_through() {
    let fixture = Fixture::new();
    let dir = fixture.one(Archive::new().symlink("var/run", "/run").file("var/run/deep/pid", "1"));
    assert_eq!(fs::read_link(dir.join("var/run")).unwrap(), Path::new("/run"));
    assert_eq!(fs::read(dir.join("run/deep/pid")).unwrap(), b"1");
}

#[test]
fn the_store_survives_its_process() {
    let fixture = Fixture::new();
    let base = fixture.layer(Archive::new().file("a", "1"), &[]).unwrap();
    let top = fixture.layer(Archive::new().file("b", "2"), &[base]).unwrap();
    assert_eq!(fixture.layer(Archive::new().file("b", "2"), &[base]).unwrap(), top, "committed twice");
    let error = fixture.layer(Archive::new().file("c", "3"), &[ChainId(stave_layers::Digest::of(b"?"))]);
    assert!(matches!(error, Err(LayerError::MissingParent(_))));

    let root = fixture.dir.path().join("root");
    let listed = fixture.store.list();
    // Half-made things of a process that was killed.
    fs::create_dir_all(root.join("layers/staging/77/deep")).unwrap();
    fs::create_dir_all(root.join("layers/trash/78/deep")).unwrap();
    let unrecorded = stave_layers::Digest::of(b"unrecorded").hex();
    fs::create_dir_all(root.join("layers/fs").join(&unrecorded)).unwrap();
    let lost = stave_layers::Digest::of(b"lost").hex();
    fs::write(root.join(format!("layers/records/{lost}.json")), "{").unwrap();
    let store = Store::open(&root).unwrap();
    assert_eq!(store.list(), listed);
    assert!(!root.join("layers/fs").join(&unrecorded).exists());
    assert!(!root.join("layers/staging/77").exists() && !root.join("layers/trash/78").exists());

    store.remove(&top).unwrap();
    store.remove(&top).unwrap();
    assert!(!store.has(&top) && !store.dir(&top).exists());
    assert_eq!(Store::open(&root).unwrap().list().len(), 1);
}
