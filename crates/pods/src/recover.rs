//! What a new daemon finds: records, supervisors that still run, exits of the time in between, leftovers.
//! Nothing here is fatal.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use stave_cgroup::Cgroups;
use stave_supervisor_proto::v1::{self as proto, packet, request};

use crate::error::{Code, Error, Result};
use crate::events::PodEvents;
use crate::files;
use crate::pod::{Container, Pod};
use crate::pods::{Inner, Pods, blocking, names, remove_tree};
use crate::record::{ContainerRecord, ContainerState, PodRecord, PodState};
use crate::stop::shut_down;
use crate::supervisor::{Supervisor, unexpected};

/// How long requests wait for it. A pod that is running is taken up in milliseconds; to take one down, plugins and systemd
/// have minutes.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between attempts to reach a supervisor that does not answer.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Between two tries to set up a network.
const REOPEN: Duration = Duration::from_secs(5);

impl Pods {
    /// Finds everything again. Call it once, before the first request. What takes longer than some seconds goes on in the
    /// background.
    pub async fn recover(&self) {
        let inner = &self.0;
        let (pods, containers) = (inner.pod_records(), inner.container_records());
        let loaded = tokio::task::spawn_blocking(move || {
            (stave_state::load_dir::<PodRecord>(&pods), stave_state::load_dir::<ContainerRecord>(&containers))
        })
        .await;
        let (pods, containers) = match loaded {
            Ok(loaded) => loaded,
            Err(error) => {
                tracing::error!(%error, "reading the records");
                return;
            }
        };
        for (_, record) in pods.records {
            inner.pods_write().insert(Pod::new(record));
        }
        for (_, record) in containers.records {
            if let Err(error) = inner.settings.images.hold_chain(&record.id, &record.layers()) {
                tracing::error!(container = record.id, %error, "holding the layers of a container");
            }
            inner.containers_write().insert(record.id.clone(), Container::new(record, true));
        }
        let all: Vec<_> = inner.pods_read().values().cloned().collect();
        let count = all.len();
        inner.resume_networks().await;
        let recovery = Arc::clone(inner);
        let recovery = tokio::spawn(async move {
            futures::future::join_all(all.into_iter().map(|pod| recovery.recover_pod(pod))).await;
            recovery.remove_leftovers().await;
            recovery.settings.network.recovered();
        });
        // A CNI plugin may wait for an API server, which may be a pod that waits for us.
        match tokio::time::timeout(PATIENCE, recovery).await {
            Ok(ended) => {
                let _ = ended.inspect_err(|error| tracing::error!(%error, "taking up the pods"));
            }
            Err(_) => tracing::warn!("not all pods are taken up, or taken down, yet: requests come first"),
        }
        reopen_network(inner);
        crate::pool::fill(inner);
        crate::oom::follow(inner);
        tracing::info!(pods = count, containers = inner.containers_read().len(), "records are read");
    }
}

/// Looks now and then whether a network that could not be set up can be by now.
fn reopen_network(inner: &Arc<Inner>) {
    let inner = Arc::downgrade(inner);
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(REOPEN).await;
            let Some(inner) = inner.upgrade() else { return };
            if inner.settings.network.reopen().await {
                tracing::info!("the network is set up now");
                inner.resume_networks().await;
                inner.free_networks().await;
            }
        }
    });
}

impl Inner {
    /// See [`crate::network::Network::resume`].
    async fn resume_networks(&self) {
        let all: Vec<_> = self.pods_read().values().cloned().collect();
        for pod in all {
            let record = pod.record();
            if let Err(error) = self.settings.network.resume(&record).await {
                tracing::error!(pod = record.id, %error, "making the lease of a pod anew");
            }
        }
    }

    async fn recover_pod(self: &Arc<Self>, pod: Arc<Pod>) {
        let record = pod.record();
        let id = record.id.as_str();
        match record.state {
            PodState::Creating => {
                self.connect_for_shutdown(&pod).await;
                if let Err(error) = self.remove_pod(&pod).await {
                    tracing::error!(pod = id, %error, "removing a pod that was never finished");
                }
            }
            PodState::Ready => {
                if let Err(error) = self.reconnect(&pod).await {
                    if self.has_supervisor(&pod) {
                        self.ask_again(&pod, &error);
                        return;
                    }
                    tracing::warn!(pod = id, %error, "the pod did not survive");
                    self.supervisor_lost(&pod).await;
                    // After a reboot nothing runs and nobody can be asked: its address and ports are free, whether or
                    // not the kubelet ever stops it.
                    if !self.pod_dir(id).exists()
                        && let Err(error) = self.stop_pod(&pod).await
                    {
                        tracing::error!(pod = id, %error, "stopping a pod of before the reboot");
                    }
                }
            }
            // The ends of its containers may have met a full disk, and nobody is left to tell them again.
            PodState::NotReady if record.torn_down => {
                self.take_exit_records(id);
                for container in self.containers_of(id) {
                    self.lose(&container, "killed with its pod");
                }
            }
            PodState::NotReady => {
                // A stop that was cut short, or a pod that lost its supervisor: StopPodSandbox comes
                // (again); what runs must not wait for it.
                self.connect_for_shutdown(&pod).await;
                if let Err(error) = self.stop_pod(&pod).await {
                    tracing::error!(pod = id, %error, "stopping a pod");
                }
            }
        }
    }

    async fn connect_for_shutdown(self: &Arc<Self>, pod: &Arc<Pod>) {
        let id = pod.with(|record| record.id.clone());
        // A stop that is asked for meanwhile would not see it.
        let _guard = pod.teardown.lock().await;
        let socket = self.pod_dir(&id).join(files::SOCKET);
        if let Ok(supervisor) = Supervisor::connect(&socket, PodEvents::new(self, &id)).await {
            pod.set_supervisor(Some(supervisor));
        }
    }

    /// Takes up a running pod. Unacknowledged exits are told by the supervisor on its own after hello.
    async fn reconnect(self: &Arc<Self>, pod: &Arc<Pod>) -> Result<()> {
        let id = pod.with(|record| record.id.clone());
        // See `connect_for_shutdown`.
        let _guard = pod.teardown.lock().await;
        if pod.state() != PodState::Ready {
            return Ok(());
        }
        // A second connection would end the first, whose end would be repaired by a third.
        let supervisor = match pod.supervisor().filter(|supervisor| supervisor.is_open()) {
            Some(supervisor) => supervisor,
            None => {
                let socket = self.pod_dir(&id).join(files::SOCKET);
                Supervisor::connect(&socket, PodEvents::new(self, &id)).await?
            }
        };
        let adopted = self.adopt_all(pod, &supervisor).await;
        // Last: a request that comes meanwhile must not find what is not looked at yet.
        pod.set_supervisor(Some(Arc::clone(&supervisor)));
        // Its closed() came before, and was ignored.
        if !supervisor.is_open() {
            return Err(Error::new(Code::Internal, "the pod's supervisor has ended"));
        }
        adopted
    }

    /// Somebody listens on the pod's socket, or it can't be told (no descriptors, no memory): the pod is not over.
    pub(crate) fn has_supervisor(&self, pod: &Pod) -> bool {
        use rustix::io::Errno;
        if pod.supervisor().is_some_and(|supervisor| supervisor.is_open()) {
            return true;
        }
        let id = pod.with(|record| record.id.clone());
        let nobody = [Errno::CONNREFUSED, Errno::NOENT].map(|errno| Some(errno.raw_os_error()));
        match stave_wire::connect(&self.pod_dir(&id).join(files::SOCKET)) {
            Ok(_) => true,
            Err(error) => !nobody.contains(&error.errno()),
        }
    }

    /// Connects to a supervisor that is there and does not answer, as when the storage of its logs hangs: until it does, or has ended.
    /// Its containers run on meanwhile, and StopPodSandbox kills them.
    pub(crate) fn ask_again(self: &Arc<Self>, pod: &Arc<Pod>, error: &Error) {
        let id = pod.with(|record| record.id.clone());
        tracing::error!(pod = id, %error, "the pod's supervisor does not answer, and is asked again");
        let (inner, pod) = (Arc::clone(self), Arc::clone(pod));
        tokio::spawn(async move {
            let mut pause = PAUSES.0;
            loop {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSES.1);
                match inner.reconnect(&pod).await {
                    Ok(()) => return tracing::info!(pod = id, "the pod is taken up, or was stopped"),
                    Err(error) if inner.has_supervisor(&pod) => {
                        tracing::warn!(pod = id, %error, "the pod's supervisor does not answer yet");
                    }
                    Err(error) => {
                        tracing::warn!(pod = id, %error, "the pod did not survive");
                        return inner.supervisor_lost(&pod).await;
                    }
                }
            }
        });
    }

    async fn adopt_all(self: &Arc<Self>, pod: &Arc<Pod>, supervisor: &Arc<Supervisor>) -> Result<()> {
        let id = pod.with(|record| record.id.clone());
        let list = match supervisor.call(request::Call::ListContainers(proto::ListContainers {}), &[]).await?
        {
            (packet::Body::ContainerList(list), _) => list,
            (other, _) => return Err(unexpected("ContainerList", &other)),
        };
        let entries: HashMap<_, _> =
            list.containers.into_iter().map(|entry| (entry.container_id.clone(), entry)).collect();
        let cgroup = pod.with(|record| record.cgroup.clone());
        for container in self.containers_of(&id) {
            let container_id = container.with(|record| record.id.clone());
            self.watch_oom(&container, &cgroup);
            match entries.get(&container_id) {
                Some(entry) => self.adopt(&id, &container, entry),
                None => self.lose(&container, "lost while no daemon ran"),
            }
        }
        // Made by a CreateContainer that never came to its end.
        for (container_id, _) in entries {
            if !self.is_unknown_container(&container_id) {
                continue;
            }
            tracing::warn!(
                pod = id,
                container = container_id,
                "removing a container that was never finished"
            );
            // It never started, since nobody knew its id: the removal kills it.
            let remove = request::Call::RemoveContainer(proto::RemoveContainer { container_id });
            if let Err(error) = supervisor.call_done(remove).await {
                tracing::warn!(pod = id, %error, "removing a container that was never finished");
            }
        }
        for container in self.containers_of(&id) {
            self.finish_update(&container).await;
        }
        let inner = Arc::clone(self);
        blocking(move || {
            for container_id in inner.traces_of(&id) {
                if inner.is_unknown_container(&container_id) {
                    let bundle = inner.bundle_dir(&id, &container_id);
                    // The bundle last: it is what the rest is found by, at the latest with the pod's end.
                    let removed = inner.remove_container_cgroup(&cgroup, &container_id);
                    log_error(&container_id, removed.and_then(|()| remove_tree(&bundle)));
                }
            }
            Ok(())
        })
        .await
    }

    fn adopt(&self, pod_id: &str, container: &Container, entry: &proto::ContainerEntry) {
        use proto::container_entry::State;
        container.set_pid(entry.pid);
        match (entry.state(), &entry.exit) {
            (State::Exited, Some(exit)) => {
                self.take_exit(pod_id, exit);
            }
            (State::Exited, None) => self.lose(container, "its exit was not recorded"),
            (State::Running, _) => {
                // The answer to StartContainer was lost with the daemon. The exit may be told meanwhile.
                let started = container.change(|record| {
                    let started = record.state == ContainerState::Created;
                    if started {
                        record.state = ContainerState::Running;
                        record.started_at = entry.started_at;
                    }
                    started
                });
                if started && let Err(error) = self.save_container(container) {
                    tracing::error!(container = entry.container_id, %error, "recording a start");
                }
            }
            (State::Created, _) => {}
        }
    }

    /// No pod of ours. One whose record is there, and which the disk or the kernel would not give, is left alone.
    pub(crate) fn is_unknown(&self, pod_id: &str) -> bool {
        self.pod(pod_id).is_none() && !self.pod_record_path(pod_id).exists()
    }

    /// See [`Self::is_unknown`].
    fn is_unknown_container(&self, id: &str) -> bool {
        !self.containers_read().contains_key(id) && !self.container_record_path(id).exists()
    }

    /// Ends supervisors whose pod has no record, as when that could not be read: nobody could stop such a pod, and its
    /// address will be another's.
    async fn end_unknown_supervisors(self: &Arc<Self>) {
        for id in names(&self.settings.state.join("pods")) {
            if !self.is_unknown(&id) || !self.pod_dir(&id).exists() {
                continue;
            }
            tracing::warn!(pod = id, "ending a pod that has no record");
            let socket = self.pod_dir(&id).join(files::SOCKET);
            // Nobody there: it has ended.
            if let Ok(supervisor) = Supervisor::connect(&socket, PodEvents::new(self, &id)).await {
                log_error(&id, shut_down(&supervisor, &id).await);
            }
            // One that the kubelet made is the kubelet's, with all below it.
            let Ok(cgroup) = self.settings.cgroups.pod_path("", &id) else { continue };
            let inner = Arc::clone(self);
            let removed = blocking(move || {
                let cgroups = &inner.settings.cgroups;
                let killed = cgroups.kill_pod(&cgroup);
                // A scope is systemd's to remove.
                let removed = match Cgroups::scope(&cgroup) {
                    Some(_) => Ok(()),
                    None => cgroups.remove_pod(&cgroup, true),
                };
                killed.and(removed).map_err(|e| Error::internal("cgroup", e))
            });
            log_error(&id, removed.await);
        }
    }

    /// Frees what pods have that are stopped or gone: their daemon had no time to take it away, or no network then.
    pub(crate) async fn free_networks(&self) {
        for id in self.settings.network.attached().await {
            let pod = self.pod(&id);
            let config = pod.as_ref().map(|pod| pod.with(|record| record.config.clone()));
            if pod.map_or_else(|| self.is_unknown(&id), |pod| pod.with(|record| record.torn_down))
                && let Err(error) = self.settings.network.detach(&id, config.as_ref()).await
            {
                tracing::error!(pod = id, %error, "freeing the network of a pod that is gone");
            }
        }
    }

    /// What no record accounts for.
    async fn remove_leftovers(self: &Arc<Self>) {
        self.end_unknown_supervisors().await;
        // Not in the loop's head: the lock would be held all through it, and a removal takes it for writing.
        let containers: Vec<_> = self.containers_read().values().cloned().collect();
        for container in containers {
            let pod_id = container.with(|record| record.pod_id.clone());
            if self.is_unknown(&pod_id)
                && let Err(error) = self.remove_container(&container).await
            {
                tracing::error!(pod = pod_id, %error, "removing a container whose pod is gone");
            }
        }
        self.free_networks().await;
        // Beside the first requests: systemd may be slow to answer.
        let inner = Arc::clone(self);
        tokio::spawn(async move { inner.remove_unknown_scopes().await });
        let inner = Arc::clone(self);
        let swept = blocking(move || {
            for name in names(&inner.settings.root.join("containers")) {
                if inner.is_unknown_container(&name) {
                    log_error(&name, remove_tree(&inner.data_dir(&name)));
                }
            }
            let runtimes = inner.settings.state.join("runtimes");
            for handler in names(&runtimes) {
                for name in names(&runtimes.join(&handler)) {
                    if inner.is_unknown(&name) {
                        log_error(&name, remove_tree(&runtimes.join(&handler).join(&name)));
                    }
                }
            }
            for name in names(&inner.settings.state.join("pods")) {
                if inner.is_unknown(&name) {
                    let dir = inner.pod_dir(&name);
                    log_error(&name, files::unmount(&dir).and_then(|()| remove_tree(&dir)));
                }
            }
            Ok(())
        })
        .await;
        log_error("leftovers", swept);
    }
}

fn log_error(what: &str, result: Result<()>) {
    if let Err(error) = result {
        tracing::error!(what, %error, "removing leftovers");
    }
}
