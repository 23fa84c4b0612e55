//! create, start, kill and delete.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::io::Errno;
use stave_executor::{Bundle, Init, Stdio};
use stave_supervisor_proto::v1::packet::Body;
use stave_supervisor_proto::v1::{
    ContainerCreated, ContainerStarted, Failure, Identity, OciRuntime, PidNamespace, Plan,
};

use super::adopt::Adopted;
use super::call::{Outcome, Pipes, Verb};
use super::{Deletion, OciContainer, console};
use crate::connection::ReplyTo;
use crate::container::{Container, State};
use crate::event_loop::Key;
use crate::output::{Buffers, Early};
use crate::reaper::ExitStatus;
use crate::report::report;
use crate::supervisor::Supervisor;
use crate::{clock, failure};

const PID_FILE: &str = "init.pid";
const CONSOLE: &str = "console.sock";

impl OciContainer {
    /// Checks what the daemon asks for, and makes the directory for the runtime's own state.
    pub(crate) fn new(runtime: &OciRuntime, plan: &Plan) -> Result<Self, Failure> {
        for (field, path) in
            [("program", &runtime.program), ("root", &runtime.root), ("bundle", &runtime.bundle)]
        {
            if !path.starts_with('/') || path.split('/').any(|part| part == "..") {
                return Err(failure::invalid(format!("oci.{field} {path:?} is not a plain absolute path")));
            }
        }
        let stage_dir = &runtime.stage_dir;
        if !stage_dir.is_empty()
            && (!stage_dir.starts_with('/') || stage_dir.split('/').any(|part| part == ".."))
        {
            return Err(failure::invalid(format!(
                "oci.stage_dir {stage_dir:?} is not a plain absolute path"
            )));
        }
        if runtime.config.is_none() {
            return Err(failure::invalid("oci.config is missing"));
        }
        std::os::unix::fs::DirBuilderExt::mode(std::fs::DirBuilder::new().recursive(true), 0o700)
            .create(&runtime.root)
            .map_err(|error| failure::io(format!("make directory {:?}", runtime.root), &error))?;
        let terminal = plan.process.as_ref().is_some_and(|process| process.terminal);
        let bundle = PathBuf::from(&runtime.bundle);
        let console = if terminal { Some(console::listen(&bundle, CONSOLE)?) } else { None };
        Ok(Self {
            runtime: Rc::new(OciRuntime { config: None, ..runtime.clone() }),
            bundle,
            identity: Identity::default(),
            umask: plan.process.as_ref().and_then(|process| process.umask),
            console,
            early: Early::default(),
            held_end: None,
            deletion: Deletion::NotYet,
            forget: false,
        })
    }

    /// User, and umask, of the container's processes.
    pub(super) fn user(&self) -> (&Identity, Option<u32>) {
        (&self.identity, self.umask)
    }

    pub(super) fn handler(&self) -> &str {
        &self.runtime.handler
    }

    pub(super) fn bundle(&self) -> &Path {
        &self.bundle
    }
}

/// Names the handler, where nothing has yet.
pub(super) fn of_handler(handler: &str, mut failure: Failure) -> Failure {
    if outside(&failure.message) {
        failure.message = format!("runtime handler {handler:?}: {}", failure.message);
    }
    failure
}

/// It is about what a runtime has left, and does not say so.
fn outside(message: &str) -> bool {
    message.starts_with("pid file ") || message.starts_with("console socket")
}

impl Container {
    /// What was written to the container's standard error while it was made: by the runtime.
    pub(super) fn take_early(&mut self, buffers: &mut Buffers) -> Vec<u8> {
        let _ = self.drain(buffers);
        self.oci.as_ref().map(|oci| oci.early.take()).unwrap_or_default()
    }
}

impl Supervisor {
    /// Lets the runtime create a container that is in the table already; the reply follows.
    pub(crate) fn create_with_runtime(
        &mut self,
        key: Key,
        plan: &Plan,
        runtime: &OciRuntime,
        stdio: Option<Stdio>,
    ) -> Result<(), Failure> {
        let pid_ns = match plan.pid_namespace() {
            PidNamespace::Pod => self.pod.pid_namespace().map(|fd| fd.try_clone_to_owned()).transpose(),
            PidNamespace::Target => self.namespace_of_target(&plan.pid_target).map(Some),
            PidNamespace::Container | PidNamespace::Node => Ok(None),
        };
        let pid_ns = pid_ns.map_err(|error| failure::io("the PID namespace to share", &error))?;
        let config = runtime.config.clone().unwrap_or_default();
        let dir = PathBuf::from(&runtime.bundle);
        let bundle = Bundle {
            plan,
            dir: &dir,
            config: &config,
            pid_ns: pid_ns.as_ref().map(std::os::fd::AsFd::as_fd),
        };
        let mut args = vec!["create", "--bundle", runtime.bundle.as_str(), "--pid-file", PID_FILE];
        let pipes = match stdio {
            Some(stdio) => Pipes::passed_on(stdio),
            None => {
                args.extend(["--console-socket", CONSOLE]);
                Pipes::own()?
            }
        };
        args.push(&plan.container_id);
        self.call_runtime(key, Verb::Create, &args, pipes, Some(&bundle))
    }

    fn namespace_of_target(&self, id: &str) -> std::io::Result<std::os::fd::OwnedFd> {
        // Ours until we wait for it, so the number can't be another process.
        let target = self.containers.values().find(|one| one.id == id && one.is_running());
        let target = target.ok_or_else(|| std::io::Error::from(Errno::SRCH))?;
        std::fs::File::open(format!("/proc/{}/ns/pid", target.pid)).map(Into::into)
    }

    /// `create` has ended.
    pub(super) fn created(&mut self, key: Key, outcome: Outcome) {
        let adopted = outcome.result.and_then(|()| {
            let oci = self.containers.get(&key).and_then(|one| one.oci.as_ref());
            let oci = oci.ok_or_else(|| failure::internal("the container is gone"))?;
            let console = oci.console.as_ref().map(console::receive).transpose()?;
            let file = oci.bundle.join(PID_FILE);
            Ok((self.adopt(&file)?, console))
        });
        let handler =
            self.containers.get(&key).and_then(|one| one.oci.as_ref()).map(|oci| oci.runtime.handler.clone());
        let adopted = adopted.map_err(|failure| of_handler(&handler.unwrap_or_default(), failure));
        let Some(container) = self.containers.get_mut(&key) else { return };
        if let Some(oci) = &mut container.oci {
            oci.console = None;
        }
        let (pid, pidfd, console) = match adopted {
            Ok((Adopted::Alive(pid, pidfd), console)) => (pid, pidfd, console),
            Ok((Adopted::Ended(_, status), _)) => {
                let why = format!("the container's init ended with {status} before it was started");
                return self.creation_failed(key, failure::internal(why), true);
            }
            Err(failure) => return self.creation_failed(key, failure, outcome.ran),
        };
        container.pid = pid;
        container.init = Some(Init::adopted(pid, pidfd));
        let watched = self.watch_adopted(key);
        let Some(container) = self.containers.get_mut(&key) else { return };
        // It has not run a line of the container's yet.
        let checked = stave_executor::place(&container.cgroup, pid)
            .and_then(|()| self.pod.namespaces().check_user_of(pid));
        if let Err(error) = checked {
            container.failure.get_or_insert(failure::executor(&error));
        }
        if let Err(errno) = watched {
            container.failure.get_or_insert(failure::system("watch the container's init", errno));
        }
        if container.failure.is_some() {
            return container.kill();
        }
        let identity = container.oci.as_ref().map(|oci| oci.identity.clone()).unwrap_or_default();
        let Identity { uid, gid, groups, .. } = identity;
        self.container_ready(key, ContainerCreated { uid, gid, groups, pid }, console);
    }

    /// Removes what there is of a container that could not be made. Then comes the reply.
    fn creation_failed(&mut self, key: Key, failure: Failure, ran: bool) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        container.failure.get_or_insert(failure);
        container.kill_processes();
        if ran {
            self.delete(key);
        } else {
            self.deleted(key, Ok(()));
        }
    }

    /// Lets the runtime start a container; the reply follows.
    pub(crate) fn start_with_runtime(&mut self, key: Key, to: ReplyTo) -> Result<(), Failure> {
        let Some(container) = self.containers.get(&key) else { return Ok(()) };
        let id = container.id.clone();
        self.call_runtime(key, Verb::Start, &["start", &id], Pipes::own()?, None)?;
        if let Some(container) = self.containers.get_mut(&key) {
            container.state = State::Starting(to);
        }
        Ok(())
    }

    /// `start` has ended.
    pub(super) fn started(&mut self, key: Key, result: Result<(), Failure>) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let State::Starting(to) = container.state else { return };
        let held = container.oci.as_mut().and_then(|oci| oci.held_end.take());
        match result {
            Ok(()) if container.failure.is_none() => {
                let now = clock::unix_nanos();
                container.started_at = held.map_or(now, |(_, finished_at)| now.min(finished_at));
                container.state = State::Running;
                let started = ContainerStarted { started_at: container.started_at };
                self.reply(to, Body::ContainerStarted(started), None);
            }
            Ok(()) => {}
            Err(failure) => {
                container.failure.get_or_insert(failure);
                if held.is_none() {
                    container.kill();
                }
            }
        }
        match held {
            Some((status, finished_at)) => self.container_ended_at(key, status, finished_at),
            None => self.signal_started(key),
        }
    }

    /// Lets the runtime send the signal that asks a container to stop. If it can't, we do.
    pub(crate) fn signal_with_runtime(&mut self, key: Key, signal: i32) -> std::io::Result<()> {
        let Some(container) = self.containers.get(&key) else { return Ok(()) };
        let (id, number) = (container.id.clone(), signal.to_string());
        let called = Pipes::own().and_then(|pipes| {
            self.call_runtime(key, Verb::Kill(signal), &["kill", &id, &number], pipes, None)
        });
        match called {
            Ok(()) => Ok(()),
            Err(failure) => {
                report!("container {id}: {}", failure.message);
                self.containers.get(&key).map_or(Ok(()), |container| container.signal(signal))
            }
        }
    }

    /// `kill` has ended.
    pub(super) fn signalled(&mut self, key: Key, signal: i32, result: Result<(), Failure>) {
        let Some(container) = self.containers.get(&key).filter(|one| one.is_alive() && !one.holds_end())
        else {
            return;
        };
        if let Err(failure) = result {
            report!(
                "container {}: {}; the signal is sent without the runtime",
                container.id,
                failure.message
            );
            if let Err(error) = container.signal(signal) {
                report!("container {}: send signal {signal}: {error}", container.id);
            }
        }
    }

    /// The init of a runtime's container has ended. True: that is to be told later.
    pub(crate) fn hold_end(&mut self, key: Key, status: ExitStatus, finished_at: i64) -> bool {
        let starting =
            self.runtime_calls.values().any(|call| call.container == key && matches!(call.verb, Verb::Start));
        let Some(container) = self.containers.get_mut(&key) else { return false };
        let Some(oci) = container.oci.as_mut().filter(|_| starting) else { return false };
        oci.held_end.get_or_insert((status, finished_at));
        container.end_watch = None;
        true
    }

    /// Lets the runtime forget a container whose init has ended.
    pub(crate) fn delete(&mut self, key: Key) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let id = container.id.clone();
        match &mut container.oci {
            Some(oci) if oci.deletion == Deletion::NotYet => oci.deletion = Deletion::Running,
            _ => return,
        }
        let called = Pipes::own()
            .and_then(|pipes| self.call_runtime(key, Verb::Delete, &["delete", "--force", &id], pipes, None));
        if let Err(failure) = called {
            self.deleted(key, Err(failure));
        }
    }

    /// `delete` has ended, or there was nothing to delete.
    pub(super) fn deleted(&mut self, key: Key, result: Result<(), Failure>) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let id = container.id.clone();
        if let Err(failure) = result {
            report!("container {id}: {}; its traces are removed without the runtime", failure.message);
        }
        // A runtime that can't delete any more must not leave anything: neither processes nor its own state.
        container.kill_processes();
        let Some(oci) = &mut container.oci else { return };
        oci.deletion = Deletion::Done;
        let own = Path::new(&oci.runtime.root).join(&id);
        match std::fs::remove_dir_all(&own) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                report!("container {id}: remove {own:?}: {error}");
            }
            _ => {}
        }
        let forget = oci.forget;
        if let State::Creating(to) = container.state {
            let failure =
                container.failure.take().unwrap_or_else(|| failure::internal("the container was not made"));
            self.forget_container(key);
            self.reply(to, Body::Failure(failure), None);
        } else if forget {
            self.forget_container(key);
        }
    }

    /// What follows for the runtime when the init of a container has been reaped. True: all of it is done here.
    pub(crate) fn end_with_runtime(&mut self, key: Key) -> bool {
        let Some(container) = self.containers.get_mut(&key) else { return true };
        let Some(oci) = &mut container.oci else { return false };
        let unfinished = match container.state {
            State::Creating(_) => true,
            State::Created if !container.removals.is_empty() => {
                oci.forget = true;
                true
            }
            _ => false,
        };
        if unfinished {
            // Nobody is to hear of an exit: what ends it is the deletion, however long that takes.
            container.ended = None;
        }
        if matches!(container.state, State::Creating(_)) {
            container.failure.get_or_insert_with(|| {
                failure::internal("the container's init ended before it was started".to_owned())
            });
        }
        self.delete(key);
        unfinished
    }
}
