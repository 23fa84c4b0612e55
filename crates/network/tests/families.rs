//! Traffic beyond the host, over UDP and over IPv6 alone. In network namespaces that play the host; needs root.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::net::UdpSocket;
use std::time::Duration;

use common::*;
use stave_network::{PortMapping, Protocol};

/// A UDP socket in a namespace.
fn udp(netns: &Netns, address: &'static str) -> UdpSocket {
    let socket = netns.run(move || UdpSocket::bind(address).unwrap());
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    socket
}

/// Sends to `to`, whose socket is `there`, and back. Gives the address that it sees.
fn there_and_back(here: &UdpSocket, to: &str, there: &UdpSocket) -> String {
    let mut buffer = [0; 8];
    here.send_to(b"ask", to).unwrap();
    let (_, peer) = there.recv_from(&mut buffer).unwrap_or_else(|e| panic!("{to}: {e}"));
    there.send_to(b"answer", peer).unwrap();
    let (count, from) = here.recv_from(&mut buffer).unwrap_or_else(|e| panic!("answer of {to}: {e}"));
    assert_eq!((&buffer[..count], from.to_string().as_str()), (&b"answer"[..], to));
    peer.ip().to_string()
}

#[test]
fn udp_beyond_the_host() {
    on_a_host(|| async {
        let outside = beyond();
        let (bridge, _dir) = open(&[V4, V6]).await;
        let pod = Netns::new();
        let port =
            PortMapping { protocol: Protocol::Udp, container_port: 53, host_port: 5353, host_ip: None };
        attach(&bridge, 'a', &pod, &[port]).await;
        for (beyond, seen, served, host_port, caller) in [
            ("192.0.2.2:7", "192.0.2.1", "10.77.0.2:53", "192.0.2.1:5353", "192.0.2.2"),
            ("[fd00:99::2]:7", "fd00:99::1", "[fd00:77::2]:53", "[fd00:99::1]:5353", "fd00:99::2"),
        ] {
            let far = udp(&outside, beyond);
            let any = if beyond.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
            assert_eq!(there_and_back(&udp(&pod, any), beyond, &far), seen, "masquerade");
            let served = udp(&pod, served);
            assert_eq!(
                there_and_back(&udp(&outside, any), host_port, &served),
                caller,
                "the pod sees who calls"
            );
        }
    });
}

#[test]
fn ipv6_alone() {
    on_a_host(|| async {
        let outside = beyond();
        let (bridge, dir) = open(&[V6]).await;
        let (a, b) = (Netns::new(), Netns::new());
        let attached = attach(&bridge, 'a', &a, &[tcp(8080, 80, None)]).await;
        assert_eq!(attached.ips, ["fd00:77::2".parse::<std::net::IpAddr>().unwrap()]);
        attach(&bridge, 'b', &b, &[]).await;
        a.serve("[fd00:77::2]:80");
        outside.serve("[fd00:99::2]:80");
        bridge.status().await.unwrap();
        assert_eq!(call("[fd00:77::2]:80").unwrap(), "fd00:77::1");
        assert_eq!(b.call("[fd00:77::2]:80").unwrap(), "fd00:77::3");
        assert_eq!(b.call("[fd00:99::2]:80").unwrap(), "fd00:99::1");
        assert_eq!(outside.call("[fd00:99::1]:8080").unwrap(), "fd00:99::2");
        assert_eq!(b.run(|| sh("ip -4 addr show eth0")), "");
        // A host port for IPv4 alone has no pod to lead to.
        let error = refused(&bridge, 'c', &Netns::new(), &[tcp(8081, 80, Some("192.0.2.1"))]).await;
        assert!(error.to_string().contains("no subnet of the host IP's family"), "{error}");
        for pod in ["aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb"] {
            bridge.detach(pod).await.unwrap();
        }
        outside.call("[fd00:99::1]:8080").unwrap_err();
        assert_eq!(stored(dir.path()), [""; 0]);
    });
}
