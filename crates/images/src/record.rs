//! Records of images: one file each, `<config digest>.json`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use stave_layers::{ChainId, Digest, Store};
use stave_state::Durability;

use crate::{Image, ImageError, manifest};

/// What is on disk about an image; everything else follows from the config.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    id: Digest,
    repo_tags: Vec<String>,
    repo_digests: Vec<String>,
    chain: Vec<ChainId>,
    size: u64,
    #[serde(default)]
    pinned: bool,
    /// When the names last changed, in nanoseconds since 1970: of two images with one tag the later
    /// one has it.
    named_at: u64,
    /// The config as pulled.
    config: String,
}

/// The directory of the records.
#[derive(Debug)]
pub(crate) struct Records {
    dir: PathBuf,
}

impl Records {
    /// Opens the directory and reads all records. What can't be used is set aside, and logged.
    pub(crate) fn open(
        dir: PathBuf,
        store: &Store,
    ) -> Result<(Records, BTreeMap<Digest, Arc<Image>>), ImageError> {
        stave_state::private_dir(&dir)?;
        let records = Records { dir };
        let mut loaded: Vec<(u64, Image)> = Vec::new();
        for (stem, record) in stave_state::load_dir::<Record>(&records.dir).records {
            match image(&stem, record, store) {
                Ok(image) => loaded.push(image),
                Err(error) => {
                    tracing::warn!(record = stem, %error, "image record can't be used: set aside");
                    records.set_aside(&stem);
                }
            }
        }
        loaded.sort_by_key(|(named_at, _)| *named_at);
        let mut images: BTreeMap<Digest, Arc<Image>> = BTreeMap::new();
        for (_, image) in loaded {
            // A crash between the two writes of a tag that moved.
            for other in images.values_mut() {
                if other.repo_tags.iter().any(|tag| image.repo_tags.contains(tag)) {
                    let other = Arc::make_mut(other);
                    other.repo_tags.retain(|tag| !image.repo_tags.contains(tag));
                }
            }
            images.insert(image.digest, Arc::new(image));
        }
        Ok((records, images))
    }

    fn path(&self, id: &Digest) -> PathBuf {
        self.dir.join(format!("{}.json", id.hex()))
    }

    fn set_aside(&self, stem: &str) {
        let name = format!("{stem}.json");
        let broken = self.dir.join(stave_state::BROKEN);
        let moved = stave_state::private_dir(&broken).map_err(|e| e.to_string()).and_then(|()| {
            std::fs::rename(self.dir.join(&name), broken.join(&name)).map_err(|e| e.to_string())
        });
        if let Err(error) = moved {
            tracing::warn!(record = stem, %error, "set a record aside");
        }
    }

    /// Writes a record; it is on disk when this returns.
    pub(crate) fn write(&self, image: &Image) -> Result<(), ImageError> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let record = Record {
            id: image.digest,
            repo_tags: image.repo_tags.clone(),
            repo_digests: image.repo_digests.clone(),
            chain: image.chain_ids.clone(),
            size: image.size,
            pinned: image.pinned,
            named_at: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            config: image.raw_config.clone(),
        };
        Ok(stave_state::write_json(&self.path(&image.digest), &record, Durability::Fsync)?)
    }

    /// Removes a record; one that is gone is success.
    pub(crate) fn remove(&self, id: &Digest) -> Result<(), ImageError> {
        Ok(stave_state::remove_durably(&self.path(id))?)
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }
}

fn image(stem: &str, record: Record, store: &Store) -> Result<(u64, Image), ImageError> {
    if record.id.hex() != stem {
        return Err(ImageError::internal(format!("it is the record of {}", record.id)));
    }
    if Digest::of(record.config.as_bytes()) != record.id {
        return Err(ImageError::internal("its config has another digest"));
    }
    if let Some(missing) = record.chain.iter().find(|chain| !store.has(chain)) {
        return Err(ImageError::internal(format!("layer {missing} is missing; pull the image again")));
    }
    let config = manifest::config(&record.config)?;
    if config.chain != record.chain {
        return Err(ImageError::internal("its layers are not those of its config"));
    }
    let mut image = Image::new(record.id, record.config, config, record.size);
    image.repo_tags = record.repo_tags;
    image.repo_digests = record.repo_digests;
    image.pinned = record.pinned;
    Ok((record.named_at, image))
}
