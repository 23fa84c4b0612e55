//! Any archive, made of members or of any bytes: it unpacks into its own directory or is refused, and leaves nothing else.
#![no_main]

use std::path::Path;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use stave_layers::{Cancel, Compression, Digest, Limits, Store};
use tempfile::TempDir;

struct Place {
    dir: TempDir,
    store: Store,
}

fn place() -> &'static Place {
    static PLACE: OnceLock<Place> = OnceLock::new();
    PLACE.get_or_init(|| {
        let dir = TempDir::new().expect("directory");
        std::fs::create_dir(dir.path().join("outside")).expect("directory");
        let limits = Limits { total_bytes: 1 << 20, entries: 200, ..Limits::default() };
        let store = Store::open_with(&dir.path().join("root"), limits).expect("store");
        Place { dir, store }
    })
}

fn count(dir: &Path) -> usize {
    std::fs::read_dir(dir).expect("directory").count()
}

/// A member as tar(5) has it, its checksum right, or nothing of the rest would ever be reached.
#[derive(Debug)]
struct Member<'a> {
    kind: u8,
    name: &'a [u8],
    link: &'a [u8],
    content: &'a [u8],
}

fn write(archive: &mut Vec<u8>, member: &Member<'_>) {
    let mut header = [0u8; 512];
    let mut put = |at: usize, room: usize, bytes: &[u8]| {
        let bytes = &bytes[..bytes.len().min(room)];
        header[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(0, 100, member.name);
    put(100, 8, b"0000755\0");
    put(108, 8, b"0000000\0");
    put(116, 8, b"0000000\0");
    put(124, 12, format!("{:011o}\0", member.content.len()).as_bytes());
    put(136, 12, b"00000000000\0");
    put(148, 8, b"        ");
    // Files, links, devices, fifos, and the members that name or describe the next one.
    let kinds = b"0123456LKxg0152";
    put(156, 1, &[kinds[usize::from(member.kind) % kinds.len()]]);
    put(157, 100, member.link);
    put(257, 8, b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    archive.extend_from_slice(&header);
    archive.extend_from_slice(member.content);
    archive.resize(archive.len().next_multiple_of(512), 0);
}

fuzz_target!(|data: (Vec<(u8, &[u8], &[u8], &[u8])>, u8, &[u8])| {
    let (members, how, raw) = data;
    let mut made = Vec::new();
    for (kind, name, link, content) in members {
        write(&mut made, &Member { kind, name, link, content });
    }
    let (archive, compression) = match how % 4 {
        0 => (raw, Compression::Gzip),
        1 => (raw, Compression::None),
        _ => {
            made.extend_from_slice(&[0; 1024]);
            (&made[..], Compression::None)
        }
    };
    let place = place();
    let unpacked = place.store.unpack(archive, compression, &Digest::of(archive), &Cancel::new());
    if let Ok(staged) = unpacked
        && let Ok(chain) = place.store.commit(staged, &[])
    {
        place.store.remove(&chain).expect("removal");
    }
    assert_eq!(count(&place.dir.path().join("outside")), 0);
    assert_eq!(count(place.dir.path()), 2);
    assert_eq!(count(&place.dir.path().join("root/layers/staging")), 0);
});
