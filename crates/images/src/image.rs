//! An image and its record.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use stave_layers::{ChainId, Digest};

use crate::manifest::Config;

/// What an image says about how to run it (OCI image spec, config.md), as containers need it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// `Entrypoint`.
    pub entrypoint: Vec<String>,
    /// `Cmd`.
    pub cmd: Vec<String>,
    /// `Env`, each `NAME=value`.
    pub env: Vec<String>,
    /// `User`: `user`, `uid`, `user:group`, `uid:gid`, ... or empty.
    pub user: String,
    /// `WorkingDir`, or empty.
    pub working_dir: String,
    /// `Volumes`: paths in the container.
    pub volumes: Vec<String>,
    /// `ExposedPorts`, each `port/protocol`.
    pub exposed_ports: Vec<String>,
    /// `StopSignal`: a name or number, or empty.
    pub stop_signal: String,
    /// `Labels`.
    pub labels: BTreeMap<String, String>,
}

/// An image in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// `sha256:…`, the digest of the image config.
    pub id: String,
    /// Normalised `domain/path:tag`, sorted.
    pub repo_tags: Vec<String>,
    /// Normalised `domain/path@sha256:…`, sorted.
    pub repo_digests: Vec<String>,
    /// Bytes of the unpacked layers (apparent sizes of the files) and of the config.
    pub size: u64,
    /// The layers' chain ids, bottom first.
    pub chain: Vec<String>,
    /// The part of the config that containers need.
    pub config: ImageConfig,
    /// The config as pulled, JSON text.
    pub raw_config: String,
    /// `os` of the config.
    pub os: String,
    /// `architecture` of the config.
    pub architecture: String,
    /// When it was made, as the config says it (RFC 3339), or empty.
    pub created: String,
    /// Never removed, and skipped by the kubelet's garbage collection.
    pub pinned: bool,
    pub(crate) chain_ids: Vec<ChainId>,
    pub(crate) digest: Digest,
}

impl Image {
    /// An image without names.
    pub(crate) fn new(digest: Digest, raw_config: String, config: Config, size: u64) -> Image {
        Image {
            id: digest.to_string(),
            repo_tags: Vec::new(),
            repo_digests: Vec::new(),
            size,
            chain: config.chain.iter().map(ToString::to_string).collect(),
            config: config.config,
            raw_config,
            os: config.os,
            architecture: config.architecture,
            created: config.created,
            pinned: false,
            chain_ids: config.chain,
            digest,
        }
    }

    /// Adds the names under which it was pulled.
    pub(crate) fn name(&mut self, tag: Option<String>, digest: String) {
        for (names, name) in [(&mut self.repo_tags, tag), (&mut self.repo_digests, Some(digest))] {
            if let Some(name) = name
                && let Err(at) = names.binary_search(&name)
            {
                names.insert(at, name);
            }
        }
    }
}
