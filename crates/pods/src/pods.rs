//! The set of all pods and containers.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use stave_cgroup::Cgroups;
use stave_cri_proto::v1 as cri;
use stave_images::Images;
use stave_state::Durability;

use crate::block_io::BlockIoClasses;
use crate::devices::DeviceFilters;
use crate::error::{Error, Result};
use crate::jobs::{Jobs, lock};
use crate::metrics::Counters;
use crate::network::Network;
use crate::oom::OomFiles;
use crate::pod::{Container, Pod};
use crate::pod_set::PodSet;
use crate::pool::{Pool, PoolState};
use crate::record::{ContainerRecord, PodRecord};
use crate::runtimes::Runtimes;
use crate::stop::detached;

/// What the daemon gives to [`Pods`].
pub struct Settings {
    /// Records and container data: survives reboots.
    pub root: PathBuf,
    /// Sockets, exit records, pod files: gone after a reboot.
    pub state: PathBuf,
    /// Images and their layers.
    pub images: Images,
    /// The cgroup hierarchies.
    pub cgroups: Cgroups,
    /// Starts and stops the scopes of pods; not connected to as long as no pod has one.
    pub systemd: stave_systemd::Systemd,
    /// Limits go to cgroup v2; false: v1 or hybrid.
    pub unified_cgroup: bool,
    /// The pods' network.
    pub network: Network,
    /// A sealed copy of the supervisor's binary.
    pub supervisor: OwnedFd,
    /// How many supervisors wait for pods to come, with their namespaces made; 0: none.
    pub ready: usize,
    /// The runtime handlers that RunPodSandbox takes.
    pub runtimes: Runtimes,
    /// Names of the capabilities in our own bounding set, as CAP_CHOWN.
    pub bounding_set: Vec<String>,
    /// We may lower an oom_score_adj (CAP_SYS_RESOURCE).
    pub lowers_oom_score: bool,
    /// What the names of classes of block I/O mean.
    pub block_io: BlockIoClasses,
    /// overlayfs knows `volatile`: no sync of the whole disk when a container ends. Its writable layer is
    /// never mounted twice, so there is nothing to lose.
    pub overlay_volatile: bool,
    /// User namespaces, and idmapped mounts of the layers, work.
    pub user_namespaces: bool,
    /// AppArmor of the host.
    pub apparmor: stave_spec::AppArmor,
    /// The policy of the host, where SELinux is on.
    pub selinux: Option<stave_lsm::selinux::Policy>,
}

/// All pods and containers. Cheap to clone.
#[derive(Clone)]
pub struct Pods(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) settings: Settings,
    pods: RwLock<PodSet>,
    containers: RwLock<HashMap<String, Arc<Container>>>,
    pub(crate) run_jobs: Jobs<(cri::PodSandboxConfig, String)>,
    pub(crate) create_jobs: Jobs<cri::ContainerConfig>,
    pub(crate) device_filters: DeviceFilters,
    pub(crate) seccomp: stave_seccomp::Cache,
    pub(crate) pool: Arc<Pool>,
    pub(crate) counters: Counters,
    pub(crate) oom: OomFiles,
}

impl Pods {
    /// An empty set. [`Self::recover`] fills it from disk, and must be called before it is used.
    pub fn new(settings: Settings) -> Result<Self> {
        let inner = Inner {
            pool: Arc::new(Pool::new(settings.ready)),
            settings,
            pods: RwLock::default(),
            containers: RwLock::default(),
            run_jobs: Jobs::default(),
            create_jobs: Jobs::default(),
            device_filters: DeviceFilters::default(),
            seccomp: stave_seccomp::Cache::default(),
            counters: Counters::default(),
            oom: OomFiles::new(),
        };
        for dir in [
            inner.pod_records(),
            inner.container_records(),
            inner.settings.root.join("containers"),
            inner.settings.state.join("pods"),
        ] {
            stave_state::private_dir(&dir).map_err(|e| Error::internal("state directories", e))?;
        }
        Ok(Self(Arc::new(inner)))
    }

    /// The pods' network.
    pub fn network(&self) -> &Network {
        &self.0.settings.network
    }

    /// Takes the node's ranges for pods from UpdateRuntimeConfig: one a family. Comes to its end though the client may go
    /// away: half-way there is no network.
    pub async fn set_pod_cidrs(&self, cidrs: Vec<String>) -> Result<()> {
        let inner = Arc::clone(&self.0);
        detached(async move {
            inner.settings.network.set_pod_cidrs(&cidrs).await?;
            inner.free_networks().await;
            Ok(())
        })
        .await
    }

    /// Finishes what goes on in the background, when the daemon stops; pods run on.
    pub async fn drain(&self, limit: std::time::Duration) {
        let inner = &self.0;
        tokio::join!(inner.pool.close(limit), inner.settings.network.drain(limit));
    }

    /// The runtime handlers that RunPodSandbox takes.
    pub fn runtimes(&self) -> &Runtimes {
        &self.0.settings.runtimes
    }

    /// The supervisors that wait for pods to come.
    pub fn pool(&self) -> PoolState {
        self.0.pool.state()
    }

    /// Identity, stage, and time in the stage of each running job.
    pub fn jobs(&self) -> Vec<(String, &'static str, std::time::Duration)> {
        let mut jobs = self.0.run_jobs.list();
        jobs.extend(self.0.create_jobs.list());
        jobs
    }
}

impl Inner {
    pub(crate) fn pod_records(&self) -> PathBuf {
        self.settings.root.join("records/pods")
    }

    pub(crate) fn container_records(&self) -> PathBuf {
        self.settings.root.join("records/containers")
    }

    /// The pod's directory in the state directory: socket, exits, files.
    pub(crate) fn pod_dir(&self, pod_id: &str) -> PathBuf {
        self.settings.state.join("pods").join(pod_id)
    }

    /// The container's bundle: config.json and plan.
    pub(crate) fn bundle_dir(&self, pod_id: &str, container_id: &str) -> PathBuf {
        self.pod_dir(pod_id).join("containers").join(container_id)
    }

    /// The container's writable layer.
    pub(crate) fn data_dir(&self, container_id: &str) -> PathBuf {
        self.settings.root.join("containers").join(container_id)
    }

    /// Writes a pod's record as it is now. Not synced: a reboot voids it anyhow.
    pub(crate) fn save_pod(&self, pod: &Pod) -> Result<()> {
        let on_disk = lock(&pod.on_disk);
        self.write_pod(*on_disk, &pod.record())
    }

    /// Writes the record with `change` made, and makes it in memory if that worked.
    pub(crate) fn save_pod_then(&self, pod: &Pod, change: impl Fn(&mut PodRecord)) -> Result<()> {
        let on_disk = lock(&pod.on_disk);
        let mut record = pod.record();
        change(&mut record);
        self.write_pod(*on_disk, &record)?;
        pod.change(change);
        Ok(())
    }

    /// Removes a pod's record, for good.
    pub(crate) fn drop_pod_record(&self, pod: &Pod) -> Result<()> {
        let mut on_disk = lock(&pod.on_disk);
        *on_disk = false;
        stave_state::remove(&self.pod_record_path(&pod.with(|record| record.id.clone())))
            .map_err(|e| Error::internal("pod record", e))
    }

    pub(crate) fn pod_record_path(&self, id: &str) -> PathBuf {
        self.pod_records().join(format!("{id}.json"))
    }

    fn write_pod(&self, on_disk: bool, record: &PodRecord) -> Result<()> {
        if !on_disk {
            return Ok(());
        }
        stave_state::write_json(&self.pod_record_path(&record.id), record, Durability::Volatile)
            .map_err(|e| Error::internal("pod record", e))
    }

    /// Writes a container's record as it is now. Not synced, see [`Self::save_pod`].
    pub(crate) fn save_container(&self, container: &Container) -> Result<()> {
        let on_disk = lock(&container.on_disk);
        self.write_container(*on_disk, &container.record())
    }

    /// Writes the record with `change` made, and leaves the one in memory.
    pub(crate) fn save_container_as(
        &self,
        container: &Container,
        change: impl Fn(&mut ContainerRecord),
    ) -> Result<()> {
        let on_disk = lock(&container.on_disk);
        let mut record = container.record();
        change(&mut record);
        self.write_container(*on_disk, &record)
    }

    /// Writes the record with `change` made, and only then makes it in memory, for all to see.
    pub(crate) fn save_container_then(
        &self,
        container: &Container,
        change: impl Fn(&mut ContainerRecord),
    ) -> Result<()> {
        let on_disk = lock(&container.on_disk);
        let mut record = container.record();
        change(&mut record);
        let saved = self.write_container(*on_disk, &record);
        container.change(change);
        saved
    }

    /// Removes a container's record, for good.
    pub(crate) fn drop_container_record(&self, container: &Container) -> Result<()> {
        let mut on_disk = lock(&container.on_disk);
        *on_disk = false;
        stave_state::remove(&self.container_record_path(&container.with(|record| record.id.clone())))
            .map_err(|e| Error::internal("container record", e))
    }

    pub(crate) fn container_record_path(&self, id: &str) -> PathBuf {
        self.container_records().join(format!("{id}.json"))
    }

    fn write_container(&self, on_disk: bool, record: &ContainerRecord) -> Result<()> {
        if !on_disk {
            return Ok(());
        }
        stave_state::write_json(&self.container_record_path(&record.id), record, Durability::Volatile)
            .map_err(|e| Error::internal("container record", e))
    }

    pub(crate) fn pods_read(&self) -> RwLockReadGuard<'_, PodSet> {
        self.pods.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn pods_write(&self) -> RwLockWriteGuard<'_, PodSet> {
        self.pods.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn containers_read(&self) -> RwLockReadGuard<'_, HashMap<String, Arc<Container>>> {
        self.containers.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn containers_write(&self) -> RwLockWriteGuard<'_, HashMap<String, Arc<Container>>> {
        self.containers.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pod with this id, or the only one whose id starts so.
    pub(crate) fn pod(&self, id: &str) -> Option<Arc<Pod>> {
        by_prefix(&self.pods_read(), id, |_| true)
    }

    /// The visible container with this id, or the only one whose id starts so.
    pub(crate) fn container(&self, id: &str) -> Option<Arc<Container>> {
        by_prefix(&self.containers_read(), id, |container| container.is_visible())
    }

    /// The containers of a pod, those in the making included.
    pub(crate) fn containers_of(&self, pod_id: &str) -> Vec<Arc<Container>> {
        self.containers_read()
            .values()
            .filter(|c| c.with(|record| record.pod_id == pod_id))
            .cloned()
            .collect()
    }
}

fn by_prefix<T>(all: &HashMap<String, Arc<T>>, id: &str, wanted: impl Fn(&T) -> bool) -> Option<Arc<T>> {
    if id.is_empty() {
        return None;
    }
    if let Some(exact) = all.get(id) {
        return wanted(exact).then(|| Arc::clone(exact));
    }
    let mut matches = all.iter().filter(|(key, value)| key.starts_with(id) && wanted(value));
    match (matches.next(), matches.next()) {
        (Some((_, only)), None) => Some(Arc::clone(only)),
        _ => None,
    }
}

/// Nanoseconds since the Unix epoch.
pub(crate) fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Runs what may block off the async threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(Error::internal("blocking task", e)))
}

/// Removes a tree; nothing there is success. The tree must not be one that a container can reach now.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::internal(format_args!("removing {}", path.display()), e))
        }
        _ => Ok(()),
    }
}

/// Names in a directory; none if it can't be read.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_may_be_unique_prefixes() {
        let all = HashMap::from([("abc".to_owned(), Arc::new(1)), ("abd".to_owned(), Arc::new(2))]);
        assert_eq!(by_prefix(&all, "abc", |_| true).as_deref(), Some(&1));
        assert_eq!(by_prefix(&all, "abd", |_| true).as_deref(), Some(&2));
        assert_eq!(by_prefix(&all, "ab", |_| true), None);
        assert_eq!(by_prefix(&all, "ab", |n| *n == 2).as_deref(), Some(&2));
        assert_eq!(by_prefix(&all, "", |_| true), None);
    }
}
