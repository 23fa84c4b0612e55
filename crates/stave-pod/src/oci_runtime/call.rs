//! One call of a runtime: a process with a deadline.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use stave_executor::{Bundle, Init, Report, RuntimeCommand, Stdio};
use stave_supervisor_proto::v1::{Failure, Identity, OciRuntime};

use super::exec::PendingExec;
use super::{kill_tree, message};
use crate::event_loop::{Key, Source, Watch};
use crate::reaper::{self, ExitStatus};
use crate::supervisor::Supervisor;
use crate::{failure, output};

/// For a runtime whose configuration names no other.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes kept of what a runtime writes to its standard error. The rest is read and dropped, so that it goes on.
const MAX_STDERR: usize = 4096;
/// What a pod that shuts down waits for `delete`.
const SHUTDOWN: Duration = Duration::from_secs(3);

/// What a runtime is asked for.
#[derive(Debug)]
pub(super) enum Verb {
    Create,
    Start,
    Kill(i32),
    Delete,
    Exec(Box<PendingExec>),
}

impl Verb {
    fn name(&self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Start => "start",
            Self::Kill(_) => "kill",
            Self::Delete => "delete",
            Self::Exec(_) => "exec",
        }
    }
}

/// One call.
#[derive(Debug)]
pub(crate) struct RuntimeCall {
    pub(super) verb: Verb,
    /// Key of the container.
    pub(super) container: Key,
    pub(super) process: Init,
    runtime: Rc<OciRuntime>,
    _end_watch: Watch,
    control_watch: Option<Watch>,
    stderr_watch: Option<Watch>,
    pub(super) stderr: Vec<u8>,
    log: PathBuf,
    started: Instant,
    pub(super) deadline: Instant,
    /// It was killed because of this.
    ended_by: Option<String>,
    /// The runtime's program was not executed: why.
    failure: Option<Failure>,
}

/// How a call came to its end.
pub(super) struct Outcome {
    /// It succeeded, or what to say about it.
    pub(super) result: Result<(), Failure>,
    /// The runtime's program ran, and may have left something.
    pub(super) ran: bool,
}

impl RuntimeCall {
    /// Pid in the supervisor's PID namespace.
    pub(crate) fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// When it is killed.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.ended_by.is_none().then_some(self.deadline)
    }

    /// Ends it, with all that it has started.
    pub(super) fn abort(&mut self, why: String) {
        if self.ended_by.is_none() {
            self.ended_by = Some(why);
            kill_tree(self.process.pid(), self.process.pidfd());
        }
    }

    fn outcome(&mut self, status: ExitStatus) -> Outcome {
        let what = format!(
            "runtime handler {:?}: {} {}",
            self.runtime.handler,
            self.runtime.program,
            self.verb.name()
        );
        if let Some(mut failure) = self.failure.take() {
            // What is wrong with the bundle is nothing of the runtime's.
            if failure.message.starts_with("execute: ") {
                failure.message = format!("{what}: {}", failure.message);
            }
            return Outcome { result: Err(failure), ran: false };
        }
        let result = match &self.ended_by {
            Some(why) => Err(failure::internal(format!("{what}: {why}"))),
            None if status.code == 0 => Ok(()),
            None => {
                let said = message::of(&self.log, &self.stderr);
                let text = format!("{what}: {status}: {said}");
                // What is not in the image is the request's fault, as with the executor.
                let phrases =
                    ["executable file not found", "no such file or directory", "not found in $PATH"];
                let missing = phrases.iter().any(|phrase| said.contains(phrase));
                Err(if missing { failure::invalid(text) } else { failure::internal(text) })
            }
        };
        Outcome { result, ran: true }
    }
}

impl Supervisor {
    /// Starts a call.
    pub(super) fn call_runtime(
        &mut self,
        container: Key,
        verb: Verb,
        args: &[&str],
        pipes: Pipes,
        bundle: Option<&Bundle<'_>>,
    ) -> Result<(), Failure> {
        let key = self.next_key();
        let oci = self.containers.get(&container).and_then(|one| one.oci.as_ref());
        let oci = oci.ok_or_else(|| failure::internal("the container has no OCI runtime"))?;
        let runtime = Rc::clone(&oci.runtime);
        let dir = oci.bundle.clone();
        let log = dir.join(format!("runtime-{key}.log"));
        let log_text = log.to_str().ok_or_else(|| failure::invalid("the bundle's path is not UTF-8"))?;
        let mut all = runtime.args.clone();
        all.extend(["--root", &runtime.root, "--log", log_text, "--log-format", "json"].map(str::to_owned));
        all.extend(args.iter().map(|arg| (*arg).to_owned()));
        let Pipes { stderr, stdio } = pipes;
        let command = RuntimeCommand {
            program: &runtime.program,
            args: &all,
            dir: &dir,
            stage_dir: (!runtime.stage_dir.is_empty()).then(|| Path::new(&runtime.stage_dir)),
            stdio,
        };
        let process = stave_executor::runtime(command, bundle, self.pod.namespaces());
        let process = process.map_err(|error| failure::executor(&error))?;
        let watches = self.events.watch_end(process.pidfd(), Source::RuntimeEnd(key)).and_then(|end| {
            let control = process.control();
            let control =
                control.map(|fd| self.events.watch_copy(fd, Source::RuntimeControl(key))).transpose()?;
            let stderr = stderr.map(|fd| self.events.watch(fd, Source::RuntimeStderr(key))).transpose()?;
            Ok((end, control, stderr))
        });
        let (end_watch, control_watch, stderr_watch) = watches.map_err(|errno| {
            // Unwatched, it is a stray: killed here and reaped as such.
            kill_tree(process.pid(), process.pidfd());
            failure::system("watch a runtime", errno)
        })?;
        let timeout = match runtime.timeout_ms {
            0 => TIMEOUT,
            ms => Duration::from_millis(ms.into()),
        };
        let started = Instant::now();
        let mut deadline = started + timeout;
        if let Verb::Exec(exec) = &verb {
            deadline = exec.deadline().map_or(deadline, |at| at.min(deadline));
        }
        if self.shutdown.is_some() {
            deadline = deadline.min(started + SHUTDOWN);
        }
        let call = RuntimeCall {
            verb,
            container,
            process,
            runtime,
            _end_watch: end_watch,
            control_watch,
            stderr_watch,
            stderr: Vec::new(),
            log,
            started,
            deadline,
            ended_by: None,
            failure: None,
        };
        self.runtime_calls.insert(key, call);
        Ok(())
    }

    /// Takes all reports from before the runtime's execve.
    pub(crate) fn read_runtime_reports(&mut self, key: Key) {
        while let Some(call) = self.runtime_calls.get_mut(&key) {
            if call.process.control().is_none() {
                call.control_watch = None;
                return;
            }
            match call.process.read_report() {
                Ok(None) => return,
                Ok(Some(Report::Staged(identity))) => {
                    let container = call.container;
                    self.know_identity(container, identity);
                }
                Ok(Some(Report::Failed(error))) => {
                    call.failure.get_or_insert(failure::executor(&error));
                }
                Ok(Some(Report::Ready { .. } | Report::ExecDone)) => {}
                Err(error) => {
                    call.failure.get_or_insert(failure::executor(&error));
                    call.control_watch = None;
                    call.abort("its set-up is garbled".to_owned());
                    return;
                }
            }
        }
    }

    fn know_identity(&mut self, container: Key, identity: Identity) {
        if let Some(oci) = self.containers.get_mut(&container).and_then(|one| one.oci.as_mut()) {
            oci.identity = identity;
        }
    }

    /// Takes what a runtime has written to its standard error.
    pub(crate) fn read_runtime_stderr(&mut self, key: Key) {
        let Some(call) = self.runtime_calls.get_mut(&key) else { return };
        let Some(pipe) = &call.stderr_watch else { return };
        let mut buffer = [0_u8; 4096];
        loop {
            match rustix::io::retry_on_intr(|| rustix::io::read(pipe, &mut buffer)) {
                Ok(count @ 1..) => {
                    let room = MAX_STDERR.saturating_sub(call.stderr.len()).min(count);
                    call.stderr.extend_from_slice(buffer.get(..room).unwrap_or_default());
                    // One that never stops writing must not keep the others waiting.
                    if room == 0 {
                        return;
                    }
                }
                Err(Errno::AGAIN) => return,
                Ok(_) | Err(_) => {
                    call.stderr_watch = None;
                    return;
                }
            }
        }
    }

    /// Looks whether a call has ended.
    pub(crate) fn reap_runtime(&mut self, key: Key) {
        let status = self.runtime_calls.get(&key).and_then(|call| reaper::reap(call.process.pidfd()));
        if let Some(status) = status {
            self.runtime_ended(key, status);
        }
    }

    /// A call has been reaped.
    pub(crate) fn runtime_ended(&mut self, key: Key, status: ExitStatus) {
        self.read_runtime_reports(key);
        self.read_runtime_stderr(key);
        let Some(mut call) = self.runtime_calls.remove(&key) else { return };
        if matches!(call.verb, Verb::Create)
            && let Some(early) =
                self.containers.get_mut(&call.container).map(|one| one.take_early(&mut self.buffers))
            && call.stderr.is_empty()
        {
            call.stderr = early;
        }
        let outcome = call.outcome(status);
        // Left behind it would go with the bundle.
        let _ = std::fs::remove_file(&call.log);
        match call.verb {
            Verb::Create => self.created(call.container, outcome),
            Verb::Start => self.started(call.container, outcome.result),
            Verb::Kill(signal) => self.signalled(call.container, signal, outcome.result),
            Verb::Delete => self.deleted(call.container, outcome.result),
            Verb::Exec(exec) => self.executed(call.container, *exec, outcome.result),
        }
        self.forget_strays();
    }

    /// Gives up what takes too long.
    pub(crate) fn time_out_runtimes(&mut self, now: Instant) {
        for call in self.runtime_calls.values_mut() {
            if call.deadline().is_some_and(|at| at <= now) {
                // Its own limit, which an exec's timeout or the pod's end may have made shorter.
                let limit = call.deadline.saturating_duration_since(call.started);
                let limit = Duration::from_millis(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX));
                call.abort(format!("did not end within {limit:?}, and was killed"));
            }
        }
    }

    /// The pod ends: what only tidies up has a little time left, everything else none.
    pub(crate) fn abort_runtimes(&mut self) {
        let soon = Instant::now() + SHUTDOWN;
        for call in self.runtime_calls.values_mut() {
            match call.verb {
                Verb::Delete => call.deadline = call.deadline.min(soon),
                _ => call.abort("the pod is shutting down".to_owned()),
            }
        }
    }

    /// Ends the calls that make or start a container.
    pub(crate) fn abort_runtimes_of(&mut self, container: Key, why: &str) {
        for call in self.runtime_calls.values_mut().filter(|call| call.container == container) {
            if matches!(call.verb, Verb::Create | Verb::Start) {
                call.abort(why.to_owned());
            }
        }
    }
}

/// The streams of a runtime.
pub(super) struct Pipes {
    /// Our end of its standard error, where it has one of its own.
    pub(super) stderr: Option<OwnedFd>,
    pub(super) stdio: Stdio,
}

impl Pipes {
    /// /dev/null, and a standard error of its own.
    pub(super) fn own() -> Result<Self, Failure> {
        let null = || rustix::fs::openat(CWD, "/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        let make = || -> Result<Self, Errno> {
            let (ours, theirs) = output::output_pipe()?;
            let stdio = Stdio { stdin: null()?, stdout: null()?, stderr: theirs };
            Ok(Self { stderr: Some(ours), stdio })
        };
        make().map_err(|errno| failure::system("make a runtime's standard streams", errno))
    }

    /// Those that the container or its process gets.
    pub(super) fn passed_on(stdio: Stdio) -> Self {
        Self { stderr: None, stdio }
    }
}
