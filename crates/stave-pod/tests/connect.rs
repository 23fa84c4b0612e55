//! TCP connections into the pod's network namespace.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;

use common::Pod;
use stave_supervisor_proto::v1::failure::Kind;
use stave_supervisor_proto::v1::packet::Body;
use stave_supervisor_proto::v1::request::Call;
use stave_supervisor_proto::v1::*;

fn pod() -> (Pod, OwnedFd) {
    let mut pod = Pod::greeted();
    let namespace = pod.set_up(SetUpPod { new_network_namespace: true, ..Default::default() });
    (pod, namespace)
}

/// Listens inside of the namespace. The thread ends, the listener stays there.
fn listen(namespace: &OwnedFd, address: &'static str) -> TcpListener {
    let namespace = namespace.try_clone().unwrap();
    std::thread::spawn(move || {
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        TcpListener::bind(address).unwrap()
    })
    .join()
    .unwrap()
}

fn connect(pod: &mut Pod, port: u32) -> Body {
    pod.call(Call::Connect(Connect { port }))
}

fn connected(pod: &mut Pod, port: u32) -> TcpStream {
    let reply = connect(pod, port);
    assert!(matches!(reply, Body::Connected(_)), "{reply:?}");
    let mut fds = pod.take_fds();
    assert_eq!(fds.len(), 1);
    let stream = TcpStream::from(fds.remove(0));
    stream.set_nonblocking(false).unwrap();
    stream
}

#[test]
fn both_families_of_loopback() {
    let (mut pod, namespace) = pod();
    let flat = pod.fd_count();
    for (address, port) in [("127.0.0.1:8080", 8080), ("[::1]:8081", 8081)] {
        let listener = listen(&namespace, address);
        assert!(TcpStream::connect(address).is_err(), "it is not on the node");
        let mut ours = connected(&mut pod, port);
        let (mut theirs, _) = listener.accept().unwrap();
        ours.write_all(b"ping").unwrap();
        ours.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        theirs.read_to_string(&mut text).unwrap();
        assert_eq!(text, "ping");
        theirs.write_all(b"pong").unwrap();
        drop(theirs);
        text.clear();
        ours.read_to_string(&mut text).unwrap();
        assert_eq!(text, "pong");
    }
    assert_eq!(pod.fd_count(), flat);
}

#[test]
fn nobody_listens() {
    let (mut pod, _namespace) = pod();
    let flat = pod.fd_count();
    let failure = common::failure(connect(&mut pod, 9));
    assert_eq!(failure.kind(), Kind::Internal);
    for wanted in ["port 9", "127.0.0.1:9: Connection refused", "[::1]:9: Connection refused"] {
        assert!(failure.message.contains(wanted), "{wanted:?} in {:?}", failure.message);
    }
    assert_eq!(pod.fd_count(), flat);
}

#[test]
fn bad_ports_and_pods() {
    let mut pod = Pod::greeted();
    assert_eq!(common::failure(connect(&mut pod, 80)).kind(), Kind::FailedPrecondition, "not set up");
    for port in [0, 65536, u32::MAX] {
        let failure = common::failure(connect(&mut pod, port));
        assert_eq!(failure.kind(), Kind::InvalidArgument);
        assert!(failure.message.contains(&port.to_string()));
    }
}

#[test]
fn a_full_backlog_blocks_nobody() {
    let (mut pod, namespace) = pod();
    let namespace2 = namespace.try_clone().unwrap();
    let listener = std::thread::spawn(move || {
        nix::sched::setns(namespace2, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let (family, kind) = (rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM);
        let socket = rustix::net::socket(family, kind, None).unwrap();
        let address = std::net::SocketAddr::from(([127, 0, 0, 1], 8080));
        rustix::net::bind(&socket, &address).unwrap();
        rustix::net::listen(&socket, 0).unwrap();
        socket
    })
    .join()
    .unwrap();
    let flat = pod.fd_count();
    // One fits into a backlog of 0; the SYNs of the others are dropped.
    let first = connected(&mut pod, 8080);
    let waiting: Vec<u64> = (0..3).map(|_| pod.send(Call::Connect(Connect { port: 8080 }), &[])).collect();
    let started = std::time::Instant::now();
    assert!(pod.list().is_empty(), "the supervisor serves on");
    assert!(started.elapsed() < std::time::Duration::from_secs(1));
    for seq in waiting {
        let failure = common::failure(pod.reply(seq));
        assert!(failure.message.contains("nobody accepted"), "{failure:?}");
    }
    assert!(pod.take_fds().is_empty());
    assert_eq!(pod.fd_count(), flat);
    drop((first, listener));
}

#[test]
fn a_daemon_that_has_gone() {
    let (mut pod, namespace) = pod();
    let flat = pod.fd_count();
    let listener = listen(&namespace, "127.0.0.1:8080");
    for _ in 0..100 {
        pod.send(Call::Connect(Connect { port: 8080 }), &[]);
    }
    pod.disconnect();
    pod.connect();
    common::wait_for("flat descriptors", || pod.fd_count() == flat);
    drop(listener);
}
