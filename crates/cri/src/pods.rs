//! The sandbox RPCs.

use std::collections::HashMap;

use serde_json::json;
use stave_cri_proto::v1 as cri;
use stave_pods::{PodFilter, PodRecord, PodState};
use tonic::Status;

use crate::Services;
use crate::info::info;
use crate::status::{missing, pod_error};

impl Services {
    pub(crate) async fn run_pod(
        &self,
        request: cri::RunPodSandboxRequest,
    ) -> Result<cri::RunPodSandboxResponse, Status> {
        let config = request.config.ok_or_else(|| missing("config"))?;
        let pod_sandbox_id = self.0.pods.run(config, request.runtime_handler).await.map_err(pod_error)?;
        Ok(cri::RunPodSandboxResponse { pod_sandbox_id })
    }

    pub(crate) async fn pod_status(
        &self,
        request: cri::PodSandboxStatusRequest,
    ) -> Result<cri::PodSandboxStatusResponse, Status> {
        let (record, pid) = self.0.pods.pod(&request.pod_sandbox_id).map_err(pod_error)?;
        let linux = record.config.linux.as_ref();
        let info = if request.verbose {
            info(&json!({
                "pid": pid,
                "cgroup": record.cgroup,
                "runtimeHandler": record.runtime_handler,
                "oci": record.oci,
                "overhead": record.overhead.as_ref().or_else(|| linux.and_then(|linux| linux.overhead.as_ref())),
                "resources": record.resources.as_ref().or_else(|| linux.and_then(|linux| linux.resources.as_ref())),
                "cniResult": self.0.pods.network().cni_result(&record.id),
                "config": record.config,
            }))?
        } else {
            HashMap::new()
        };
        Ok(cri::PodSandboxStatusResponse {
            status: Some(status(record)),
            info,
            containers_statuses: Vec::new(),
            timestamp: 0,
        })
    }

    pub(crate) fn update_pod(&self, request: cri::UpdatePodSandboxResourcesRequest) -> Result<(), Status> {
        self.0
            .pods
            .update_pod(&request.pod_sandbox_id, request.overhead, request.resources)
            .map_err(pod_error)
    }

    pub(crate) fn list_pods(&self, filter: Option<cri::PodSandboxFilter>) -> Vec<cri::PodSandbox> {
        let filter = filter.unwrap_or_default();
        let filter = PodFilter {
            id: filter.id,
            ready: filter.state.map(|state| state.state() == cri::PodSandboxState::SandboxReady),
            labels: filter.label_selector,
        };
        self.0.pods.list(&filter).into_iter().map(entry).collect()
    }
}

fn state(record: &PodRecord) -> cri::PodSandboxState {
    match record.state {
        PodState::Ready => cri::PodSandboxState::SandboxReady,
        PodState::Creating | PodState::NotReady => cri::PodSandboxState::SandboxNotready,
    }
}

fn entry(record: PodRecord) -> cri::PodSandbox {
    cri::PodSandbox {
        state: state(&record).into(),
        id: record.id,
        metadata: Some(record.config.metadata.unwrap_or_default()),
        created_at: record.created_at,
        labels: record.config.labels,
        annotations: record.config.annotations,
        runtime_handler: record.runtime_handler,
    }
}

fn status(record: PodRecord) -> cri::PodSandboxStatus {
    let options = record
        .config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|context| context.namespace_options.clone())
        .unwrap_or_default();
    let mut ips = record.ips.iter().cloned();
    let network = cri::PodSandboxNetworkStatus {
        ip: ips.next().unwrap_or_default(),
        additional_ips: ips.map(|ip| cri::PodIp { ip }).collect(),
    };
    let state = state(&record).into();
    cri::PodSandboxStatus {
        id: record.id,
        metadata: Some(record.config.metadata.unwrap_or_default()),
        state,
        created_at: record.created_at,
        network: Some(network),
        // Echoed whole: the kubelet compares it with what the pod asks for.
        linux: Some(cri::LinuxPodSandboxStatus {
            namespaces: Some(cri::Namespace { options: Some(options) }),
        }),
        labels: record.config.labels,
        annotations: record.config.annotations,
        runtime_handler: record.runtime_handler,
    }
}
