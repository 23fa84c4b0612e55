//! How pods get on the network: one of the configured modes.

use std::os::fd::OwnedFd;

use stave_cni::Cni;
use stave_cri_proto::v1 as cri;
use stave_network::{BridgeGuard, BridgeNetwork, NetworkError, PortMapping, PreparedLink};

use crate::bandwidth::Bandwidth;
use crate::error::{Code, Error, Result};
use crate::host_ports::port_mappings;
use crate::record::PodRecord;

/// The network of pods that have one of their own.
pub enum Network {
    /// The built-in bridge.
    Bridge(BridgeNetwork),
    /// The administrator's CNI plugins.
    Cni(Cni),
    /// Pods have a loopback device and nothing else.
    None,
    /// The mode is not built, or its set-up failed: why. Pods on the host's network still run.
    Unready(String),
}

impl Network {
    /// Why pods can't get on the network, if they can't.
    pub async fn status(&self) -> std::result::Result<(), String> {
        match self {
            Self::Bridge(bridge) => bridge.status().await.map_err(|e| e.to_string()),
            Self::Cni(cni) => cni.status(),
            Self::None => Ok(()),
            Self::Unready(why) => Err(why.clone()),
        }
    }

    /// Takes the node's ranges for pods from UpdateRuntimeConfig: one a family.
    pub(crate) async fn set_pod_cidrs(&self, cidrs: &[String]) -> Result<()> {
        match self {
            Self::Bridge(bridge) => bridge.set_ranges(cidrs).await.map_err(|e| {
                let code = match &e {
                    NetworkError::Config { .. } => Code::InvalidArgument,
                    NetworkError::Ranges { .. } | NetworkError::Collision { .. } => Code::FailedPrecondition,
                    _ => Code::Internal,
                };
                Error::new(code, format!("runtime_config.network_config.pod_cidr: {e}"))
            }),
            Self::Cni(cni) => cni.set_pod_cidrs(cidrs).await.map_err(|e| crate::cni::error(&e)),
            // Whether there is a network or not, its ranges are not this node's to give.
            Self::None | Self::Unready(_) => Ok(()),
        }
    }

    /// Fails early, before anything is made for a pod.
    pub(crate) async fn check(&self, config: &cri::PodSandboxConfig) -> Result<()> {
        match self {
            Self::Cni(cni) => {
                crate::cni::pod("", config)?;
                cni.ready().await.map_err(|e| crate::cni::error(&e))
            }
            Self::Unready(why) => Err(Error::new(Code::FailedPrecondition, format!("network: {why}"))),
            Self::Bridge(bridge) => {
                limits(config)?;
                let bridge = get(bridge).await?;
                bridge.check_ports(&port_mappings(config)?).map_err(|e| attach_error(&e))
            }
            Self::None => Ok(()),
        }
    }

    /// Pods get host ports here.
    pub(crate) fn has_host_ports(&self) -> bool {
        matches!(self, Self::Bridge(_) | Self::Cni(_))
    }

    /// Puts a pod on the network. Gives its addresses, the primary one first. On an error nothing is left, or it is
    /// left to [`Self::detach`].
    pub(crate) async fn attach(&self, pod: Attach<'_>) -> Result<Vec<String>> {
        match self {
            Self::Bridge(bridge) => {
                let attached =
                    get(bridge).await?.attach(pod.id, pod.netns, pod.ports, limits(pod.config)?).await;
                let attachment = attached.map_err(|e| attach_error(&e))?;
                Ok(attachment.ips.iter().map(ToString::to_string).collect())
            }
            Self::Cni(cni) => {
                let attached = cni.attach(&crate::cni::pod(pod.id, pod.config)?, pod.netns).await;
                let ips = attached.map_err(|e| crate::cni::error(&e))?;
                Ok(ips.iter().map(ToString::to_string).collect())
            }
            Self::None => Ok(Vec::new()),
            Self::Unready(_) => self.check(pod.config).await.map(|()| Vec::new()),
        }
    }

    /// Makes what can be made for a pod to come. None: this mode makes all with the pod.
    pub(crate) async fn prepare(&self, netns: OwnedFd) -> Result<Option<Prepared>> {
        match self {
            Self::Bridge(bridge) => {
                // Without its ranges yet, it makes the interface with the pod, too.
                let Ok(bridge) = bridge.get().await else { return Ok(None) };
                let link = bridge.prepare(netns).await;
                link.map(|link| Some(Prepared::Link(link))).map_err(|e| Error::internal("network", e))
            }
            Self::Cni(_) => Ok(Some(Prepared::Namespace(netns))),
            Self::None | Self::Unready(_) => Ok(None),
        }
    }

    /// Like [`Self::attach`], with what [`Self::prepare`] gave.
    pub(crate) async fn attach_prepared(
        &self,
        id: &str,
        config: &cri::PodSandboxConfig,
        prepared: Prepared,
        ports: &[PortMapping],
    ) -> Result<Vec<String>> {
        match (self, prepared) {
            (_, Prepared::Namespace(netns)) => self.attach(Attach { id, config, netns, ports }).await,
            (Self::Bridge(bridge), Prepared::Link(link)) => {
                let attached = get(bridge).await?.attach_prepared(id, link, ports, limits(config)?).await;
                let attachment = attached.map_err(|e| attach_error(&e))?;
                Ok(attachment.ips.iter().map(ToString::to_string).collect())
            }
            _ => Err(Error::new(Code::Internal, "network: this mode prepares no interfaces")),
        }
    }

    /// Tries to set up again what could not be set up. True: it is there now, and was not before.
    pub(crate) async fn reopen(&self) -> bool {
        match self {
            Self::Bridge(bridge) => bridge.reopen().await,
            Self::Cni(_) | Self::None | Self::Unready(_) => false,
        }
    }

    /// Sees to it that pods which an earlier daemon attached have what their records say, before anybody else gets it.
    pub(crate) async fn resume(&self, record: &PodRecord) -> Result<()> {
        let Self::Bridge(bridge) = self else { return Ok(()) };
        // Without its ranges there is nothing to give.
        let Ok(bridge) = bridge.get().await else { return Ok(()) };
        let ips: Vec<_> = record.ips.iter().filter_map(|ip| ip.parse().ok()).collect();
        if record.torn_down || record.host_network() || ips.is_empty() {
            return Ok(());
        }
        let resumed =
            bridge.resume(&record.id, &ips, &port_mappings(&record.config)?, limits(&record.config)?).await;
        resumed.map(drop).map_err(|e| Error::internal("network", e))
    }

    /// Cuts a pod off whose processes have ended; success when it has nothing. `config` is the pod's, where its record
    /// is there. The rest may go on in the background.
    pub(crate) async fn detach(&self, pod_id: &str, config: Option<&cri::PodSandboxConfig>) -> Result<()> {
        match self {
            Self::Bridge(bridge) => match bridge.get().await {
                Ok(bridge) => bridge.retire(pod_id).await.map_err(|e| Error::internal("network", e)),
                // Nothing is attached to one that is not there.
                Err(_) => Ok(()),
            },
            Self::Cni(cni) => {
                let pod = config.and_then(|config| crate::cni::pod(pod_id, config).ok());
                cni.detach(pod_id, pod.as_ref()).await.map_err(|e| crate::cni::error(&e))
            }
            Self::None | Self::Unready(_) => Ok(()),
        }
    }

    /// Waits until nothing of a pod is left that was detached.
    pub(crate) async fn settle(&self, pod_id: &str) -> Result<()> {
        match self {
            Self::Bridge(bridge) => match bridge.get().await {
                Ok(bridge) => bridge.detach(pod_id).await.map_err(|e| Error::internal("network", e)),
                Err(_) => Ok(()),
            },
            // Its detach leaves nothing to the background.
            Self::Cni(_) | Self::None | Self::Unready(_) => Ok(()),
        }
    }

    /// Waits for what goes on in the background, when the daemon stops. What is left then, the next one finds.
    pub(crate) async fn drain(&self, limit: std::time::Duration) {
        if let Self::Bridge(bridge) = self
            && let Ok(bridge) = bridge.get().await
            && !bridge.drain(limit).await
        {
            tracing::warn!("some interfaces of stopped pods are still there after {limit:?}");
        }
    }

    /// Pods that have something here.
    pub(crate) async fn attached(&self) -> Vec<String> {
        match self {
            Self::Bridge(bridge) => match bridge.get().await {
                Ok(bridge) => bridge.attached().await,
                Err(_) => Vec::new(),
            },
            Self::Cni(cni) => cni.attached(),
            Self::None | Self::Unready(_) => Vec::new(),
        }
    }
}

impl Network {
    /// The pods that are gone have been detached: what a network does after a restart can begin.
    pub(crate) fn recovered(&self) {
        if let Self::Cni(cni) = self {
            cni.recovered();
        }
    }

    /// The configuration of CNI in use and whether it can be used, for verbose Status.
    pub fn cni(&self) -> Option<(serde_json::Value, std::result::Result<(), String>)> {
        match self {
            Self::Cni(cni) => Some((cni.describe(), cni.status())),
            _ => None,
        }
    }

    /// What the CNI plugins answered for a pod.
    pub fn cni_result(&self, pod_id: &str) -> Option<serde_json::Value> {
        match self {
            Self::Cni(cni) => cni.result(pod_id),
            _ => None,
        }
    }
}

/// What a network has of a pod to come, in the namespace of a ready supervisor.
pub(crate) enum Prepared {
    /// Mode "bridge": the interface.
    Link(PreparedLink),
    /// Mode "cni": the namespace, for the plugins.
    Namespace(OwnedFd),
}

impl Prepared {
    /// False: somebody has taken it away.
    pub(crate) fn exists(&self) -> bool {
        match self {
            Self::Link(link) => link.exists(),
            Self::Namespace(_) => true,
        }
    }
}

/// What a network is told of a pod that it is to attach.
pub(crate) struct Attach<'a> {
    pub(crate) id: &'a str,
    pub(crate) config: &'a cri::PodSandboxConfig,
    pub(crate) netns: OwnedFd,
    /// Of its `port_mappings`, those with a host port.
    pub(crate) ports: &'a [PortMapping],
}

/// What a pod may send and receive.
fn limits(config: &cri::PodSandboxConfig) -> Result<stave_network::Bandwidth> {
    let Bandwidth { ingress, egress } = Bandwidth::of(&config.annotations)?;
    Ok(stave_network::Bandwidth { ingress, egress })
}

async fn get(bridge: &BridgeNetwork) -> Result<BridgeGuard<'_>> {
    bridge.get().await.map_err(|e| Error::new(Code::FailedPrecondition, format!("network: {e}")))
}

/// Whose fault it is that a pod gets no network.
fn attach_error(error: &NetworkError) -> Error {
    let (code, what) = match error {
        NetworkError::PortMapping { .. } => (Code::InvalidArgument, "config.port_mappings"),
        NetworkError::PortInUse { .. } => (Code::FailedPrecondition, "config.port_mappings"),
        NetworkError::Exhausted { .. } => (Code::ResourceExhausted, "network"),
        _ => (Code::Internal, "network"),
    };
    Error::new(code, format!("{what}: {error}"))
}
