//! The supervisor: its tables, and the loop that everything happens in.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signalfd::SignalFd;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use stave_supervisor_proto::v1::packet::Body;
use stave_supervisor_proto::v1::{ContainerExit, Done, Packet};
use stave_wire::WireError;

use crate::args::Args;
use crate::connect::PendingConnect;
use crate::connection::{Connection, ReplyTo};
use crate::container::{Container, State};
use crate::event_loop::{EventLoop, Key, Source, Watch};
use crate::exec::RunningExec;
use crate::exits::ExitRecords;
use crate::log_file::LogFile;
use crate::oci_runtime::{RuntimeCall, Strays};
use crate::output::Buffers;
use crate::pod::Pod;
use crate::process::Fatal;
use crate::reaper::{self, ExitStatus, Reaped};
use crate::report::report;

/// Requests taken from the connection before other events get their turn.
const MESSAGES_A_TURN: usize = 16;
/// While a pod shuts down, what still lives is killed again this often.
const KILL_INTERVAL: Duration = Duration::from_millis(500);
/// How long the last reply may take to leave.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// All that one pod has.
pub(crate) struct Supervisor {
    pub(crate) pod_id: String,
    socket_path: PathBuf,
    pub(crate) events: EventLoop,
    listener: Watch,
    signals: SignalFd,
    _signals_watch: Watch,
    pub(crate) connection: Option<Connection>,
    last_key: Key,
    pub(crate) pod: Pod,
    pub(crate) containers: BTreeMap<Key, Container>,
    pub(crate) execs: BTreeMap<Key, RunningExec>,
    pub(crate) connects: BTreeMap<Key, PendingConnect>,
    pub(crate) runtime_calls: BTreeMap<Key, RuntimeCall>,
    pub(crate) oci_strays: Strays,
    pub(crate) exits: ExitRecords,
    pub(crate) buffers: Buffers,
    pub(crate) shutdown: Option<Shutdown>,
}

/// A Shutdown call that is being carried out.
#[derive(Debug)]
pub(crate) struct Shutdown {
    pub(crate) replies: Vec<ReplyTo>,
    next_kill: Instant,
}

impl Supervisor {
    pub(crate) fn new(args: Args, listener: OwnedFd) -> Result<Self, Fatal> {
        let events = EventLoop::new().map_err(Fatal::system("epoll_create1"))?;
        let listener = events.watch(listener, Source::Listener).map_err(Fatal::system("watch the socket"))?;
        let signals = reaper::take_signals()
            .map_err(|error| Fatal::system("signalfd")(Errno::from_raw_os_error(error as i32)))?;
        let signals_watch = events
            .watch_copy(signals.as_fd(), Source::Signals)
            .map_err(Fatal::system("watch the signals"))?;
        let exits = ExitRecords::open(&args.dir)
            .map_err(|error| Fatal::ExitRecords(args.dir.join("exits"), error))?;
        Ok(Self {
            pod_id: args.pod_id,
            socket_path: args.dir.join("supervisor.sock"),
            events,
            listener,
            signals,
            _signals_watch: signals_watch,
            connection: None,
            last_key: 0,
            pod: Pod::new(args.in_namespaces),
            containers: BTreeMap::new(),
            execs: BTreeMap::new(),
            connects: BTreeMap::new(),
            runtime_calls: BTreeMap::new(),
            oci_strays: Strays::default(),
            exits,
            buffers: Buffers::new(),
            shutdown: None,
        })
    }

    /// Serves until Shutdown is done.
    pub(crate) fn run(mut self) -> Result<(), Fatal> {
        loop {
            let timeout = self.next_deadline().map(|at| at.saturating_duration_since(Instant::now()));
            for (source, flags) in self.events.wait(timeout).map_err(Fatal::system("epoll_wait"))? {
                self.handle(source, flags);
            }
            self.meet_deadlines(Instant::now());
            if self.is_shut_down() {
                self.say_goodbye();
                return Ok(());
            }
        }
    }

    fn handle(&mut self, source: Source, flags: EventFlags) {
        match source {
            Source::Listener => self.accept(),
            Source::Signals => self.reap_children(),
            Source::Connection(key) => self.serve(key, flags),
            Source::PodInit => self.reap_pod_init(),
            Source::ContainerEnd(key) => self.reap_container(key),
            Source::ContainerControl(key) => self.read_reports(key),
            Source::ContainerStdout(key) | Source::ContainerStderr(key) => {
                self.read_output(key, source);
            }
            Source::ExecEnd(key) => self.reap_exec(key),
            Source::ExecControl(key) => self.read_exec_reports(key),
            Source::Sink(key) => self.sink_hung_up(key),
            Source::Connect(key) => self.connect_ready(key),
            Source::RuntimeEnd(key) => self.reap_runtime(key),
            Source::RuntimeControl(key) => self.read_runtime_reports(key),
            Source::RuntimeStderr(key) => self.read_runtime_stderr(key),
        }
    }

    /// A number that nothing has which events come from.
    pub(crate) fn next_key(&mut self) -> Key {
        // Once around takes years of an exec a millisecond; skip what still lives then.
        loop {
            self.last_key = self.last_key.wrapping_add(1);
            let key = self.last_key;
            let taken = self.containers.contains_key(&key)
                || self.execs.contains_key(&key)
                || self.connects.contains_key(&key)
                || self.runtime_calls.contains_key(&key)
                || self.containers.values().any(|container| container.has_sink(key));
            if !taken {
                return key;
            }
        }
    }

    // --- the connection ---

    fn accept(&mut self) {
        let socket = match stave_wire::accept(self.listener.as_fd()) {
            Ok(Some(socket)) => socket,
            Ok(None) => return,
            Err(error) => return report!("accept: {error}"),
        };
        let key = self.next_key();
        match self.events.watch(socket, Source::Connection(key)) {
            // The newest connection wins; the one before is closed here.
            Ok(watch) => self.connection = Some(Connection::new(watch, key)),
            Err(errno) => report!("watch a connection: {errno}"),
        }
    }

    fn serve(&mut self, key: Key, flags: EventFlags) {
        if flags.contains(EventFlags::OUT)
            && let Some(connection) = self.connection.as_mut().filter(|connection| connection.key == key)
            && let Err(error) = connection.flush()
        {
            self.lose_connection(&error);
        }
        for _ in 0..MESSAGES_A_TURN {
            let Some(connection) = self.connection.as_ref().filter(|connection| connection.key == key) else {
                return;
            };
            match stave_wire::recv(connection.socket()) {
                Ok(Some(message)) => self.call(key, message),
                Ok(None) => {
                    self.connection = None;
                    return;
                }
                Err(WireError::WouldBlock) => return,
                Err(error) => return self.lose_connection(&error),
            }
        }
    }

    pub(crate) fn lose_connection(&mut self, error: &dyn std::fmt::Display) {
        report!("the daemon's connection is closed: {error}");
        self.connection = None;
    }

    fn send(&mut self, packet: &Packet, fds: Vec<OwnedFd>) {
        if let Some(connection) = &mut self.connection
            && let Err(error) = connection.send(packet, fds)
        {
            self.lose_connection(&error);
        }
    }

    /// Answers a request, if the connection that it came from is still there.
    pub(crate) fn reply(&mut self, to: ReplyTo, body: Body, fds: impl IntoIterator<Item = OwnedFd>) {
        if self.connection.as_ref().is_some_and(|connection| connection.key == to.connection) {
            self.send(&Packet { seq: to.seq, body: Some(body) }, fds.into_iter().collect());
        }
    }

    /// Tells the daemon something, if there is one.
    pub(crate) fn tell(&mut self, event: Body) {
        if self.connection.as_ref().is_some_and(|connection| connection.greeted) {
            self.send(&Packet { seq: 0, body: Some(event) }, Vec::new());
        }
    }

    /// Tells all exits that no daemon has acknowledged.
    pub(crate) fn tell_exits(&mut self) {
        let exits: Vec<ContainerExit> = self
            .containers
            .values()
            .filter_map(|container| match &container.state {
                State::Exited { exit, acknowledged: false } => Some(exit.clone()),
                _ => None,
            })
            .collect();
        for exit in exits {
            self.tell(Body::ContainerExit(exit));
        }
    }

    // --- children ---

    fn reap_children(&mut self) {
        // What the signals were does not matter, and one may stand for many.
        while let Ok(Some(_)) = self.signals.read_signal() {}
        // First: what they made has become a child of ours with their end.
        for key in self.runtime_calls.keys().copied().collect::<Vec<_>>() {
            self.reap_runtime(key);
        }
        for key in self.containers.keys().copied().collect::<Vec<_>>() {
            self.reap_container(key);
        }
        for key in self.execs.keys().copied().collect::<Vec<_>>() {
            self.reap_exec(key);
        }
        self.reap_pod_init();
        self.reap_strays();
    }

    /// Reaps until nothing that has ended is left. True when there are no children at all.
    fn reap_strays(&mut self) -> bool {
        loop {
            match reaper::reap_any() {
                Reaped::Child(pid, status) => self.child_ended(pid, status),
                Reaped::NoneEnded => return false,
                Reaped::NoChildren => return true,
            }
        }
    }

    /// A child that ended after its own pidfd was looked at, or an orphan.
    fn child_ended(&mut self, pid: i32, status: ExitStatus) {
        // Until it is reaped, a pid belongs to one process, so it still tells which one this was.
        if let Some(key) = self.runtime_calls.iter().find(|(_, one)| one.pid() == pid).map(|(key, _)| *key) {
            return self.runtime_ended(key, status);
        }
        let mut alive = self.containers.iter().filter(|(_, one)| one.is_alive() && !one.holds_end());
        let container = alive.find(|(_, one)| one.pid == pid);
        if let Some(key) = container.map(|(key, _)| *key) {
            return self.container_ended(key, status);
        }
        if let Some(key) = self.execs.iter().find(|(_, one)| one.pid() == pid).map(|(key, _)| *key) {
            return self.exec_ended(key, status);
        }
        if self.pod.init().is_some_and(|(init, _)| init == pid) {
            return self.pod_init_ended(status);
        }
        self.keep_stray(pid, status);
    }

    fn reap_pod_init(&mut self) {
        if let Some(status) = self.pod.init().and_then(|(_, pidfd)| reaper::reap(pidfd)) {
            self.pod_init_ended(status);
        }
    }

    fn pod_init_ended(&mut self, status: ExitStatus) {
        if self.shutdown.is_none() {
            report!("the pod's init ended with {status}, and with it all containers of its PID namespace");
        }
        self.pod.init_ended();
    }

    // --- time ---

    fn next_deadline(&self) -> Option<Instant> {
        let containers = self.containers.values().flat_map(|one| {
            let drain_until = one.ended.as_ref().map(|ended| ended.drain_until);
            [one.kill_at, drain_until, one.record_at, one.log.as_ref().and_then(LogFile::say_at)]
        });
        let execs = self.execs.values().map(RunningExec::deadline);
        let shutdown = self.shutdown.as_ref().map(|shutdown| shutdown.next_kill);
        let connects = self.connects.values().map(|pending| Some(pending.deadline));
        let runtimes = self.runtime_calls.values().map(RuntimeCall::deadline);
        containers.chain(execs).chain(connects).chain(runtimes).chain([shutdown]).flatten().min()
    }

    fn meet_deadlines(&mut self, now: Instant) {
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        for container in self.containers.values_mut() {
            if due(container.kill_at) {
                container.kill();
            }
            if due(container.log.as_ref().and_then(LogFile::say_at)) {
                container.say_dropped();
            }
        }
        for exec in self.execs.values_mut() {
            if due(exec.deadline()) {
                exec.time_out();
            }
        }
        self.time_out_connects(now);
        self.time_out_runtimes(now);
        let undrained =
            self.containers.iter().filter(|(_, one)| due(one.ended.as_ref().map(|ended| ended.drain_until)));
        for key in undrained.map(|(key, _)| *key).collect::<Vec<_>>() {
            self.finish_container(key);
        }
        let unrecorded = self.containers.iter().filter(|(_, one)| due(one.record_at));
        for key in unrecorded.map(|(key, _)| *key).collect::<Vec<_>>() {
            self.record_exit(key);
        }
        if self.shutdown.as_ref().is_some_and(|shutdown| shutdown.next_kill <= now) {
            self.kill_all();
        }
    }

    // --- the end ---

    /// Starts to end the pod; the reply follows when all of it has ended.
    pub(crate) fn shut_down(&mut self, reply: ReplyTo) {
        let shutdown =
            self.shutdown.get_or_insert_with(|| Shutdown { replies: Vec::new(), next_kill: Instant::now() });
        shutdown.replies.push(reply);
        self.kill_all();
    }

    fn kill_all(&mut self) {
        self.abort_runtimes();
        for exec in self.execs.values() {
            exec.kill();
        }
        for container in self.containers.values_mut().filter(|container| container.is_alive()) {
            container.kill();
        }
        if let Some((_, pidfd)) = self.pod.init() {
            // ESRCH: it has ended and is reaped next.
            let _ = rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL);
        }
        if let Some(shutdown) = &mut self.shutdown {
            shutdown.next_kill = Instant::now() + KILL_INTERVAL;
        }
    }

    fn is_shut_down(&mut self) -> bool {
        self.shutdown.is_some()
            && self.reap_strays()
            && self.execs.is_empty()
            && self.runtime_calls.is_empty()
            && self.pod.init().is_none()
            && self.containers.values().all(|one| matches!(one.state, State::Exited { .. }))
    }

    fn say_goodbye(&mut self) {
        // Nobody can connect any more; a file that is gone already is fine.
        let _ = std::fs::remove_file(&self.socket_path);
        let replies = self.shutdown.take().map(|shutdown| shutdown.replies).unwrap_or_default();
        for to in replies {
            self.reply(to, Body::Done(Done {}), None);
        }
        if let Some(connection) = &mut self.connection
            && let Err(error) = connection.flush_within(FLUSH_LIMIT)
        {
            report!("the last packets were not sent: {error}");
        }
    }
}
