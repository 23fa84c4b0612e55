//! What happens to containers: reports of an init, output, the end.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use stave_executor::Report;
use stave_supervisor_proto::v1::packet::Body;
use stave_supervisor_proto::v1::{ContainerCreated, ContainerStarted, Failure};

use crate::container::{Container, State};
use crate::event_loop::{EventLoop, Key, Source};
use crate::log_file::LogFile;
use crate::output::{self, Output, Progress};
use crate::reaper::{self, ExitStatus};
use crate::report::report;
use crate::supervisor::Supervisor;
use crate::{clock, failure};

/// How long after an exit record could not be written it is tried again.
const RECORD_AGAIN: Duration = Duration::from_secs(1);

impl Supervisor {
    /// Takes all reports of an init that are there.
    pub(crate) fn read_reports(&mut self, key: Key) {
        while let Some(container) = self.containers.get_mut(&key) {
            let Some(init) = container.init.as_mut().filter(|init| init.control().is_some()) else {
                container.control_watch = None;
                return;
            };
            match init.read_report() {
                Ok(None) => return,
                Ok(Some(Report::Ready { uid, gid, groups, console })) => {
                    let created = ContainerCreated { uid, gid, groups, pid: container.pid };
                    self.container_ready(key, created, console);
                }
                Ok(Some(Report::ExecDone)) => self.control_closed(key),
                // Of a runtime's bundle, which reports elsewhere.
                Ok(Some(Report::Staged(_))) => {}
                Ok(Some(Report::Failed(error))) => container.fail(failure::executor(&error)),
                Err(error) => {
                    container.fail(failure::executor(&error));
                    container.control_watch = None;
                    return;
                }
            }
        }
    }

    /// The init waits for its start.
    pub(crate) fn container_ready(&mut self, key: Key, created: ContainerCreated, console: Option<OwnedFd>) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let State::Creating(to) = container.state else { return };
        if container.failure.is_some() {
            return; // It is being killed.
        }
        // Only now, so that a container that can't be created leaves no log file.
        let opened = open_log(container).and_then(|()| {
            console.map_or(Ok(()), |console| add_console(&self.events, key, container, console))
        });
        match opened {
            Ok(()) => {
                for output in [&mut container.stdout, &mut container.stderr].into_iter().flatten() {
                    output.early = None;
                }
                container.state = State::Created;
                self.reply(to, Body::ContainerCreated(created), None);
            }
            Err(failure) => container.fail(failure),
        }
    }

    /// execve succeeded, or the init was killed on the way.
    fn control_closed(&mut self, key: Key) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let State::Starting(to) = container.state else { return };
        if container.failure.is_some() {
            return;
        }
        container.started_at = clock::unix_nanos();
        container.state = State::Running;
        let started = ContainerStarted { started_at: container.started_at };
        self.reply(to, Body::ContainerStarted(started), None);
        self.signal_started(key);
    }

    /// Sends the signal that StopContainer asked for while the container was starting.
    pub(crate) fn signal_started(&mut self, key: Key) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let Some(signal) = container.signal_at_start.take() else { return };
        let sent = match container.oci {
            Some(_) => self.signal_with_runtime(key, signal),
            None => container.signal(signal),
        };
        if let Err(error) = sent {
            report!("send signal {signal} to a container that has started: {error}");
        }
    }

    pub(crate) fn read_output(&mut self, key: Key, source: Source) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let output = match source {
            Source::ContainerStderr(_) => &mut container.stderr,
            _ => &mut container.stdout,
        };
        let log = container.log.as_mut();
        match output.as_mut().map(|output| output.pump(log, &mut self.buffers)) {
            Some(Progress::Ended) => {}
            Some(Progress::ReadAndBroke) => return self.drop_broken_sinks(key),
            Some(Progress::Read | Progress::Empty) | None => return,
        }
        if let Some(output) = output.take() {
            output.finish(container.log.as_mut(), &mut self.buffers);
        }
        if container.ended.is_some() && container.stdout.is_none() && container.stderr.is_none() {
            self.finish_container(key);
        }
    }

    /// Looks whether the init has ended.
    pub(crate) fn reap_container(&mut self, key: Key) {
        let container = self.containers.get(&key).filter(|container| !container.holds_end());
        let pidfd = container.and_then(Container::pidfd);
        if let Some(status) = pidfd.and_then(reaper::reap) {
            self.container_ended(key, status);
        }
    }

    /// The init has been reaped.
    pub(crate) fn container_ended(&mut self, key: Key, status: ExitStatus) {
        self.container_ended_at(key, status, clock::unix_nanos());
    }

    /// The init was reaped at this Unix time in ns.
    pub(crate) fn container_ended_at(&mut self, key: Key, status: ExitStatus, finished_at: i64) {
        if self.hold_end(key, status, finished_at) {
            return;
        }
        // What it reported before it ended tells what the end means.
        self.read_reports(key);
        let Some(container) = self.containers.get_mut(&key) else { return };
        container.init_ended(status, finished_at);
        if self.end_with_runtime(key) {
            return;
        }
        let Some(container) = self.containers.get_mut(&key) else { return };
        match container.state {
            State::Creating(to) => {
                let failure = container.failure.take().unwrap_or_else(|| {
                    failure::internal(format!("the container's init ended with {status} before it was ready"))
                });
                self.forget_container(key);
                self.reply(to, Body::Failure(failure), None);
            }
            State::Created if !container.removals.is_empty() => self.forget_container(key),
            State::Created | State::Starting(_) | State::Running => {
                // Before the output is read, which may take a while.
                self.record_exit(key);
                let Some(container) = self.containers.get_mut(&key) else { return };
                let drained = container.drain(&mut self.buffers);
                self.drop_broken_sinks(key);
                if drained {
                    self.finish_container(key);
                }
            }
            State::Exited { .. } => {}
        }
    }

    /// Writes the exit record. One that can't be written is tried again until the exit is acknowledged: a full disk
    /// must keep nobody from hearing of the end.
    pub(crate) fn record_exit(&mut self, key: Key) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let Some(exit) = container.exit() else { return };
        let failed_before = container.record_at.take().is_some();
        if let Err(error) = self.exits.write(&exit) {
            container.record_at = Some(Instant::now() + RECORD_AGAIN);
            if !failed_before {
                report!("container {}: write the exit record: {error}", container.id);
            }
        }
    }

    /// Tells the end of a container whose output is drained, or has had its time. It is on disk already.
    pub(crate) fn finish_container(&mut self, key: Key) {
        if self.containers.get(&key).is_some_and(|container| container.record_at.is_some()) {
            self.record_exit(key);
        }
        let Some(container) = self.containers.get_mut(&key) else { return };
        let Some(exit) = container.exit() else { return };
        let Some(ended) = container.ended.take() else { return };
        container.close_output(&mut self.buffers);
        let start_failure = match container.state {
            State::Starting(to) => Some((to, container.start_failure(&ended))),
            _ => None,
        };
        container.state = State::Exited { exit: exit.clone(), acknowledged: false };
        let removed = !container.removals.is_empty();
        if let Some((to, failure)) = start_failure {
            self.reply(to, Body::Failure(failure), None);
        }
        self.tell(Body::ContainerExit(exit));
        if removed {
            self.forget_container(key);
        }
    }
}

impl Container {
    /// The init can't go on, or must not. Its end brings the reply.
    fn fail(&mut self, failure: Failure) {
        self.failure.get_or_insert(failure);
        self.kill();
    }
}

fn open_log(container: &mut Container) -> Result<(), Failure> {
    if !container.log_path.is_empty() {
        container.log = Some(LogFile::open(Path::new(&container.log_path))?);
    }
    Ok(())
}

/// A terminal: all output comes from its master.
fn add_console(
    events: &EventLoop,
    key: Key,
    container: &mut Container,
    console: OwnedFd,
) -> Result<(), Failure> {
    let output = output::set_nonblocking(&console)
        .and_then(|()| events.watch_in_order(console, Source::ContainerStdout(key)))
        .and_then(Output::of_terminal)
        .map_err(|errno| failure::system("watch the container's terminal", errno))?;
    container.stdout = Some(output);
    Ok(())
}
