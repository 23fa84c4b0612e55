//! Lookups against a real tree with hostile links.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use tempfile::TempDir;

use crate::{PathError, Root, remove_tree};

const DIR: Mode = Mode::from_raw_mode(0o755);

/// `outside/` must stay as it is; `root/` is the root.
struct Tree {
    dir: TempDir,
    root: Root,
}

impl Tree {
    fn new() -> Tree {
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/secret"), "secret").unwrap();
        let root = Root::open(&dir.path().join("root")).unwrap();
        Tree { dir, root }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("root").join(name)
    }

    fn link(&self, target: impl AsRef<Path>, name: &str) {
        symlink(target, self.path(name)).unwrap();
    }

    fn assert_outside_untouched(&self) {
        let names: Vec<_> =
            fs::read_dir(self.dir.path().join("outside")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["secret"]);
        assert_eq!(fs::read(self.dir.path().join("outside/secret")).unwrap(), b"secret");
        assert_eq!(fs::read_dir(self.dir.path()).unwrap().count(), 2);
    }
}

fn p(text: &str) -> &Path {
    Path::new(text)
}

#[test]
fn empty_and_broken_paths_are_refused() {
    let t = Tree::new();
    let long = "x/".repeat(2048);
    for bad in [OsStr::new(""), OsStr::from_bytes(b"a\0b"), OsStr::new(&long)] {
        let bad = Path::new(bad);
        assert!(matches!(t.root.resolve(bad), Err(PathError::Invalid { .. })));
        assert!(matches!(t.root.make_dir_all(bad, DIR), Err(PathError::Invalid { .. })));
        assert!(matches!(t.root.make_file(bad), Err(PathError::Invalid { .. })));
        assert!(matches!(t.root.open_beneath(bad, OFlags::PATH), Err(PathError::Invalid { .. })));
    }
}

#[test]
fn directories_are_made_through_links_and_never_outside() {
    let t = Tree::new();
    fs::create_dir_all(t.path("run")).unwrap();
    t.link("/run", "absolute");
    t.link("../../../../run", "up");
    t.link("/missing/deep", "dangling");
    t.link(t.dir.path().join("outside"), "out");
    t.link("loop", "loop");

    t.root.make_dir_all(p("/absolute/a/b"), DIR).unwrap();
    assert!(t.path("run/a/b").is_dir());
    t.root.make_dir_all(p("up/c"), DIR).unwrap();
    assert!(t.path("run/c").is_dir());
    t.root.make_dir_all(p("dangling/x"), DIR).unwrap();
    assert!(t.path("missing/deep/x").is_dir());
    t.root.make_dir_all(p("out/y"), DIR).unwrap();
    t.root.make_dir_all(p("../../../z/../zz"), DIR).unwrap();
    assert!(t.path("zz").is_dir());
    let error = t.root.make_dir_all(p("loop/x"), DIR).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::LOOP.raw_os_error()));
    let same = t.root.make_dir_all(p("/"), DIR).unwrap();
    assert_eq!(rustix::fs::fstat(same).unwrap().st_ino, fs::metadata(t.path("")).unwrap().ino());
    t.assert_outside_untouched();
}

#[test]
fn a_file_in_the_way_is_an_error() {
    let t = Tree::new();
    fs::write(t.path("file"), "").unwrap();
    assert!(t.root.make_dir_all(p("file"), DIR).is_err());
    assert!(t.root.make_dir_all(p("file/x"), DIR).is_err());
    fs::create_dir(t.path("dir")).unwrap();
    assert!(matches!(t.root.make_file(p("dir")), Err(PathError::WrongKind { .. })));
    assert!(matches!(t.root.make_file(p("/")), Err(PathError::WrongKind { .. })));
    assert!(matches!(t.root.make_file(p("x/..")), Err(PathError::WrongKind { .. })));
}

#[test]
fn files_are_made_through_links_and_never_outside() {
    let t = Tree::new();
    t.link(t.dir.path().join("outside/new"), "resolv.conf");
    t.link("/etc/target", "hosts");
    t.root.make_file(p("etc/deep/file")).unwrap();
    assert!(t.path("etc/deep/file").is_file());
    t.root.make_file(p("hosts")).unwrap();
    assert!(t.path("etc/target").is_file());
    t.root.make_file(p("resolv.conf")).unwrap();
    t.root.make_file(p("resolv.conf")).unwrap();
    t.assert_outside_untouched();
}

#[test]
fn create_file_follows_no_last_link_and_wants_a_new_name() {
    let t = Tree::new();
    t.link(t.dir.path().join("outside/secret"), "link");
    for taken in ["link", "."] {
        assert!(t.root.create_file(p(taken), Mode::from_raw_mode(0o600)).is_err());
    }
    assert!(t.root.create_file(p(".."), Mode::from_raw_mode(0o600)).is_err());
    t.root.create_file(p("new"), Mode::from_raw_mode(0o600)).unwrap();
    assert!(t.root.create_file(p("new"), Mode::from_raw_mode(0o600)).is_err());
    t.assert_outside_untouched();
}

#[test]
fn beneath_follows_nothing_and_leaves_nothing() {
    let t = Tree::new();
    fs::create_dir_all(t.path("a/b")).unwrap();
    t.link("a", "link");
    t.link(t.dir.path().join("outside"), "out");
    assert!(t.root.open_beneath(p("/a/b"), OFlags::PATH).is_ok());
    assert!(t.root.open_beneath(p("/"), OFlags::PATH).is_ok());
    for path in ["link/b", "out/secret", "..", "a/../../outside", "link"] {
        let result = t.root.open_beneath(p(path), OFlags::PATH);
        assert!(matches!(result, Err(PathError::Escapes { .. })), "{path}: {result:?}");
    }
    assert!(t.root.open_beneath(p("link"), OFlags::PATH | OFlags::NOFOLLOW).is_ok());
}

/// CVE-2026-47262, CVE-2025-4437, CVE-2024-9676
#[test]
fn cve_2026_47262_only_regular_files_of_limited_size_are_read() {
    let t = Tree::new();
    fs::create_dir(t.path("etc")).unwrap();
    fs::write(t.path("etc/passwd"), "root").unwrap();
    assert_eq!(t.root.read_limited(p("/etc/passwd"), 4).unwrap(), b"root");
    assert!(matches!(t.root.read_limited(p("etc/passwd"), 3), Err(PathError::TooLarge { max: 3, .. })));
    assert!(t.root.read_limited(p("etc/none"), 3).unwrap_err().is_not_found());

    t.link(t.dir.path().join("outside/secret"), "etc/group");
    t.link("passwd", "etc/shadow");
    t.link("/dev/zero", "etc/zero");
    rustix::fs::mkfifoat(rustix::fs::CWD, t.path("etc/fifo"), Mode::from_raw_mode(0o600)).unwrap();
    for path in ["etc/group", "etc/shadow", "etc/zero", "etc/fifo", "etc"] {
        let result = t.root.read_limited(p(path), 1 << 20);
        assert!(matches!(result, Err(PathError::WrongKind { .. })), "{path}: {result:?}");
    }
}

#[test]
fn resolve_stays_inside() {
    let t = Tree::new();
    t.link(t.dir.path().join("outside/secret"), "out");
    t.link("/proc/self/root", "magic");
    for path in ["out", "magic", "../outside/secret", "/../../outside/secret"] {
        assert!(t.root.resolve(p(path)).unwrap_err().is_not_found(), "{path}");
    }
}

#[test]
fn trees_of_any_depth_are_removed_and_links_are_not_followed() {
    let t = Tree::new();
    t.link(t.dir.path().join("outside"), "link");
    fs::create_dir(t.path("deep")).unwrap();
    let mut at = Root::open(&t.path("deep")).unwrap();
    for _ in 0..1500 {
        rustix::fs::symlinkat("../../../outside", at.fd(), "l").unwrap();
        rustix::fs::mkdirat(at.fd(), "d", DIR).unwrap();
        at = Root::from_dir_fd(at.open_dir_fd(p("d")).unwrap()).unwrap();
    }
    for name in ["deep", "link", "missing"] {
        remove_tree(t.root.fd(), OsStr::new(name)).unwrap();
    }
    assert_eq!(fs::read_dir(t.path("")).unwrap().count(), 0);
    for bad in ["", ".", "..", "a/b"] {
        assert!(remove_tree(t.root.fd(), OsStr::new(bad)).is_err());
    }
    t.assert_outside_untouched();
}

/// CVE-2024-45310, CVE-2018-15664: a directory that is swapped for a link while we walk.
#[test]
fn cve_2024_45310_make_dir_all_against_a_renamer() {
    let t = Tree::new();
    fs::create_dir(t.path("dir")).unwrap();
    t.link(t.dir.path().join("outside"), "evil");
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (dir, evil) = (t.path("dir"), t.path("evil"));
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                let _ = rustix::fs::renameat_with(rustix::fs::CWD, &dir, rustix::fs::CWD, &evil, flags);
            }
        });
        for i in 0..1000 {
            // Either may fail, neither may leave the root.
            let _ = t.root.make_dir_all(p(&format!("dir/{i}/x")), DIR);
            let _ = t.root.make_file(p(&format!("dir/f{i}")));
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    t.assert_outside_untouched();
}
