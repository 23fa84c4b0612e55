//! Host ports of SCTP, with packets made by hand: this kernel need not speak it. In network namespaces that play the host; needs root.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use common::*;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto, sockopt};
use stave_network::{PortMapping, Protocol};

/// The tag of the INIT.
const TAG: [u8; 4] = [1, 2, 3, 4];

/// An INIT from port 40000.
fn sctp_init(port: u16) -> Vec<u8> {
    sctp(40_000, port, [0; 4], 1)
}

/// A packet of one chunk, INIT (1) or INIT ACK (2).
fn sctp(from: u16, to: u16, tag: [u8; 4], chunk: u8) -> Vec<u8> {
    let mut packet = Vec::new();
    packet.extend(from.to_be_bytes());
    packet.extend(to.to_be_bytes());
    packet.extend(tag);
    packet.extend([0; 4]);
    // 20 bytes: tag, window, streams out and in, first number.
    packet.extend([chunk, 0, 0, 20]);
    packet.extend(TAG);
    packet.extend([0, 1, 0, 0, 0, 10, 0, 10, 0, 0, 0, 1]);
    // CRC32c (RFC 9260, appendix A).
    let mut crc = u32::MAX;
    for byte in &packet {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    packet[8..12].copy_from_slice(&(!crc).to_le_bytes());
    packet
}

/// A raw socket that waits for 2 s.
fn raw(family: AddressFamily) -> OwnedFd {
    let socket = rustix::net::socket(family, SocketType::RAW, Some(ipproto::SCTP)).unwrap();
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(Duration::from_secs(2))).unwrap();
    socket
}

#[test]
fn sctp_host_port() {
    on_a_host(|| async {
        let outside = beyond();
        let (bridge, _dir) = open(&[V4, V6]).await;
        let (pod, client) = (Netns::new(), Netns::new());
        let port =
            PortMapping { protocol: Protocol::Sctp, container_port: 36_412, host_port: 5000, host_ip: None };
        attach(&bridge, 'a', &pod, &[port]).await;
        attach(&bridge, 'b', &client, &[]).await;
        let (v4, v6) = (AddressFamily::INET, AddressFamily::INET6);
        // From a pod, from beyond the host, and from the host itself. A raw socket of IPv4 gets the header as well.
        for (from, family, host, header) in [
            (Some(&client), v4, "10.77.0.1:0", 20),
            (Some(&client), v6, "[fd00:77::1]:0", 0),
            (Some(&outside), v4, "192.0.2.1:0", 20),
            (Some(&outside), v6, "[fd00:99::1]:0", 0),
            (None, v4, "127.0.0.1:0", 20),
            (None, v4, "192.0.2.1:0", 20),
            (None, v6, "[fd00:99::1]:0", 0),
        ] {
            let host: SocketAddr = host.parse().unwrap();
            let socket = |netns: Option<&Netns>| {
                netns.map_or_else(|| raw(family), |netns| netns.run(move || raw(family)))
            };
            let (inside, peer) = (socket(Some(&pod)), socket(from));
            let mut packet = [0u8; 100];
            let mut receive = |socket: &OwnedFd| {
                let (_, _, from) = rustix::net::recvfrom(socket, &mut packet[..], RecvFlags::empty())?;
                let ports = [&packet[header..header + 2], &packet[header + 2..header + 4]];
                let ports = ports.map(|port| u16::from_be_bytes(port.try_into().unwrap()));
                Ok::<_, rustix::io::Errno>((SocketAddr::try_from(from.unwrap()).unwrap(), ports))
            };
            rustix::net::sendto(&peer, &sctp_init(5000), SendFlags::empty(), &host).unwrap();
            let (seen, ports) = receive(&inside).unwrap_or_else(|e| panic!("{host}: {e}"));
            assert_eq!(ports[1], 36_412, "the pod's port");
            // Its answer comes from the host port.
            let answer = sctp(36_412, ports[0], TAG, 2);
            rustix::net::sendto(&inside, &answer, SendFlags::empty(), &SocketAddr::new(seen.ip(), 0))
                .unwrap();
            let answer = loop {
                // What the host sends to itself, it gets, too.
                match receive(&peer).unwrap_or_else(|e| panic!("answer of {host}: {e}")) {
                    (_, [40_000, _]) => {}
                    answer => break answer,
                }
            };
            assert_eq!((answer.0.ip(), answer.1), (host.ip(), [5000, 40_000]));
            rustix::net::sendto(&peer, &sctp_init(5001), SendFlags::empty(), &host).unwrap();
            let limit = Some(Duration::from_millis(200));
            sockopt::set_socket_timeout(&inside, sockopt::Timeout::Recv, limit).unwrap();
            receive(&inside).expect_err("port 5001 is nobody's");
        }
    });
}

#[test]
fn an_sctp_sender_that_goes_on_reaches_the_next_pod() {
    on_a_host(|| async {
        let (bridge, _dir) = open(&[V4]).await;
        let client = Netns::new();
        attach(&bridge, 'c', &client, &[]).await;
        let host: std::net::SocketAddr = "10.77.0.1:0".parse().unwrap();
        // Always from one port, and before a tracked connection that gets no answer ends (3 s).
        for id in ['a', 'b'] {
            let pod = Netns::new();
            let port =
                PortMapping { protocol: Protocol::Sctp, container_port: 80, host_port: 5000, host_ip: None };
            attach(&bridge, id, &pod, &[port]).await;
            let inside = pod.run(|| raw(AddressFamily::INET));
            client.run(move || {
                rustix::net::sendto(raw(AddressFamily::INET), &sctp_init(5000), SendFlags::empty(), &host)
                    .unwrap();
            });
            let got = rustix::net::recv(&inside, &mut [0u8; 100][..], RecvFlags::empty());
            got.unwrap_or_else(|e| panic!("{id}: {e}"));
            bridge.detach(&String::from(id).repeat(16)).await.unwrap();
        }
    });
}
