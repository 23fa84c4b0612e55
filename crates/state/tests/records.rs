//! Records as they are on disk: written, read back, broken, set aside.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use serde::{Deserialize, Serialize};
use stave_state::{
    BROKEN, Durability, MAX_RECORD, StateError, load_dir, read_json, remove, remove_durably, write_bytes,
    write_json,
};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Record {
    name: String,
    count: u32,
}

fn record(count: u32) -> Record {
    Record { name: "Größe".into(), count }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_record_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.json");
    assert!(read_json::<Record>(&path).unwrap().is_none());
    for (count, durability) in [(1, Durability::Fsync), (2, Durability::Volatile), (3, Durability::Fsync)] {
        write_json(&path, &record(count), durability).unwrap();
        assert_eq!(read_json::<Record>(&path).unwrap(), Some(record(count)));
    }
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(names(dir.path()), ["a.json"], "no temporary file stays");
}

#[test]
fn a_failed_write_keeps_the_old_record_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    // A directory in the record's place: the rename fails.
    let path = dir.path().join("a.json");
    fs::create_dir(&path).unwrap();
    let err = write_json(&path, &record(1), Durability::Fsync).unwrap_err();
    assert!(matches!(err, StateError::Io { op: "rename to", .. }), "{err}");
    assert!(err.to_string().contains("a.json"), "{err}");
    assert_eq!(names(dir.path()), ["a.json"]);

    let err = write_bytes(&dir.path().join("no/a.json"), b"1", Durability::Volatile).unwrap_err();
    assert!(matches!(err, StateError::Io { op: "create", .. }), "{err}");
    for bad in ["/", "..", ""] {
        let err = write_bytes(Path::new(bad), b"1", Durability::Volatile).unwrap_err();
        assert!(matches!(err, StateError::BadName { .. }), "{bad:?}: {err}");
    }
}

#[test]
fn a_value_that_is_no_json_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    // A map with keys that are no strings.
    let value = std::collections::BTreeMap::from([(vec![1], 1)]);
    let err = write_json(&dir.path().join("a.json"), &value, Durability::Fsync).unwrap_err();
    assert!(matches!(err, StateError::Encode { .. }), "{err}");
    assert!(names(dir.path()).is_empty());
}

#[test]
fn readers_see_whole_records_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.json");
    let big = |count| Record { name: "x".repeat(100_000), count };
    write_json(&path, &big(0), Durability::Volatile).unwrap();
    std::thread::scope(|scope| {
        for writer in 0..2 {
            let path = &path;
            scope.spawn(move || {
                for count in 0..100 {
                    write_json(path, &big(writer * 100 + count), Durability::Volatile).unwrap();
                }
            });
        }
        for _ in 0..200 {
            assert_eq!(read_json::<Record>(&path).unwrap().unwrap().name.len(), 100_000);
        }
    });
    assert_eq!(names(dir.path()), ["a.json"]);
}

#[test]
fn removing_twice_is_success() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.json");
    write_json(&path, &record(1), Durability::Volatile).unwrap();
    for _ in 0..2 {
        remove(&path).unwrap();
        remove_durably(&path).unwrap();
    }
    remove_durably(&dir.path().join("no/such/a.json")).unwrap();
    assert!(matches!(remove(dir.path()).unwrap_err(), StateError::Io { op: "remove", .. }));
}

#[test]
fn what_is_broken_is_set_aside_and_stops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for (name, count) in [("b.json", 2), ("a.json", 1)] {
        write_json(&at(name), &record(count), Durability::Volatile).unwrap();
    }
    fs::write(at("half.json"), b"{\"name\":\"x\",\"cou").unwrap();
    fs::write(at("empty.json"), b"").unwrap();
    fs::write(at("type.json"), b"{\"name\":1,\"count\":1}").unwrap();
    fs::File::create(at("big.json")).unwrap().set_len(MAX_RECORD + 1).unwrap();
    symlink("a.json", at("link.json")).unwrap();
    fs::create_dir(at("dir.json")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("fifo.json"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    // These are no records.
    fs::create_dir(at("pod")).unwrap();
    fs::write(at("lock"), b"1").unwrap();
    // What a crash in the middle of a write leaves.
    fs::write(at(".stave-tmp-1-2"), b"{").unwrap();

    let loaded = load_dir::<Record>(dir.path());
    assert_eq!(loaded.records, [("a".to_owned(), record(1)), ("b".to_owned(), record(2))]);
    assert_eq!(names(dir.path()), [BROKEN, "a.json", "b.json", "lock", "pod"]);
    let broken = ["big.json", "dir.json", "empty.json", "fifo.json", "half.json", "link.json", "type.json"];
    assert_eq!(names(&at(BROKEN)), broken);
    assert_eq!(fs::metadata(at(BROKEN)).unwrap().permissions().mode() & 0o7777, 0o700);
    let mut reported: Vec<_> = loaded
        .set_aside
        .iter()
        .map(|aside| {
            assert_eq!(aside.moved_to, Some(at(BROKEN).join(aside.path.file_name().unwrap())));
            let name = aside.path.file_name().unwrap().to_str().unwrap();
            assert!(aside.error.to_string().contains(name), "{}", aside.error);
            (name, std::mem::discriminant(&aside.error))
        })
        .collect();
    reported.sort_by_key(|(name, _)| *name);
    assert_eq!(reported.iter().map(|(name, _)| *name).collect::<Vec<_>>(), broken);
    assert_eq!(reported[1].1, reported[3].1, "a directory and a FIFO are no regular files");
    assert_eq!(reported[1].1, reported[5].1, "nor is a link");

    let again = load_dir::<Record>(dir.path());
    assert_eq!((again.records.len(), again.set_aside.len()), (2, 0), "the second start is quiet");

    // The same name once more: the first stays what it was.
    fs::write(at("half.json"), b"?").unwrap();
    let third = load_dir::<Record>(dir.path());
    assert_eq!(third.set_aside[0].moved_to, Some(at(BROKEN).join("half.json.1")));
    assert_eq!(fs::read(at(BROKEN).join("half.json")).unwrap(), b"{\"name\":\"x\",\"cou");
}

#[test]
fn names_that_are_not_utf8_are_set_aside() {
    use std::os::unix::ffi::OsStrExt as _;
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(std::ffi::OsStr::from_bytes(b"\xff.json")), b"1").unwrap();
    let loaded = load_dir::<u32>(dir.path());
    assert!(loaded.records.is_empty());
    assert!(matches!(loaded.set_aside[0].error, StateError::BadName { .. }));
    assert!(loaded.set_aside[0].moved_to.is_some());
}

#[test]
fn a_directory_that_is_missing_has_no_records_and_a_bad_one_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let loaded = load_dir::<Record>(&dir.path().join("none"));
    assert!(loaded.records.is_empty() && loaded.set_aside.is_empty());

    let file = dir.path().join("file");
    fs::write(&file, b"").unwrap();
    let loaded = load_dir::<Record>(&file);
    assert_eq!(loaded.set_aside.len(), 1);
    assert_eq!(loaded.set_aside[0].path, file);
    assert!(loaded.set_aside[0].moved_to.is_none());
    assert!(file.exists());
}

#[test]
fn nesting_has_a_limit() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("deep.json"), "[".repeat(1 << 20)).unwrap();
    let loaded = load_dir::<serde_json::Value>(dir.path());
    assert!(matches!(loaded.set_aside[0].error, StateError::Decode { .. }));
}
