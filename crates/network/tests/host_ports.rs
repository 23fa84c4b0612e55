//! Host ports, masquerade and the guard of the host's loopback, in network namespaces that play the host. They need root.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use common::*;
use stave_network::{Bridge, NetworkError, PortMapping, Protocol};

#[test]
fn host_ports() {
    on_a_host(|| async {
        sh("ip link add eth9 type bridge && ip addr add 192.0.2.9/24 dev eth9 && ip link set eth9 up");
        let dir = tempfile::tempdir().unwrap();
        let bridge = Bridge::open(&config(&[V4, V6]), dir.path()).await.unwrap();
        let (a, b) = (Netns::new(), Netns::new());
        let ports = [tcp(8080, 80, None), tcp(8081, 80, Some("127.0.0.1")), tcp(8082, 80, Some("192.0.2.9"))];
        bridge.attach("aaaaaaaaaaaaaaaa", a.fd(), &ports).await.unwrap();
        bridge.attach("bbbbbbbbbbbbbbbb", b.fd(), &[tcp(8083, 80, Some("0.0.0.0"))]).await.unwrap();
        for (pod, n) in [(&a, 2), (&b, 3)] {
            pod.serve(&format!("10.77.0.{n}:80"));
            pod.serve(&format!("[fd00:77::{n}]:80"));
        }
        // From the host.
        for address in [
            "127.0.0.1:8080",
            "10.77.0.1:8080",
            "192.0.2.9:8080",
            "127.0.0.1:8081",
            "192.0.2.9:8082",
            "127.0.0.1:8083",
        ] {
            call(address).unwrap();
        }
        assert_eq!(call("[fd00:77::1]:8080").unwrap(), "fd00:77::1");
        for address in ["10.77.0.1:8081", "127.0.0.1:8082", "[fd00:77::1]:8083", "10.77.0.2:8080"] {
            call(address).unwrap_err();
        }
        // From another pod, and from the pod itself.
        b.call("10.77.0.1:8080").unwrap();
        b.call("[fd00:77::1]:8080").unwrap();
        a.call("10.77.0.1:8080").unwrap();
        a.call("192.0.2.9:8082").unwrap();
        // A port that another pod has is refused by name, and the rules stay.
        let c = Netns::new();
        let error = bridge.attach("cccccccccccccccc", c.fd(), &[tcp(8082, 1, None)]).await.unwrap_err();
        assert!(
            matches!(&error, NetworkError::PortInUse { holder, .. } if holder == "aaaaaaaaaaaaaaaa"),
            "{error}"
        );
        bridge.attach("cccccccccccccccc", c.fd(), &[tcp(8081, 1, Some("10.77.0.1"))]).await.unwrap();
        // One pod's end leaves the ports of the others.
        bridge.detach("aaaaaaaaaaaaaaaa").await.unwrap();
        call("127.0.0.1:8080").unwrap_err();
        call("127.0.0.1:8083").unwrap();
    });
}

#[test]
fn udp_host_port() {
    on_a_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        let bridge = Bridge::open(&config(&[V4]), dir.path()).await.unwrap();
        let pod = Netns::new();
        let port =
            PortMapping { protocol: Protocol::Udp, container_port: 53, host_port: 5353, host_ip: None };
        let sctp = PortMapping { protocol: Protocol::Sctp, ..port.clone() };
        bridge.attach("aaaaaaaaaaaaaaaa", pod.fd(), &[port, sctp]).await.unwrap();
        let socket = pod.run(|| std::net::UdpSocket::bind("10.77.0.2:53").unwrap());
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let client = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        client.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        client.send_to(b"ask", "127.0.0.1:5353").unwrap();
        let mut buffer = [0; 16];
        let (n, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..n], b"ask");
        socket.send_to(b"answer", from).unwrap();
        let (n, from) = client.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..n], from.to_string().as_str()), (&b"answer"[..], "127.0.0.1:5353"));
        assert!(rules().contains("sctp"), "{}", rules());

        // The same sender reaches the port's next pod, though its connection is tracked.
        bridge.detach("aaaaaaaaaaaaaaaa").await.unwrap();
        let next = Netns::new();
        let port =
            PortMapping { protocol: Protocol::Udp, container_port: 53, host_port: 5353, host_ip: None };
        bridge.attach("bbbbbbbbbbbbbbbb", next.fd(), &[port]).await.unwrap();
        let socket = next.run(|| std::net::UdpSocket::bind("10.77.0.3:53").unwrap());
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        client.send_to(b"again", "127.0.0.1:5353").unwrap();
        let (n, _) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..n], b"again");
    });
}

#[test]
fn outside_sees_the_host_and_reaches_host_ports() {
    on_a_host(|| async {
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
        let dir = tempfile::tempdir().unwrap();
        let bridge = Bridge::open(&config(&[V4, V6]), dir.path()).await.unwrap();
        let pod = Netns::new();
        bridge.attach("aaaaaaaaaaaaaaaa", pod.fd(), &[tcp(8080, 80, None)]).await.unwrap();
        outside.serve("192.0.2.2:80");
        outside.serve("[fd00:99::2]:80");
        pod.serve("10.77.0.2:80");
        pod.serve("[fd00:77::2]:80");
        assert_eq!(pod.call("192.0.2.2:80").unwrap(), "192.0.2.1");
        assert_eq!(pod.call("[fd00:99::2]:80").unwrap(), "fd00:99::1");
        // The pod sees who calls.
        assert_eq!(outside.call("192.0.2.1:8080").unwrap(), "192.0.2.2");
        assert_eq!(outside.call("[fd00:99::1]:8080").unwrap(), "fd00:99::2");
    });
}

#[test]
fn pods_do_not_reach_the_loopback_of_the_host() {
    on_a_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        let bridge = Bridge::open(&config(&[V4]), dir.path()).await.unwrap();
        let pod = Netns::new();
        bridge.attach("aaaaaaaaaaaaaaaa", pod.fd(), &[]).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:90").unwrap();
        listener.set_nonblocking(true).unwrap();
        // What a pod with CAP_NET_ADMIN can do (CVE-2020-8558).
        pod.run(|| {
            sh("ip addr del 127.0.0.1/8 dev lo; echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet
                ip route del local 127.0.0.0/8 dev lo table local 2>/dev/null || true
                ip route add 127.0.0.1/32 via 10.77.0.1 dev eth0 src 10.77.0.2");
            let address = "127.0.0.1:90".parse().unwrap();
            TcpStream::connect_timeout(&address, Duration::from_millis(500)).unwrap_err();
        });
        assert!(listener.accept().is_err(), "a pod's connection reached 127.0.0.1 of the host");
        // It was our rule that kept it away.
        sh("nft flush chain inet stave-br-test guard");
        pod.run(|| {
            let address = "127.0.0.1:90".parse().unwrap();
            TcpStream::connect_timeout(&address, Duration::from_millis(500)).unwrap();
        });
    });
}
