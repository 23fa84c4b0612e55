//! Archives that try to leave the layer, to confuse the parser, or to use up the host.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;

use common::{Archive, Fixture};
use proptest::prelude::*;
use stave_layers::{Cancel, Compression, Digest, LayerError, Limits};
use tar::EntryType;

fn bad(fixture: &Fixture, archive: &Archive) -> LayerError {
    let error = fixture.layer(archive, &[]).expect_err("a hostile archive was accepted");
    fixture.assert_contained();
    assert!(fixture.store.list().is_empty());
    error
}

#[test]
fn cve_2018_20990_names_with_dot_dot_are_refused() {
    let fixture = Fixture::new();
    for name in ["..", "../x", "a/../../x", "/../x", "a/..", "./../outside/secret"] {
        assert!(
            matches!(bad(&fixture, Archive::new().file(name, "x")), LayerError::BadArchive { .. }),
            "{name}"
        );
        bad(&fixture, Archive::new().dir(name));
        bad(&fixture, Archive::new().symlink(name, "/"));
        bad(&fixture, Archive::new().file("f", "").hardlink("l", name));
        bad(&fixture, Archive::new().file("f", "").hardlink(name, "f"));
    }
}

#[test]
fn absolute_names_are_inside() {
    let fixture = Fixture::new();
    let path = fixture.outside().join("secret");
    let dir = fixture.one(Archive::new().file(path.to_str().unwrap(), "inside"));
    assert_eq!(fs::read(dir.join(path.strip_prefix("/").unwrap())).unwrap(), b"inside");
    fixture.assert_contained();
}

#[test]
fn cve_2021_32760_links_do_not_lead_out() {
    let fixture = Fixture::new();
    let outside = fixture.outside();
    let outside = outside.to_str().unwrap();
    for target in [outside, "../../../../outside", "/../../../../../outside"] {
        let archive = Archive::new()
            .symlink("link", target)
            .file("link/secret", "overwritten")
            .file("link/new", "new")
            .raw(EntryType::Directory, b"link/dir", b"", b"", 0o4777)
            .file(".wh.none", "")
            .clone();
        fixture.one(&archive);
        fixture.assert_contained();
    }
    // A file or a directory in the place of a link replaces the link; modes don't go through.
    let secret = format!("{outside}/secret");
    for kind in [EntryType::Regular, EntryType::Directory, EntryType::Char, EntryType::Fifo] {
        let dir = fixture.one(Archive::new().symlink("link", &secret).raw(kind, b"link", b"", b"", 0o4777));
        assert!(!fs::symlink_metadata(dir.join("link")).unwrap().is_symlink(), "{kind:?}");
        fixture.assert_contained();
    }
    // A hard link to a link is one more link, and writing to its name replaces it.
    let dir = fixture.one(Archive::new().symlink("link", &secret).hardlink("hard", "link").file("hard", "x"));
    assert_eq!(fs::read(dir.join("hard")).unwrap(), b"x");
    fixture.assert_contained();
    // Through a link in the target's parents.
    bad_link(outside);
}

fn bad_link(outside: &str) {
    let fixture = Fixture::new();
    bad(&fixture, Archive::new().symlink("d", outside).hardlink("hard", "d/secret"));
    bad(&fixture, Archive::new().hardlink("hard", &format!("{outside}/secret")));
    bad(&fixture, Archive::new().dir("d").hardlink("hard", "d"));
    bad(&fixture, Archive::new().hardlink("same", "same"));
}

#[test]
fn whiteouts_name_one_file_of_their_directory() {
    let fixture = Fixture::new();
    for name in [".wh...", ".wh..", ".wh.", "a/.wh...", ".wh.a/b", ".wh..wh..opq"] {
        bad(&fixture, Archive::new().file(name, ""));
    }
    let outside = fixture.outside();
    let archive = Archive::new().symlink("d", outside.to_str().unwrap()).file("d/.wh.secret", "").clone();
    fixture.one(&archive);
    let archive = Archive::new().symlink("e", outside.to_str().unwrap()).file("e/.wh..wh..opq", "").clone();
    fixture.one(&archive);
    fixture.assert_contained();
}

#[test]
fn looping_links_end() {
    let fixture = Fixture::new();
    fixture.one(Archive::new().symlink("a", "b").symlink("b", "a").file("a/x", "x").file("b/y/z", "z"));
    fixture.one(Archive::new().symlink("s", "s").file("s/x", "x"));
    fixture.one(Archive::new().symlink("s", "s/t/u").file("s/t/x", "x"));
    fixture.assert_contained();
}

#[test]
fn the_root_stays_a_directory() {
    let fixture = Fixture::new();
    for name in ["/", ".", "./"] {
        bad(&fixture, Archive::new().symlink(name, "/tmp"));
        bad(&fixture, Archive::new().raw(EntryType::Char, name.as_bytes(), b"", b"", 0o644));
        bad(&fixture, Archive::new().file("f", "").hardlink(name, "f"));
    }
}

#[test]
fn limits_hold() {
    let limits =
        Limits { entries: 10, total_bytes: 1 << 20, xattr_bytes: 100, xattrs: 2, ..Limits::default() };
    let fixture = Fixture::with(limits);
    let is_limit = |archive: &Archive| {
        let error = bad(&fixture, archive);
        assert!(matches!(error, LayerError::Limit { .. }), "{error}");
    };
    let mut many = Archive::new();
    (0..11).for_each(|i| {
        many.file(&i.to_string(), "");
    });
    is_limit(&many);
    is_limit(Archive::new().file("big", &"x".repeat(1 << 20)));
    is_limit(Archive::new().pax(&[("SCHILY.xattr.user.a", &[b'x'; 101])]).file("f", ""));
    let three: Vec<(&str, &[u8])> =
        vec![("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.user.b", b"1"), ("SCHILY.xattr.user.c", b"1")];
    is_limit(Archive::new().pax(&three).file("f", ""));
    is_limit(Archive::new().file(&"d/".repeat(257), ""));
    is_limit(Archive::new().file(&"x".repeat(256), ""));
    is_limit(Archive::new().file(&"x/".repeat(2100), ""));
    is_limit(Archive::new().symlink("l", &"x".repeat(5000)));
}

/// Endless extension headers, as a gzip bomb would bring them.
#[test]
fn huge_headers_are_not_read_into_memory() {
    let limits = Limits { header_bytes: 64 << 10, ..Limits::default() };
    let fixture = Fixture::with(limits);
    for kind in [EntryType::XHeader, EntryType::GNULongName, EntryType::GNULongLink] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(8 << 30);
        header.set_cksum();
        let endless = io::Cursor::new(header.as_bytes().to_vec()).chain(io::repeat(b'1'));
        let error = fixture
            .store
            .unpack(endless, Compression::None, &Digest::of(b""), &Cancel::new())
            .expect_err("accepted");
        assert!(matches!(error, LayerError::Limit { .. }), "{kind:?}: {error}");
        fixture.assert_contained();
    }
}

#[test]
fn broken_streams_leave_nothing() {
    let fixture = Fixture::new();
    let tar = Archive::new().file("a", &"x".repeat(100_000)).file("b", "y").finish();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    let gzip = gzip.finish().unwrap();
    let id = Digest::of(&tar);
    let unpack = |bytes: &[u8], compression| fixture.store.unpack(bytes, compression, &id, &Cancel::new());
    assert!(unpack(&gzip, Compression::Gzip).is_ok());
    for cut in [0, 1, 20, gzip.len() / 2, gzip.len() - 9, gzip.len() - 1] {
        let error = unpack(&gzip[..cut], Compression::Gzip).expect_err("accepted");
        assert!(matches!(error, LayerError::Read(_) | LayerError::DiffIdMismatch { .. }), "{cut}: {error}");
    }
    let mut flipped = gzip.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0x55;
    unpack(&flipped, Compression::Gzip).expect_err("accepted");
    unpack(&gzip, Compression::None).expect_err("accepted");
    unpack(&tar[..700], Compression::None).expect_err("accepted");
    let longer = [&tar[..], b"more"].concat();
    assert!(matches!(unpack(&longer, Compression::None), Err(LayerError::DiffIdMismatch { .. })));
    // Two members, and bytes behind the archive that the digest covers.
    let longer_id = Digest::of(&longer);
    let mut members = gzip.clone();
    let mut second = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    second.write_all(b"more").unwrap();
    members.extend(second.finish().unwrap());
    assert!(fixture.store.unpack(&members[..], Compression::Gzip, &longer_id, &Cancel::new()).is_ok());
    let cancel = Cancel::new();
    cancel.cancel();
    let error = fixture.store.unpack(&tar[..], Compression::None, &id, &cancel).expect_err("accepted");
    assert!(matches!(error, LayerError::Cancelled));
    fixture.assert_contained();
}

#[test]
fn unsupported_entries_are_named() {
    let fixture = Fixture::new();
    for archive in [
        Archive::new().raw(EntryType::GNUSparse, b"s", b"", b"", 0o644).clone(),
        Archive::new().pax(&[("GNU.sparse.major", b"1")]).file("s", "").clone(),
        Archive::new().raw(EntryType::new(b'V'), b"label", b"", b"", 0o644).clone(),
    ] {
        let error = bad(&fixture, &archive);
        assert!(matches!(error, LayerError::Unsupported(_)), "{error}");
    }
    for media_type in ["application/vnd.oci.image.layer.v1.tar+zstd", "text/plain"] {
        let error = Compression::from_media_type(media_type).expect_err("accepted");
        assert!(error.to_string().contains(media_type), "{error}");
    }
}

/// RUSTSEC-2026-0113, CVE-2025-62518: our reading of an archive and GNU tar's are the same.
#[test]
fn cve_2025_62518_pax_size_agrees_with_gnu_tar() {
    let fixture = Fixture::new();
    let mut inner = Archive::new();
    inner.file("smuggled", "evil");
    // The ustar header says 0 bytes, the PAX header says how many there are.
    let mut archive = Archive::new();
    archive.pax(&[("size", inner.0.len().to_string().as_bytes())]);
    archive.raw(EntryType::Regular, b"carrier", b"", b"", 0o644);
    archive.0.extend_from_slice(&inner.0);
    archive.file("after", "after");
    let dir = fixture.one(&archive);
    let mut ours: Vec<String> =
        fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    ours.sort();
    let file = fixture.dir.path().join("outside/../a.tar");
    fs::write(&file, archive.finish()).unwrap();
    let listed = std::process::Command::new("tar").arg("tf").arg(&file).output().unwrap();
    fs::remove_file(&file).unwrap();
    let mut theirs: Vec<String> =
        String::from_utf8(listed.stdout).unwrap().lines().map(String::from).collect();
    theirs.sort();
    assert_eq!(ours, theirs);
    assert_eq!(ours, ["after", "carrier"]);
    assert_eq!(fs::metadata(dir.join("carrier")).unwrap().len() as usize, inner.0.len());
}

fn name() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        4 => Just("a"), 4 => Just("b"), 2 => Just("link"), 1 => Just(".."), 1 => Just("."), 1 => Just(""),
        1 => Just(".wh.a"), 1 => Just(".wh..wh..opq"), 1 => Just("secret"), 1 => Just("outside")
    ];
    proptest::collection::vec(part, 1..5).prop_map(|parts| parts.join("/"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn nothing_leaves_the_layer(entries in proptest::collection::vec((0usize..6, name(), name(), any::<bool>()), 1..12)) {
        let fixture = Fixture::new();
        let outside = fixture.outside();
        let mut archive = Archive::new();
        for (kind, name, target, out) in &entries {
            let kind = [EntryType::Regular, EntryType::Directory, EntryType::Symlink, EntryType::Link,
                EntryType::Char, EntryType::Fifo][*kind];
            let target = if *out { format!("{}/{target}", outside.display()) } else { target.clone() };
            let content: &[u8] = if kind == EntryType::Regular { b"evil" } else { b"" };
            archive.raw(kind, name.as_bytes(), target.as_bytes(), content, 0o4777);
        }
        let _ = fixture.layer(&archive, &[]);
        fixture.assert_contained();
    }

    #[test]
    fn any_bytes_end_in_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
        let fixture = Fixture::new();
        let _ = fixture.store.unpack(&bytes[..], Compression::None, &Digest::of(&bytes), &Cancel::new());
        let _ = fixture.store.unpack(&bytes[..], Compression::Gzip, &Digest::of(&bytes), &Cancel::new());
        fixture.assert_contained();
    }
}

#[test]
fn the_store_is_private() {
    use std::os::unix::fs::MetadataExt;
    let fixture = Fixture::new();
    for dir in
        ["root/layers", "root/layers/fs", "root/layers/records", "root/layers/staging", "root/layers/trash"]
    {
        let mode = fs::metadata(fixture.dir.path().join(Path::new(dir))).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o700, "{dir}");
    }
}
