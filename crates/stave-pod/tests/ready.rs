//! Ready supervisors: they wait in namespaces of their own, become one pod's supervisor, once, and end.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use prost::Message as _;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use stave_supervisor_proto::VERSION;
use stave_supervisor_proto::v1::packet::Body as PodBody;
use stave_supervisor_proto::v1::ready_packet::Body;
use stave_supervisor_proto::v1::request::Call;
use stave_supervisor_proto::v1::*;
use stave_wire::{Message, WireError};

struct Waiting {
    child: Child,
    socket: OwnedFd,
    network_namespace: OwnedFd,
}

impl Waiting {
    fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests need root");
        let (ours, theirs) = socketpair();
        let child = Command::new(env!("CARGO_BIN_EXE_stave-pod"))
            .args(["--ready", "--sysctl", "net.ipv4.ip_unprivileged_port_start=81"])
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let message = receive(&ours).expect("Ready");
        assert!(matches!(body(&message), Body::Ready(_)));
        let network_namespace = message.fds.into_iter().next().expect("the network namespace");
        Self { child, socket: ours, network_namespace }
    }

    fn become_pod(&self, request: &Become, fds: &[BorrowedFd<'_>]) -> Message {
        stave_wire::send(self.socket.as_fd(), &request.encode_to_vec(), fds).unwrap();
        receive(&self.socket).expect("an answer")
    }

    fn ended(&mut self) -> bool {
        let end = Instant::now() + common::LIMIT;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.success();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        panic!("it goes on");
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn socketpair() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

fn receive(socket: &OwnedFd) -> Option<Message> {
    let end = Instant::now() + common::LIMIT;
    loop {
        match stave_wire::recv(socket.as_fd()) {
            Err(WireError::WouldBlock) => assert!(Instant::now() < end, "no packet"),
            other => return other.unwrap(),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn body(message: &Message) -> Body {
    ReadyPacket::decode(&message.payload[..]).unwrap().body.unwrap()
}

fn inode(path: impl AsRef<Path>) -> u64 {
    std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap())
}

#[test]
fn it_becomes_one_pods_supervisor_and_ends() {
    let mut waiting = Waiting::new();
    let pid = waiting.child.id();
    let before = ["net", "ipc", "uts"].map(|name| inode(format!("/proc/{pid}/ns/{name}")));
    let own = ["net", "ipc", "uts"].map(|name| inode(format!("/proc/self/ns/{name}")));
    assert!(before.iter().zip(own).all(|(one, other)| *one != other), "namespaces of its own");
    let namespace_of_fd = rustix::fs::fstat(&waiting.network_namespace).unwrap().st_ino;
    assert_eq!(namespace_of_fd, before[0]);

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("supervisor.sock");
    let listener = stave_wire::listen(&path).unwrap();
    let log = File::create(dir.path().join("log")).unwrap();
    let cgroup_path = common::cgroup2_mount().join(format!("stave-test-ready-{}", std::process::id()));
    std::fs::create_dir(&cgroup_path).unwrap();
    let cgroup = File::open(&cgroup_path).unwrap();
    let request = Become { pod_id: "pod1".into(), dir: dir.path().to_str().unwrap().into() };
    let answer = waiting.become_pod(&request, &[listener.as_fd(), log.as_fd(), cgroup.as_fd()]);
    let Body::Became(became) = body(&answer) else { panic!("{:?}", body(&answer)) };
    let pidfd = answer.fds.into_iter().next().expect("a pidfd");
    assert!(waiting.ended(), "it ends with success");
    drop(listener);

    // The supervisor: another process, in the pod's cgroup from its start, with its arguments, a child of ours.
    let supervisor = became.pid;
    assert_ne!(supervisor as u32, pid);
    let procs = std::fs::read_to_string(cgroup_path.join("cgroup.procs")).unwrap();
    assert_eq!(procs.trim(), supervisor.to_string());
    let status = std::fs::read_to_string(format!("/proc/{supervisor}/status")).unwrap();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap().trim();
    assert_eq!(parent, std::process::id().to_string());
    common::wait_for("execve", || {
        let line = std::fs::read(format!("/proc/{supervisor}/cmdline")).unwrap_or_default();
        line.windows(4).any(|word| word == b"pod1")
    });
    assert_eq!(["net", "ipc", "uts"].map(|name| inode(format!("/proc/{supervisor}/ns/{name}"))), before);

    let socket = stave_wire::connect(&path).unwrap();
    let call = |seq, call| {
        let request = Request { seq, call: Some(call) };
        stave_wire::send(socket.as_fd(), &request.encode_to_vec(), &[]).unwrap();
        let message = receive(&socket).expect("a reply");
        let packet = Packet::decode(&message.payload[..]).unwrap();
        assert_eq!(packet.seq, seq);
        (packet.body.unwrap(), message.fds)
    };
    let (PodBody::Hello(hello), _) = call(1, Call::Hello(Hello { version: VERSION })) else { panic!() };
    assert_eq!((hello.pod_id.as_str(), hello.pid, hello.set_up), ("pod1", supervisor, false));
    // It can't be a pod that shares what it has of its own.
    let shared = SetUpPod { new_network_namespace: true, new_ipc_namespace: true, ..Default::default() };
    let (PodBody::Failure(refusal), _) = call(2, Call::SetUpPod(shared)) else { panic!() };
    assert_eq!(refusal.kind(), failure::Kind::FailedPrecondition);
    let own = SetUpPod {
        new_network_namespace: true,
        new_ipc_namespace: true,
        new_uts_namespace: true,
        hostname: "late".into(),
        sysctls: [("kernel.shm_rmid_forced".to_owned(), "1".to_owned())].into(),
        ..Default::default()
    };
    let (PodBody::PodReady(_), fds) = call(3, Call::SetUpPod(own)) else { panic!() };
    assert_eq!(
        rustix::fs::fstat(&fds[0]).unwrap().st_ino,
        before[0],
        "the namespaces are those made in advance"
    );
    let inside = |command: &str| {
        let output = Command::new("nsenter")
            .args(["-t", &supervisor.to_string(), "-n", "-i", "-u", "sh", "-c", command])
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let seen = inside(
        "hostname; cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced; cat /sys/class/net/lo/operstate; ip -o addr show lo | grep -c 127.0.0.1",
    );
    assert_eq!(seen.lines().collect::<Vec<_>>()[..3], ["late", "81", "1"], "{seen}");
    assert!(seen.ends_with("1\n"), "lo is up: {seen}");

    let (PodBody::Done(_), _) = call(4, Call::Shutdown(Shutdown {})) else { panic!() };
    let id = rustix::process::WaitId::PidFd(pidfd.as_fd());
    let status = rustix::process::waitid(id, rustix::process::WaitIdOptions::EXITED).unwrap().unwrap();
    assert_eq!(status.exit_status(), Some(0), "{}", std::fs::read_to_string(dir.path().join("log")).unwrap());
    common::wait_for("an empty cgroup", || std::fs::remove_dir(&cgroup_path).is_ok());
}

#[test]
fn without_a_daemon_it_ends() {
    let mut waiting = Waiting::new();
    let (ours, _) = socketpair();
    drop(std::mem::replace(&mut waiting.socket, ours));
    assert!(waiting.ended());
}

#[test]
fn what_it_can_not_become_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let log = File::create(dir.path().join("log")).unwrap();
    let request = |pod_id: &str, dir: &str| Become { pod_id: pod_id.into(), dir: dir.into() };
    for (request, fds) in [
        (request("../x", "/tmp"), vec![log.as_fd(), log.as_fd()]),
        (request("pod1", "tmp"), vec![log.as_fd(), log.as_fd()]),
        (request("pod1", "/tmp"), vec![log.as_fd()]),
        // No cgroup directory.
        (request("pod1", "/tmp"), vec![log.as_fd(), log.as_fd(), log.as_fd()]),
    ] {
        let mut waiting = Waiting::new();
        let answer = waiting.become_pod(&request, &fds);
        assert!(matches!(body(&answer), Body::Failure(_)), "{request:?}: {:?}", body(&answer));
        assert!(waiting.ended(), "it is of no use any more");
    }
}
