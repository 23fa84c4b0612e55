//! Packets to and from pods, whatever put them on the network.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use stave_e2e::cri::{PortMapping, Protocol};
use stave_e2e::{Config as _, Daemon, Pod};
use tokio::io::AsyncReadExt as _;
use tokio::net::UdpSocket;

use crate::container_anatomy::{host_pid, user};

/// A TCP server in a pod, whichever family; the test image's nc is not that good.
pub(crate) const SERVER: &str = "while :; do echo from the pod | nc -l -p 8080; done";

/// What a TCP server sends.
pub(crate) async fn read(address: impl Into<SocketAddr>) -> Option<String> {
    let connect = tokio::net::TcpStream::connect(address.into());
    let mut stream = tokio::time::timeout(Duration::from_secs(1), connect).await.ok()?.ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await.ok()?;
    Some(text)
}

/// Reads from SERVER, which takes a moment between two clients.
pub(crate) async fn answers(address: impl Into<SocketAddr>) {
    let address = address.into();
    let what = format!("an answer at {address}");
    let answer =
        stave_e2e::eventually(&what, async || read(address).await.filter(|text| !text.is_empty())).await;
    assert_eq!(answer, "from the pod\n", "{address}");
}

/// The same from within a container. A connection that SERVER had not taken yet when it turned to the next client ends empty.
pub(crate) async fn answers_in(daemon: &Daemon, container: &str, ip: IpAddr, port: u16) {
    let script = format!(
        "for i in 1 2 3 4 5 6 7 8 9; do nc -w 2 {ip} {port} </dev/null >/tmp/answer 2>/tmp/why && \
         [ -s /tmp/answer ] && exec cat /tmp/answer; sleep 0.2; done; cat /tmp/why >&2; exit 1"
    );
    assert_eq!(daemon.cri.shell(container, &script).await, "from the pod\n", "{ip}");
}

/// A TCP port that nobody has now.
pub(crate) fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("address").port()
}

/// A UDP socket in a network namespace.
pub(crate) fn udp_in(netns: PathBuf, address: &str) -> UdpSocket {
    let address = address.to_owned();
    let work = move || {
        let file = std::fs::File::open(&netns).unwrap_or_else(|e| panic!("{}: {e}", netns.display()));
        nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).expect("setns");
        std::net::UdpSocket::bind(address).expect("a socket in the pod")
    };
    let socket = std::thread::spawn(work).join().expect("thread");
    socket.set_nonblocking(true).expect("nonblocking");
    UdpSocket::from_std(socket).expect("socket")
}

/// A UDP socket of the node that can send to this address.
pub(crate) async fn udp_to(to: IpAddr) -> UdpSocket {
    UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).await.expect("a UDP port")
}

/// A datagram there, and one back. Gives the sender as the receiver sees it.
pub(crate) async fn there_and_back(client: &UdpSocket, to: SocketAddr, server: &UdpSocket) -> IpAddr {
    let exchange = async {
        client.send_to(b"ping", to).await.expect("send");
        let mut buffer = [0; 64];
        let (count, from) = server.recv_from(&mut buffer).await.expect("a datagram");
        assert_eq!(&buffer[..count], b"ping");
        server.send_to(b"pong", from).await.expect("an answer");
        let (count, _) = client.recv_from(&mut buffer).await.expect("the answer");
        assert_eq!(&buffer[..count], b"pong");
        from.ip().to_canonical()
    };
    tokio::time::timeout(stave_e2e::limit(5), exchange)
        .await
        .unwrap_or_else(|_| panic!("UDP to {to} and back"))
}

/// A pod's addresses, the primary one first.
pub(crate) async fn addresses(daemon: &Daemon, pod: &Pod) -> Vec<IpAddr> {
    let network = daemon.cri.pod(&pod.id).await.expect("PodSandboxStatus").network.expect("network");
    let more = network.additional_ips.into_iter().map(|ip| ip.ip);
    let all: Vec<String> = std::iter::once(network.ip).chain(more).collect();
    daemon.remember(all.iter().skip(1).cloned());
    all.iter().map(|ip| ip.parse().expect("an address")).collect()
}

/// A pod with a user namespace and addresses of both families; `gateways` are the node's on the way to it.
pub(crate) async fn a_user_namespace_and_a_network(daemon: &Daemon, gateways: [IpAddr; 2]) {
    let (tcp, udp) = (free_port(), free_port());
    let config = user::pod("mapped").with(|config| {
        config.port_mappings = ports(tcp, udp);
        let linux = config.linux.as_mut().expect("linux");
        linux.sysctls =
            [("net.ipv4.ip_local_port_range", "2000 3000"), ("net.ipv4.conf.eth0.arp_notify", "1")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into();
    });
    let bad = user::pod("bad").with(|config| {
        let sysctl = ("net.ipv4.conf.eth0.no_such".to_owned(), "1".to_owned());
        config.linux.as_mut().expect("linux").sysctls = [sysctl].into();
    });
    let error = daemon.run_pod(bad).await.expect_err("there is no such setting");
    assert!(error.message().contains("config.linux.sysctls[\"net.ipv4.conf.eth0.no_such\"]"), "{error:?}");
    assert_eq!(daemon.cri.pods(None).await.expect("ListPodSandbox"), [], "nothing half-made is left");
    let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
    let ips = addresses(daemon, &pod).await;
    assert!(ips.len() == 2 && ips[0].is_ipv4() && ips[1].is_ipv6(), "{ips:?}");
    let config = user::inside(crate::sh("server", SERVER));
    let config = config.with(|config| user::capabilities(config, &["NET_ADMIN"]));
    let server = daemon.run(&pod, &config).await.expect("start");
    for ip in &ips {
        answers((*ip, 8080)).await;
    }
    answers((IpAddr::from([127, 0, 0, 1]), tcp)).await;
    for gateway in gateways {
        answers((gateway, tcp)).await;
    }
    let netns = PathBuf::from(format!("/proc/{}/ns/net", host_pid(daemon, &server).await));
    let inside = udp_in(netns.clone(), "[::]:53");
    for to in gateways {
        there_and_back(&udp_to(to).await, (to, udp).into(), &inside).await;
        // And from the pod to the node.
        let node = UdpSocket::bind((to, 0)).await.expect("a UDP port of the node");
        let client = udp_in(netns.clone(), if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" });
        let from = there_and_back(&client, node.local_addr().expect("address"), &node).await;
        assert!(ips.contains(&from), "{from} of {ips:?}");
    }
    let cri = &daemon.cri;
    assert!(cri.shell(&server, "ip addr show lo").await.contains("127.0.0.1/8"), "lo is up");
    let range = cri.output(&server, &["cat", "/proc/sys/net/ipv4/ip_local_port_range"]).await;
    assert_eq!(range.split_whitespace().collect::<Vec<_>>(), ["2000", "3000"]);
    assert_eq!(cri.output(&server, &["cat", "/proc/sys/net/ipv4/conf/eth0/arp_notify"]).await, "1\n");
    // Root of the pod's user namespace may do this only in a network namespace that belongs to it.
    cri.shell(&server, "ip addr add 10.99.99.1/32 dev lo && ip addr show lo | grep -q 10.99.99.1").await;
    cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
}

/// A host port of each protocol, to the ports 8080 and 53.
pub(crate) fn ports(tcp: u16, udp: u16) -> Vec<PortMapping> {
    vec![
        PortMapping { container_port: 8080, host_port: i32::from(tcp), ..Default::default() },
        PortMapping {
            protocol: Protocol::Udp.into(),
            container_port: 53,
            host_port: i32::from(udp),
            ..Default::default()
        },
    ]
}
