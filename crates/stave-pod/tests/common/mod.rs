//! A supervisor in a state directory of its own, spoken to as the daemon does.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used)]

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use prost::Message as _;
use stave_supervisor_proto::VERSION;
use stave_supervisor_proto::v1::packet::Body;
use stave_supervisor_proto::v1::request::Call;
use stave_supervisor_proto::v1::*;

/// Nothing that a test waits for takes longer.
pub const LIMIT: Duration = Duration::from_secs(20);

pub struct Pod {
    child: Child,
    pub dir: tempfile::TempDir,
    /// The pod's directory in the cgroup2 mount.
    pub cgroup: PathBuf,
    socket: Option<OwnedFd>,
    seq: u64,
    events: VecDeque<Body>,
    received: Vec<OwnedFd>,
}

/// One record of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub stream: String,
    pub tag: String,
    pub content: String,
}

impl Pod {
    /// A supervisor that no daemon has spoken to yet.
    pub fn spawn() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests need root");
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("stave-test-pod-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let cgroup = cgroup2_mount().join(name);
        std::fs::create_dir(&cgroup).unwrap();
        let dir = tempfile::tempdir().unwrap();
        make_root(&dir.path().join("root"));
        let listener = stave_wire::listen(&dir.path().join("supervisor.sock")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_stave-pod"))
            .args(["--id", "pod1", "--dir"])
            .arg(dir.path())
            .stdin(Stdio::from(listener))
            .stdout(Stdio::null())
            .stderr(File::create(dir.path().join("stderr")).unwrap())
            .spawn()
            .unwrap();
        Self { child, dir, cgroup, socket: None, seq: 0, events: VecDeque::new(), received: Vec::new() }
    }

    /// A supervisor that a daemon has greeted.
    pub fn greeted() -> Self {
        let mut pod = Self::spawn();
        pod.connect();
        pod
    }

    /// A pod that is ready for containers, in namespaces of its own.
    pub fn ready() -> Self {
        let mut pod = Self::greeted();
        pod.set_up(SetUpPod {
            new_network_namespace: true,
            new_ipc_namespace: true,
            new_uts_namespace: true,
            ..Default::default()
        });
        pod
    }

    pub fn set_up(&mut self, request: SetUpPod) -> OwnedFd {
        let reply = self.call(Call::SetUpPod(request));
        assert!(matches!(reply, Body::PodReady(_)), "{reply:?}");
        self.received.pop().expect("the network namespace")
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Connects anew and says Hello.
    pub fn connect(&mut self) -> HelloReply {
        self.connect_silently();
        match self.call(Call::Hello(Hello { version: VERSION })) {
            Body::Hello(reply) => {
                assert_eq!(self.received.len(), 1, "a pidfd of the supervisor");
                self.received.clear();
                reply
            }
            other => panic!("{other:?}"),
        }
    }

    pub fn connect_silently(&mut self) {
        self.events.clear();
        self.socket = Some(stave_wire::connect(&self.dir.path().join("supervisor.sock")).unwrap());
    }

    pub fn disconnect(&mut self) -> Option<OwnedFd> {
        self.events.clear();
        self.socket.take()
    }

    pub fn send(&mut self, call: Call, fds: &[BorrowedFd<'_>]) -> u64 {
        self.seq += 1;
        let request = Request { seq: self.seq, call: Some(call) };
        let socket = self.socket.as_ref().expect("connected");
        stave_wire::send(socket.as_fd(), &request.encode_to_vec(), fds).unwrap();
        self.seq
    }

    /// False when the supervisor has closed the connection.
    pub fn try_send(&mut self, call: Call) -> bool {
        self.seq += 1;
        let request = Request { seq: self.seq, call: Some(call) }.encode_to_vec();
        loop {
            match stave_wire::send(self.socket.as_ref().unwrap().as_fd(), &request, &[]) {
                Ok(()) => return true,
                Err(stave_wire::WireError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
                Err(stave_wire::WireError::Closed) => return false,
                Err(error) => panic!("{error}"),
            }
        }
    }

    pub fn send_raw(&mut self, payload: &[u8]) {
        stave_wire::send(self.socket.as_ref().unwrap().as_fd(), payload, &[]).unwrap();
    }

    pub fn call(&mut self, call: Call) -> Body {
        self.call_with(call, &[])
    }

    pub fn call_with(&mut self, call: Call, fds: &[BorrowedFd<'_>]) -> Body {
        let seq = self.send(call, fds);
        self.reply(seq)
    }

    /// The reply to this request. Events on the way are kept.
    pub fn reply(&mut self, seq: u64) -> Body {
        loop {
            let packet = self.receive(LIMIT).expect("a reply");
            let body = packet.body.expect("a body");
            if packet.seq == seq {
                return body;
            }
            assert_eq!(packet.seq, 0, "a reply to something else: {body:?}");
            self.events.push_back(body);
        }
    }

    /// The next packet; `None` when the supervisor closed the connection.
    pub fn receive(&mut self, limit: Duration) -> Option<Packet> {
        let socket = self.socket.as_ref().expect("connected");
        wait_readable(socket, limit).expect("the supervisor says nothing");
        let message = stave_wire::recv(socket.as_fd()).unwrap()?;
        self.received.extend(message.fds);
        Some(Packet::decode(&message.payload[..]).unwrap())
    }

    /// The descriptors that came with replies since the last time.
    pub fn take_fds(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.received)
    }

    /// Number of open descriptors of the supervisor.
    pub fn fd_count(&mut self) -> usize {
        self.list(); // What came before is done with, once this is answered.
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// The next event.
    pub fn event(&mut self) -> Body {
        if let Some(event) = self.events.pop_front() {
            return event;
        }
        let packet = self.receive(LIMIT).expect("an event");
        assert_eq!(packet.seq, 0, "{packet:?}");
        packet.body.unwrap()
    }

    /// Nothing is said for a while.
    pub fn assert_silent(&mut self, time: Duration) {
        assert!(self.events.is_empty(), "{:?}", self.events);
        let socket = self.socket.as_ref().unwrap();
        assert!(wait_readable(socket, time).is_none(), "{:?}", self.receive(time));
    }

    pub fn done(&mut self, call: Call) {
        let reply = self.call(call);
        assert!(matches!(reply, Body::Done(_)), "{reply:?}");
    }

    pub fn fails(&mut self, call: Call) -> Failure {
        failure(self.call(call))
    }

    /// The plan of a container that runs this in a PID namespace of its own.
    pub fn plan(&self, id: &str, args: &[&str]) -> Plan {
        let cgroup = self.cgroup.join(id);
        if !cgroup.exists() {
            std::fs::create_dir(&cgroup).unwrap();
        }
        Plan {
            container_id: id.into(),
            root: Some(RootFs {
                lower_dirs: vec![self.dir.path().join("root").to_str().unwrap().into()],
                ..Default::default()
            }),
            mounts: vec![file_system("proc", "/proc", &[]), file_system("tmpfs", "/dev", &["mode=755"])],
            devices: vec![device("/dev/null", 3), device("/dev/zero", 5)],
            process: Some(process(args)),
            cgroup: Some(Cgroup { v2_dir: cgroup.to_str().unwrap().into(), ..Default::default() }),
            ..Default::default()
        }
    }

    pub fn log_path(&self, id: &str) -> PathBuf {
        self.dir.path().join("logs").join(id).join("0.log")
    }

    pub fn create_call(&self, plan: Plan) -> Call {
        let log_path = self.log_path(&plan.container_id).to_str().unwrap().into();
        Call::CreateContainer(CreateContainer { plan: Some(plan), log_path, ..Default::default() })
    }

    pub fn create(&mut self, plan: Plan) -> ContainerCreated {
        let call = self.create_call(plan);
        match self.call(call) {
            Body::ContainerCreated(created) => created,
            other => panic!("{other:?}\n{}", self.stderr()),
        }
    }

    pub fn start(&mut self, id: &str) -> ContainerStarted {
        match self.call(Call::StartContainer(StartContainer { container_id: id.into() })) {
            Body::ContainerStarted(started) => started,
            other => panic!("{other:?}"),
        }
    }

    /// Creates and starts a container that runs a shell script.
    pub fn run(&mut self, id: &str, script: &str) -> ContainerCreated {
        let created = self.create(self.plan(id, &["/bin/sh", "-c", script]));
        self.start(id);
        created
    }

    pub fn exit(&mut self, id: &str) -> ContainerExit {
        match self.event() {
            Body::ContainerExit(exit) if exit.container_id == id => exit,
            other => panic!("{other:?}"),
        }
    }

    pub fn stop_call(id: &str, signal: i32, timeout_ms: u64) -> Call {
        Call::StopContainer(StopContainer { container_id: id.into(), signal, timeout_ms })
    }

    pub fn kill(&mut self, id: &str) -> ContainerExit {
        self.done(Self::stop_call(id, 15, 0));
        self.exit(id)
    }

    pub fn acknowledge(&mut self, id: &str) {
        self.done(Call::AckExit(AckExit { container_id: id.into() }));
    }

    pub fn remove(&mut self, id: &str) {
        self.done(Call::RemoveContainer(RemoveContainer { container_id: id.into() }));
    }

    pub fn list(&mut self) -> Vec<ContainerEntry> {
        match self.call(Call::ListContainers(ListContainers {})) {
            Body::ContainerList(list) => list.containers,
            other => panic!("{other:?}"),
        }
    }

    pub fn entry(&mut self, id: &str) -> ContainerEntry {
        self.list().into_iter().find(|entry| entry.container_id == id).expect("listed")
    }

    pub fn exit_record(&self, id: &str) -> Option<ContainerExit> {
        let bytes = std::fs::read(self.dir.path().join("exits").join(id)).ok()?;
        Some(ContainerExit::decode(&bytes[..]).unwrap())
    }

    pub fn log(&self, id: &str) -> Vec<Line> {
        parse_log(&std::fs::read_to_string(self.log_path(id)).unwrap())
    }

    /// Waits for output; it is written while the container runs.
    pub fn wait_for_output(&self, id: &str, content: &str) {
        wait_for(&format!("{content:?} in the log of {id}"), || {
            std::fs::read_to_string(self.log_path(id)).is_ok_and(|log| log.contains(content))
        });
    }

    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("stderr")).unwrap_or_default()
    }

    /// Pids in the pod's cgroup and below.
    pub fn pids(&self) -> Vec<u32> {
        let mut pids = Vec::new();
        each_cgroup(&self.cgroup, &mut |dir| {
            let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
        });
        pids
    }

    /// States of the supervisor's children, such as 'Z'.
    pub fn children(&self) -> Vec<(u32, char)> {
        let path = format!("/proc/{0}/task/{0}/children", self.pid());
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.split_whitespace()
            .filter_map(|pid| {
                let pid: u32 = pid.parse().ok()?;
                let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
                Some((pid, stat.rsplit(')').next()?.trim().chars().next()?))
            })
            .collect()
    }

    /// SIGKILL to the supervisor itself.
    pub fn kill_supervisor(&mut self) {
        self.child.kill().expect("kill the supervisor");
        self.child.wait().expect("the supervisor's end");
    }

    /// The supervisor's exit status, once it has ended.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        let mut status = None;
        wait_for("the supervisor's end", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the supervisor's log:\n{}---", self.stderr());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::write(self.cgroup.join("cgroup.kill"), "1");
        let deadline = Instant::now() + LIMIT;
        while !self.pids().is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        while self.cgroup.exists() && Instant::now() < deadline {
            each_cgroup(&self.cgroup, &mut |dir| {
                let _ = std::fs::remove_dir(dir);
            });
        }
    }
}

/// Calls `visit` for each directory of a cgroup tree, the deepest first.
fn each_cgroup(dir: &Path, visit: &mut dyn FnMut(&Path)) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            each_cgroup(&entry.path(), visit);
        }
    }
    visit(dir);
}

pub fn cgroup2_mount() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = mounts.lines().find(|line| line.contains(" - cgroup2 ")).expect("a cgroup2 mount");
    line.split(' ').nth(4).unwrap().into()
}

fn make_root(root: &Path) {
    for dir in ["bin", "dev", "proc", "tmp", "etc"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static");
    for applet in
        ["sh", "cat", "sleep", "echo", "true", "false", "dd", "readlink", "head", "tr", "yes", "env"]
    {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
}

pub fn process(args: &[&str]) -> Process {
    Process {
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        env: vec!["PATH=/bin".into()],
        cwd: "/".into(),
        user: Some(User::default()),
        capabilities: Some(Capabilities::default()),
        ..Default::default()
    }
}

pub fn file_system(fs_type: &str, destination: &str, options: &[&str]) -> Mount {
    Mount {
        kind: mount::Kind::FileSystem.into(),
        source: fs_type.into(),
        destination: destination.into(),
        fs_type: fs_type.into(),
        options: options.iter().map(|&option| option.to_owned()).collect(),
        ..Default::default()
    }
}

fn device(path: &str, minor: u32) -> Device {
    Device { path: path.into(), major: 1, minor, mode: 0o666, ..Default::default() }
}

pub fn failure(body: Body) -> Failure {
    match body {
        Body::Failure(failure) => failure,
        other => panic!("no failure: {other:?}"),
    }
}

pub fn parse_log(text: &str) -> Vec<Line> {
    assert!(text.is_empty() || text.ends_with('\n'), "whole records only");
    text.lines()
        .map(|line| {
            let mut parts = line.splitn(4, ' ');
            let time = parts.next().unwrap();
            assert!(time.len() == 30 && time.ends_with('Z') && time.starts_with("20"), "{time}");
            let mut part = || parts.next().expect("a part").to_owned();
            Line { stream: part(), tag: part(), content: part() }
        })
        .collect()
}

pub fn line(stream: &str, tag: &str, content: &str) -> Line {
    Line { stream: stream.into(), tag: tag.into(), content: content.into() }
}

pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "timed out: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `Some` when the descriptor becomes readable in time.
pub fn wait_readable(fd: impl AsFd, limit: Duration) -> Option<()> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let timeout = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
    let fd = fd.as_fd();
    (poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&timeout)).unwrap() > 0).then_some(())
}
