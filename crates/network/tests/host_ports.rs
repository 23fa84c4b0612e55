//! Host ports, masquerade and the guard of the host's loopback, in network namespaces that play the host. They need root.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use common::*;
use stave_network::{NetworkError, PortMapping, Protocol};

#[test]
fn host_ports() {
    on_a_host(|| async {
        // One with a carrier: IPv6 takes an address of an interface without for nobody's.
        sh("ip link add eth9 type veth peer name eth8; ip link set eth8 up; ip link set eth9 up
            ip addr add 192.0.2.9/24 dev eth9; ip addr add fd00:9::9/64 dev eth9 nodad");
        let (bridge, _dir) = open(&[V4, V6]).await;
        let (a, b) = (Netns::new(), Netns::new());
        let ports = [tcp(8080, 80, None), tcp(8081, 80, Some("127.0.0.1")), tcp(8082, 80, Some("192.0.2.9"))];
        attach(&bridge, 'a', &a, &ports).await;
        attach(&bridge, 'b', &b, &[tcp(8083, 80, Some("0.0.0.0"))]).await;
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
        assert_eq!(call("[fd00:9::9]:8080").unwrap(), "fd00:9::9");
        // ::1 stays with whoever listens there.
        let own = TcpListener::bind("[::1]:8080").unwrap();
        let client = TcpStream::connect("[::1]:8080").unwrap();
        assert_eq!(own.accept().unwrap().1, client.local_addr().unwrap());
        let loopback = [tcp(8089, 80, Some("::1"))];
        let error = bridge.check_ports(&loopback).unwrap_err().to_string();
        assert!(error.contains("8089") && error.contains("::1"), "{error}");
        assert_eq!(refused(&bridge, 'd', &Netns::new(), &loopback).await.to_string(), error);
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
        let error = refused(&bridge, 'c', &c, &[tcp(8082, 1, None)]).await;
        assert!(
            matches!(&error, NetworkError::PortInUse { holder, .. } if holder == "aaaaaaaaaaaaaaaa"),
            "{error}"
        );
        attach(&bridge, 'c', &c, &[tcp(8081, 1, Some("10.77.0.1"))]).await;
        // One pod's end leaves the ports of the others.
        bridge.detach("aaaaaaaaaaaaaaaa").await.unwrap();
        call("127.0.0.1:8080").unwrap_err();
        call("127.0.0.1:8083").unwrap();
    });
}

#[test]
fn udp_host_port() {
    on_a_host(|| async {
        let (bridge, _dir) = open(&[V4]).await;
        let pod = Netns::new();
        let port =
            PortMapping { protocol: Protocol::Udp, container_port: 53, host_port: 5353, host_ip: None };
        let sctp = PortMapping { protocol: Protocol::Sctp, ..port.clone() };
        attach(&bridge, 'a', &pod, &[port, sctp]).await;
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
        attach(&bridge, 'b', &next, &[port]).await;
        let socket = next.run(|| std::net::UdpSocket::bind("10.77.0.3:53").unwrap());
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        client.send_to(b"again", "127.0.0.1:5353").unwrap();
        let (n, _) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..n], b"again");
    });
}

#[test]
fn udp_host_port_over_ipv6_and_on_one_address() {
    on_a_host(|| async {
        // One with a carrier: IPv6 takes an address of an interface without for nobody's.
        sh("ip link add eth9 type veth peer name eth8; ip link set eth8 up; ip link set eth9 up
            ip addr add fd00:9::9/64 dev eth9 nodad");
        let (bridge, _dir) = open(&[V4, V6]).await;
        let pod = Netns::new();
        let udp = |host_port, ip: Option<&str>| PortMapping {
            protocol: Protocol::Udp,
            container_port: 53,
            host_port,
            host_ip: ip.map(|ip| ip.parse().unwrap()),
        };
        let ports = [udp(5353, None), udp(5354, Some("fd00:9::9"))];
        attach(&bridge, 'a', &pod, &ports).await;
        let socket = pod.run(|| std::net::UdpSocket::bind("[fd00:77::2]:53").unwrap());
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let mut buffer = [0; 16];
        for (address, arrives) in [
            ("[fd00:9::9]:5353", true),
            ("[fd00:77::1]:5353", true),
            ("[fd00:9::9]:5354", true),
            ("[fd00:77::1]:5354", false),
        ] {
            let client = std::net::UdpSocket::bind("[::]:0").unwrap();
            client.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            client.send_to(b"ask", address).unwrap();
            let got = socket.recv_from(&mut buffer);
            assert_eq!(got.is_ok(), arrives, "{address}: {got:?}");
            if let Ok((_, from)) = got {
                socket.send_to(b"answer", from).unwrap();
                let (n, from) = client.recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..n], from.to_string().as_str()), (&b"answer"[..], address));
            }
        }
    });
}

/// While a pod is made anew, nobody has its port, and a sender that goes on gets a connection that ends at the node.
#[test]
fn a_udp_sender_that_goes_on_reaches_the_next_pod() {
    on_a_host(|| async {
        let (bridge, _dir) = open(&[V4, V6]).await;
        let port =
            PortMapping { protocol: Protocol::Udp, container_port: 53, host_port: 5353, host_ip: None };
        let socket = |address: &str| {
            let socket = std::net::UdpSocket::bind(address).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            socket
        };
        let senders = [
            (socket("127.0.0.1:0"), "127.0.0.1:5353"),
            (socket("0.0.0.0:0"), "10.77.0.1:5353"),
            (socket("[::]:0"), "[fd00:77::1]:5353"),
        ];
        let send = || senders.iter().for_each(|(from, to)| assert_eq!(from.send_to(b"ask", to).unwrap(), 3));
        for id in ['a', 'b'] {
            send();
            let pod = Netns::new();
            attach(&bridge, id, &pod, std::slice::from_ref(&port)).await;
            let inside = pod.run(|| std::net::UdpSocket::bind("[::]:53").unwrap());
            inside.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            let mut buffer = [0; 16];
            for (from, to) in &senders {
                from.send_to(b"ask", to).unwrap();
                let (n, peer) = inside.recv_from(&mut buffer).unwrap_or_else(|e| panic!("{id} {to}: {e}"));
                assert_eq!(&buffer[..n], b"ask");
                inside.send_to(b"answer", peer).unwrap();
                let (n, peer) = from.recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..n], peer.to_string().as_str()), (&b"answer"[..], *to));
            }
            bridge.detach(&String::from(id).repeat(16)).await.unwrap();
        }
    });
}

#[test]
fn a_full_disk_keeps_no_host_port() {
    on_a_host(|| async {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let dir = tempfile::tempdir().unwrap();
        sh(&format!(
            "mount --make-rprivate /; mount -t tmpfs -o size=64k leases {}",
            dir.path().to_str().unwrap()
        ));
        let leases = dir.path().join("leases");
        let bridge = stave_network::Bridge::open(&config(&[V4]), &leases).await.unwrap();
        let (before, pod) = (rules(), Netns::new());
        attach(&bridge, 'a', &pod, &[tcp(8080, 80, None)]).await;
        let full = dir.path().join("full");
        std::fs::write(&full, vec![1; 1 << 20]).unwrap_err();
        bridge.retire("aaaaaaaaaaaaaaaa").await.unwrap();
        assert_eq!(rules(), before);
        // A daemon that comes now does not give the port to the pod again.
        let next = stave_network::Bridge::open(&config(&[V4]), &leases).await.unwrap();
        assert_eq!(rules(), before);
        drop(next);
        bridge.detach("aaaaaaaaaaaaaaaa").await.unwrap();
        std::fs::remove_file(full).unwrap();
        attach(&bridge, 'b', &pod, &[tcp(8080, 80, None)]).await;
        assert_eq!(bridge.attached().await, ["bbbbbbbbbbbbbbbb"]);
    });
}

#[test]
fn outside_sees_the_host_and_reaches_host_ports() {
    on_a_host(|| async {
        let outside = beyond();
        let (bridge, _dir) = open(&[V4, V6]).await;
        let pod = Netns::new();
        attach(&bridge, 'a', &pod, &[tcp(8080, 80, None)]).await;
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

/// A neighbour can send packets for 127.0.0.1 to the host's hardware address, and a host port is looked up before the
/// kernel takes them for martians.
#[test]
fn a_host_port_on_127_0_0_1_is_not_for_neighbours() {
    on_a_host(|| async {
        let outside = beyond();
        let (bridge, _dir) = open(&[V4]).await;
        let pod = Netns::new();
        attach(&bridge, 'a', &pod, &[tcp(8081, 80, Some("127.0.0.1")), tcp(8082, 80, None)]).await;
        pod.serve("10.77.0.2:80");
        call("127.0.0.1:8081").unwrap();
        outside.run(|| {
            sh("ip addr del 127.0.0.1/8 dev lo 2>/dev/null || true
                echo 1 > /proc/sys/net/ipv4/conf/out0/route_localnet
                ip route del local 127.0.0.0/8 dev lo table local 2>/dev/null || true
                ip route add 127.0.0.1/32 via 192.0.2.1 dev out0 src 192.0.2.2");
        });
        for address in ["127.0.0.1:8081", "127.0.0.1:8082"] {
            outside.call(address).unwrap_err();
        }
        outside.call("192.0.2.1:8082").unwrap();
        outside.call("192.0.2.1:8081").unwrap_err();
        call("127.0.0.1:8081").unwrap();
    });
}

/// Else whoever may ask for a host port could ask for the API server's.
#[test]
fn a_host_port_on_an_address_of_another_host_takes_nothing() {
    on_a_host(|| async {
        let outside = beyond();
        let (bridge, _dir) = open(&[V4, V6]).await;
        let (thief, pod) = (Netns::new(), Netns::new());
        let stolen = [tcp(80, 81, Some("192.0.2.2")), tcp(80, 81, Some("fd00:99::2"))];
        attach(&bridge, 'a', &thief, &stolen).await;
        attach(&bridge, 'b', &pod, &[]).await;
        for address in ["192.0.2.2:80", "[fd00:99::2]:80"] {
            outside.serve(address);
        }
        for (address, host) in [("192.0.2.2:80", "192.0.2.1"), ("[fd00:99::2]:80", "fd00:99::1")] {
            assert_eq!(pod.call(address).unwrap(), host);
            assert_eq!(call(address).unwrap(), host);
        }
        // An address that moves to this host is one of its own then.
        thief.serve("10.77.0.2:81");
        outside.run(|| sh("ip addr del 192.0.2.2/24 dev out0"));
        sh("ip addr add 192.0.2.2/24 dev up0");
        assert_eq!(pod.call("192.0.2.2:80").unwrap(), "10.77.0.1");
    });
}

#[test]
fn pods_do_not_reach_the_loopback_of_the_host() {
    on_a_host(|| async {
        let (bridge, _dir) = open(&[V4]).await;
        let pod = Netns::new();
        attach(&bridge, 'a', &pod, &[]).await;
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
        // It was our rule that kept it away. (It would be put back.)
        drop(bridge);
        sh("nft flush chain inet stave-br-test guard");
        pod.run(|| {
            let address = "127.0.0.1:90".parse().unwrap();
            TcpStream::connect_timeout(&address, Duration::from_millis(500)).unwrap();
        });
    });
}
