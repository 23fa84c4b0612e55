//! Any archive, in each compression: it unpacks into its own directory or is refused, and leaves nothing else.
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

fuzz_target!(|data: &[u8]| {
    let Some((kind, archive)) = data.split_first() else { return };
    let kinds = [Compression::None, Compression::Gzip, Compression::Zstd];
    let compression = kinds[usize::from(*kind) % kinds.len()];
    let place = place();
    // Not what the archive has, mostly: that is found out when all of it has been unpacked.
    let diff_id = Digest::of(archive);
    if let Ok(staged) = place.store.unpack(archive, compression, &diff_id, &Cancel::new()) {
        if let Ok(chain) = place.store.commit(staged, &[]) {
            place.store.remove(&chain).expect("removal");
        }
    }
    assert_eq!(count(&place.dir.path().join("outside")), 0);
    assert_eq!(count(place.dir.path()), 2);
    assert_eq!(count(&place.dir.path().join("root/layers/staging")), 0);
});
