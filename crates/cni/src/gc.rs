//! GC and CHECK, after a restart.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::{Map, json};

use crate::attachment::INTERFACE;
use crate::chain::Chain;
use crate::cni::{Inner, PREVIOUS, lock};
use crate::config::Network;
use crate::exec::Runner;
use crate::{CniError, Version};

/// GC keeps all pods from being attached and detached: it has less time than these.
const GC_LIMIT: Duration = Duration::from_secs(20);
/// It waits for those under way, and all that come meanwhile wait behind it. One that takes longer is let pass.
const PATIENCE: Duration = Duration::from_secs(1);
/// One that failed is tried again after this, and so many times what it took: pods are kept waiting seldom.
const REST: Duration = Duration::from_secs(10);
const REST_FACTOR: u32 = 30;

/// The network that GC was last run for.
#[derive(Debug)]
pub(crate) struct Collected {
    name: String,
    version: Version,
    /// When it is to be tried again; none: it did all.
    again: Option<Instant>,
}

impl Inner {
    /// Lets the plugins free what no pod has, once after a restart and for a network that is new since, as soon as there is one
    /// that has GC. Called by one task only.
    pub(crate) async fn collect_once(&self) {
        let Some(network) = self.readiness().network.clone() else { return };
        if !self.recovered.load(Ordering::Acquire)
            || network.version < Version::V1_1_0
            || network.disable_gc
            || lock(&self.collected).as_ref().is_some_and(|collected| {
                collected.name == network.name
                    && collected.version == network.version
                    && collected.again.is_none_or(|again| Instant::now() < again)
            })
        {
            return;
        }
        // The specification: no ADD and no DEL meanwhile. So the list is complete, too.
        let Ok(_alone) = tokio::time::timeout(PATIENCE, self.collecting.write()).await else {
            tracing::debug!(
                network = network.name,
                "garbage collection waits for pods that are being attached"
            );
            return;
        };
        let began = Instant::now();
        let failed = self.collect(&network).await.err();
        if let Some(error) = &failed {
            tracing::warn!(%error, network = network.name, "garbage collection of the CNI network");
        }
        let again = failed.map(|_| Instant::now() + REST.max(began.elapsed() * REST_FACTOR));
        let (name, version) = (network.name.clone(), network.version);
        *lock(&self.collected) = Some(Collected { name, version, again });
    }

    /// The caller holds [`Inner::collecting`].
    async fn collect(&self, network: &Network) -> Result<(), CniError> {
        let attachments = self.all();
        let valid: BTreeSet<_> = attachments
            .iter()
            .filter(|attachment| attachment.network.name == network.name)
            .map(|attachment| (attachment.pod_id.clone(), attachment.interface.clone()))
            .chain(self.unrecorded().into_iter().map(|id| (id, INTERFACE.to_owned())))
            .collect();
        let valid: Vec<_> =
            valid.iter().map(|(id, name)| json!({ "containerID": id, "ifname": name })).collect();
        tracing::info!(network = network.name, valid = valid.len(), "garbage collection of the CNI network");
        let runner = Runner { limit: self.runner.limit.min(GC_LIMIT), ..self.runner.clone() };
        // The second name is what plugins of the first libraries with GC read.
        let more = ["cni.dev/valid-attachments", "cni.dev/attachments"].map(|key| (key, json!(valid)));
        let chain = Chain {
            runner: &runner,
            network,
            command: "GC",
            environment: &[],
            capabilities: &Map::new(),
            more: more.into(),
            guard: None,
            unwanted: None,
        };
        chain.run_all(network.plugins.iter()).await
    }

    /// Asks the plugins whether all is as they made it. Nothing is changed. A pod that is detached meanwhile is success.
    pub(crate) async fn check(&self, pod_id: &str) -> Result<(), CniError> {
        let Some(turn) = self.get(pod_id).map(|attachment| Arc::clone(&attachment.turn)) else {
            return Ok(());
        };
        let _turn = turn.busy.lock().await;
        let unwanted = turn.leaving.subscribe();
        // What it is now: this may have waited for the end of ADD or DEL.
        let Some(attachment) = self.get(pod_id).filter(|_| !*unwanted.borrow()) else { return Ok(()) };
        let network = &attachment.network;
        let Some(result) = &attachment.result else { return Ok(()) };
        if network.version < Version::V0_4_0 || network.disable_check {
            return Ok(());
        }
        let environment = attachment.environment(&attachment.netns);
        let chain = Chain {
            runner: &self.runner,
            network,
            command: "CHECK",
            environment: &environment,
            capabilities: &attachment.capabilities,
            more: [(PREVIOUS, result.clone())].into(),
            guard: None,
            unwanted: Some(unwanted),
        };
        match chain.run_until_failure().await {
            Err(CniError::Unwanted { .. }) => Ok(()),
            checked => checked,
        }
    }

    /// Checks all pods, one at a time: nobody waits for it.
    pub(crate) async fn check_all(self: Arc<Self>) {
        for attachment in self.all() {
            if let Err(error) = self.check(&attachment.pod_id).await {
                tracing::warn!(pod = attachment.pod_id, %error, "the pod's network is not as its plugins made it");
            }
        }
    }
}
