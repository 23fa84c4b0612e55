//! The calls about containers.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use stave_executor::{Init, Stdio};
use stave_supervisor_proto::v1::packet::Body;
use stave_supervisor_proto::v1::{
    Cgroup, CreateContainer, Done, Failure, PidNamespace, RemoveContainer, ReopenLog, StartContainer,
    StopContainer,
};

use crate::calls::{Answer, DONE};
use crate::connection::ReplyTo;
use crate::container::{Container, State};
use crate::event_loop::{Key, Source};
use crate::log_file::Dropped;
use crate::log_lines::OutputKind;
use crate::oci_runtime::OciContainer;
use crate::output::{self, Output};
use crate::report::report;
use crate::supervisor::Supervisor;
use crate::{failure, ids, oom};

const MAX_CONTAINERS: usize = 4096;
/// `_NSIG` of the kernel.
const MAX_SIGNAL: i32 = 64;

/// The container's ends of its standard streams, and ours.
struct Streams {
    theirs: Stdio,
    stdin: Option<OwnedFd>,
    stdout: Output,
    stderr: Output,
}

impl Supervisor {
    pub(crate) fn find_container(&self, id: &str) -> Option<Key> {
        self.containers.iter().find(|(_, container)| container.id == id).map(|(key, _)| *key)
    }

    pub(crate) fn container(&self, id: &str) -> Result<&Container, Failure> {
        self.containers
            .values()
            .find(|container| container.id == id)
            .ok_or_else(|| failure::not_found(format!("container {id:?} is not in this pod")))
    }

    pub(crate) fn container_mut(&mut self, id: &str) -> Result<(Key, &mut Container), Failure> {
        self.containers
            .iter_mut()
            .find(|(_, container)| container.id == id)
            .map(|(key, container)| (*key, container))
            .ok_or_else(|| failure::not_found(format!("container {id:?} is not in this pod")))
    }

    /// Clones the init; the reply follows when it is ready.
    pub(crate) fn create_container(&mut self, to: ReplyTo, call: CreateContainer) -> Answer {
        let plan = call.plan.ok_or_else(|| failure::invalid("plan is missing"))?;
        let id = plan.container_id.clone();
        ids::check("container_id", &id)?;
        if !self.pod.is_set_up() {
            return Err(failure::precondition("the pod is not set up"));
        }
        if self.find_container(&id).is_some() {
            return Err(failure::precondition(format!("container {id:?} exists already")));
        }
        if self.containers.len() >= MAX_CONTAINERS {
            return Err(failure::exhausted(format!("the pod has {MAX_CONTAINERS} containers")));
        }
        if !call.log_path.is_empty() && !call.log_path.starts_with('/') {
            return Err(failure::invalid(format!("log_path {:?} is not an absolute path", call.log_path)));
        }
        let process = plan.process.as_ref().ok_or_else(|| failure::invalid("plan.process is missing"))?;
        let cgroup = plan.cgroup.clone().unwrap_or_default();
        check_cgroup(&cgroup)?;
        let key = self.next_key();
        if plan.pid_namespace() == PidNamespace::Pod {
            self.pod.make_pid_namespace(&self.events)?;
        }
        let pid_namespace = match plan.pid_namespace() {
            PidNamespace::Pod => self.pod.pid_namespace(),
            PidNamespace::Target => Some(self.pid_target(&plan.pid_target)?),
            PidNamespace::Container | PidNamespace::Node => None,
        };
        let oom_kills_before = oom::kills(&cgroup.oom_file).unwrap_or(0);
        let streams = if process.terminal { None } else { Some(self.streams(key, call.stdin)?) };
        let (theirs, stdin, stdout, stderr) = match streams {
            None => (None, None, None, None),
            Some(Streams { theirs, stdin, stdout, stderr }) => {
                (Some(theirs), stdin, Some(stdout), Some(stderr))
            }
        };
        let (init, theirs) = match &call.oci {
            Some(_) => (None, theirs),
            None => {
                let init = self.pod.namespaces().create(&plan, theirs, pid_namespace);
                (Some(init.map_err(|error| failure::executor(&error))?), None)
            }
        };
        let oci = call.oci.as_ref().map(|runtime| OciContainer::new(runtime, &plan)).transpose()?;
        let mut container = Container {
            id,
            pid: init.as_ref().map_or(0, Init::pid),
            cgroup,
            entrances: None,
            state: State::Creating(to),
            init,
            end_watch: None,
            control_watch: None,
            stdout,
            stderr,
            stdin,
            stdin_once: call.stdin_once,
            terminal: process.terminal,
            log_path: call.log_path,
            log: None,
            log_dropped: Dropped::default(),
            attachments_dropped: 0,
            oom_kills_before,
            failure: None,
            started_at: 0,
            stopping: false,
            signal_at_start: None,
            kill_at: None,
            ended: None,
            record_at: None,
            removals: Vec::new(),
            oci,
        };
        if let Some(runtime) = &call.oci {
            for output in [&mut container.stdout, &mut container.stderr].into_iter().flatten() {
                output.early = container.oci.as_ref().map(|oci| Rc::clone(&oci.early));
            }
            self.containers.insert(key, container);
            return match self.create_with_runtime(key, &plan, runtime, theirs) {
                Ok(()) => Ok(None),
                Err(failure) => {
                    self.containers.remove(&key);
                    Err(failure)
                }
            };
        }
        if let Err(errno) = self.watch_init(key, &mut container) {
            container.failure = Some(failure::system("watch the container's init", errno));
            container.kill();
        }
        self.containers.insert(key, container);
        Ok(None)
    }

    /// The pidfd of the init whose PID namespace a container joins.
    fn pid_target(&self, id: &str) -> Result<BorrowedFd<'_>, Failure> {
        let target = self.containers.values().find(|container| container.id == id);
        target.filter(|target| target.is_running()).and_then(Container::pidfd).ok_or_else(|| {
            failure::precondition(format!("plan.pid_target {id:?}: no such container runs in this pod"))
        })
    }

    /// Watches the init that an OCI runtime has made.
    pub(crate) fn watch_adopted(&mut self, key: Key) -> Result<(), Errno> {
        let Some(container) = self.containers.get_mut(&key) else { return Ok(()) };
        let Some(init) = &container.init else { return Ok(()) };
        container.end_watch = Some(self.events.watch_end(init.pidfd(), Source::ContainerEnd(key))?);
        Ok(())
    }

    fn watch_init(&self, key: Key, container: &mut Container) -> Result<(), Errno> {
        let Some(init) = &container.init else { return Ok(()) };
        container.end_watch = Some(self.events.watch_end(init.pidfd(), Source::ContainerEnd(key))?);
        if let Some(control) = init.control() {
            container.control_watch = Some(self.events.watch_copy(control, Source::ContainerControl(key))?);
        }
        Ok(())
    }

    fn streams(&self, key: Key, stdin: bool) -> Result<Streams, Failure> {
        let make = || -> Result<Streams, Errno> {
            let (out, their_out) = output::output_pipe()?;
            let (err, their_err) = output::output_pipe()?;
            let (their_in, stdin) = if stdin {
                let (theirs, ours) = output::input_pipe()?;
                (theirs, Some(ours))
            } else {
                let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                (rustix::fs::openat(CWD, "/dev/null", flags, Mode::empty())?, None)
            };
            let stdout = self.events.watch_in_order(out, Source::ContainerStdout(key))?;
            let stderr = self.events.watch_in_order(err, Source::ContainerStderr(key))?;
            Ok(Streams {
                theirs: Stdio { stdin: their_in, stdout: their_out, stderr: their_err },
                stdin,
                stdout: Output::new(stdout, OutputKind::Stdout),
                stderr: Output::new(stderr, OutputKind::Stderr),
            })
        };
        make().map_err(|errno| failure::system("make the container's standard streams", errno))
    }

    /// Lets the init go on; the reply follows at execve.
    pub(crate) fn start_container(&mut self, to: ReplyTo, call: &StartContainer) -> Answer {
        let (key, container) = self.container_mut(&call.container_id)?;
        let startable = matches!(container.state, State::Created) && container.removals.is_empty();
        let init = container.init.as_mut().filter(|_| startable);
        let Some(init) = init else {
            return Err(failure::precondition(format!(
                "container {:?} is {}, not created",
                container.id,
                container.state_name()
            )));
        };
        if container.oci.is_some() {
            self.start_with_runtime(key, to)?;
            return Ok(None);
        }
        init.start().map_err(|error| failure::executor(&error))?;
        container.state = State::Starting(to);
        Ok(None)
    }

    /// Sends the signal and sets the deadline.
    pub(crate) fn stop_container(&mut self, call: &StopContainer) -> Answer {
        if !(1..=MAX_SIGNAL).contains(&call.signal) {
            return Err(failure::invalid(format!("signal {} is not in 1 to {MAX_SIGNAL}", call.signal)));
        }
        let (key, container) = self.container_mut(&call.container_id)?;
        if !container.is_alive() {
            return DONE;
        }
        if let State::Creating(_) = container.state {
            container.failure.get_or_insert_with(|| {
                failure::precondition(format!(
                    "container {:?} was stopped while it was created",
                    container.id
                ))
            });
        }
        if matches!(container.state, State::Creating(_) | State::Created) || call.timeout_ms == 0 {
            container.stopping = true;
            container.kill();
            return DONE;
        }
        if matches!(container.state, State::Starting(_)) {
            // Now it would kill the init before execve, or be ignored, if that is process 1 of its PID namespace.
            container.signal_at_start.get_or_insert(call.signal);
        } else if !container.stopping {
            let sent = match container.oci {
                Some(_) => self.signal_with_runtime(key, call.signal),
                None => container.signal(call.signal),
            };
            sent.map_err(|error| failure::io(format!("send signal {}", call.signal), &error))?;
        }
        let (_, container) = self.container_mut(&call.container_id)?;
        container.stopping = true;
        // A deadline too far for the clock is none.
        if let Some(at) = Instant::now().checked_add(Duration::from_millis(call.timeout_ms)) {
            container.kill_at = Some(container.kill_at.map_or(at, |earlier| earlier.min(at)));
        }
        DONE
    }

    /// Forgets a container. One that lives but never started is killed first, and the reply waits.
    pub(crate) fn remove_container(&mut self, to: ReplyTo, call: &RemoveContainer) -> Answer {
        ids::check("container_id", &call.container_id)?;
        let Ok((key, container)) = self.container_mut(&call.container_id) else { return DONE };
        if let Some(oci) = container.oci.as_mut().filter(|oci| oci.is_deleting())
            && !matches!(container.state, State::Creating(_))
        {
            oci.forget_later();
            container.removals.push(to);
            return Ok(None);
        }
        match container.state {
            State::Exited { .. } => self.forget_container(key),
            State::Running if !container.is_alive() => {
                self.finish_container(key);
                self.forget_container(key);
            }
            State::Creating(_) | State::Created => {
                container.failure.get_or_insert_with(|| {
                    failure::precondition(format!(
                        "container {:?} was removed while it was created",
                        container.id
                    ))
                });
                container.removals.push(to);
                container.kill();
                if container.oci.is_some() {
                    self.abort_runtimes_of(key, "the container was removed while it was created");
                }
                return Ok(None);
            }
            State::Starting(_) | State::Running => {
                return Err(failure::precondition(format!(
                    "container {:?} is {}: stop it first",
                    container.id,
                    container.state_name()
                )));
            }
        }
        DONE
    }

    /// Drops all that is known of a container, its exit record included.
    /// With an OCI runtime once that has forgotten it as well.
    pub(crate) fn forget_container(&mut self, key: Key) {
        if let Some(oci) = self.containers.get_mut(&key).and_then(|one| one.oci.as_mut())
            && oci.is_deleting()
        {
            return oci.forget_later();
        }
        let Some(container) = self.containers.remove(&key) else { return };
        if let Err(error) = self.exits.delete(&container.id) {
            report!("container {}: delete the exit record: {error}", container.id);
        }
        for to in container.removals {
            self.reply(to, Body::Done(Done {}), None);
        }
    }

    pub(crate) fn reopen_log(&mut self, call: &ReopenLog) -> Answer {
        let (_, container) = self.container_mut(&call.container_id)?;
        if !container.is_running() {
            return Err(failure::precondition(format!(
                "container {:?} is {}, not running",
                container.id,
                container.state_name()
            )));
        }
        match &mut container.log {
            Some(log) => log.reopen()?,
            None => return Err(failure::precondition(format!("container {:?} has no log", container.id))),
        }
        DONE
    }
}

/// The directories come from the daemon; this only keeps an empty or relative one from meaning
/// another place.
fn check_cgroup(cgroup: &Cgroup) -> Result<(), Failure> {
    let paths = [("v2_dir", &cgroup.v2_dir), ("oom_file", &cgroup.oom_file)];
    let hierarchies = cgroup.v1.iter().map(|hierarchy| ("v1.dir", &hierarchy.dir));
    for (field, path) in paths.into_iter().filter(|(_, path)| !path.is_empty()).chain(hierarchies) {
        if !path.starts_with('/') || path.split('/').any(|part| part == "..") {
            return Err(failure::invalid(format!(
                "plan.cgroup.{field} {path:?} is not a plain absolute path"
            )));
        }
    }
    Ok(())
}
