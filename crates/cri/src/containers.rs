//! The container RPCs.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::{Value, json};
use stave_cri_proto::v1 as cri;
use stave_pods::{ContainerFilter, ContainerRecord, ContainerState};
use tonic::Status;

use crate::Services;
use crate::info::info;
use crate::status::{missing, pod_error};

impl Services {
    pub(crate) async fn create(
        &self,
        request: cri::CreateContainerRequest,
    ) -> Result<cri::CreateContainerResponse, Status> {
        let config = request.config.ok_or_else(|| missing("config"))?;
        let container_id = self.0.pods.create(&request.pod_sandbox_id, config).await.map_err(pod_error)?;
        Ok(cri::CreateContainerResponse { container_id })
    }

    pub(crate) async fn stop_container(&self, request: cri::StopContainerRequest) -> Result<(), Status> {
        let seconds = u64::try_from(request.timeout)
            .map_err(|_| Status::invalid_argument(format!("timeout {}: is negative", request.timeout)))?;
        self.0
            .pods
            .stop_container(&request.container_id, Duration::from_secs(seconds))
            .await
            .map_err(pod_error)
    }

    pub(crate) fn list_containers(&self, filter: Option<cri::ContainerFilter>) -> Vec<cri::Container> {
        let filter = filter.unwrap_or_default();
        // CONTAINER_UNKNOWN is a state that no container of ours is in.
        let state = match filter.state.map(|state| state.state()) {
            None => None,
            Some(cri::ContainerState::ContainerCreated) => Some(ContainerState::Created),
            Some(cri::ContainerState::ContainerRunning) => Some(ContainerState::Running),
            Some(cri::ContainerState::ContainerExited) => Some(ContainerState::Exited),
            Some(cri::ContainerState::ContainerUnknown) => return Vec::new(),
        };
        let filter = ContainerFilter {
            id: filter.id,
            pod_id: filter.pod_sandbox_id,
            state,
            labels: filter.label_selector,
        };
        self.0.pods.list_containers(&filter).into_iter().map(entry).collect()
    }

    pub(crate) async fn container_status(
        &self,
        request: cri::ContainerStatusRequest,
    ) -> Result<cri::ContainerStatusResponse, Status> {
        let (record, pid) = self.0.pods.container(&request.container_id).map_err(pod_error)?;
        let info = if request.verbose { self.container_info(&record, pid).await? } else { HashMap::new() };
        Ok(cri::ContainerStatusResponse { status: Some(status(record)), info })
    }

    pub(crate) async fn update_container(
        &self,
        request: cri::UpdateContainerResourcesRequest,
    ) -> Result<(), Status> {
        if request.windows.is_some() {
            return Err(Status::invalid_argument("windows: containers here run on Linux"));
        }
        let linux = request.linux.unwrap_or_default();
        self.0.pods.update_container(&request.container_id, linux).await.map_err(pod_error)
    }

    async fn container_info(
        &self,
        record: &ContainerRecord,
        pid: i32,
    ) -> Result<HashMap<String, String>, Status> {
        // Absent after a reboot: then the status still answers.
        let spec = self
            .0
            .pods
            .oci_spec(record)
            .await
            .ok()
            .and_then(|text| serde_json::from_str::<Value>(&text).ok());
        info(&json!({
            "sandboxID": record.pod_id,
            "pid": pid,
            "bundle": self.0.pods.bundle(record),
            "cgroup": self.0.pods.cgroup(record),
            "layers": record.chain,
            "config": record.config,
            "runtimeSpec": spec,
        }))
    }
}

fn state(record: &ContainerRecord) -> cri::ContainerState {
    match record.state {
        ContainerState::Created => cri::ContainerState::ContainerCreated,
        ContainerState::Running => cri::ContainerState::ContainerRunning,
        ContainerState::Exited => cri::ContainerState::ContainerExited,
    }
}

fn entry(record: ContainerRecord) -> cri::Container {
    cri::Container {
        state: state(&record).into(),
        id: record.id,
        pod_sandbox_id: record.pod_id,
        metadata: Some(record.config.metadata.unwrap_or_default()),
        image: Some(record.config.image.unwrap_or_default()),
        image_ref: record.image_ref,
        created_at: record.created_at,
        labels: record.config.labels,
        annotations: record.config.annotations,
        image_id: record.image_id,
    }
}

fn status(mut record: ContainerRecord) -> cri::ContainerStatus {
    // As requested, but that the kubelet compares the images with the ids that ListImages gives.
    for volume in std::mem::take(&mut record.image_volumes) {
        if let Some(image) = record.config.mounts.get_mut(volume.mount).and_then(|mount| mount.image.as_mut())
        {
            image.image.clone_from(&volume.image_id);
            image.image_ref = volume.image_id;
        }
    }
    let state = state(&record).into();
    let requested = record.config.image.unwrap_or_default();
    cri::ContainerStatus {
        state,
        id: record.id,
        metadata: Some(record.config.metadata.unwrap_or_default()),
        created_at: record.created_at,
        started_at: record.started_at,
        finished_at: record.finished_at,
        exit_code: record.exit_code,
        image: Some(cri::ImageSpec { image: record.image_name, ..requested }),
        image_ref: record.image_ref,
        reason: record.reason,
        message: record.message,
        labels: record.config.labels,
        annotations: record.config.annotations,
        mounts: record.config.mounts,
        log_path: record.log_path,
        resources: Some(cri::ContainerResources { linux: record.resources, windows: None }),
        image_id: record.image_id,
        user: Some(cri::ContainerUser {
            linux: Some(cri::LinuxContainerUser {
                uid: record.uid.into(),
                gid: record.gid.into(),
                supplemental_groups: record.groups.iter().map(|gid| (*gid).into()).collect(),
            }),
        }),
        stop_signal: record.stop_signal_cri,
    }
}
