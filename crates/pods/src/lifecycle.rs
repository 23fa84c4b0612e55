//! StartContainer, StopContainer, RemoveContainer, ReopenContainerLog.

use std::sync::Arc;
use std::time::Duration;

use stave_supervisor_proto::v1::{self as proto, packet, request};

use crate::error::{Code, Error, Result};
use crate::pod::Container;
use crate::pods::{Inner, Pods};
use crate::record::{ContainerState, PodState};
use crate::stop::detached;
use crate::supervisor::{Supervisor, unexpected};

/// After SIGKILL, the kernel needs this long only when something hangs in it.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

impl Pods {
    /// Starts a created container.
    pub async fn start(&self, id: &str) -> Result<()> {
        let container = self.0.container(id).ok_or_else(|| Error::container_not_found(id))?;
        let inner = Arc::clone(&self.0);
        detached(async move { inner.start_container(&container).await }).await
    }

    /// Stops a container: its stop signal, then SIGKILL after `timeout`. Unknown or exited: success.
    pub async fn stop_container(&self, id: &str, timeout: Duration) -> Result<()> {
        let Some(container) = self.0.container(id) else { return Ok(()) };
        self.0.stop_container(&container, timeout).await
    }

    /// Removes a container, killing it first where it runs. Unknown: success.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        let Some(container) = self.0.container(id) else { return Ok(()) };
        let inner = Arc::clone(&self.0);
        detached(async move {
            let _guard = container.lifecycle.lock().await;
            if container.state() == ContainerState::Running {
                inner.stop_container(&container, Duration::ZERO).await?;
            }
            inner.remove_container(&container).await?;
            tracing::info!(container = container.with(|record| record.id.clone()), "container is removed");
            Ok(())
        })
        .await
    }

    /// Makes the supervisor open the log file anew, after it was renamed.
    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let container = self.0.container(id).ok_or_else(|| Error::container_not_found(id))?;
        let supervisor = self.0.running(&container)?;
        let call = proto::ReopenLog { container_id: container.with(|record| record.id.clone()) };
        supervisor.call_done(request::Call::ReopenLog(call)).await
    }
}

impl Inner {
    async fn start_container(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        let _guard = container.lifecycle.lock().await;
        let (id, pod_id) = container.with(|record| (record.id.clone(), record.pod_id.clone()));
        match container.state() {
            ContainerState::Created => {}
            state => return Err(wrong_state(&id, state, "created")),
        }
        // One that ends from here on takes the init along, with its PID namespace.
        self.pid_target(&pod_id, &container.with(|record| record.config.clone()))?;
        let supervisor = self.supervisor_of(&pod_id)?;
        let began = std::time::Instant::now();
        let call = request::Call::StartContainer(proto::StartContainer { container_id: id.clone() });
        let started = match supervisor.call(call, &[]).await? {
            (packet::Body::ContainerStarted(started), _) => started,
            (other, _) => return Err(unexpected("ContainerStarted", &other)),
        };
        container.change(|record| {
            record.started_at = started.started_at;
            // The exit of a short container may have been told first.
            if record.state == ContainerState::Created {
                record.state = ContainerState::Running;
            }
        });
        self.save_container(container)?;
        tracing::info!(container = id, elapsed = ?began.elapsed(), "container is started");
        Ok(())
    }

    pub(crate) async fn stop_container(&self, container: &Arc<Container>, timeout: Duration) -> Result<()> {
        let (id, pod_id, signal) =
            container.with(|record| (record.id.clone(), record.pod_id.clone(), record.stop_signal));
        if container.state() == ContainerState::Exited {
            return Ok(());
        }
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let call = proto::StopContainer { container_id: id.clone(), signal, timeout_ms };
        let (told, gone) = match self.supervisor_of(&pod_id) {
            Ok(supervisor) => {
                let told = supervisor.call_done(request::Call::StopContainer(call)).await;
                let ended = tokio::time::timeout(Duration::from_millis(200), supervisor.ended());
                let gone = told.is_err() && (!supervisor.is_open() || ended.await.is_ok());
                (told, gone)
            }
            Err(error) => (Err(error), true),
        };
        if let Err(error) = told {
            // All of a pod ends with its supervisor, once that has been noticed.
            if gone && tokio::time::timeout(KILL_TIMEOUT, container.exited()).await.is_ok() {
                return Ok(());
            }
            return Err(error);
        }
        let all = timeout.saturating_add(KILL_TIMEOUT);
        tokio::time::timeout(all, container.exited()).await.map_err(|_| {
            Error::new(
                Code::DeadlineExceeded,
                format!(
                    "container {id}: still there {KILL_TIMEOUT:?} after SIGKILL (pid {})",
                    container.pid()
                ),
            )
        })
    }

    pub(crate) fn supervisor_of(&self, pod_id: &str) -> Result<Arc<Supervisor>> {
        let pod = self.pod(pod_id);
        if let Some(supervisor) = pod.as_ref().and_then(|pod| pod.supervisor()) {
            return Ok(supervisor);
        }
        Err(match pod {
            // See `ask_again`.
            Some(pod) if pod.state() == PodState::Ready => {
                Error::new(Code::Unavailable, format!("pod {pod_id}: its supervisor does not answer"))
            }
            _ => Error::new(Code::FailedPrecondition, format!("pod {pod_id}: its supervisor has ended")),
        })
    }

    /// The supervisor of a container that runs.
    pub(crate) fn running(&self, container: &Container) -> Result<Arc<Supervisor>> {
        let (id, pod_id) = container.with(|record| (record.id.clone(), record.pod_id.clone()));
        match container.state() {
            ContainerState::Running => self.supervisor_of(&pod_id),
            state => Err(wrong_state(&id, state, "running")),
        }
    }
}

pub(crate) fn wrong_state(id: &str, state: ContainerState, wanted: &str) -> Error {
    let state = match state {
        ContainerState::Created => "created",
        ContainerState::Running => "running",
        ContainerState::Exited => "exited",
    };
    Error::new(
        Code::FailedPrecondition,
        format!("container_id {id:?}: the container is {state}, not {wanted}"),
    )
}
