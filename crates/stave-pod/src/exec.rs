//! Further processes in containers.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use stave_executor::{Entrances, ExecTarget, Report, Stdio};
use stave_supervisor_proto::v1::packet::Body;
use stave_supervisor_proto::v1::{Exec, ExecExit, ExecStarted, Failure, KillExec};

use crate::calls::{Answer, DONE};
use crate::connection::ReplyTo;
use crate::event_loop::{EventLoop, Key, Source, Watch};
use crate::oci_runtime::kill_tree;
use crate::reaper::{self, ExitStatus};
use crate::report::report;
use crate::supervisor::Supervisor;
use crate::{failure, ids};

const MAX_EXECS: usize = 1024;

/// Containers whose cgroups are held open for execs: there may be more containers than descriptors for all.
const ENTRANCES_KEPT: usize = 8;

/// An exec'd process, from clone to reaping. It runs on when the daemon that asked for it is gone.
#[derive(Debug)]
pub(crate) struct RunningExec {
    id: String,
    /// Its container, for what it leaves there.
    container: Option<Key>,
    process: stave_executor::Exec,
    _end_watch: Watch,
    control_watch: Option<Watch>,
    /// The master of its terminal, until execve.
    console: Option<OwnedFd>,
    /// Until execve, or the end.
    reply: Option<ReplyTo>,
    /// The end is what the reply tells.
    reply_at_exit: bool,
    /// execve was reached.
    executed: bool,
    /// Why it can't execute its program.
    failure: Option<Failure>,
    deadline: Option<Instant>,
    timed_out: bool,
    /// An OCI runtime has made it: it has no cgroup of its own.
    adopted: bool,
}

impl RunningExec {
    /// A process that an OCI runtime has started.
    pub(crate) fn adopted(
        events: &EventLoop,
        key: Key,
        id: String,
        process: stave_executor::Exec,
        deadline: Option<Instant>,
    ) -> Result<Self, Failure> {
        let watch = events.watch_end(process.pidfd(), Source::ExecEnd(key)).map_err(|errno| {
            // Unwatched, it is a stray: killed here and reaped as such.
            kill_tree(process.pid(), process.pidfd());
            failure::system("watch the exec'd process", errno)
        })?;
        Ok(Self {
            id,
            container: None,
            process,
            _end_watch: watch,
            control_watch: None,
            console: None,
            reply: None,
            reply_at_exit: false,
            executed: true,
            failure: None,
            deadline,
            timed_out: false,
            adopted: true,
        })
    }

    /// Pid in the supervisor's PID namespace.
    pub(crate) fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// When it is killed.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// SIGKILL to it and its descendants.
    pub(crate) fn kill(&self) {
        if self.adopted {
            return kill_tree(self.process.pid(), self.process.pidfd());
        }
        if let Err(error) = self.process.kill() {
            report!("exec {}: {error}", self.id);
        }
    }

    /// Its time is over.
    pub(crate) fn time_out(&mut self) {
        self.deadline = None;
        self.timed_out = true;
        self.kill();
    }
}

impl Supervisor {
    /// Clones the process; the reply follows at execve.
    pub(crate) fn exec(&mut self, to: ReplyTo, call: Exec, fds: Vec<OwnedFd>) -> Answer {
        ids::check("exec_id", &call.exec_id)?;
        let process = call.process.as_ref().ok_or_else(|| failure::invalid("process is missing"))?;
        let stdio = stdio(process.terminal, fds)?;
        if self.execs.values().any(|exec| exec.id == call.exec_id) || self.is_exec_pending(&call.exec_id) {
            return Err(failure::precondition(format!("exec {:?} exists already", call.exec_id)));
        }
        if self.execs.len() + self.pending_execs() >= MAX_EXECS {
            return Err(failure::exhausted(format!("{MAX_EXECS} exec'd processes run in the pod")));
        }
        let key = self.next_key();
        self.keep_entrances(&call.container_id);
        let found = self.find_container(&call.container_id);
        let container = self.container(&call.container_id)?;
        let pidfd = container.pidfd().filter(|_| container.is_running()).ok_or_else(|| {
            failure::precondition(format!(
                "container {:?} is {}, not running",
                container.id,
                container.state_name()
            ))
        })?;
        if container.oci.is_some() {
            let found = found.ok_or_else(|| failure::internal("the container is gone"))?;
            self.exec_with_runtime(to, found, &call, stdio)?;
            return Ok(None);
        }
        let reply_at_exit = call.reply_at_exit && !process.terminal;
        let target = ExecTarget {
            init: pidfd,
            cgroup: &container.cgroup,
            entrances: container.entrances.as_ref(),
            name: &call.exec_id,
        };
        let namespaces = self.pod.namespaces();
        let process = namespaces.exec(&target, process, stdio).map_err(|error| failure::executor(&error))?;
        let watches = self.events.watch_end(process.pidfd(), Source::ExecEnd(key)).and_then(|end| {
            // Where nobody waits for the start, what it reports can wait for its end.
            let control = process.control().filter(|_| !reply_at_exit);
            let control = control.map(|control| self.events.watch_copy(control, Source::ExecControl(key)));
            Ok((end, control.transpose()?))
        });
        let (end_watch, control_watch) = match watches {
            Ok(watches) => watches,
            Err(errno) => {
                // Unwatched, it is a stray: killed here and reaped as such.
                let _ = process.kill();
                return Err(failure::system("watch the exec'd process", errno));
            }
        };
        let deadline = match call.timeout_ms {
            0 => None,
            timeout => Instant::now().checked_add(Duration::from_millis(timeout)),
        };
        let exec = RunningExec {
            id: call.exec_id,
            container: found,
            process,
            _end_watch: end_watch,
            control_watch,
            console: None,
            reply: Some(to),
            reply_at_exit,
            executed: false,
            failure: None,
            deadline,
            timed_out: false,
            adopted: false,
        };
        self.execs.insert(key, exec);
        Ok(None)
    }

    /// Holds a running container's cgroups open, if not too many are. Where that fails the exec itself says why.
    fn keep_entrances(&mut self, id: &str) {
        let kept = self.containers.values().filter(|one| one.entrances.is_some()).count();
        if let Ok((_, container)) = self.container_mut(id)
            && container.entrances.is_none()
            && container.is_running()
            && container.oci.is_none()
            && kept < ENTRANCES_KEPT
        {
            container.entrances = Entrances::open(&container.cgroup).ok();
        }
    }

    /// One that has ended is success.
    pub(crate) fn kill_exec(&mut self, call: &KillExec) -> Answer {
        for exec in self.execs.values().filter(|exec| exec.id == call.exec_id) {
            exec.kill();
        }
        self.kill_pending_exec(&call.exec_id);
        DONE
    }

    /// Takes all reports of an exec'd process that are there.
    pub(crate) fn read_exec_reports(&mut self, key: Key) {
        while let Some(exec) = self.execs.get_mut(&key) {
            if exec.process.control().is_none() {
                exec.control_watch = None;
                return;
            }
            match exec.process.read_report() {
                Ok(None) => return,
                Ok(Some(Report::Ready { console, .. })) => exec.console = console,
                Ok(Some(Report::Staged(_))) => {}
                Ok(Some(Report::Failed(error))) => {
                    exec.failure.get_or_insert(failure::executor(&error));
                }
                Ok(Some(Report::ExecDone)) if exec.failure.is_some() => {}
                Ok(Some(Report::ExecDone)) if exec.reply_at_exit => exec.executed = true,
                Ok(Some(Report::ExecDone)) => {
                    exec.executed = true;
                    let started = ExecStarted { pid: exec.pid() };
                    let console = exec.console.take();
                    if let Some(to) = exec.reply.take() {
                        self.reply(to, Body::ExecStarted(started), console);
                    }
                }
                Err(error) => {
                    exec.failure.get_or_insert(failure::executor(&error));
                    exec.control_watch = None;
                    exec.kill();
                    return;
                }
            }
        }
    }

    /// Looks whether an exec'd process has ended.
    pub(crate) fn reap_exec(&mut self, key: Key) {
        let status = self.execs.get(&key).and_then(|exec| reaper::reap(exec.process.pidfd()));
        if let Some(status) = status {
            self.exec_ended(key, status);
        }
    }

    /// An exec'd process has been reaped.
    pub(crate) fn exec_ended(&mut self, key: Key, status: ExitStatus) {
        // Before execve a process ends by a signal or with one of the executor's own codes: any other tells that it got there.
        let executed = status.signal == 0 && !stave_executor::EXIT_CODES.contains(&status.code);
        match self.execs.get_mut(&key) {
            Some(exec) if executed && exec.reply_at_exit => exec.executed = true,
            _ => self.read_exec_reports(key),
        }
        let Some(mut exec) = self.execs.remove(&key) else { return };
        self.tell_exec_end(&mut exec, status);
        // After the answer, which need not wait for this.
        let container = exec.container.and_then(|key| self.containers.get(&key));
        let entrances = container.and_then(|container| container.entrances.as_ref());
        let cleared = match entrances {
            Some(entrances) => exec.process.give_back_cgroup(entrances),
            None => exec.process.remove_cgroup(),
        };
        if let Err(error) = cleared {
            report!("exec {}: {error}", exec.id);
        }
    }

    fn tell_exec_end(&mut self, exec: &mut RunningExec, status: ExitStatus) {
        let exit = ExecExit { exec_id: exec.id.clone(), exit_code: status.code, timed_out: exec.timed_out };
        if let Some(to) = exec.reply.take() {
            if let Some(failure) = exec.failure.take() {
                return self.reply(to, Body::Failure(failure), None);
            }
            // One that had no time to start has timed out like any other.
            if !exec.executed && !exec.timed_out {
                let message = format!("the process ended with {status} before execve");
                return self.reply(to, Body::Failure(failure::internal(message)), None);
            }
            if exec.reply_at_exit {
                return self.reply(to, Body::ExecExit(exit), None);
            }
            let started = ExecStarted { pid: exec.process.pid() };
            self.reply(to, Body::ExecStarted(started), exec.console.take());
        }
        self.tell(Body::ExecExit(exit));
    }
}

/// The standard streams that came with the call; none with a terminal.
fn stdio(terminal: bool, fds: Vec<OwnedFd>) -> Result<Option<Stdio>, Failure> {
    let count = fds.len();
    if terminal && count == 0 {
        return Ok(None);
    }
    match <[OwnedFd; 3]>::try_from(fds) {
        Ok([stdin, stdout, stderr]) if !terminal => Ok(Some(Stdio { stdin, stdout, stderr })),
        _ if terminal => Err(failure::invalid(format!(
            "Exec with a terminal came with {count} descriptors: it takes none"
        ))),
        _ => Err(failure::invalid(format!(
            "Exec came with {count} descriptors: it needs stdin, stdout and stderr"
        ))),
    }
}
