//! StopPodSandbox and RemovePodSandbox. Teardown goes on past errors, gathers them, and can be repeated.

use std::sync::Arc;
use std::time::Duration;

use stave_cgroup::Cgroups;
use stave_supervisor_proto::v1::{self as proto, request};

use crate::error::{Code, Error, Result};
use crate::files;
use crate::pod::Pod;
use crate::pods::{Inner, Pods, blocking, names, remove_tree};
use crate::record::PodState;
use crate::supervisor::Supervisor;

/// SIGKILL has been sent to all; the kernel needs this long only when something hangs in it.
const END_TIMEOUT: Duration = Duration::from_secs(10);

impl Pods {
    /// Stops a pod: kills its containers, frees its network. Unknown or stopped: success.
    pub async fn stop(&self, id: &str) -> Result<()> {
        let Some(pod) = self.0.pod(id) else { return Ok(()) };
        let inner = Arc::clone(&self.0);
        detached(async move { inner.stop_pod(&pod).await }).await
    }

    /// Removes a pod and its containers, stopping it first where it runs. Unknown: success.
    pub async fn remove(&self, id: &str) -> Result<()> {
        let Some(pod) = self.0.pod(id) else { return Ok(()) };
        let inner = Arc::clone(&self.0);
        detached(async move { inner.remove_pod(&pod).await }).await
    }
}

/// Runs to its end even when the client gives up.
pub(crate) async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    tokio::spawn(work).await.unwrap_or_else(|e| Err(Error::internal("task", e)))
}

/// Errors of steps that must not stop the next step.
#[derive(Default)]
pub(crate) struct Gathered(Vec<Error>);

impl Gathered {
    pub(crate) fn add(&mut self, result: Result<()>) {
        if let Err(error) = result {
            self.0.push(error);
        }
    }

    pub(crate) fn into_result(self) -> Result<()> {
        let Some(first) = self.0.first() else { return Ok(()) };
        let messages: Vec<_> = self.0.iter().map(|error| error.message.as_str()).collect();
        Err(Error::new(first.code, messages.join("; ")))
    }
}

/// Has a supervisor kill all that runs in its pod, and end.
pub(crate) async fn shut_down(supervisor: &Supervisor, id: &str) -> Result<()> {
    let shutdown = supervisor.call_done(request::Call::Shutdown(proto::Shutdown {}));
    match tokio::time::timeout(END_TIMEOUT, shutdown).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(pod = id, %error, "shutdown of the supervisor"),
        Err(_) => tracing::warn!(pod = id, "the supervisor did not shut down within {END_TIMEOUT:?}"),
    }
    if tokio::time::timeout(Duration::from_secs(1), supervisor.ended()).await.is_err() {
        supervisor.kill();
        if tokio::time::timeout(END_TIMEOUT, supervisor.ended()).await.is_err() {
            return Err(Error::new(
                Code::DeadlineExceeded,
                format!("supervisor (pid {}) does not end after SIGKILL", supervisor.pid()),
            ));
        }
    }
    Ok(())
}

impl Inner {
    pub(crate) async fn stop_pod(self: &Arc<Self>, pod: &Arc<Pod>) -> Result<()> {
        let _guard = pod.teardown.lock().await;
        self.tear_down(pod).await
    }

    /// The pod's teardown lock is held.
    async fn tear_down(self: &Arc<Self>, pod: &Arc<Pod>) -> Result<()> {
        let before = pod.record();
        if before.torn_down {
            return Ok(());
        }
        let id = before.id.as_str();
        // From here on nothing new starts in it, and the end of its supervisor is no accident.
        // One that was never finished stays so, and unlisted.
        pod.change(|record| {
            if record.state == PodState::Ready {
                record.state = PodState::NotReady;
            }
        });
        let mut errors = Gathered::default();
        // A full disk must not keep anything from being stopped and removed. A daemon that finds the older
        // record finds no supervisor, and gets to the same end.
        self.try_save_pod(pod);

        if let Some(supervisor) = pod.supervisor() {
            errors.add(shut_down(&supervisor, id).await);
            pod.set_supervisor(None);
        }
        // Without its supervisor it fails soon, and undoes what it did.
        let _none_is_made = pod.making.write().await;
        self.take_exit_records(id);
        // All that may be left after an accident.
        self.kill_leaves(id, &before.cgroup).await;
        for container in self.containers_of(id) {
            self.lose(&container, "killed with its pod");
        }

        errors.add(self.settings.network.detach(id, Some(&before.config)).await);
        // systemd removes its cgroup, so that comes first; without its word the cgroup stays for the next try.
        let scope = self.stop_scope(&before.cgroup).await;
        let scope_stopped = scope.is_ok();
        errors.add(scope);
        let containers = self.traces_of(id);
        let (inner, record) = (Arc::clone(self), before.clone());
        errors.add(
            blocking(move || {
                let mut errors = Gathered::default();
                for container in &containers {
                    errors.add(inner.remove_container_cgroup(&record.cgroup, container));
                }
                if scope_stopped {
                    let removed =
                        inner.settings.cgroups.remove_pod(&record.cgroup, !record.cgroup_is_foreign);
                    errors.add(removed.map_err(|e| Error::internal("cgroup", e)));
                }
                errors.add(files::unmount(&inner.pod_dir(&record.id)));
                if let Some(oci) = &record.oci {
                    errors.add(remove_tree(&oci.root_of(&record.id)));
                }
                errors.into_result()
            })
            .await,
        );
        errors.into_result()?;
        pod.change(|record| {
            record.torn_down = true;
            record.ips.clear();
        });
        self.try_save_pod(pod);
        tracing::info!(pod = id, "pod is stopped");
        Ok(())
    }

    pub(crate) async fn remove_pod(self: &Arc<Self>, pod: &Arc<Pod>) -> Result<()> {
        let _guard = pod.teardown.lock().await;
        self.tear_down(pod).await?;
        let id = pod.with(|record| record.id.clone());
        let mut errors = Gathered::default();
        for container in self.containers_of(&id) {
            errors.add(self.remove_container(&container).await);
        }
        errors.add(self.settings.network.settle(&id).await);
        errors.into_result()?;
        let dir = self.pod_dir(&id);
        blocking(move || remove_tree(&dir)).await?;
        // The record last: as long as there is anything, it can be found and removed again.
        self.drop_pod_record(pod)?;
        self.pods_write().remove(&id);
        tracing::info!(pod = id, "pod is removed");
        Ok(())
    }

    /// Kills what is left of a pod; its supervisor is dead, or was killed. Two sandboxes of one pod share
    /// the kubelet's cgroup: then only the containers of this one are killed, and what its supervisor has left.
    pub(crate) async fn kill_leaves(self: &Arc<Self>, id: &str, cgroup: &str) {
        let containers = self.traces_of(id);
        let (inner, path) = (Arc::clone(self), cgroup.to_owned());
        let own = cgroup.ends_with(&format!("/{id}")) || Cgroups::scope(cgroup).is_some();
        let shared = self
            .pods_read()
            .in_cgroup(cgroup)
            .any(|other| other.with(|record| record.id != id && !record.torn_down));
        let killed = blocking(move || {
            let cgroups = &inner.settings.cgroups;
            if own && cgroups.is_exclusive(&path) {
                return cgroups.kill_pod(&path).map_err(|e| Error::internal("cgroup", e));
            }
            let mut errors = Gathered::default();
            for container in &containers {
                errors
                    .add(cgroups.kill_container(&path, container).map_err(|e| Error::internal("cgroup", e)));
            }
            if !shared {
                errors.add(cgroups.kill_supervisor_leaf(&path).map_err(|e| Error::internal("cgroup", e)));
            }
            errors.into_result()
        });
        if let Err(error) = killed.await {
            tracing::error!(pod = id, %error, "killing what is left in the pod");
        }
    }

    /// Ids of all containers that may have something in a pod: those that are known, and those whose
    /// CreateContainer died with an earlier daemon, which left a bundle before anything else.
    pub(crate) fn traces_of(&self, pod_id: &str) -> Vec<String> {
        let mut ids: Vec<String> =
            self.containers_of(pod_id).iter().map(|c| c.with(|record| record.id.clone())).collect();
        for name in names(&self.pod_dir(pod_id).join(files::CONTAINERS)) {
            if !ids.contains(&name) {
                ids.push(name);
            }
        }
        ids
    }

    /// Writes a pod's record where its absence does no harm.
    pub(crate) fn try_save_pod(&self, pod: &Pod) {
        if let Err(error) = self.save_pod(pod) {
            tracing::error!(pod = pod.with(|record| record.id.clone()), %error, "recording the state of a pod");
        }
    }

    /// Kills what is left in a container's cgroup, which is nothing but after an accident, and removes it.
    pub(crate) fn remove_container_cgroup(&self, pod_cgroup: &str, container_id: &str) -> Result<()> {
        let cgroups = &self.settings.cgroups;
        let mut errors = Gathered::default();
        for result in [
            cgroups.kill_container(pod_cgroup, container_id),
            cgroups.remove_container(pod_cgroup, container_id),
        ] {
            errors.add(result.map_err(|e| Error::internal("cgroup", e)));
        }
        errors.into_result()
    }
}
