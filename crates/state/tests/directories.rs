//! Private directories and the lock of a root.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{PermissionsExt as _, chown, lchown, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use stave_state::{RootLock, StateError, private_dir};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn made_with_parents_and_kept() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("a/b/c");
    for _ in 0..2 {
        private_dir(&dir).unwrap();
        assert_eq!(mode(&dir), 0o700);
    }
    private_dir(&tmp.path().join("slash/")).unwrap();
    assert_eq!(mode(&tmp.path().join("slash")), 0o700);
}

#[test]
fn a_wider_mode_is_narrowed_with_its_content_kept() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("d");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("file"), b"1").unwrap();
    for wide in [0o755, 0o770, 0o2750, 0o500] {
        fs::set_permissions(&dir, fs::Permissions::from_mode(wide)).unwrap();
        private_dir(&dir).unwrap();
        assert_eq!(mode(&dir), 0o700, "from {wide:o}");
    }
    assert!(dir.join("file").exists());
}

#[test]
fn shared_foreign_and_wrong_ones_are_refused() {
    assert!(rustix::process::geteuid().is_root(), "this test gives files to another user: run it as root");
    let tmp = tempfile::tempdir().unwrap();
    let refused = |path: &Path, expected: &str| {
        let err = private_dir(path).unwrap_err();
        assert!(matches!(err, StateError::NotPrivate { .. }), "{err}");
        assert!(err.to_string().contains(expected), "{err}");
    };
    let shared = tmp.path().join("shared");
    fs::create_dir(&shared).unwrap();
    for mode_bits in [0o1777, 0o777, 0o1700] {
        fs::set_permissions(&shared, fs::Permissions::from_mode(mode_bits)).unwrap();
        refused(&shared, &format!("is shared with other users (mode {mode_bits:04o})"));
        assert_eq!(mode(&shared), mode_bits, "left as it was");
    }

    let foreign = tmp.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    chown(&foreign, Some(12345), None).unwrap();
    refused(&foreign, "belongs to user 12345, not to 0");

    let link = tmp.path().join("link");
    fs::create_dir(tmp.path().join("target")).unwrap();
    symlink("target", &link).unwrap();
    private_dir(&link).unwrap();
    assert_eq!(mode(&tmp.path().join("target")), 0o700, "our own link is followed");
    lchown(&link, Some(12345), None).unwrap();
    refused(&link, "is a symbolic link of user 12345");

    let file = tmp.path().join("file");
    fs::write(&file, b"").unwrap();
    refused(&file, "is no directory");
}

#[test]
fn one_holder_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let lock = RootLock::acquire(dir.path(), Duration::ZERO).unwrap();
    let err = RootLock::acquire(dir.path(), Duration::ZERO).unwrap_err().to_string();
    assert!(err.contains(&format!("is held by pid {}", std::process::id())), "{err}");
    assert_eq!(mode(&dir.path().join("lock")), 0o600);
    drop(lock);
    let again = RootLock::acquire(dir.path(), Duration::ZERO).unwrap();
    drop(again);
    assert!(dir.path().join("lock").exists(), "the file stays");
}

#[test]
fn a_lock_that_a_killed_daemons_child_still_has_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    // A copy of the descriptor, as a child between clone(2) and execve(2) has it.
    let held = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(dir.path().join("lock"))
        .unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let child = held.try_clone().unwrap();
    drop(held);
    assert!(RootLock::acquire(dir.path(), Duration::from_millis(30)).is_err());
    let ends = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        drop(child);
    });
    RootLock::acquire(dir.path(), Duration::from_secs(30)).unwrap();
    ends.join().unwrap();
}

#[test]
fn rubbish_in_the_file_is_no_holder_and_no_obstacle() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("lock"), b"99999999 not a pid \xff\xfe").unwrap();
    let _lock = RootLock::acquire(dir.path(), Duration::ZERO).unwrap();
    let text = fs::read_to_string(dir.path().join("lock")).unwrap();
    assert_eq!(text, format!("{}\n", std::process::id()));

    fs::write(dir.path().join("lock"), b"\xff").unwrap();
    let err = RootLock::acquire(dir.path(), Duration::ZERO).unwrap_err().to_string();
    assert!(err.contains("is held by an unknown process"), "{err}");
}

#[test]
fn a_link_is_not_locked() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("precious"), b"keep").unwrap();
    symlink("precious", dir.path().join("lock")).unwrap();
    assert!(matches!(
        RootLock::acquire(dir.path(), Duration::ZERO).unwrap_err(),
        StateError::Io { op: "open", .. }
    ));
    assert_eq!(fs::read(dir.path().join("precious")).unwrap(), b"keep");
}

/// The other process of the next test, run as a copy of this test program.
#[test]
#[ignore = "the child of the_lock_ends_with_the_process"]
fn child_that_holds_the_lock() {
    let Ok(dir) = std::env::var("STAVE_TEST_LOCK_DIR") else { return };
    let _lock = RootLock::acquire(Path::new(&dir), Duration::ZERO).unwrap();
    let mut out = std::io::stdout();
    writeln!(out, "locked").unwrap();
    out.flush().unwrap();
    // Until the parent kills us or goes away.
    let _ = std::io::stdin().read_line(&mut String::new());
}

#[test]
fn the_lock_ends_with_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_holds_the_lock", "--ignored", "--nocapture"])
        .env("STAVE_TEST_LOCK_DIR", dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let locked = lines.by_ref().any(|line| line.is_ok_and(|line| line.contains("locked")));
    let refused = RootLock::acquire(dir.path(), Duration::ZERO);
    // SIGKILL: nothing of the child runs any more, so it is the kernel that unlocks.
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(locked, "the child did not get the lock");
    let err = refused.unwrap_err().to_string();
    assert!(err.contains(&format!("is held by pid {}", child.id())), "{err}");
    RootLock::acquire(dir.path(), Duration::ZERO).unwrap();
}
