//! The bridge of a node whose ranges for pods may come from the kubelet: there is none before.

use std::path::{Path, PathBuf};

use stave_state::Durability;
use tokio::sync::{Mutex, RwLock, RwLockReadGuard};

use crate::bridge::{blocking, check_config};
use crate::{Bridge, BridgeConfig, NetworkError};

/// The record, beside the leases. No `.json`: those are all leases.
const RECORD: &str = "ranges";

/// See the module.
#[derive(Debug)]
pub struct BridgeNetwork {
    config: BridgeConfig,
    leases: PathBuf,
    state: RwLock<State>,
    changes: Mutex<()>,
}

#[derive(Debug)]
enum State {
    Open(Box<Bridge>, Vec<String>),
    /// why there is no bridge
    Closed(String),
}

/// The bridge, which stays the same as long as this is held.
#[derive(Debug)]
pub struct BridgeGuard<'a>(RwLockReadGuard<'a, Bridge>);

impl std::ops::Deref for BridgeGuard<'_> {
    type Target = Bridge;

    fn deref(&self) -> &Bridge {
        &self.0
    }
}

impl BridgeNetwork {
    /// Opens the bridge with the subnets of the configuration; where that has none, with those that the kubelet told an
    /// earlier daemon. Where it can't be opened now, [`Self::reopen`] tries again.
    pub async fn open(config: BridgeConfig, leases: &Path) -> Result<Self, NetworkError> {
        if !config.subnets.is_empty() {
            check_config(&config)?;
        }
        let network = Self {
            config,
            leases: leases.to_owned(),
            state: RwLock::new(State::Closed(UNTOLD.to_owned())),
            changes: Mutex::default(),
        };
        network.reopen().await;
        if let State::Closed(why) = &*network.state.read().await {
            tracing::warn!(why, "pods can't get on the bridge network yet");
        }
        Ok(network)
    }

    /// Opens a bridge that could not be opened before: what was in the way may be gone. True: it is open now, and was not.
    pub async fn reopen(&self) -> bool {
        let _one_at_a_time = self.changes.lock().await;
        if self.get().await.is_ok() {
            return false;
        }
        let opened = match self.known().await {
            Ok(None) => return false,
            Ok(Some(ranges)) => match Bridge::open(&with(&self.config, &ranges), &self.leases).await {
                Ok(bridge) => State::Open(Box::new(bridge), ranges),
                Err(error) => State::Closed(error.to_string()),
            },
            // The kubelet tells it again when it starts, and when it hears of the node.
            Err(error) => State::Closed(format!("{UNTOLD}; {error}")),
        };
        let is_open = matches!(opened, State::Open(..));
        *self.state.write().await = opened;
        is_open
    }

    /// The ranges for pods, if there are any yet.
    async fn known(&self) -> Result<Option<Vec<String>>, NetworkError> {
        if !self.config.subnets.is_empty() {
            return Ok(Some(self.config.subnets.clone()));
        }
        let record = self.leases.join(RECORD);
        blocking(move || Ok(stave_state::read_json(&record)?)).await
    }

    /// The bridge, or why there is none.
    pub async fn get(&self) -> Result<BridgeGuard<'_>, NetworkError> {
        let state = self.state.read().await;
        RwLockReadGuard::try_map(state, |state| match state {
            State::Open(bridge, _) => Some(&**bridge),
            State::Closed(_) => None,
        })
        .map(BridgeGuard)
        .map_err(|state| match &*state {
            State::Closed(why) => NetworkError::NotReady(why.clone()),
            State::Open(..) => NetworkError::NotReady(String::new()),
        })
    }

    /// Takes the node's ranges for pods, one a family, and keeps them over restarts. The same ones again are success. Others
    /// are refused while pods have addresses, and where the configuration has subnets.
    pub async fn set_ranges(&self, ranges: &[String]) -> Result<(), NetworkError> {
        let _one_at_a_time = self.changes.lock().await;
        let refused = |why: String| NetworkError::Ranges { ranges: ranges.join(","), why };
        let same = |other: &[String]| other.iter().all(|o| ranges.contains(o)) && other.len() == ranges.len();
        if !self.config.subnets.is_empty() {
            if same(&self.config.subnets) {
                return Ok(());
            }
            let subnets = self.config.subnets.join(",");
            return Err(refused(format!(
                "network.bridge.subnets is {subnets}; [] takes what the kubelet tells"
            )));
        }
        check_config(&with(&self.config, ranges))?;
        // Whoever puts a pod on the bridge is waited for; nobody begins before this has come to its end.
        let mut state = self.state.write().await;
        if let State::Open(bridge, now) = &*state {
            if now.as_slice() == ranges {
                return Ok(());
            }
            let pods = bridge.attached().await;
            if let Some(first) = pods.first() {
                let now = now.join(",");
                return Err(refused(format!(
                    "{} pods have addresses of {now}, {first} one of them",
                    pods.len()
                )));
            }
        }
        // First, so that a repeat after a failure writes it again: ranges in use are success at once.
        let (leases, kept) = (self.leases.clone(), ranges.to_vec());
        blocking(move || {
            stave_state::private_dir(&leases)?;
            Ok(stave_state::write_json(&leases.join(RECORD), &kept, Durability::Fsync)?)
        })
        .await?;
        let why = "the node's ranges for pods are being changed".to_owned();
        if let State::Open(bridge, _) = std::mem::replace(&mut *state, State::Closed(why)) {
            bridge.close().await?;
        }
        match Bridge::open(&with(&self.config, ranges), &self.leases).await {
            Ok(bridge) => *state = State::Open(Box::new(bridge), ranges.to_vec()),
            Err(error) => {
                *state = State::Closed(error.to_string());
                return Err(error);
            }
        }
        tracing::info!(?ranges, "the bridge network has the node's ranges");
        Ok(())
    }
}

#[cfg(test)]
impl BridgeNetwork {
    /// What a change holds.
    pub(crate) async fn hold(&self) -> impl Sized + '_ {
        self.state.write().await
    }
}

const UNTOLD: &str = "network.bridge.subnets is empty, and the kubelet has not told the node's ranges for pods \
                      (UpdateRuntimeConfig)";

fn with(config: &BridgeConfig, ranges: &[String]) -> BridgeConfig {
    BridgeConfig { name: config.name.clone(), subnets: ranges.to_vec() }
}
