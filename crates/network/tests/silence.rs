//! Pods that start are not heard by others. They need root, ip and nft.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::time::Duration;

use common::*;

/// Else each pod costs all others something, and a node with many pods is slow to start one.
async fn starts_are_silent(subnets: &[&str]) {
    let (bridge, _dir) = open(subnets).await;
    let pods: Vec<Netns> = (0..6).map(|_| Netns::new()).collect();
    attach(&bridge, 'a', &pods[0], &[]).await;
    // What a pod has to say comes within two seconds, and again.
    let settle = async || tokio::time::sleep(Duration::from_millis(2500)).await;
    settle().await;
    let packets = || {
        let text = sh("ip -s -j link show stvaaaaaaaaaaa | tr ',{}' '\\n' | grep '\"packets\"'");
        text.lines().filter_map(|line| line.rsplit(':').next()?.trim().parse::<u64>().ok()).sum::<u64>()
    };
    let before = packets();
    for (id, pod) in ('b'..).zip(&pods[1..]) {
        attach(&bridge, id, pod, &[]).await;
    }
    settle().await;
    assert_eq!(packets(), before);
    // But whoever asks is heard, and what goes to all.
    pods[0].serve("10.77.0.2:80");
    assert_eq!(pods[1].call("10.77.0.2:80").unwrap(), "10.77.0.3");
    assert!(packets() > before);
    assert_eq!(sh("ip -d link show br-test | grep -o 'mcast_snooping [01]'").trim(), "mcast_snooping 0");
    assert!(!sh("ip -6 route show table all").contains("stv"));
    if subnets.contains(&V6) {
        pods[2].serve("[fd00:77::4]:80");
        assert_eq!(pods[1].call("[fd00:77::4]:80").unwrap(), "fd00:77::3");
        assert_eq!(call("[fd00:77::4]:80").unwrap(), "fd00:77::1");
        // A group of pods hears what is sent to it, though nobody is told of it.
        let hears = pods[3].run(|| {
            let index = nix::net::if_::if_nametoindex("eth0").unwrap();
            let socket = std::net::UdpSocket::bind("[::]:99").unwrap();
            socket.join_multicast_v6(&"ff02::99".parse().unwrap(), index).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            socket
        });
        pods[4].run(|| {
            let index = nix::net::if_::if_nametoindex("eth0").unwrap();
            let socket = std::net::UdpSocket::bind("[::]:0").unwrap();
            let group = std::net::SocketAddrV6::new("ff02::99".parse().unwrap(), 99, 0, index);
            socket.send_to(b"all", group).unwrap();
        });
        let mut buffer = [0; 8];
        assert_eq!(hears.recv_from(&mut buffer).unwrap().0, 3);
    }
    // What keeps them silent goes with the bridge, and comes back when somebody takes it away.
    let table = || sh("nft list table bridge stave-br-test 2>/dev/null || true");
    let listed = table();
    assert_eq!(listed.contains("icmpv6"), subnets.contains(&V6), "{listed}");
    sh("nft flush ruleset");
    let guard = || sh("nft list table inet stave-br-test 2>/dev/null || true").contains("guard");
    within_a_second("the table", || table() == listed && guard()).await;
    bridge.remove_all().await.unwrap();
    assert_eq!(sh("nft list tables").trim(), "");
}

#[test]
fn with_ipv4() {
    on_a_host(async || starts_are_silent(&[V4]).await);
}

#[test]
fn with_both_families() {
    on_a_host(async || starts_are_silent(&[V4, V6]).await);
}
