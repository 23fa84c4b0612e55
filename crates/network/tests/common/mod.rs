//! Network namespaces that play host and pod.
#![allow(dead_code, unreachable_pub, missing_docs)]

use std::future::Future;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};
use stave_network::{Attachment, Bandwidth, Bridge, BridgeConfig, NetworkError, PortMapping, Protocol};

pub const V4: &str = "10.77.0.0/24";
pub const V6: &str = "fd00:77::/64";

/// A network namespace that lives as long as its fd.
pub struct Netns(OwnedFd);

impl Netns {
    pub fn new() -> Self {
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("this test needs root");
            std::fs::File::open("/proc/thread-self/ns/net").unwrap()
        });
        Self(made.join().unwrap().into())
    }

    pub fn fd(&self) -> OwnedFd {
        self.0.try_clone().unwrap()
    }

    /// Runs something in a thread inside.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let fd = self.fd();
        let done = thread::spawn(move || {
            setns(fd.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        done.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// A TCP server inside that tells each client the address that it sees.
    pub fn serve(&self, address: &str) {
        let address: SocketAddr = address.parse().unwrap();
        let (ready, wait) = mpsc::channel();
        let fd = self.fd();
        thread::spawn(move || {
            setns(fd.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
            drop(fd);
            let listener = TcpListener::bind(address).unwrap();
            ready.send(()).unwrap();
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let peer = stream.peer_addr().unwrap().ip().to_string();
                let _ = stream.write_all(peer.as_bytes());
            }
        });
        wait.recv().unwrap();
    }

    pub fn call(&self, address: &str) -> Result<String, String> {
        let address = address.to_owned();
        self.run(move || call(&address))
    }

    pub fn sysctl(&self, name: &str) -> String {
        let path = format!("/proc/sys/net/{name}");
        self.run(move || std::fs::read_to_string(path).unwrap().trim().to_owned())
    }
}

/// A namespace beyond the host's interface `up0`: 192.0.2.2 and fd00:99::2, the host is 1.
pub fn beyond() -> Netns {
    let outside = Netns::new();
    let fd = outside.fd();
    let target = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&fd));
    sh(&format!(
        "ip link add up0 type veth peer name out0 netns {target}
         ip addr add 192.0.2.1/24 dev up0; ip addr add fd00:99::1/64 dev up0 nodad; ip link set up0 up"
    ));
    outside.run(|| {
        sh("ip addr add 192.0.2.2/24 dev out0; ip addr add fd00:99::2/64 dev out0 nodad; ip link set out0 up");
    });
    outside
}

/// Connects from the calling thread's namespace; the address that the server sees.
pub fn call(address: &str) -> Result<String, String> {
    let address: SocketAddr = address.parse().unwrap();
    let error = |e: std::io::Error| format!("{address}: {e}");
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2)).map_err(error)?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let mut seen = String::new();
    stream.read_to_string(&mut seen).map_err(error)?;
    Ok(seen)
}

/// Runs a test on a host of its own: a fresh network namespace, gone with all that is in it at the end.
pub fn on_a_host<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    Netns::new().run(move || {
        sh("ip link set lo up");
        runtime().block_on(test());
    });
}

pub fn runtime() -> tokio::runtime::Runtime {
    // One thread: the workers that it starts inherit the namespace of this one.
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

pub fn sh(script: &str) -> String {
    let output = Command::new("sh").arg("-ec").arg(script).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub fn config(subnets: &[&str]) -> BridgeConfig {
    BridgeConfig { name: "br-test".into(), subnets: subnets.iter().map(|s| (*s).to_owned()).collect() }
}

/// The bridge of a test, and the directory of its leases.
pub async fn open(subnets: &[&str]) -> (Bridge, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let bridge = Bridge::open(&config(subnets), dir.path()).await.unwrap();
    (bridge, dir)
}

/// Attaches the pod whose id is 16 times this letter.
pub async fn attach(bridge: &Bridge, id: char, pod: &Netns, ports: &[PortMapping]) -> Attachment {
    try_attach(bridge, id, pod, ports).await.unwrap()
}

/// The same, where that must fail.
pub async fn refused(bridge: &Bridge, id: char, pod: &Netns, ports: &[PortMapping]) -> NetworkError {
    try_attach(bridge, id, pod, ports).await.unwrap_err()
}

async fn try_attach(
    bridge: &Bridge,
    id: char,
    pod: &Netns,
    ports: &[PortMapping],
) -> Result<Attachment, NetworkError> {
    let id = String::from(id).repeat(16);
    bridge.attach(&id, pod.fd(), ports, Bandwidth::default()).await
}

/// Waits for a condition, at most a second.
pub async fn within_a_second(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..100 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within a second: {what}");
}

pub fn tcp(host_port: u16, container_port: u16, host_ip: Option<&str>) -> PortMapping {
    let host_ip = host_ip.map(|ip| ip.parse().unwrap());
    PortMapping { protocol: Protocol::Tcp, container_port, host_port, host_ip }
}

pub fn links() -> String {
    sh("ip -o link | sed 's/^[0-9]*: //; s/[:@].*//' | sort | tr '\\n' ' '").trim().to_owned()
}

pub fn stored(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|n| n.ends_with(".json")).collect()
}

pub fn rules() -> String {
    sh("nft list table inet stave-br-test")
}
