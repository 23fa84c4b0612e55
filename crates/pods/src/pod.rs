//! One pod and one container in memory.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock};

use stave_supervisor_proto::v1 as proto;
use tokio::sync::watch;

use crate::jobs::lock;
use crate::record::{ContainerRecord, ContainerState, PodRecord, PodState};
use crate::supervisor::Supervisor;

/// A pod.
pub(crate) struct Pod {
    record: Mutex<PodRecord>,
    supervisor: Mutex<Option<Arc<Supervisor>>>,
    /// Held while the pod is stopped or removed.
    pub(crate) teardown: tokio::sync::Mutex<()>,
    /// Read: a container is being made. Write: the pod is torn down, and what would be made now would stay.
    pub(crate) making: tokio::sync::RwLock<()>,
    /// As that of a container.
    pub(crate) on_disk: Mutex<bool>,
}

impl Pod {
    pub(crate) fn new(record: PodRecord) -> Arc<Self> {
        Arc::new(Self {
            record: Mutex::new(record),
            supervisor: Mutex::default(),
            teardown: tokio::sync::Mutex::default(),
            making: tokio::sync::RwLock::default(),
            on_disk: Mutex::new(true),
        })
    }

    /// A copy of the record.
    pub(crate) fn record(&self) -> PodRecord {
        lock(&self.record).clone()
    }

    /// Looks at the record. Must not block.
    pub(crate) fn with<T>(&self, look: impl FnOnce(&PodRecord) -> T) -> T {
        look(&lock(&self.record))
    }

    /// Changes the record, in memory only.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut PodRecord) -> T) -> T {
        change(&mut lock(&self.record))
    }

    pub(crate) fn state(&self) -> PodState {
        self.with(|record| record.state)
    }

    pub(crate) fn supervisor(&self) -> Option<Arc<Supervisor>> {
        lock(&self.supervisor).clone()
    }

    pub(crate) fn set_supervisor(&self, supervisor: Option<Arc<Supervisor>>) {
        *lock(&self.supervisor) = supervisor;
    }
}

/// A container.
pub(crate) struct Container {
    record: Mutex<ContainerRecord>,
    /// Follows the record's state, for those who wait.
    state: watch::Sender<ContainerState>,
    /// False until CreateContainer is done: exits are taken, but nobody sees the container.
    visible: Mutex<bool>,
    /// Host pid of the init, to be shown to people; 0: not known or gone.
    pid: Mutex<i32>,
    /// Held while the record is written, so that an older one never overwrites a newer one. False: the
    /// container is removed, and its record with it.
    pub(crate) on_disk: Mutex<bool>,
    /// Held while the container is started, or removed.
    pub(crate) lifecycle: tokio::sync::Mutex<()>,
    /// Of its plan, which never changes: read when the first exec needs it.
    pub(crate) process: OnceLock<Arc<proto::Process>>,
    /// Processes of it that the OOM killer has ended, as far as it was noticed.
    pub(crate) oom_kills: AtomicU64,
}

impl Container {
    pub(crate) fn new(record: ContainerRecord, visible: bool) -> Arc<Self> {
        Arc::new(Self {
            state: watch::Sender::new(record.state),
            record: Mutex::new(record),
            visible: Mutex::new(visible),
            pid: Mutex::new(0),
            on_disk: Mutex::new(true),
            lifecycle: tokio::sync::Mutex::default(),
            process: OnceLock::new(),
            oom_kills: AtomicU64::new(0),
        })
    }

    /// A copy of the record.
    pub(crate) fn record(&self) -> ContainerRecord {
        lock(&self.record).clone()
    }

    /// Looks at the record. Must not block.
    pub(crate) fn with<T>(&self, look: impl FnOnce(&ContainerRecord) -> T) -> T {
        look(&lock(&self.record))
    }

    /// Changes the record, in memory only, and tells those who wait for a state.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut ContainerRecord) -> T) -> T {
        let mut record = lock(&self.record);
        let result = change(&mut record);
        self.state.send_if_modified(|state| std::mem::replace(state, record.state) != record.state);
        result
    }

    pub(crate) fn state(&self) -> ContainerState {
        *self.state.borrow()
    }

    /// Waits for the end of the container.
    pub(crate) async fn exited(&self) {
        let mut state = self.state.subscribe();
        let _ = state.wait_for(|state| *state == ContainerState::Exited).await;
    }

    pub(crate) fn is_visible(&self) -> bool {
        *lock(&self.visible)
    }

    pub(crate) fn show(&self) {
        *lock(&self.visible) = true;
    }

    pub(crate) fn pid(&self) -> i32 {
        // The end may have been told before the reply that named the pid.
        if self.state() == ContainerState::Exited {
            return 0;
        }
        *lock(&self.pid)
    }

    pub(crate) fn set_pid(&self, pid: i32) {
        *lock(&self.pid) = pid;
    }
}
