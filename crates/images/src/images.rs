//! The image store.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared};
use stave_layers::{ChainId, Digest, Store};

use crate::progress::JobState;
use crate::pull::{blocking, pull};
use crate::record::Records;
use crate::registry::Patience;
use crate::{Auth, ErrorKind, Image, ImageError, PullState, Reference};

/// Use of the disk by images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsInfo {
    /// The store's directory: on the file system that holds the images.
    pub mountpoint: PathBuf,
    /// Bytes used by layers and configs.
    pub used_bytes: u64,
    /// Inodes used by layers.
    pub inodes_used: u64,
}

/// The images of this node. Cheap to clone; all clones are one store.
#[derive(Clone)]
pub struct Images {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) store: Store,
    pub(crate) records: Records,
    pub(crate) config_dir: PathBuf,
    pub(crate) patience: Arc<Patience>,
    /// Held while names change and their records are written.
    pub(crate) naming: tokio::sync::Mutex<()>,
    /// Held while layers are collected, and while new claims on layers are made.
    collecting: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    jobs: Mutex<HashMap<JobKey, Job>>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) images: BTreeMap<Digest, Arc<Image>>,
    /// Layers that containers use, by container id.
    holds: HashMap<String, Vec<ChainId>>,
    /// Layers that running pulls need.
    pins: HashMap<u64, Vec<ChainId>>,
    next_pin: u64,
    /// Layers that are being deleted.
    doomed: BTreeSet<ChainId>,
}

type JobKey = (Reference, Option<Auth>);
type Pulling = BoxFuture<'static, Result<Arc<Image>, ImageError>>;

struct Job {
    /// Weak: the job lives as long as somebody waits for it.
    future: WeakShared<Pulling>,
    state: Arc<JobState>,
}

impl Images {
    /// Opens the store below `root`. Records that can't be read are set aside and logged.
    /// `registries_config_dir` holds `<host>/hosts.toml` files; it is read at each pull.
    pub async fn open(root: &Path, registries_config_dir: &Path) -> Result<Images, ImageError> {
        Images::open_with(root, registries_config_dir, Patience::default()).await
    }

    /// As [`Images::open`], with time limits of one's own.
    pub async fn open_with(
        root: &Path,
        registries_config_dir: &Path,
        patience: Patience,
    ) -> Result<Images, ImageError> {
        let root = root.to_owned();
        let opened = blocking(move || {
            let store = Store::open(&root)?;
            let (records, images) = Records::open(root.join("images"), &store)?;
            Ok((store, records, images))
        });
        let (store, records, images) = opened.await?;
        let inner = Inner {
            store,
            records,
            config_dir: registries_config_dir.to_owned(),
            patience: Arc::new(patience),
            naming: tokio::sync::Mutex::default(),
            collecting: tokio::sync::Mutex::default(),
            state: Mutex::new(State { images, ..State::default() }),
            jobs: Mutex::default(),
        };
        Ok(Images { inner: Arc::new(inner) })
    }

    /// Pulls an image, or joins the running pull of the same reference and credentials. The pull is
    /// cancelled when the last waiter is dropped.
    pub async fn pull(&self, reference: &str, auth: Option<Auth>) -> Result<Arc<Image>, ImageError> {
        let reference = Reference::parse(reference)?;
        let auth = auth.filter(|auth| *auth != Auth::default());
        self.join((reference, auth)).await
    }

    fn join(&self, key: JobKey) -> Shared<Pulling> {
        let mut jobs = self.inner.jobs();
        jobs.retain(|_, job| job.is_running());
        if let Some(running) = jobs.get(&key).and_then(|job| job.future.upgrade()) {
            return running;
        }
        let state = Arc::new(JobState::new(key.0.to_string()));
        let future = pull(self.inner.clone(), key.0.clone(), key.1.clone(), state.clone()).boxed().shared();
        if let Some(weak) = future.downgrade() {
            jobs.insert(key, Job { future: weak, state });
        }
        future
    }

    /// The running pulls.
    pub fn pulls(&self) -> Vec<PullState> {
        let jobs = self.inner.jobs();
        let mut pulls: Vec<_> =
            jobs.values().filter(|job| job.is_running()).map(|job| job.state.state()).collect();
        pulls.sort_by(|a, b| a.reference.cmp(&b.reference));
        pulls
    }

    /// All images, sorted by id.
    pub fn list(&self) -> Vec<Arc<Image>> {
        self.inner.state().images.values().cloned().collect()
    }

    /// Finds an image by id (with or without `sha256:`, or a unique prefix of at least 3 digits), by
    /// tag, by `repository@digest`, or by familiar forms of those (`busybox`).
    pub fn find(&self, name: &str) -> Option<Arc<Image>> {
        self.inner.state().find(name)
    }

    /// Removes the image that `name` finds, with all its names. None found is success. Layers that no
    /// other image uses and nobody holds are deleted.
    pub async fn remove(&self, name: &str) -> Result<(), ImageError> {
        let (inner, name) = (self.inner.clone(), name.to_owned());
        // A client that goes away does not stop it half-way.
        let removing = tokio::spawn(async move {
            {
                let _turn = inner.naming.lock().await;
                let Some(image) = inner.state().find(&name) else { return Ok(()) };
                let (records, id) = (inner.clone(), image.digest);
                blocking(move || records.records.remove(&id)).await?;
                inner.state().images.remove(&image.digest);
            }
            inner.collect().await
        });
        removing.await.map_err(|e| ImageError::internal(e.to_string()))?
    }

    /// Keeps the image's layers on disk for `owner` (a container id), whatever happens to the image.
    /// In memory only: after a restart it must be done again, before anything is removed.
    pub fn hold(&self, owner: &str, image: &Image) -> Result<(), ImageError> {
        self.inner.hold(owner, &image.chain_ids)
    }

    /// As [`Images::hold`], for an image that may be gone: `chain` is its [`Image::chain`].
    pub fn hold_chain(&self, owner: &str, chain: &[String]) -> Result<(), ImageError> {
        let chain = chain.iter().map(|id| Ok(id.parse()?)).collect::<Result<Vec<ChainId>, ImageError>>()?;
        self.inner.hold(owner, &chain)
    }

    /// Ends what [`Images::hold`] began; deletes layers that nobody needs any more.
    pub async fn release(&self, owner: &str) {
        let held = self.inner.state().holds.remove(owner);
        // As long as all of them belong to an image there is nothing to collect.
        let Some(held) = held else { return };
        let needed = self.inner.state().needed();
        if held.iter().all(|chain| needed.contains(chain)) {
            return;
        }
        let inner = self.inner.clone();
        let collecting = tokio::spawn(async move { inner.collect().await });
        if let Ok(Err(error)) = collecting.await {
            tracing::warn!(%error, owner, "delete layers that nobody needs");
        }
    }

    /// The directories of the image's layers, top first, as overlayfs wants its lower directories.
    pub fn layer_dirs(&self, image: &Image) -> Vec<PathBuf> {
        image.chain_ids.iter().rev().map(|chain| self.inner.store.dir(chain)).collect()
    }

    /// The lower directories of an overlay without an upper one, top first, for an image that may be gone: `chain` is its
    /// [`Image::chain`]. Below a single layer is an empty directory, since overlayfs wants two.
    pub fn volume_dirs(&self, chain: &[String]) -> Result<Vec<PathBuf>, ImageError> {
        let layers = chain.iter().rev().map(|id| Ok(self.inner.store.dir(&id.parse()?)));
        let mut dirs = layers.collect::<Result<Vec<_>, ImageError>>()?;
        if dirs.len() == 1 {
            dirs.push(self.inner.store.empty_dir());
        }
        Ok(dirs)
    }

    /// Use of the disk, from the records: no scan.
    pub fn fs_info(&self) -> FsInfo {
        let layers = self.inner.store.list();
        let configs: u64 =
            self.inner.state().images.values().map(|image| image.raw_config.len() as u64).sum();
        FsInfo {
            mountpoint: self.inner.records.dir().to_owned(),
            used_bytes: layers.iter().map(|layer| layer.size).sum::<u64>() + configs,
            inodes_used: layers.iter().map(|layer| layer.inodes).sum(),
        }
    }
}

impl Job {
    fn is_running(&self) -> bool {
        self.future.upgrade().is_some_and(|future| future.peek().is_none())
    }
}

/// A claim of a running pull on its layers.
pub(crate) struct Pin {
    inner: Arc<Inner>,
    number: u64,
}

impl Drop for Pin {
    fn drop(&mut self) {
        let unneeded = {
            let mut state = self.inner.state();
            let Some(chain) = state.pins.remove(&self.number) else { return };
            let needed = state.needed();
            chain.iter().any(|chain| !needed.contains(chain) && self.inner.store.has(chain))
        };
        // The pull failed or was given up after it had committed some layers.
        if let (true, Ok(runtime)) = (unneeded, tokio::runtime::Handle::try_current()) {
            let inner = self.inner.clone();
            runtime.spawn(async move {
                if let Err(error) = inner.collect().await {
                    tracing::warn!(%error, "delete the layers of a broken pull");
                }
            });
        }
    }
}

impl Inner {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn jobs(&self) -> MutexGuard<'_, HashMap<JobKey, Job>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims layers for a pull, whether they are there yet or not.
    pub(crate) async fn pin(self: &Arc<Self>, chain: &[ChainId]) -> Pin {
        // Waits for a collection that may be deleting some of them.
        let _turn = self.collecting.lock().await;
        let mut state = self.state();
        state.next_pin += 1;
        let number = state.next_pin;
        state.pins.insert(number, chain.to_vec());
        drop(state);
        Pin { inner: self.clone(), number }
    }

    fn hold(&self, owner: &str, chain: &[ChainId]) -> Result<(), ImageError> {
        let mut state = self.state();
        if let Some(gone) = chain.iter().find(|c| state.doomed.contains(c) || !self.store.has(c)) {
            return Err(ImageError::new(ErrorKind::NotFound, format!("layer {gone} has been removed")));
        }
        state.holds.insert(owner.to_owned(), chain.to_vec());
        Ok(())
    }

    /// Deletes the layers that nobody needs, those on top first. Goes on past errors.
    async fn collect(self: &Arc<Self>) -> Result<(), ImageError> {
        let _turn = self.collecting.lock().await;
        let layers = self.store.list();
        let mut unneeded: Vec<_> = {
            let mut state = self.state();
            let needed = state.needed();
            let unneeded: Vec<_> = layers.into_iter().filter(|l| !needed.contains(&l.chain_id)).collect();
            state.doomed = unneeded.iter().map(|layer| layer.chain_id).collect();
            unneeded
        };
        let inner = self.clone();
        let removed = blocking(move || {
            let mut first_error = None;
            while !unneeded.is_empty() {
                let parents: BTreeSet<_> = unneeded.iter().filter_map(|layer| layer.parent).collect();
                let (tops, rest): (Vec<_>, Vec<_>) =
                    unneeded.into_iter().partition(|layer| !parents.contains(&layer.chain_id));
                if tops.is_empty() {
                    return Err(ImageError::internal("layers that stand on each other"));
                }
                for layer in tops {
                    if let Err(e) = inner.store.remove(&layer.chain_id) {
                        tracing::warn!(layer = %layer.chain_id, error = %e, "delete a layer");
                        first_error.get_or_insert(e);
                    }
                }
                unneeded = rest;
            }
            first_error.map_or(Ok(()), |e| Err(e.into()))
        })
        .await;
        self.state().doomed.clear();
        removed
    }
}

impl State {
    /// Layers that images, containers and pulls need.
    fn needed(&self) -> BTreeSet<ChainId> {
        let images = self.images.values().flat_map(|image| &image.chain_ids);
        images.chain(self.holds.values().flatten()).chain(self.pins.values().flatten()).copied().collect()
    }

    fn find(&self, name: &str) -> Option<Arc<Image>> {
        let hex = name.strip_prefix("sha256:").unwrap_or(name);
        if let Ok(id) = Digest::from_hex(hex) {
            return self.images.get(&id).cloned();
        }
        if let Ok(reference) = Reference::parse(name) {
            let found = match reference.digest() {
                Some(digest) => {
                    let digest = format!("{}@{digest}", reference.repository());
                    self.images.values().find(|image| image.repo_digests.contains(&digest))
                }
                None => {
                    let tag = reference.to_string();
                    self.images.values().find(|image| image.repo_tags.contains(&tag))
                }
            };
            if found.is_some() {
                return found.cloned();
            }
        }
        if hex.len() < 3 || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        let mut matching = self.images.values().filter(|image| image.digest.hex().starts_with(hex));
        matching.next().filter(|_| matching.next().is_none()).cloned()
    }
}
