//! Looking: lists and status, answered from memory.

use crate::error::{Error, Result};
use crate::pods::Pods;
use crate::record::{ContainerRecord, ContainerState, PodRecord, PodState};
use std::collections::HashMap;
use std::path::PathBuf;

/// Which pods to list; empty fields match all. Fields are joined by AND.
#[derive(Clone, Debug, Default)]
pub struct PodFilter {
    /// An id, or the start of one.
    pub id: String,
    /// True: ready, false: not ready.
    pub ready: Option<bool>,
    /// Labels that must be equal.
    pub labels: HashMap<String, String>,
}

/// Which containers to list; empty fields match all. Fields are joined by AND.
#[derive(Clone, Debug, Default)]
pub struct ContainerFilter {
    /// An id, or the start of one.
    pub id: String,
    /// The pod's id, or the start of one.
    pub pod_id: String,
    /// The state that it must be in.
    pub state: Option<ContainerState>,
    /// Labels that must be equal.
    pub labels: HashMap<String, String>,
}

impl Pods {
    /// Pods that are made, newest first.
    pub fn list(&self, filter: &PodFilter) -> Vec<PodRecord> {
        let mut pods: Vec<_> = self
            .0
            .pods_read()
            .values()
            .filter(|pod| {
                pod.with(|record| {
                    record.state != PodState::Creating
                        && record.id.starts_with(&filter.id)
                        && filter.ready.is_none_or(|ready| ready == (record.state == PodState::Ready))
                        && labels_match(&record.config.labels, &filter.labels)
                })
            })
            .map(|pod| pod.record())
            .collect();
        pods.sort_by_key(|record| std::cmp::Reverse(record.created_at));
        pods
    }

    /// Containers that are made, newest first.
    pub fn list_containers(&self, filter: &ContainerFilter) -> Vec<ContainerRecord> {
        let mut containers: Vec<_> = self
            .0
            .containers_read()
            .values()
            .filter(|container| {
                container.is_visible()
                    && container.with(|record| {
                        record.id.starts_with(&filter.id)
                            && record.pod_id.starts_with(&filter.pod_id)
                            && filter.state.is_none_or(|state| state == record.state)
                            && labels_match(&record.config.labels, &filter.labels)
                    })
            })
            .map(|container| container.record())
            .collect();
        containers.sort_by_key(|record| std::cmp::Reverse(record.created_at));
        containers
    }

    /// One pod, with the host pid of its supervisor (0: none).
    pub fn pod(&self, id: &str) -> Result<(PodRecord, i32)> {
        self.0
            .pod(id)
            .filter(|pod| pod.state() != PodState::Creating)
            .map(|pod| (pod.record(), pod.supervisor().map_or(0, |supervisor| supervisor.pid())))
            .ok_or_else(|| Error::pod_not_found(id))
    }

    /// One container, with the host pid of its init (0: not running).
    pub fn container(&self, id: &str) -> Result<(ContainerRecord, i32)> {
        self.0
            .container(id)
            .map(|container| (container.record(), container.pid()))
            .ok_or_else(|| Error::container_not_found(id))
    }

    /// The directory with the OCI specification and the plan of a container.
    pub fn bundle(&self, record: &ContainerRecord) -> PathBuf {
        self.0.bundle_dir(&record.pod_id, &record.id)
    }

    /// The container's cgroup, relative to the hierarchies' roots; none when its pod is gone.
    pub fn cgroup(&self, record: &ContainerRecord) -> Option<String> {
        let pod = self.0.pod(&record.pod_id)?;
        Some(pod.with(|pod| format!("{}/{}", pod.cgroup, record.id)))
    }

    /// The OCI specification that a container runs, as JSON text.
    pub async fn oci_spec(&self, record: &ContainerRecord) -> Result<String> {
        let path = self.0.bundle_dir(&record.pod_id, &record.id).join(crate::create::CONFIG);
        tokio::fs::read_to_string(&path).await.map_err(|e| Error::internal(path.display(), e))
    }
}

fn labels_match(labels: &HashMap<String, String>, wanted: &HashMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}
