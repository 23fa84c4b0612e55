use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::broadcast;
use tokio::time::Instant;
use zbus::{DynamicType, Message, OwnedObjectPath, OwnedVariant, Variant};

use crate::SystemdError;
use crate::bus::{Bus, Ended, MANAGER, NAME, PATH, answer, is_absence};

/// For one of our calls, all its steps together. A busy systemd of a node with hundreds of pods takes some tenths of
/// a second; the kubelet waits two minutes for RunPodSandbox.
const DEADLINE: Duration = Duration::from_secs(20);

/// How long after a signal should have come the unit is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Between tries while systemd restarts.
const PAUSE: Duration = Duration::from_millis(100);

/// The scope of a pod sandbox.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'a> {
    /// name, such as `stave-<pod id>.scope`
    pub name: &'a str,
    /// the slice that it is in; systemd makes it where it is missing
    pub slice: &'a str,
    /// the slice does not exist, and is to go with the last scope in it
    pub transient_slice: bool,
    /// for people: what `systemctl status` shows
    pub description: &'a str,
    /// a process to begin with: systemd starts no scope without one
    pub pid: i32,
}

/// A unit, as systemd lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// name, such as `stave-<pod id>.scope`
    pub name: String,
    /// as it was started with
    pub description: String,
    /// active, activating, deactivating, inactive, failed
    pub state: String,
}

/// What systemd says of a unit.
#[derive(Debug, PartialEq, Eq)]
enum State {
    /// Not in memory.
    Gone,
    /// It has a job.
    Busy,
    /// Its `ActiveState`.
    Is(String),
}

type Properties<'a> = Vec<(&'a str, Variant<'a>)>;
type Listed = (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

/// The system's systemd. Connects when it is first needed, and again when the connection is lost.
pub struct Systemd {
    address: Option<String>,
    deadline: Duration,
    bus: Mutex<Option<Arc<Bus>>>,
}

impl Default for Systemd {
    fn default() -> Self {
        Self { address: None, deadline: DEADLINE, bus: Mutex::default() }
    }
}

impl Systemd {
    /// Of the bus at another D-Bus address, and with another deadline for each call.
    pub fn at(address: &str, deadline: Duration) -> Self {
        Self { address: Some(address.to_owned()), deadline, bus: Mutex::default() }
    }

    /// The cgroup that all slices are in: "" on a host, systemd's own in a container.
    pub async fn control_group(&self) -> Result<String, SystemdError> {
        let stage = "asking for systemd's cgroup";
        self.in_time(stage, async {
            let body = (MANAGER, "ControlGroup");
            let (reply, _) = self.call_at("org.freedesktop.DBus.Properties", "Get", &body, stage).await?;
            let value: OwnedVariant = read(&reply, stage)?;
            String::try_from(value)
                .map_err(|e| SystemdError::Answer { stage: stage.to_owned(), message: e.to_string() })
        })
        .await
    }

    /// Starts a scope, and waits until it is there. All limits are ours to set below it: the scope itself has
    /// none, and its cgroup is delegated, so that neither `daemon-reload` nor a restart of systemd touches it.
    pub async fn start_scope(&self, scope: &Scope<'_>) -> Result<(), SystemdError> {
        let stage = format!("starting the scope {}", scope.name);
        let stage = stage.as_str();
        self.in_time(stage, async {
            let until = Instant::now() + self.deadline / 2;
            let mut transient_slice = scope.transient_slice;
            loop {
                let error = match self.try_start(&Scope { transient_slice, ..*scope }, stage).await {
                    Err(error) => error,
                    started => return started,
                };
                match &error {
                    SystemdError::Refused { name, .. } if name.ends_with(".UnitExists") => {
                        // An earlier try whose answer was lost: the name is nobody else's.
                        if self.state(scope.name, stage).await? != State::Gone {
                            return self.wait_for(scope.name, true, stage).await;
                        }
                        // Somebody has made the slice meanwhile: the kubelet, or another pod in it.
                        transient_slice = false;
                    }
                    // It was there, and has gone with the last scope in it, or is about to.
                    error if is_unknown(error) => transient_slice = true,
                    _ => return Err(error),
                }
                if Instant::now() >= until {
                    return Err(error);
                }
                tokio::time::sleep(PAUSE).await;
            }
        })
        .await
    }

    /// Stops a unit, waits until it is stopped, and has systemd forget a failure of it. Unknown is success.
    pub async fn stop(&self, unit: &str) -> Result<(), SystemdError> {
        let stage = format!("stopping {unit}");
        let stage = stage.as_str();
        self.in_time(stage, async {
            match self.job("StopUnit", &(unit, "replace"), stage).await {
                Ok((job, ended)) => self.wait(&job, ended, unit, false, stage).await?,
                Err(error) if is_unknown(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
            match self.call("ResetFailedUnit", &(unit,), stage).await {
                // Not failed, and forgotten by now.
                Err(error) if !is_unknown(&error) => Err(error),
                _ => Ok(()),
            }
        })
        .await
    }

    /// Sends SIGKILL to every process of a unit. Unknown is success.
    pub async fn kill(&self, unit: &str) -> Result<(), SystemdError> {
        const SIGKILL: i32 = 9;
        let stage = format!("killing {unit}");
        let stage = stage.as_str();
        self.in_time(stage, async {
            match self.call("KillUnit", &(unit, "all", SIGKILL), stage).await {
                Err(error) if !is_unknown(&error) => Err(error),
                _ => Ok(()),
            }
        })
        .await
    }

    /// Units that systemd has in memory and whose name matches a pattern, as `stave-*.scope` (glob(7)).
    pub async fn list(&self, pattern: &str) -> Result<Vec<Unit>, SystemdError> {
        let stage = "listing units";
        self.in_time(stage, async {
            let none: [&str; 0] = [];
            let reply = self.call("ListUnitsByPatterns", &(&none[..], &[pattern][..]), stage).await?;
            Ok(units(read(&reply, stage)?))
        })
        .await
    }

    async fn try_start(&self, scope: &Scope<'_>, stage: &str) -> Result<(), SystemdError> {
        let body = (scope.name, "replace", properties(scope), auxiliary(scope));
        let (job, ended) = self.job("StartTransientUnit", &body, stage).await?;
        self.wait(&job, ended, scope.name, true, stage).await
    }

    async fn state(&self, unit: &str, stage: &str) -> Result<State, SystemdError> {
        let reply = self.call("ListUnitsByNames", &(&[unit][..],), stage).await?;
        let listed: Vec<Listed> = read(&reply, stage)?;
        Ok(match listed.into_iter().find(|one| one.0 == unit) {
            Some(one) if one.7 != 0 => State::Busy,
            Some(one) if one.2 == "loaded" => State::Is(one.3),
            _ => State::Gone,
        })
    }

    /// Bounds all steps of a call together.
    async fn in_time<T>(
        &self,
        stage: &str,
        work: impl Future<Output = Result<T, SystemdError>>,
    ) -> Result<T, SystemdError> {
        let deadline = self.deadline;
        tokio::time::timeout(deadline, work)
            .await
            .unwrap_or_else(|_| Err(SystemdError::Deadline { stage: stage.to_owned(), deadline }))
    }

    /// The connection that is up, or a new one.
    async fn bus(&self) -> zbus::Result<Arc<Bus>> {
        let lock = || self.bus.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bus) = lock().as_ref().filter(|bus| bus.is_open()) {
            return Ok(Arc::clone(bus));
        }
        // Two that connect at once leave the later one here; both work.
        let bus = Arc::new(Bus::connect(self.address.as_deref()).await?);
        *lock() = Some(Arc::clone(&bus));
        Ok(bus)
    }

    /// Gives a connection up that an answer did not come on.
    fn drop_bus(&self) {
        *self.bus.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Calls a method that makes a job: the job's path, and the ends of all jobs since before it was made.
    async fn job<B: Serialize + DynamicType + Sync>(
        &self,
        method: &str,
        body: &B,
        stage: &str,
    ) -> Result<(OwnedObjectPath, broadcast::Receiver<Ended>), SystemdError> {
        let (reply, ended) = self.call_at(MANAGER, method, body, stage).await?;
        Ok((read(&reply, stage)?, ended))
    }

    async fn call<B: Serialize + DynamicType + Sync>(
        &self,
        method: &str,
        body: &B,
        stage: &str,
    ) -> Result<Message, SystemdError> {
        self.call_at(MANAGER, method, body, stage).await.map(|(reply, _)| reply)
    }

    /// Calls, and calls again while systemd restarts or the bus does. A bus that can't be connected to is told at
    /// once.
    async fn call_at<B: Serialize + DynamicType + Sync>(
        &self,
        interface: &str,
        method: &str,
        body: &B,
        stage: &str,
    ) -> Result<(Message, broadcast::Receiver<Ended>), SystemdError> {
        let until = Instant::now() + self.deadline / 2;
        loop {
            let unreachable =
                |message: String| SystemdError::Unreachable { stage: stage.to_owned(), message };
            let error = match self.bus().await {
                Ok(bus) => {
                    let ended = bus.jobs();
                    let call = bus.connection.call_method(Some(NAME), PATH, Some(interface), method, body);
                    match call.await {
                        Ok(reply) => return Ok((reply, ended)),
                        Err(error) => error,
                    }
                }
                Err(error) if answer(&error).is_none() => return Err(unreachable(error.to_string())),
                Err(error) => error,
            };
            match answer(&error) {
                Some((name, message)) if !is_absence(&name) => {
                    return Err(SystemdError::Refused { stage: stage.to_owned(), name, message });
                }
                // That of ours: the body or the arguments. Nothing was sent.
                None if !matches!(error, zbus::Error::InputOutput(_)) => {
                    return Err(SystemdError::Answer { stage: stage.to_owned(), message: error.to_string() });
                }
                _ if Instant::now() >= until => return Err(unreachable(error.to_string())),
                _ => {}
            }
            tracing::debug!(stage, %error, "systemd does not answer, trying again");
            self.drop_bus();
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Waits for the end of a job, by the signal or, where that does not come, by the state of the unit: a restart
    /// of systemd keeps its jobs, and may lose its signals.
    async fn wait(
        &self,
        job: &OwnedObjectPath,
        mut ended: broadcast::Receiver<Ended>,
        unit: &str,
        start: bool,
        stage: &str,
    ) -> Result<(), SystemdError> {
        match tokio::time::timeout(LOOK, ended_job(&mut ended, job)).await {
            Ok(Some(result)) if result == "done" => Ok(()),
            Ok(Some(result)) => Err(job_error(unit, &result, stage)),
            Ok(None) | Err(_) => {
                tracing::debug!(unit, "systemd does not tell the end of a job, looking at the unit");
                self.wait_for(unit, start, stage).await
            }
        }
    }

    /// Waits until a unit is active, or is stopped.
    async fn wait_for(&self, unit: &str, start: bool, stage: &str) -> Result<(), SystemdError> {
        loop {
            match (self.state(unit, stage).await?, start) {
                (State::Is(state), true) if state == "active" => return Ok(()),
                (State::Gone, false) => return Ok(()),
                (State::Is(state), false) if matches!(state.as_str(), "inactive" | "failed") => return Ok(()),
                (State::Gone, true) => return Err(job_error(unit, "gone", stage)),
                (State::Is(state), true) if matches!(state.as_str(), "inactive" | "failed") => {
                    return Err(job_error(unit, &state, stage));
                }
                _ => tokio::time::sleep(PAUSE).await,
            }
        }
    }
}

fn job_error(unit: &str, result: &str, stage: &str) -> SystemdError {
    SystemdError::Job { stage: stage.to_owned(), unit: unit.to_owned(), result: result.to_owned() }
}

/// How a job has ended; none when nothing more is told on this connection.
async fn ended_job(ended: &mut broadcast::Receiver<Ended>, job: &OwnedObjectPath) -> Option<String> {
    loop {
        match ended.recv().await {
            Ok((path, result)) if path == *job => return Some(result),
            // One that was missed shows in the unit's state.
            Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return None,
        }
    }
}

/// What a scope is started with (org.freedesktop.systemd1(5), "Properties" of units and scopes).
fn properties<'a>(scope: &Scope<'a>) -> Properties<'a> {
    vec![
        ("Description", Variant::from(scope.description)),
        ("Slice", Variant::from(scope.slice)),
        ("PIDs", Variant::from(vec![u32::try_from(scope.pid).unwrap_or_default()])),
        // All controllers, and what is below is nobody's but ours.
        ("Delegate", Variant::from(true)),
        // No order and no conflict with the shutdown: the kubelet ends pods in time, or systemd does at the very end.
        ("DefaultDependencies", Variant::from(false)),
        // The default is 15 % of what the machine has: the pod's slice has the limit that is asked for.
        ("TasksMax", Variant::from(u64::MAX)),
        // One that failed is forgotten as well.
        ("CollectMode", Variant::from("inactive-or-failed")),
    ]
}

/// Units that systemd makes beside the scope: its slice, when that is ours.
fn auxiliary<'a>(scope: &Scope<'a>) -> Vec<(&'a str, Properties<'a>)> {
    if !scope.transient_slice {
        return Vec::new();
    }
    vec![(
        scope.slice,
        vec![
            ("Description", Variant::from("Pods of Stave")),
            ("DefaultDependencies", Variant::from(false)),
            // It ends with its last scope, whoever is alive then.
            ("StopWhenUnneeded", Variant::from(true)),
        ],
    )]
}

fn units(listed: Vec<Listed>) -> Vec<Unit> {
    listed.into_iter().map(|one| Unit { name: one.0, description: one.1, state: one.3 }).collect()
}

fn read<T>(reply: &Message, stage: &str) -> Result<T, SystemdError>
where
    T: for<'d> zbus::wire::DynamicDeserialize<'d>,
{
    reply
        .body()
        .deserialize()
        .map_err(|e| SystemdError::Answer { stage: stage.to_owned(), message: e.to_string() })
}

fn is_unknown(error: &SystemdError) -> bool {
    matches!(error, SystemdError::Refused { name, .. } if name.ends_with(".NoSuchUnit"))
}
