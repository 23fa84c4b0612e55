//! One container: its processes' handles, its output, its state.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use stave_executor::{Entrances, Init};
use stave_supervisor_proto::v1::container_entry::State as EntryState;
use stave_supervisor_proto::v1::{Cgroup, ContainerEntry, ContainerExit, Failure};

use crate::connection::ReplyTo;
use crate::event_loop::Watch;
use crate::failure;
use crate::log_file::{Dropped, LogFile};
use crate::oci_runtime::OciContainer;
use crate::output::{Buffers, Output, Progress};
use crate::reaper::{self, ExitStatus};
use crate::report::report;

/// How long output is read after the init has ended: a process that left the container's cgroup
/// may hold the pipe for ever.
pub(crate) const DRAIN_LIMIT: Duration = Duration::from_secs(1);
/// Reads in a row from one output while draining. A pipe of the largest size is empty before.
const DRAIN_READS: usize = 64;

/// Exit code of a container whose program could not be executed.
const START_ERROR_CODE: i32 = 128;

const SIGKILL: i32 = 9;

/// Where a container is in its life.
#[derive(Debug)]
pub(crate) enum State {
    /// The init sets itself up.
    Creating(ReplyTo),
    /// The init waits for the start.
    Created,
    /// The init has been told to go on.
    Starting(ReplyTo),
    /// execve succeeded.
    Running,
    /// All over, and recorded.
    Exited { exit: ContainerExit, acknowledged: bool },
}

/// What is known once the init has ended, until the output is drained.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) finished_at: i64,
    pub(crate) oom_killed: bool,
    pub(crate) drain_until: Instant,
}

/// One container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) pid: i32,
    pub(crate) cgroup: Cgroup,
    /// Of the cgroup, kept from the first exec on, with the leaf of one that has ended.
    pub(crate) entrances: Option<Entrances>,
    pub(crate) state: State,
    /// Until it has ended.
    pub(crate) init: Option<Init>,
    pub(crate) end_watch: Option<Watch>,
    pub(crate) control_watch: Option<Watch>,
    pub(crate) stdout: Option<Output>,
    pub(crate) stderr: Option<Output>,
    /// Our end of a stdin that stays open.
    pub(crate) stdin: Option<OwnedFd>,
    /// stdin is for the first who attaches, and ends with that.
    pub(crate) stdin_once: bool,
    /// Input and output go through a terminal, whose master is `stdout`.
    pub(crate) terminal: bool,
    pub(crate) log_path: String,
    pub(crate) log: Option<LogFile>,
    pub(crate) log_dropped: Dropped,
    pub(crate) attachments_dropped: u64,
    /// Kills of the OOM killer in its cgroup that are not its end: those before its creation, and before our own SIGKILL.
    pub(crate) oom_kills_before: u64,
    /// Why it can't be created or started.
    pub(crate) failure: Option<Failure>,
    /// Unix time in ns, 0 before.
    pub(crate) started_at: i64,
    /// StopContainer sent its signal.
    pub(crate) stopping: bool,
    /// A signal of StopContainer that waits for execve.
    pub(crate) signal_at_start: Option<i32>,
    /// When SIGKILL follows.
    pub(crate) kill_at: Option<Instant>,
    pub(crate) ended: Option<Ended>,
    /// When the exit record, which could not be written, is tried again.
    pub(crate) record_at: Option<Instant>,
    /// RemoveContainer calls that wait for the end.
    pub(crate) removals: Vec<ReplyTo>,
    /// An OCI runtime has made it, and not the executor.
    pub(crate) oci: Option<OciContainer>,
}

impl Container {
    /// The init runs or may still run.
    pub(crate) fn is_alive(&self) -> bool {
        self.init.is_some()
    }

    /// Its init has ended, which is told once the OCI runtime has come to its end.
    pub(crate) fn holds_end(&self) -> bool {
        self.oci.as_ref().is_some_and(OciContainer::holds_end)
    }

    /// The init runs the container's program.
    pub(crate) fn is_running(&self) -> bool {
        matches!(self.state, State::Running) && self.is_alive()
    }

    /// The init's pidfd, until it has ended.
    pub(crate) fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.init.as_ref().map(Init::pidfd)
    }

    /// The state as StopContainer and people know it.
    pub(crate) fn state_name(&self) -> &'static str {
        match &self.state {
            State::Creating(_) => "still being created",
            State::Created => "created",
            State::Starting(_) => "starting",
            State::Running if self.is_alive() => "running",
            State::Running => "exiting",
            State::Exited { .. } => "exited",
        }
    }

    /// Sends a signal to the init. One that has ended is success.
    pub(crate) fn signal(&self, signal: i32) -> std::io::Result<()> {
        const ESRCH: i32 = 3;
        match self.pidfd().map(|pidfd| stave_sys::pidfd_send_signal(pidfd.as_fd(), signal)) {
            Some(Err(error)) if error.raw_os_error() != Some(ESRCH) => Err(error),
            _ => Ok(()),
        }
    }

    /// SIGKILL to every process of the container. Does not wait.
    pub(crate) fn kill(&mut self) {
        self.kill_at = None;
        // An exec that is still to come must not find a leaf that is killed here.
        self.entrances = None;
        // What ends it now is no want of memory, whatever was killed in it before.
        if self.pidfd().is_some_and(|init| !reaper::has_ended(init)) {
            self.oom_kills_before = crate::oom::kills(&self.cgroup.oom_file).unwrap_or(0);
        }
        // Until execve there is only the init.
        if !matches!(self.state, State::Creating(_) | State::Created) {
            self.kill_cgroup();
        }
        // Where there is no cgroup2 mount, this is what ends the container; with a PID namespace of
        // its own that takes all processes along.
        if let Err(error) = self.signal(SIGKILL) {
            report!("container {}: SIGKILL to the init: {error}", self.id);
        }
    }

    /// SIGKILL to whatever an OCI runtime has left in the cgroup.
    pub(crate) fn kill_processes(&self) {
        self.kill_cgroup();
    }

    /// Leaves an empty cgroup alone: once cgroup.kill has been written, the kernel (6.18) kills every
    /// process that is cloned into the cgroup later, and a create that failed may be repeated.
    fn kill_cgroup(&self) {
        if self.cgroup.v2_dir.is_empty() {
            return self.kill_v1();
        }
        let dir = Path::new(&self.cgroup.v2_dir);
        if is_empty(dir) {
            return;
        }
        if let Err(error) = stave_executor::kill_cgroup(dir) {
            report!("container {}: kill the cgroup: {error}", self.id);
        }
    }

    /// Without a cgroup2 mount; a process is in each of the hierarchies, unless it was moved.
    fn kill_v1(&self) {
        for hierarchy in &self.cgroup.v1 {
            if let Err(error) = stave_executor::kill_v1_cgroup(Path::new(&hierarchy.dir)) {
                report!("container {}: kill the {} cgroup: {error}", self.id, hierarchy.name);
            }
        }
    }

    /// The init has been reaped: ends all that is left of the container and keeps what must be
    /// read now.
    pub(crate) fn init_ended(&mut self, status: ExitStatus, finished_at: i64) {
        // A PID namespace of its own has ended with the init; a shared one has not.
        self.kill_cgroup();
        let oom_kills = crate::oom::kills(&self.cgroup.oom_file).unwrap_or(0);
        let oom_killed = oom_kills > self.oom_kills_before && status.may_be_oom_kill();
        self.end_watch = None;
        self.control_watch = None;
        self.init = None;
        self.entrances = None;
        self.stdin = None;
        self.kill_at = None;
        if let Some(output) = &mut self.stdout {
            output.release_terminal();
        }
        let drain_until = Instant::now() + DRAIN_LIMIT;
        self.ended = Some(Ended { status, finished_at, oom_killed, drain_until });
    }

    /// How it ended, once its init has.
    pub(crate) fn exit(&self) -> Option<ContainerExit> {
        if let State::Exited { exit, .. } = &self.state {
            return Some(exit.clone());
        }
        let ended = self.ended.as_ref()?;
        let mut exit = ContainerExit {
            container_id: self.id.clone(),
            exit_code: ended.status.code,
            signal: ended.status.signal,
            oom_killed: ended.oom_killed,
            started_at: self.started_at,
            finished_at: ended.finished_at,
            start_error: String::new(),
        };
        if let State::Starting(_) = self.state {
            exit.exit_code = START_ERROR_CODE;
            exit.signal = 0;
            exit.start_error = self.start_failure(ended).message;
        }
        Some(exit)
    }

    /// Why a container that ended before execve could not be started.
    pub(crate) fn start_failure(&self, ended: &Ended) -> Failure {
        self.failure.clone().unwrap_or_else(|| {
            failure::internal(format!("the container's init ended with {} before execve", ended.status))
        })
    }

    /// Reads the outputs as far as they go. True when both have ended.
    pub(crate) fn drain(&mut self, buffers: &mut Buffers) -> bool {
        for output in [&mut self.stdout, &mut self.stderr] {
            for _ in 0..DRAIN_READS {
                match output.as_mut().map(|output| output.pump(self.log.as_mut(), buffers)) {
                    Some(Progress::Read) => {}
                    Some(Progress::Empty | Progress::ReadAndBroke) | None => break,
                    Some(Progress::Ended) => {
                        if let Some(output) = output.take() {
                            output.finish(self.log.as_mut(), buffers);
                        }
                    }
                }
            }
        }
        self.stdout.is_none() && self.stderr.is_none()
    }

    /// Closes the outputs, and the log once it has said what it could not take.
    pub(crate) fn close_output(&mut self, buffers: &mut Buffers) {
        for output in [self.stdout.take(), self.stderr.take()].into_iter().flatten() {
            output.finish(self.log.as_mut(), buffers);
        }
        self.close_log();
    }

    fn close_log(&mut self) {
        if let Some(log) = self.log.take_if(|log| log.say_at().is_none()) {
            self.log_dropped += log.dropped();
        }
    }

    /// Tries to say in the log what was dropped, while nothing is written.
    pub(crate) fn say_dropped(&mut self) {
        if let Some(log) = &mut self.log {
            log.append(&[]);
        }
        if matches!(self.state, State::Exited { .. }) && self.stdout.is_none() && self.stderr.is_none() {
            self.close_log();
        }
    }

    /// The container as ListContainers shows it.
    pub(crate) fn entry(&self) -> ContainerEntry {
        let (state, exit) = match &self.state {
            State::Creating(_) | State::Created => (EntryState::Created, None),
            State::Starting(_) | State::Running => (EntryState::Running, None),
            State::Exited { exit, .. } => (EntryState::Exited, Some(exit.clone())),
        };
        let mut dropped = self.log_dropped;
        dropped += self.log.as_ref().map(LogFile::dropped).unwrap_or_default();
        ContainerEntry {
            container_id: self.id.clone(),
            state: state.into(),
            pid: self.pid,
            started_at: self.started_at,
            exit,
            log_bytes_dropped: dropped.bytes,
            attachments_dropped: self.attachments_dropped,
            log_records_dropped: dropped.records,
        }
    }
}

/// No process is in the cgroup2 directory or below.
fn is_empty(dir: &Path) -> bool {
    std::fs::read_to_string(dir.join("cgroup.events"))
        .is_ok_and(|events| events.lines().any(|line| line == "populated 0"))
}
