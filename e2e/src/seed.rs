//! An image that one daemon has pulled, for the others: in an emulated machine a pull is a third of a test's time.
//!
//! Layers are never written to, so their files can be the same ones: hard links, on the file system of the daemons' roots.

use std::path::{Path, PathBuf};
use std::process::Command;

/// What a daemon's root holds of images.
const PARTS: [&str; 2] = ["images", "layers"];

/// Where they are for this image; none without `STAVE_E2E_SEED`.
fn directory(image: &str) -> Option<PathBuf> {
    let wanted = std::env::var("STAVE_E2E_SEED").is_ok_and(|value| !value.is_empty());
    wanted.then(|| std::env::temp_dir().join("stave-e2e-seeds").join(image.replace(['/', ':'], "_")))
}

/// Puts the image into a root that no daemon has used yet, and says whether it could.
pub(crate) fn take(image: &str, root: &Path) -> bool {
    let Some(seed) = directory(image).filter(|seed| seed.exists()) else { return false };
    std::fs::create_dir_all(root).expect("root of the daemon");
    copy(&seed, root);
    true
}

/// Keeps what a root holds, which is this image alone, for the next.
pub(crate) fn give(image: &str, root: &Path) {
    let Some(seed) = directory(image).filter(|seed| !seed.exists()) else { return };
    let above = seed.parent().expect("a directory");
    std::fs::create_dir_all(above).expect("directory of seeds");
    let new = tempfile::tempdir_in(above).expect("a directory").keep();
    copy(root, &new);
    // Another test may have been quicker.
    if std::fs::rename(&new, &seed).is_err() {
        let _ = std::fs::remove_dir_all(&new);
    }
}

fn copy(from: &Path, to: &Path) {
    let parts = PARTS.map(|part| from.join(part));
    let status = Command::new("cp").arg("--archive").arg("--link").args(parts).arg(to).status();
    assert!(status.expect("cp").success(), "cp --link from {} to {}", from.display(), to.display());
}
