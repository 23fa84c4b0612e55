//! One layer: downloaded, verified and unpacked in one stream.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use stave_layers::{Cancel, Digest, LayerError, Staged, Store};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::manifest::LayerBlob;
use crate::progress::{JobState, LayerStage};
use crate::registry::{Patience, Registry};
use crate::{ErrorKind, ImageError};

/// A staged layer that an async task holds. Deleting one blocks, so that is done elsewhere.
pub(crate) struct Held(Option<Staged>);

impl Held {
    pub(crate) fn into_inner(mut self) -> Option<Staged> {
        self.0.take()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let (Some(staged), Ok(runtime)) = (self.0.take(), tokio::runtime::Handle::try_current()) {
            runtime.spawn_blocking(move || drop(staged));
        }
    }
}

/// Cancels the unpacking when the task that waits for it is dropped.
struct CancelOnDrop(Cancel);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Downloads and unpacks a layer. A cut connection is resumed where it broke, with the same host or
/// the next; content with a wrong digest is thrown away and tried again from the next host.
pub(crate) async fn layer(
    registries: &[Registry],
    blob: &LayerBlob,
    diff_id: &Digest,
    store: &Store,
    patience: &Patience,
    job: &JobState,
    index: usize,
) -> Result<Held, ImageError> {
    let mut order: Vec<&Registry> = registries.iter().filter(|r| r.host().pull).collect();
    let tries = order.len().max(2);
    let mut last = ImageError::new(ErrorKind::Configuration, "no host with the capability \"pull\"");
    for _ in 0..if order.is_empty() { 0 } else { tries } {
        job.received(index, 0);
        match once(&order, blob, diff_id, store, patience, job, index).await {
            Err(e) if e.kind() == ErrorKind::DigestMismatch => {
                tracing::warn!(layer = %blob.digest, error = %e, "downloaded layer is not what it should be");
                last = e;
                order.rotate_left(1);
            }
            other => return other,
        }
    }
    Err(last)
}

async fn once(
    registries: &[&Registry],
    blob: &LayerBlob,
    diff_id: &Digest,
    store: &Store,
    patience: &Patience,
    job: &JobState,
    index: usize,
) -> Result<Held, ImageError> {
    let (sender, receiver) = mpsc::channel(16);
    let cancel = CancelOnDrop(Cancel::new());
    let corrupt = Arc::new(AtomicBool::new(false));
    let mut reader = Body::new(receiver, blob.digest, corrupt.clone());
    let unpacking = tokio::task::spawn_blocking({
        let (store, cancel, diff_id, compression) =
            (store.clone(), cancel.0.clone(), *diff_id, blob.compression);
        move || {
            let result = store.unpack(&mut reader, compression, &diff_id, &cancel);
            if let Err(LayerError::Read(_) | LayerError::BadArchive { .. }) = &result {
                // Is it the archive, or has the download been tampered with? The end tells.
                let _ = io::copy(&mut reader, &mut io::sink());
            }
            result.map(|staged| Held(Some(staged)))
        }
    });
    let fed = feed(registries, blob, sender, patience, job, index).await;
    let unpacked =
        unpacking.await.map_err(|e| ImageError::internal(format!("unpack {}: {e}", blob.digest)))?;
    if corrupt.load(Ordering::Relaxed) {
        let what = format!("layer {}: content has another digest", blob.digest);
        return Err(ImageError::new(ErrorKind::DigestMismatch, what));
    }
    let place = format_args!("layer {}", blob.digest).to_string();
    match (fed, unpacked) {
        (Ok(Fed::All), Ok(held)) => {
            job.stage(index, LayerStage::Unpacked);
            Ok(held)
        }
        // What stopped the unpacking also stopped the feeding.
        (Ok(_), Err(e)) => Err(ImageError::from(e).context(place)),
        (Err(e), _) => Err(e.context(place)),
        (Ok(Fed::Unwanted), Ok(_)) => Err(ImageError::internal(format!("{place}: unpacked before its end"))),
    }
}

/// Bytes after which a broken connection does not count against its host.
const WORTH_A_TRY: u64 = 8 << 20;

enum Item {
    Bytes(Bytes),
    End,
}

enum Fed {
    All,
    /// The other side has stopped reading.
    Unwanted,
}

async fn feed(
    registries: &[&Registry],
    blob: &LayerBlob,
    sender: mpsc::Sender<Item>,
    patience: &Patience,
    job: &JobState,
    index: usize,
) -> Result<Fed, ImageError> {
    let mut offset = 0u64;
    let mut last = None;
    for registry in registries {
        let mut backoff = patience.backoff;
        let mut attempt = 0;
        while attempt < patience.attempts {
            let before = offset;
            match stream(registry, blob, &sender, &mut offset, job, index).await {
                Ok(Fed::Unwanted) => return Ok(Fed::Unwanted),
                Ok(Fed::All) => {
                    let wanted = sender.send(Item::End).await.is_ok();
                    return Ok(if wanted { Fed::All } else { Fed::Unwanted });
                }
                Err(e) => {
                    tracing::debug!(layer = %blob.digest, host = %registry.host().url, error = %e, offset, "download broke off");
                    let retry = e.kind() == ErrorKind::RegistryUnavailable;
                    last = Some(e);
                    if !retry {
                        break;
                    }
                    // A host that brought much before it broke off is worth another try.
                    attempt = if offset - before > WORTH_A_TRY { 1 } else { attempt + 1 };
                    if attempt < patience.attempts {
                        tokio::time::sleep(backoff).await;
                        backoff = (backoff * 2).min(Duration::from_secs(10));
                    }
                }
            }
        }
    }
    Err(last.unwrap_or_else(|| ImageError::internal("no host")))
}

async fn stream(
    registry: &Registry,
    blob: &LayerBlob,
    sender: &mpsc::Sender<Item>,
    offset: &mut u64,
    job: &JobState,
    index: usize,
) -> Result<Fed, ImageError> {
    if *offset >= blob.size {
        return Ok(Fed::All);
    }
    let mut download = registry.blob(&blob.digest, *offset).await?;
    while let Some(chunk) = download.chunk().await? {
        *offset += chunk.len() as u64;
        if *offset > blob.size {
            let what =
                format!("{} sent more than the {} bytes of the manifest", registry.host().url, blob.size);
            return Err(ImageError::new(ErrorKind::DigestMismatch, what));
        }
        job.received(index, *offset);
        let sending = Instant::now();
        if sender.send(Item::Bytes(chunk)).await.is_err() {
            return Ok(Fed::Unwanted);
        }
        download.pause(sending.elapsed());
    }
    if *offset < blob.size {
        let what = format!("{} sent {} of {} bytes", registry.host().url, offset, blob.size);
        return Err(ImageError::new(ErrorKind::RegistryUnavailable, what));
    }
    Ok(Fed::All)
}

/// The compressed bytes for the unpacking thread; verified at their end, which is an error if the
/// digest is wrong or the download broke off.
struct Body {
    receiver: mpsc::Receiver<Item>,
    chunk: Bytes,
    hasher: Option<Sha256>,
    expected: Digest,
    corrupt: Arc<AtomicBool>,
    ended: bool,
}

impl Body {
    fn new(receiver: mpsc::Receiver<Item>, expected: Digest, corrupt: Arc<AtomicBool>) -> Body {
        Body { receiver, chunk: Bytes::new(), hasher: Some(Sha256::new()), expected, corrupt, ended: false }
    }
}

impl Read for Body {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() {
            if self.ended {
                return Ok(0);
            }
            match self.receiver.blocking_recv() {
                Some(Item::Bytes(chunk)) => {
                    if let Some(hasher) = &mut self.hasher {
                        hasher.update(&chunk);
                    }
                    self.chunk = chunk;
                }
                Some(Item::End) => {
                    let right = self.hasher.take().is_some_and(|h| Digest::from_hasher(h) == self.expected);
                    if !right {
                        self.corrupt.store(true, Ordering::Relaxed);
                        return Err(io::Error::new(io::ErrorKind::InvalidData, "wrong digest"));
                    }
                    self.ended = true;
                }
                None => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "download broke off")),
            }
        }
        let n = buf.len().min(self.chunk.len());
        buf[..n].copy_from_slice(&self.chunk.split_to(n));
        Ok(n)
    }
}
