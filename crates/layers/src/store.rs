//! The store.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use stave_paths::{Root, remove_tree};
use stave_state::Durability;

use crate::below::Below;
use crate::tree::{Tree, io};
use crate::unpack::{Compression, unpack};
use crate::{Cancel, ChainId, Digest, LayerError, Limits};

/// A committed layer; its record on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// The layer with all below it.
    pub chain_id: ChainId,
    /// Of the uncompressed archive.
    pub diff_id: Digest,
    /// The layer below.
    pub parent: Option<ChainId>,
    /// Bytes of the regular files unpacked (an upper bound where an archive replaces its own files).
    pub size: u64,
    /// Files and directories unpacked (likewise).
    pub inodes: u64,
}

/// The layers of this node, below one directory. Cheap to clone; all clones are one store.
///
/// All methods block: call them off the async threads.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

/// Layers live in `fs/<hex of the chain id>`, their records in `records/<hex>.json`. What is being
/// written is in `staging`, what is being deleted in `trash`; nothing is ever in `empty`.
#[derive(Debug)]
struct Inner {
    top: PathBuf,
    limits: Limits,
    layers: Mutex<BTreeMap<ChainId, Layer>>,
    next: AtomicU64,
}

const FS: &str = "fs";
const RECORDS: &str = "records";
const STAGING: &str = "staging";
const TRASH: &str = "trash";
const EMPTY: &str = "empty";

/// An unpacked layer that waits for [`Store::commit`]. Dropping it deletes it.
#[derive(Debug)]
pub struct Staged {
    store: Store,
    name: OsString,
    tree: Tree,
    diff_id: Digest,
    committed: bool,
}

impl Staged {
    /// The digest of the uncompressed archive.
    pub fn diff_id(&self) -> &Digest {
        &self.diff_id
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.committed {
            self.store.inner.discard(STAGING, &self.name);
        }
    }
}

impl Store {
    /// Opens the store in `root/layers`, made if it is missing (0700). What a crash left half-made is
    /// deleted; records that can't be read are set aside, and their layers deleted.
    pub fn open(root: &Path) -> Result<Store, LayerError> {
        Store::open_with(root, Limits::default())
    }

    /// As [`Store::open`], with limits of one's own.
    pub fn open_with(root: &Path, limits: Limits) -> Result<Store, LayerError> {
        let top = root.join("layers");
        stave_state::private_dir(&top)?;
        for dir in [FS, RECORDS, STAGING, TRASH, EMPTY] {
            stave_state::private_dir(&top.join(dir))?;
        }
        let inner = Inner { top, limits, layers: Mutex::default(), next: AtomicU64::new(0) };
        inner.load()?;
        Ok(Store { inner: Arc::new(inner) })
    }

    /// Whether the layer is there, whole.
    pub fn has(&self, chain_id: &ChainId) -> bool {
        self.inner.layers().contains_key(chain_id)
    }

    /// The record of a layer.
    pub fn layer(&self, chain_id: &ChainId) -> Option<Layer> {
        self.inner.layers().get(chain_id).cloned()
    }

    /// All layers, by chain id.
    pub fn list(&self) -> Vec<Layer> {
        self.inner.layers().values().cloned().collect()
    }

    /// The directory of a layer: a lower directory for overlayfs, whether it is there or not.
    pub fn dir(&self, chain_id: &ChainId) -> PathBuf {
        self.inner.dir(FS).join(chain_id.0.hex())
    }

    /// A directory with nothing in it, for an overlay of a single layer: overlayfs wants two.
    pub fn empty_dir(&self) -> PathBuf {
        self.inner.dir(EMPTY)
    }

    /// Unpacks a layer as its bytes come. `reader` is read to its end, so that it can verify the
    /// digest of the compressed bytes; the uncompressed ones must have the digest `diff_id`. On any
    /// error nothing is left.
    pub fn unpack(
        &self,
        reader: impl Read,
        compression: Compression,
        diff_id: &Digest,
        cancel: &Cancel,
    ) -> Result<Staged, LayerError> {
        let inner = &self.inner;
        let name = inner.unique();
        let path = inner.dir(STAGING).join(&name);
        rustix::fs::mkdir(&path, Mode::from_raw_mode(0o755)).map_err(io("mkdir", &path))?;
        let staged = Root::open(&path).map(|root| Staged {
            store: self.clone(),
            name: name.clone(),
            tree: Tree::new(root),
            diff_id: *diff_id,
            committed: false,
        });
        let mut staged = staged.inspect_err(|_| inner.discard(STAGING, &name))?;
        rustix::fs::chmod(&path, Mode::from_raw_mode(0o755)).map_err(io("chmod", &path))?;
        let found = unpack(reader, compression, &inner.limits, cancel, &mut staged.tree)?;
        if found != *diff_id {
            return Err(LayerError::DiffIdMismatch { expected: *diff_id, found });
        }
        Ok(staged)
    }

    /// Makes a staged layer part of the store, on top of `parents` (bottom first), which must be
    /// there: takes from them what it depends on, then data, syncfs, rename, record. One that is
    /// there already is success.
    pub fn commit(&self, mut staged: Staged, parents: &[ChainId]) -> Result<ChainId, LayerError> {
        let inner = &self.inner;
        let chain_id = ChainId::on(parents.last(), &staged.diff_id);
        if self.has(&chain_id) {
            return Ok(chain_id);
        }
        if let Some(missing) = parents.iter().find(|parent| !self.has(parent)) {
            return Err(LayerError::MissingParent(*missing));
        }
        let dirs: Vec<PathBuf> = parents.iter().rev().map(|parent| self.dir(parent)).collect();
        Below::open(&dirs)?.settle(&mut staged.tree)?;

        let from = inner.dir(STAGING).join(&staged.name);
        let to = self.dir(&chain_id);
        // syncfs(2) refuses O_PATH descriptors.
        let fd = staged.tree.root.open_dir_fd(Path::new("."))?;
        rustix::fs::syncfs(&fd).map_err(io("syncfs", &from))?;

        let mut layers = inner.layers();
        if layers.contains_key(&chain_id) {
            return Ok(chain_id);
        }
        // Without a record it is no layer: left by a record that could not be written.
        inner.discard(FS, OsStr::new(&chain_id.0.hex()));
        rustix::fs::rename(&from, &to).map_err(io("rename", &to))?;
        staged.committed = true;
        let layer = Layer {
            chain_id,
            diff_id: staged.diff_id,
            parent: parents.last().copied(),
            size: staged.tree.size,
            inodes: staged.tree.inodes,
        };
        let recorded = inner
            .sync_dir(FS)
            .and_then(|()| Ok(stave_state::write_json(&inner.record(&chain_id), &layer, Durability::Fsync)?));
        if let Err(e) = recorded {
            inner.discard(FS, OsStr::new(&chain_id.0.hex()));
            return Err(e);
        }
        layers.insert(chain_id, layer);
        Ok(chain_id)
    }

    /// Removes a layer; one that is not there is success. Nothing may use its directory, and no layer
    /// may stand on it: the caller knows.
    pub fn remove(&self, chain_id: &ChainId) -> Result<(), LayerError> {
        let inner = &self.inner;
        let trashed = {
            let mut layers = inner.layers();
            stave_state::remove(&inner.record(chain_id))?;
            layers.remove(chain_id);
            inner.trash(FS, OsStr::new(&chain_id.0.hex()))?
        };
        match trashed {
            Some(name) => inner.delete(TRASH, &name),
            None => Ok(()),
        }
    }
}

impl Inner {
    fn layers(&self) -> MutexGuard<'_, BTreeMap<ChainId, Layer>> {
        // Every change of the map is a single insert or remove: a panic can't leave it half-done.
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dir(&self, name: &str) -> PathBuf {
        self.top.join(name)
    }

    fn record(&self, chain_id: &ChainId) -> PathBuf {
        self.dir(RECORDS).join(format!("{}.json", chain_id.0.hex()))
    }

    fn unique(&self) -> OsString {
        // Both directories are emptied when the store is opened.
        self.next.fetch_add(1, Ordering::Relaxed).to_string().into()
    }

    fn load(&self) -> Result<(), LayerError> {
        self.clear(STAGING)?;
        self.clear(TRASH)?;
        let mut layers = self.layers();
        for (stem, layer) in stave_state::load_dir::<Layer>(&self.dir(RECORDS)).records {
            let whole = layer.chain_id.0.hex() == stem && self.dir(FS).join(&stem).is_dir();
            if whole {
                layers.insert(layer.chain_id, layer);
            } else {
                tracing::warn!(record = stem, "record without its layer: removed");
                stave_state::remove(&self.dir(RECORDS).join(format!("{stem}.json")))?;
            }
        }
        // A layer whose parent is gone can't be used by any image.
        let known: std::collections::BTreeSet<OsString> = layers.keys().map(|c| c.0.hex().into()).collect();
        for name in self.names(FS)? {
            if !known.contains(&name) {
                tracing::warn!(layer = %name.display(), "layer without a record: deleted");
                self.delete(FS, &name)?;
            }
        }
        Ok(())
    }

    fn names(&self, dir: &str) -> Result<Vec<OsString>, LayerError> {
        let path = self.dir(dir);
        let fail = |source| LayerError::Io { call: "getdents64", path: path.clone(), source };
        std::fs::read_dir(&path)
            .map_err(fail)?
            .map(|entry| entry.map(|e| e.file_name()).map_err(fail))
            .collect()
    }

    fn clear(&self, dir: &str) -> Result<(), LayerError> {
        for name in self.names(dir)? {
            self.delete(dir, &name)?;
        }
        Ok(())
    }

    fn delete(&self, dir: &str, name: &OsStr) -> Result<(), LayerError> {
        Ok(remove_tree(Root::open(&self.dir(dir))?.fd(), name)?)
    }

    /// Deletes what is no longer wanted; a failure is only logged, the next start tries again.
    fn discard(&self, dir: &str, name: &OsStr) {
        let deleted = match self.trash(dir, name) {
            Ok(Some(name)) => self.delete(TRASH, &name),
            other => other.map(drop),
        };
        if let Err(error) = deleted {
            tracing::warn!(%error, dir, name = %name.display(), "delete unpacked files");
        }
    }

    /// Moves something to the trash; `None` if it isn't there.
    fn trash(&self, dir: &str, name: &OsStr) -> Result<Option<OsString>, LayerError> {
        stave_paths::check_component(name)?;
        let from = self.dir(dir).join(name);
        let trashed = self.unique();
        match rustix::fs::rename(&from, self.dir(TRASH).join(&trashed)) {
            Ok(()) => Ok(Some(trashed)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(io("rename", &from)(e)),
        }
    }

    fn sync_dir(&self, dir: &str) -> Result<(), LayerError> {
        let path = self.dir(dir);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&path, flags, Mode::empty()).map_err(io("open", &path))?;
        rustix::fs::fsync(&fd).map_err(io("fsync", &path))
    }
}
