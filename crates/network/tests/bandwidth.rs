//! Limits of a pod's traffic, measured. They need root.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use common::*;
use nix::sched::{CloneFlags, setns};
use stave_network::{Bandwidth, Bridge};

const BYTES: usize = 1_500_000;

/// Serves in the pod: port 90 reads all and answers with a byte, port 91 sends.
fn serve(pod: &Netns, ip: &str) {
    let fd = pod.fd();
    let (read, send) = (format!("{ip}:90"), format!("{ip}:91"));
    let (ready, wait) = std::sync::mpsc::channel();
    thread::spawn(move || {
        setns(fd.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
        drop(fd);
        let (read, send) = (TcpListener::bind(read).unwrap(), TcpListener::bind(send).unwrap());
        ready.send(()).unwrap();
        thread::spawn(move || {
            for mut stream in send.incoming().flatten() {
                let _ = stream.write_all(&vec![0; BYTES]);
            }
        });
        for mut stream in read.incoming().flatten() {
            let mut bytes = vec![0; BYTES];
            let _ = stream.read_exact(&mut bytes).and_then(|()| stream.write_all(b"x"));
        }
    });
    wait.recv().unwrap();
}

/// How long it takes to send to the pod, and to get from it.
fn times(ip: &str) -> (Duration, Duration) {
    let connect = |port: u16| {
        let stream = TcpStream::connect((ip, port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    };
    let (mut to, mut bytes) = (connect(90), vec![0; BYTES]);
    let begin = Instant::now();
    to.write_all(&bytes).unwrap();
    to.read_exact(&mut bytes[..1]).unwrap();
    let ingress = begin.elapsed();
    // It sends as soon as it has the connection, whether or not this thread runs then.
    let begin = Instant::now();
    let mut from = connect(91);
    from.read_exact(&mut bytes).unwrap();
    (ingress, begin.elapsed())
}

#[test]
fn each_way_is_limited_by_itself() {
    on_a_host(|| async {
        let (bridge, _dir) = open(&[V4, V6]).await;
        // 8 Mbit/s: 1.5 s for all; and 24: 0.5 s.
        let (slow, medium) = (Some(8_000_000), Some(24_000_000));
        let cases = [
            ("aaaaaaaaaaaaaaaa", Bandwidth::default(), (0.0, 0.0)),
            ("bbbbbbbbbbbbbbbb", Bandwidth { ingress: slow, egress: None }, (1.5, 0.0)),
            ("cccccccccccccccc", Bandwidth { ingress: None, egress: slow }, (0.0, 1.5)),
            ("dddddddddddddddd", Bandwidth { ingress: medium, egress: slow }, (0.5, 1.5)),
        ];
        for (number, (id, bandwidth, expected)) in cases.into_iter().enumerate() {
            let pod = Netns::new();
            // One way and the other of making the interface.
            let got = if number % 2 == 0 {
                bridge.attach(id, pod.fd(), &[], bandwidth).await.unwrap()
            } else {
                let link = bridge.prepare(pod.fd()).await.unwrap();
                bridge.attach_prepared(id, link, &[], bandwidth).await.unwrap()
            };
            for ip in &got.ips {
                let ip = ip.to_string();
                serve(&pod, &if ip.contains(':') { format!("[{ip}]") } else { ip.clone() });
                let (ingress, egress) = times(&ip);
                for (way, time, expected) in
                    [("ingress", ingress, expected.0), ("egress", egress, expected.1)]
                {
                    let seconds = time.as_secs_f64();
                    // A busy machine is slower, but never faster than the limit.
                    let range = (expected * 0.85)..(expected * 1.5 + 0.4);
                    assert!(range.contains(&seconds), "{bandwidth:?} {ip} {way}: {seconds} s, not {range:?}");
                }
            }
            bridge.detach(id).await.unwrap();
        }
    });
}

/// What a pod with CAP_NET_ADMIN can do: it takes its own token bucket away.
#[test]
fn a_pod_can_not_lift_its_limit() {
    on_a_host(|| async {
        let (bridge, dir) = open(&[V4, V6]).await;
        let before = (links(), rules());
        let limited = Bandwidth { ingress: None, egress: Some(4_000_000) };
        let (pod, other) = (Netns::new(), Netns::new());
        let got = bridge.attach("aaaaaaaaaaaaaaaa", pod.fd(), &[], limited).await.unwrap();
        attach(&bridge, 'b', &other, &[]).await;
        pod.run(|| sh("tc qdisc del dev eth0 root"));
        for ip in got.ips.iter().map(std::net::IpAddr::to_string) {
            serve(&pod, &if ip.contains(':') { format!("[{ip}]") } else { ip.clone() });
            // To the host, and to another pod, which no packet filter of the host's own sees.
            let (to_host, to_pod) = (ip.clone(), ip.clone());
            for (whom, (_, egress)) in [("host", times(&to_host)), ("pod", other.run(move || times(&to_pod)))]
            {
                // 3 s at the rate; what it gives in a second may come at once.
                assert!(egress.as_secs_f64() > 1.8, "{whom} {ip}: {egress:?}");
            }
        }
        let limits = || sh("nft list table bridge stave-br-test 2>/dev/null || true");
        assert!(limits().contains("iifname \"stvaaaaaaaaaaa\" limit rate over"), "{}", limits());
        let listed = limits();
        // Put back when somebody takes it away, and kept over a restart.
        sh("nft flush ruleset");
        within_a_second("the limit", || limits() == listed).await;
        drop(bridge);
        let bridge = Bridge::open(&config(&[V4, V6]), dir.path()).await.unwrap();
        assert_eq!(limits(), listed);
        // Two of them: one goes, the other stays.
        let second = Netns::new();
        bridge.attach("cccccccccccccccc", second.fd(), &[], limited).await.unwrap();
        assert_eq!(limits().matches("limit rate over").count(), 2, "{}", limits());
        bridge.retire("aaaaaaaaaaaaaaaa").await.unwrap();
        bridge.detach("aaaaaaaaaaaaaaaa").await.unwrap();
        let left = limits();
        assert!(left.contains("stvccccccccccc") && !left.contains("stvaaaaaaaaaaa"), "{left}");
        for id in ["bbbbbbbbbbbbbbbb", "cccccccccccccccc"] {
            bridge.detach(id).await.unwrap();
        }
        assert_eq!((links(), rules()), before);
        assert!(!limits().contains("limit rate over"), "{}", limits());
    });
}

#[test]
fn the_least_and_the_most_are_taken_by_the_kernel() {
    on_a_host(|| async {
        let (bridge, _dir) = open(&[V4]).await;
        let pod = Netns::new();
        let bandwidth = Bandwidth { ingress: Some(1_000), egress: Some(1_000_000_000_000_000) };
        bridge.attach("aaaaaaaaaaaaaaaa", pod.fd(), &[], bandwidth).await.unwrap();
        let host = sh("tc qdisc show dev stvaaaaaaaaaaa");
        assert!(host.contains("tbf") && host.contains("rate 1Kbit"), "{host}");
        let inside = pod.run(|| sh("tc qdisc show dev eth0"));
        assert!(inside.contains("tbf") && inside.contains("rate 1000Tbit"), "{inside}");
    });
}
