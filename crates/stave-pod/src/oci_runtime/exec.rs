//! exec: a further process, started by the runtime.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use stave_executor::Stdio;
use stave_supervisor_proto::v1::packet::Body;
use stave_supervisor_proto::v1::{Exec, ExecExit, ExecStarted, Failure};

use super::adopt::Adopted;
use super::call::{Pipes, Verb};
use super::container::of_handler;
use super::{console, kill_tree};
use crate::connection::ReplyTo;
use crate::event_loop::Key;
use crate::exec::RunningExec;
use crate::failure;
use crate::supervisor::Supervisor;

/// A process that the runtime is starting.
#[derive(Debug)]
pub(crate) struct PendingExec {
    pub(super) id: String,
    handler: String,
    to: ReplyTo,
    console: Option<OwnedFd>,
    files: Files,
    /// When the process is to be killed.
    deadline: Option<Instant>,
}

impl PendingExec {
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }
}

/// Files of one call in the container's bundle; they go with this.
#[derive(Debug)]
struct Files {
    process: PathBuf,
    pid: PathBuf,
    console: PathBuf,
}

impl Drop for Files {
    fn drop(&mut self) {
        for file in [&self.process, &self.pid, &self.console] {
            // What is not there is fine; the rest goes with the bundle.
            let _ = std::fs::remove_file(file);
        }
    }
}

impl Supervisor {
    /// Lets the runtime start a process; the reply follows.
    pub(crate) fn exec_with_runtime(
        &mut self,
        to: ReplyTo,
        container: Key,
        call: &Exec,
        stdio: Option<Stdio>,
    ) -> Result<(), Failure> {
        let oci = self.containers.get(&container).and_then(|one| one.oci.as_ref());
        let oci = oci.ok_or_else(|| failure::internal("the container has no OCI runtime"))?;
        let text = call
            .oci
            .as_ref()
            .ok_or_else(|| failure::invalid("oci is missing: the container is run by an OCI runtime"))?;
        let dir = oci.bundle().to_owned();
        let handler = oci.handler().to_owned();
        let id = &call.exec_id;
        let name = |suffix: &str| format!("exec-{id}.{suffix}");
        let (process, pid, console) = (name("json"), name("pid"), name("sock"));
        let files = Files { process: dir.join(&process), pid: dir.join(&pid), console: dir.join(&console) };
        let (identity, umask) = oci.user();
        let json = stave_executor::user_json(text, identity, umask);
        std::fs::write(&files.process, json)
            .map_err(|error| failure::io(format!("write {:?}", files.process), &error))?;
        let container_id = call.container_id.clone();
        let mut args = vec!["exec", "--process", process.as_str(), "--pid-file", pid.as_str(), "--detach"];
        let (pipes, listener) = match stdio {
            Some(stdio) => (Pipes::passed_on(stdio), None),
            None => {
                args.extend(["--console-socket", console.as_str()]);
                (Pipes::own()?, Some(console::listen(&dir, &console)?))
            }
        };
        args.push(&container_id);
        let deadline = match call.timeout_ms {
            0 => None,
            timeout => Instant::now().checked_add(Duration::from_millis(timeout)),
        };
        let pending = PendingExec { id: id.clone(), handler, to, console: listener, files, deadline };
        self.call_runtime(container, Verb::Exec(Box::new(pending)), &args, pipes, None)
    }

    /// `exec` has ended, and the process runs or has ended as well.
    pub(super) fn executed(&mut self, container: Key, exec: PendingExec, result: Result<(), Failure>) {
        let adopted = result.and_then(|()| {
            let adopted = self.adopt(&exec.files.pid)?;
            let console = exec.console.as_ref().map(console::receive).transpose();
            let console = console.and_then(|console| match (&adopted, self.containers.get(&container)) {
                (Adopted::Alive(pid, _), Some(container)) => stave_executor::place(&container.cgroup, *pid)
                    .and_then(|()| self.pod.namespaces().check_user_of(*pid))
                    .map(|()| console)
                    .map_err(|error| failure::executor(&error)),
                _ => Ok(console),
            });
            if let (Err(_), Adopted::Alive(pid, pidfd)) = (&console, &adopted) {
                // Nobody could reach it, or it is where no limit holds. A stray: killed here and reaped as such.
                kill_tree(*pid, pidfd.as_fd());
            }
            Ok((adopted, console?))
        });
        let timed_out = exec.deadline.is_some_and(|at| at <= Instant::now());
        let (adopted, console) = match adopted {
            Ok(adopted) => adopted,
            // It had no time to start, which is a timeout like any other.
            Err(_) if timed_out => {
                self.reply(exec.to, Body::ExecStarted(ExecStarted { pid: 0 }), None);
                return self.tell(Body::ExecExit(ExecExit { exec_id: exec.id, exit_code: 137, timed_out }));
            }
            Err(failure) => {
                let failure = of_handler(&exec.handler, failure);
                return self.reply(exec.to, Body::Failure(failure), None);
            }
        };
        let (pid, pidfd) = match adopted {
            Adopted::Alive(pid, pidfd) => (pid, pidfd),
            Adopted::Ended(pid, status) => {
                self.reply(exec.to, Body::ExecStarted(ExecStarted { pid }), console);
                let exit = ExecExit { exec_id: exec.id, exit_code: status.code, timed_out: false };
                return self.tell(Body::ExecExit(exit));
            }
        };
        let process = stave_executor::Exec::adopted(pid, pidfd);
        let key = self.next_key();
        match RunningExec::adopted(&self.events, key, exec.id.clone(), process, exec.deadline) {
            Ok(running) => {
                // A deadline that has passed meanwhile is met by the event loop.
                self.execs.insert(key, running);
                self.reply(exec.to, Body::ExecStarted(ExecStarted { pid }), console);
            }
            Err(failure) => self.reply(exec.to, Body::Failure(failure), None),
        }
    }

    /// Ends the call that starts this process, if it still runs.
    pub(crate) fn kill_pending_exec(&mut self, id: &str) {
        for call in self.runtime_calls.values_mut() {
            if matches!(&call.verb, Verb::Exec(exec) if exec.id == id) {
                call.abort("it was killed".to_owned());
            }
        }
    }

    /// Processes that are being started.
    pub(crate) fn pending_execs(&self) -> usize {
        self.runtime_calls.values().filter(|call| matches!(call.verb, Verb::Exec(_))).count()
    }

    /// One with this id is being started.
    pub(crate) fn is_exec_pending(&self, id: &str) -> bool {
        self.runtime_calls.values().any(|call| matches!(&call.verb, Verb::Exec(exec) if exec.id == id))
    }
}
