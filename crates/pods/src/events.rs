//! What supervisors tell: exits, and their own end.

use std::sync::{Arc, Weak};

use prost::Message as _;
use stave_supervisor_proto::v1 as proto;

use crate::files;
use crate::pod::{Container, Pod};
use crate::pods::{Inner, now};
use crate::record::{ContainerRecord, ContainerState, PodState};
use crate::supervisor::{Events, Supervisor};

/// Takes the events of one pod's supervisor.
pub(crate) struct PodEvents {
    inner: Weak<Inner>,
    pod_id: String,
}

impl PodEvents {
    pub(crate) fn new(inner: &Arc<Inner>, pod_id: &str) -> Arc<Self> {
        Arc::new(Self { inner: Arc::downgrade(inner), pod_id: pod_id.to_owned() })
    }
}

impl Events for PodEvents {
    fn container_exit(&self, exit: proto::ContainerExit) -> bool {
        self.inner.upgrade().is_some_and(|inner| inner.take_exit(&self.pod_id, &exit))
    }

    fn closed(&self) {
        let Some(inner) = self.inner.upgrade() else { return };
        let Some(pod) = inner.pod(&self.pod_id) else { return };
        if pod.state() != PodState::Ready {
            return;
        }
        tokio::spawn(async move { inner.supervisor_closed(&pod).await });
    }
}

impl Inner {
    /// Records an exit. True: it is on disk, or concerns nothing that is known.
    pub(crate) fn take_exit(&self, pod_id: &str, exit: &proto::ContainerExit) -> bool {
        let container = self.containers_read().get(&exit.container_id).cloned();
        let Some(container) = container.filter(|c| c.with(|record| record.pod_id == pod_id)) else {
            tracing::warn!(pod = pod_id, container = exit.container_id, "exit of an unknown container");
            return true;
        };
        if container.state() == ContainerState::Exited {
            // Told again: it may not have got to the disk the first time.
            return self.save_container(&container).is_ok();
        }
        self.finish(&container, |record| apply_exit(record, exit))
    }

    /// The container's end, for which no supervisor has a record.
    pub(crate) fn lose(&self, container: &Container, message: &str) {
        if container.state() == ContainerState::Exited {
            return;
        }
        let finished_at = now();
        self.finish(container, |record| {
            record.state = ContainerState::Exited;
            record.finished_at = finished_at;
            record.exit_code = 255;
            record.reason = "Unknown".to_owned();
            record.message = message.to_owned();
        });
    }

    /// Disk first, then those who wait. False: not on disk; true in memory all the same, and the
    /// supervisor keeps its own record.
    fn finish(&self, container: &Container, change: impl Fn(&mut ContainerRecord)) -> bool {
        container.set_pid(0);
        self.unwatch_oom(container);
        let saved = self.save_container_then(container, change);
        let (id, exit_code, reason) = container.with(|r| (r.id.clone(), r.exit_code, r.reason.clone()));
        if let Err(error) = &saved {
            tracing::error!(container = id, %error, "recording an exit");
        }
        tracing::info!(container = id, exit_code, reason, "container has exited");
        saved.is_ok()
    }

    /// The connection to a pod's supervisor has ended, and not by our wish.
    async fn supervisor_closed(self: &Arc<Self>, pod: &Arc<Pod>) {
        let id = pod.with(|record| record.id.clone());
        // None, or an open one: somebody else connects, or has done so.
        let Some(old) = pod.supervisor().filter(|old| !old.is_open()) else { return };
        // A broken connection with a live process is repaired. It is not a second daemon's doing: the root is locked.
        if tokio::time::timeout(std::time::Duration::from_millis(200), old.ended()).await.is_err() {
            let socket = self.pod_dir(&id).join(files::SOCKET);
            match Supervisor::connect(&socket, PodEvents::new(self, &id)).await {
                Ok(supervisor) => {
                    tracing::warn!(pod = id, "the connection to the supervisor broke, and is back");
                    pod.set_supervisor(Some(supervisor));
                    return;
                }
                Err(error) if self.has_supervisor(pod) => return self.ask_again(pod, &error),
                Err(error) => tracing::error!(pod = id, %error, "reconnecting to the supervisor"),
            }
        }
        self.supervisor_lost(pod).await;
    }

    /// A pod without its supervisor is over: whatever still runs in it is killed, exits that it left on
    /// disk are taken, the other containers end as unknown.
    pub(crate) async fn supervisor_lost(self: &Arc<Self>, pod: &Arc<Pod>) {
        let (id, cgroup) = pod.with(|record| (record.id.clone(), record.cgroup.clone()));
        // A stop that began before this does all of it, and may have ended it.
        let _guard = pod.teardown.lock().await;
        if pod.state() != PodState::Ready {
            return;
        }
        tracing::error!(pod = id, "the pod's supervisor is gone; ending the pod");
        if let Some(supervisor) = pod.supervisor() {
            supervisor.kill();
        }
        pod.set_supervisor(None);
        self.kill_leaves(&id, &cgroup).await;
        self.take_exit_records(&id);
        for container in self.containers_of(&id) {
            self.lose(&container, "the pod's supervisor ended");
        }
        pod.change(|record| record.state = PodState::NotReady);
        self.try_save_pod(pod);
    }

    /// Takes the exit records that a dead supervisor left.
    pub(crate) fn take_exit_records(&self, pod_id: &str) {
        let Ok(entries) = std::fs::read_dir(self.pod_dir(pod_id).join(files::EXITS)) else { return };
        for entry in entries.flatten() {
            let path = entry.path();
            if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".")) {
                continue;
            }
            let exit = std::fs::read(&path)
                .map_err(|e| e.to_string())
                .and_then(|bytes| proto::ContainerExit::decode(bytes.as_slice()).map_err(|e| e.to_string()));
            match exit {
                Ok(exit) => {
                    self.take_exit(pod_id, &exit);
                }
                Err(error) => tracing::warn!(path = %path.display(), error, "unreadable exit record"),
            }
        }
    }
}

fn apply_exit(record: &mut ContainerRecord, exit: &proto::ContainerExit) {
    record.state = ContainerState::Exited;
    record.exit_code = exit.exit_code;
    record.finished_at = exit.finished_at;
    if exit.started_at != 0 {
        record.started_at = exit.started_at;
    }
    if exit.start_error.is_empty() {
        record.reason = match (exit.oom_killed, exit.exit_code) {
            (true, _) => "OOMKilled",
            (false, 0) => "Completed",
            (false, _) => "Error",
        }
        .to_owned();
    } else {
        record.reason = "StartError".to_owned();
        record.message.clone_from(&exit.start_error);
    }
}
