//! What is counted of pods and containers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use stave_supervisor_proto::v1::{self as proto, packet, request};

use crate::pod::Pod;
use crate::pods::Pods;
use crate::record::{ContainerRecord, ContainerState, PodState};

/// A supervisor that doesn't answer within this is left out.
const ANSWER: Duration = Duration::from_secs(2);

/// Counted by the daemon itself, from its start on.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) exec_sync: AtomicU64,
    pub(crate) exec_stream: AtomicU64,
    pub(crate) attach: AtomicU64,
    pub(crate) port_forward: AtomicU64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// A snapshot.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// Pods that are ready.
    pub pods_ready: u64,
    /// Pods that are not.
    pub pods_not_ready: u64,
    /// Containers that are created, and not started.
    pub containers_created: u64,
    /// Containers that run.
    pub containers_running: u64,
    /// Containers that have exited, and are not removed.
    pub containers_exited: u64,
    /// ExecSync calls that began to run a command, since the daemon's start.
    pub exec_sync: u64,
    /// Commands that were begun for a client of the streaming server.
    pub exec_stream: u64,
    /// Attachments that were begun.
    pub attach: u64,
    /// Connections that were made for port-forwards.
    pub port_forward: u64,
    /// What supervisors dropped, by container.
    pub drops: Vec<Drops>,
    /// Processes that the kernel's OOM killer has ended, by container.
    pub oom_kills: Vec<OomKills>,
    /// Supervisors that did not answer: their containers are not in `drops`.
    pub unreachable: u64,
}

/// Processes of one container that the kernel's OOM killer has ended.
#[derive(Clone, Debug)]
pub struct OomKills {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The container's name.
    pub container: String,
    /// The container's id.
    pub id: String,
    /// How many since it was created, with those in cgroups of its own making.
    pub kills: u64,
}

/// What one container wrote and nobody got.
#[derive(Clone, Debug)]
pub struct Drops {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The container's name.
    pub container: String,
    /// The container's id.
    pub id: String,
    /// Bytes of output that could not be written to the log.
    pub log_bytes: u64,
    /// Records of the log that those bytes would have been.
    pub log_records: u64,
    /// Attached clients that were dropped since they read too slowly.
    pub attachments: u64,
}

impl Pods {
    /// Asks all supervisors, at once and for [`ANSWER`] at most.
    pub async fn metrics(&self) -> Metrics {
        let counters = &self.0.counters;
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut metrics = Metrics {
            exec_sync: count(&counters.exec_sync),
            exec_stream: count(&counters.exec_stream),
            attach: count(&counters.attach),
            port_forward: count(&counters.port_forward),
            ..Metrics::default()
        };
        for container in self.0.containers_read().values().filter(|container| container.is_visible()) {
            match container.state() {
                ContainerState::Created => metrics.containers_created += 1,
                ContainerState::Running => metrics.containers_running += 1,
                ContainerState::Exited => metrics.containers_exited += 1,
            }
        }
        metrics.oom_kills = self.oom_kills();
        let pods: Vec<_> = self.0.pods_read().values().cloned().collect();
        for pod in &pods {
            match pod.state() {
                PodState::Creating => {}
                PodState::Ready => metrics.pods_ready += 1,
                _ => metrics.pods_not_ready += 1,
            }
        }
        let ready = pods.iter().filter(|pod| pod.state() == PodState::Ready);
        for drops in futures::future::join_all(ready.map(|pod| self.drops(pod))).await {
            match drops {
                Some(drops) => metrics.drops.extend(drops),
                None => metrics.unreachable += 1,
            }
        }
        metrics.drops.sort_by(|one, other| one.id.cmp(&other.id));
        metrics
    }

    fn oom_kills(&self) -> Vec<OomKills> {
        let containers: Vec<_> = self.0.containers_read().values().cloned().collect();
        let kills = containers.iter().filter(|container| container.is_visible()).filter_map(|container| {
            let pod = self.0.pod(&container.with(|record| record.pod_id.clone()))?;
            let (namespace, name) = names(&pod);
            Some(OomKills {
                namespace,
                pod: name,
                container: container.with(name_of),
                id: container.with(|record| record.id.clone()),
                kills: self.0.count_oom_kills(container),
            })
        });
        let mut kills: Vec<_> = kills.collect();
        kills.sort_by(|one, other| one.id.cmp(&other.id));
        kills
    }

    async fn drops(&self, pod: &Arc<Pod>) -> Option<Vec<Drops>> {
        let supervisor = pod.supervisor()?;
        let call = supervisor.call(request::Call::ListContainers(proto::ListContainers {}), &[]);
        let Ok(Ok((packet::Body::ContainerList(list), _))) = tokio::time::timeout(ANSWER, call).await else {
            return None;
        };
        let (namespace, name) = names(pod);
        let drops = list.containers.into_iter().filter_map(|entry| {
            let container = self.0.containers_read().get(&entry.container_id).cloned()?;
            Some(Drops {
                namespace: namespace.clone(),
                pod: name.clone(),
                container: container.with(name_of),
                id: entry.container_id,
                log_bytes: entry.log_bytes_dropped,
                log_records: entry.log_records_dropped,
                attachments: entry.attachments_dropped,
            })
        });
        Some(drops.collect())
    }
}

/// The pod's namespace and name.
fn names(pod: &Pod) -> (String, String) {
    pod.with(|record| {
        let metadata = record.config.metadata.clone().unwrap_or_default();
        (metadata.namespace, metadata.name)
    })
}

fn name_of(record: &ContainerRecord) -> String {
    record.config.metadata.as_ref().map(|metadata| metadata.name.clone()).unwrap_or_default()
}
