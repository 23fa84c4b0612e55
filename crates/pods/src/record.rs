//! What is known of a pod and of a container, as written to disk.

use crate::runtimes::OciRuntime;
use serde::{Deserialize, Serialize};
use stave_cri_proto::v1 as cri;

/// Life of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PodState {
    /// RunPodSandbox is at work; a pod found in this state at start is taken down.
    Creating,
    /// Set up; its supervisor runs.
    Ready,
    /// Being stopped, stopped, or without its supervisor.
    NotReady,
}

/// One pod: `<root>/records/pods/<id>.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodRecord {
    /// 64 hex digits.
    pub id: String,
    /// As requested.
    pub config: cri::PodSandboxConfig,
    /// As requested; "" is the default.
    pub runtime_handler: String,
    /// Unix time in ns.
    pub created_at: i64,
    /// Where in its life it is.
    pub state: PodState,
    /// Addresses, the primary one first; empty with host network.
    pub ips: Vec<String>,
    /// The pod's cgroup, relative to the hierarchies' roots.
    pub cgroup: String,
    /// The cgroup is the kubelet's, and stays when the pod goes.
    pub cgroup_is_foreign: bool,
    /// Network, mounts and cgroups are gone: nothing is left to stop.
    pub torn_down: bool,
    /// The SELinux level of its containers, which no other pod has; empty where SELinux is off.
    #[serde(default)]
    pub selinux_level: String,
    /// What its RuntimeClass adds, as last told by UpdatePodSandboxResources; none: see the config.
    #[serde(default)]
    pub overhead: Option<cri::LinuxContainerResources>,
    /// The sums over its containers, likewise.
    #[serde(default)]
    pub resources: Option<cri::LinuxContainerResources>,
    /// The OCI runtime that makes its containers; none: the built-in executor. As configured when it was made.
    #[serde(default)]
    pub oci: Option<OciRuntime>,
    /// Most processes and threads of a container, likewise.
    #[serde(default)]
    pub pids_limit: Option<i64>,
}

/// Life of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerState {
    /// Made, waiting for StartContainer.
    Created,
    /// Started.
    Running,
    /// Over, or never started because the start failed.
    Exited,
}

/// One container: `<root>/records/containers/<id>.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// 64 hex digits.
    pub id: String,
    /// Its pod.
    pub pod_id: String,
    /// As requested.
    pub config: cri::ContainerConfig,
    /// `Image.id`: digest of the image's configuration.
    pub image_id: String,
    /// `repo@sha256:…`, or the id of an image without digest.
    pub image_ref: String,
    /// A name for people: the first tag, or what was requested.
    pub image_name: String,
    /// Layers in use, bottom first: they outlive the image's removal.
    pub chain: Vec<String>,
    /// Unix times in ns; 0: not yet.
    pub created_at: i64,
    /// See `created_at`.
    pub started_at: i64,
    /// See `created_at`.
    pub finished_at: i64,
    /// Where in its life it is.
    pub state: ContainerState,
    /// Exit status, or 128 + signal.
    pub exit_code: i32,
    /// One word: Completed, Error, OOMKilled, StartError, Unknown.
    pub reason: String,
    /// A sentence, where there is one.
    pub message: String,
    /// Absolute; empty: no log.
    pub log_path: String,
    /// As resolved in the container.
    pub uid: u32,
    /// As resolved in the container.
    pub gid: u32,
    /// As resolved in the container, `gid` included.
    pub groups: Vec<u32>,
    /// Number of the signal that asks it to stop.
    pub stop_signal: i32,
    /// The same in the API's numbers.
    pub stop_signal_cri: i32,
    /// As last applied.
    pub resources: Option<cri::LinuxContainerResources>,
    /// An update of the resources that is under way: what was asked for. A daemon that finds one ends it.
    #[serde(default)]
    pub update: Option<cri::LinuxContainerResources>,
    /// Images mounted into it.
    #[serde(default)]
    pub image_volumes: Vec<ImageVolume>,
}

/// An image mounted into a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageVolume {
    /// Index of the mount in the container's config.
    pub mount: usize,
    /// `Image.id`.
    pub image_id: String,
    /// Its layers, bottom first: they outlive the image's removal.
    pub chain: Vec<String>,
}

impl PodRecord {
    /// What no two pods may share.
    pub(crate) fn key(&self) -> String {
        pod_key(&self.config)
    }

    /// The namespaces that it shares with the node.
    pub(crate) fn namespaces(&self) -> cri::NamespaceOption {
        namespaces(&self.config)
    }

    /// As the kubelet gave it; "" for the default.
    pub(crate) fn cgroup_parent(&self) -> &str {
        self.config.linux.as_ref().map_or("", |linux| linux.cgroup_parent.as_str())
    }

    /// The node's network.
    pub(crate) fn host_network(&self) -> bool {
        self.namespaces().network() == cri::NamespaceMode::Node
    }
}

impl ContainerRecord {
    /// All layers that it uses.
    pub(crate) fn layers(&self) -> Vec<String> {
        crate::image_volumes::layers(&self.chain, &self.image_volumes)
    }

    /// What no two containers of a pod may share.
    pub(crate) fn key(&self) -> String {
        container_key(&self.pod_id, &self.config)
    }
}

pub(crate) fn pod_key(config: &cri::PodSandboxConfig) -> String {
    let metadata = config.metadata.clone().unwrap_or_default();
    format!("pod {}/{} uid {} attempt {}", metadata.namespace, metadata.name, metadata.uid, metadata.attempt)
}

pub(crate) fn container_key(pod_id: &str, config: &cri::ContainerConfig) -> String {
    let metadata = config.metadata.clone().unwrap_or_default();
    format!("container {} attempt {} in pod {pod_id}", metadata.name, metadata.attempt)
}

pub(crate) fn namespaces(config: &cri::PodSandboxConfig) -> cri::NamespaceOption {
    config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|context| context.namespace_options.clone())
        .unwrap_or_default()
}
