//! One pull, from the reference to the record.

use std::sync::Arc;

use futures::stream::{FuturesUnordered, StreamExt};
use stave_layers::{ChainId, Digest};
use tokio::sync::Semaphore;

use crate::download::{self, Held};
use crate::hosts::{Host, hosts};
use crate::images::{Inner, Pin};
use crate::manifest::{self, ACCEPT, Config, Document, MAX_MANIFEST, Manifest};
use crate::progress::{JobState, LayerProgress, LayerStage};
use crate::registry::Registry;
use crate::{Auth, ErrorKind, Image, ImageError, Reference};

/// Layers downloaded and unpacked at once, for one pull.
const PARALLEL_LAYERS: usize = 3;
/// An index may name an index.
const MAX_NESTING: usize = 3;

pub(crate) async fn pull(
    inner: Arc<Inner>,
    reference: Reference,
    auth: Option<Auth>,
    job: Arc<JobState>,
) -> Result<Arc<Image>, ImageError> {
    let place = format!("pull {reference}");
    run(&inner, &reference, auth.as_ref(), &job).await.map_err(|e| e.context(place))
}

async fn run(
    inner: &Arc<Inner>,
    reference: &Reference,
    auth: Option<&Auth>,
    job: &JobState,
) -> Result<Arc<Image>, ImageError> {
    let (dir, domain) = (inner.config_dir.clone(), reference.domain().to_owned());
    let hosts: Vec<Host> = blocking(move || hosts(&dir, &domain)).await?;
    let mut registries = Vec::with_capacity(hosts.len());
    for host in hosts {
        let (reference, auth, patience) = (reference.clone(), auth.cloned(), inner.patience.clone());
        // It reads the certificates of the system.
        registries.push(blocking(move || Registry::new(host, &reference, auth.as_ref(), patience)).await?);
    }

    let (top, manifest) = resolve(inner, &registries, reference).await?;
    let raw_config = config(inner, &registries, &manifest).await?;
    let config = manifest::config(&raw_config)?;
    if config.diff_ids.len() != manifest.layers.len() {
        let what = format!("{} layers, but {} diff_ids", manifest.layers.len(), config.diff_ids.len());
        return Err(ImageError::new(ErrorKind::InvalidImage, what));
    }
    // From here until the record is written nobody may collect these layers.
    let pin = inner.pin(&config.chain).await;
    layers(inner, &registries, &manifest, &config, job).await?;

    job.named("recording");
    let tag = reference.tag().filter(|_| reference.digest().is_none());
    let tag = tag.map(|tag| format!("{}:{tag}", reference.repository()));
    let digest = format!("{}@{top}", reference.repository());
    let image = record(inner.clone(), pin, manifest.config, raw_config, config, tag, digest);
    // Not to be broken off half-way, by whomever: a task of its own.
    tokio::spawn(image).await.map_err(|e| ImageError::internal(format!("record: {e}")))?
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    tokio::task::spawn_blocking(work).await.map_err(|e| ImageError::internal(e.to_string()))?
}

/// Asks the hosts in turn for a small document and checks its digest.
async fn document(
    inner: &Inner,
    registries: &[Registry],
    kind: &str,
    what: &str,
    digest: Option<&Digest>,
) -> Result<(Vec<u8>, Option<String>, Digest), ImageError> {
    let mut last = None;
    for registry in registries {
        let host = registry.host();
        if !(if digest.is_some() { host.pull } else { host.resolve }) {
            continue;
        }
        let mut backoff = inner.patience.backoff;
        for attempt in 0..inner.patience.attempts {
            if attempt > 0 {
                tokio::time::sleep(backoff).await;
                backoff *= 2;
            }
            let accept = if kind == "manifests" { ACCEPT } else { "*/*" };
            let error = match registry.document(kind, what, accept, MAX_MANIFEST).await {
                Ok((body, content_type)) => {
                    let found = Digest::of(&body);
                    match digest {
                        Some(wanted) if *wanted != found => {
                            let what = format!("{}: {kind}/{what} has the digest {found}", host.url);
                            ImageError::new(ErrorKind::DigestMismatch, what)
                        }
                        _ => return Ok((body, content_type, found)),
                    }
                }
                Err(e) => e,
            };
            tracing::debug!(host = %host.url, %error, attempt, "no answer to use");
            let again = error.kind() == ErrorKind::RegistryUnavailable;
            last = Some(error);
            if !again {
                break;
            }
        }
    }
    Err(last.unwrap_or_else(|| {
        let capability = if digest.is_some() { "pull" } else { "resolve" };
        ImageError::new(ErrorKind::Configuration, format!("no host with the capability {capability:?}"))
    }))
}

/// The digest that the reference stands for, and the manifest for this platform.
async fn resolve(
    inner: &Inner,
    registries: &[Registry],
    reference: &Reference,
) -> Result<(Digest, Manifest), ImageError> {
    let mut wanted = reference.digest().copied();
    let mut top = None;
    for _ in 0..MAX_NESTING {
        let what = match (&wanted, reference.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.to_owned(),
            (None, None) => return Err(ImageError::internal("a reference without tag and digest")),
        };
        let (body, content_type, found) =
            document(inner, registries, "manifests", &what, wanted.as_ref()).await?;
        let top = *top.get_or_insert(found);
        match manifest::parse(&body, content_type.as_deref())? {
            Document::Manifest(manifest) => return Ok((top, manifest)),
            Document::Index(digest) => wanted = Some(digest),
        }
    }
    Err(ImageError::new(ErrorKind::InvalidImage, format!("indexes nested more than {MAX_NESTING} deep")))
}

async fn config(inner: &Inner, registries: &[Registry], manifest: &Manifest) -> Result<String, ImageError> {
    let what = manifest.config.to_string();
    let (body, _, _) = document(inner, registries, "blobs", &what, Some(&manifest.config)).await?;
    if body.len() as u64 != manifest.config_size {
        let what = format!("config of {} bytes, the manifest says {}", body.len(), manifest.config_size);
        return Err(ImageError::new(ErrorKind::InvalidImage, what));
    }
    String::from_utf8(body).map_err(|_| ImageError::new(ErrorKind::InvalidImage, "image config: not UTF-8"))
}

/// Downloads and unpacks what is missing, in parallel; commits in order.
async fn layers(
    inner: &Inner,
    registries: &[Registry],
    manifest: &Manifest,
    config: &Config,
    job: &JobState,
) -> Result<(), ImageError> {
    let count = manifest.layers.len();
    let waiting = |layer: &manifest::LayerBlob| LayerProgress {
        digest: layer.digest.to_string(),
        total: layer.size,
        done: 0,
        stage: LayerStage::Waiting,
    };
    job.begin(manifest.layers.iter().map(waiting).collect());
    let permits = Semaphore::new(PARALLEL_LAYERS);
    let mut downloads = FuturesUnordered::new();
    for (index, (blob, diff_id)) in manifest.layers.iter().zip(&config.diff_ids).enumerate() {
        if inner.store.has(&config.chain[index]) {
            job.stage(index, LayerStage::Done);
            continue;
        }
        let permits = &permits;
        downloads.push(async move {
            let _permit = permits.acquire().await.map_err(|e| ImageError::internal(e.to_string()))?;
            let held =
                download::layer(registries, blob, diff_id, &inner.store, &inner.patience, job, index).await?;
            Ok::<_, ImageError>((index, held))
        });
    }
    let mut staged: Vec<Option<Held>> = (0..count).map(|_| None).collect();
    let mut next = 0;
    loop {
        while next < count {
            if inner.store.has(&config.chain[next]) {
                job.stage(next, LayerStage::Done);
            } else if let Some(held) = staged[next].take() {
                job.named(format!("committing layer {}/{count}", next + 1));
                commit(inner, held, &config.chain[..next]).await?;
                job.stage(next, LayerStage::Done);
            } else {
                break;
            }
            next += 1;
        }
        match downloads.next().await {
            Some(done) => {
                let (index, held) = done?;
                staged[index] = Some(held);
            }
            None if next == count => return Ok(()),
            None => return Err(ImageError::internal(format!("layer {} was not downloaded", next + 1))),
        }
    }
}

async fn commit(inner: &Inner, held: Held, parents: &[ChainId]) -> Result<(), ImageError> {
    let (store, parents) = (inner.store.clone(), parents.to_vec());
    blocking(move || {
        let staged = held.into_inner().ok_or_else(|| ImageError::internal("a layer staged twice"))?;
        store.commit(staged, &parents)?;
        Ok(())
    })
    .await
}

/// Writes the record, the last step: from now on the image exists.
async fn record(
    inner: Arc<Inner>,
    pin: Pin,
    id: Digest,
    raw_config: String,
    config: Config,
    tag: Option<String>,
    digest: String,
) -> Result<Arc<Image>, ImageError> {
    // The lock also orders the writes of records of one image.
    let _turn = inner.naming.lock().await;
    let size = raw_config.len() as u64
        + config
            .chain
            .iter()
            .filter_map(|chain| inner.store.layer(chain))
            .map(|layer| layer.size)
            .sum::<u64>();
    let mut image = match inner.state().images.get(&id) {
        Some(known) => Image::clone(known),
        None => Image::new(id, raw_config, config, size),
    };
    image.name(tag.clone(), digest);
    let image = Arc::new(image);
    let loser = tag.and_then(|tag| {
        let state = inner.state();
        let old = state.images.values().find(|old| old.digest != id && old.repo_tags.contains(&tag))?;
        let mut old = Image::clone(old);
        old.repo_tags.retain(|t| *t != tag);
        Some(Arc::new(old))
    });
    let written = blocking({
        let (inner, image, loser) = (inner.clone(), image.clone(), loser.clone());
        move || {
            inner.records.write(&image)?;
            loser.map_or(Ok(()), |old| inner.records.write(&old))
        }
    })
    .await;
    if let Err(e) = written {
        if !inner.state().images.contains_key(&id) {
            // The record may be there, if only the second write failed.
            let _ = blocking({
                let inner = inner.clone();
                move || inner.records.remove(&id)
            })
            .await;
        }
        return Err(e);
    }
    let mut state = inner.state();
    state.images.insert(id, image.clone());
    if let Some(old) = loser {
        state.images.insert(old.digest, old);
    }
    drop(state);
    drop(pin);
    Ok(image)
}
