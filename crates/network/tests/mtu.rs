//! The MTU of bridge and pods. In network namespaces that play the host; needs root.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::*;
use stave_network::{Bandwidth, Bridge};

#[test]
fn pods_have_the_mtu_of_the_uplink() {
    on_a_host(|| async {
        sh("ip link add up0 type bridge; ip link set up0 mtu 1400 up; ip addr add 192.0.2.9/24 dev up0
            ip route add default via 192.0.2.1");
        let (bridge, _dir) = open(&[V4]).await;
        let (a, b) = (Netns::new(), Netns::new());
        attach(&bridge, 'a', &a, &[]).await;
        let ready = bridge.prepare(b.fd()).await.unwrap();
        bridge.attach_prepared("bbbbbbbbbbbbbbbb", ready, &[], Bandwidth::default()).await.unwrap();
        for pod in [&a, &b] {
            assert!(pod.run(|| sh("ip link show eth0")).contains("mtu 1400"));
        }
        assert!(sh("ip link show br-test; ip link show stvaaaaaaaaaaa").matches("mtu 1400").count() == 2);
    });
}

#[test]
fn of_several_uplinks_the_least_mtu_counts() {
    on_a_host(|| async {
        sh("ip link add up0 type bridge; ip link set up0 mtu 1450 up; ip addr add 192.0.2.9/24 dev up0
            ip link add up1 type bridge; ip link set up1 mtu 1400 up; ip addr add 192.0.3.9/24 dev up1
            ip route add default nexthop via 192.0.2.1 dev up0 nexthop via 192.0.3.1 dev up1");
        let (_bridge, _dir) = open(&[V4]).await;
        let has = |mtu: u32| sh("ip link show br-test").contains(&format!("mtu {mtu} "));
        assert!(has(1400), "{}", sh("ip link show br-test"));
        for (step, mtu) in [("ip link set up0 mtu 1300", 1300), ("ip link set up1 mtu 1290", 1290)] {
            sh(step);
            within_a_second(step, || has(mtu)).await;
        }
    });
}

#[test]
fn the_mtu_follows_the_uplink() {
    on_a_host(|| async {
        let (bridge, dir) = open(&[V4]).await;
        fn mtu(name: &str) -> String {
            sh(&format!("ip link show {name} | grep -o 'mtu [0-9]*'")).trim().to_owned()
        }
        let before = mtu("br-test");
        // An uplink comes, its MTU changes, another one takes its place, the last in IPv6 alone.
        sh(
            "ip link add up0 type bridge; ip link set up0 mtu 1400 up; ip addr add 192.0.2.9/24 dev up0
            ip link add up1 type bridge; ip link set up1 mtu 1450 up; ip addr add 192.0.3.9/24 dev up1
            ip link add up2 type bridge; ip link set up2 mtu 1350 up; ip addr add fd00:9::9/64 dev up2 nodad",
        );
        let steps = [
            ("ip route add default via 192.0.2.1", 1400),
            ("ip link set up0 mtu 1300", 1300),
            ("ip route replace default via 192.0.3.1", 1450),
            ("ip route del default; ip -6 route add default via fd00:9::1", 1350),
        ];
        let ready_pod = Netns::new();
        let ready = bridge.prepare(ready_pod.fd()).await.unwrap();
        let (old, new) = (Netns::new(), Netns::new());
        attach(&bridge, 'a', &old, &[]).await;
        for (step, wanted) in steps {
            sh(step);
            within_a_second(step, || mtu("br-test") == format!("mtu {wanted}")).await;
        }
        // Pods to come have it, also with an interface that was made before; one that runs keeps its own.
        attach(&bridge, 'b', &new, &[]).await;
        bridge.attach_prepared("cccccccccccccccc", ready, &[], Bandwidth::default()).await.unwrap();
        for pod in [&new, &ready_pod] {
            assert_eq!(pod.run(|| mtu("eth0")), "mtu 1350");
        }
        for link in ["stvbbbbbbbbbbb", "stvccccccccccc"] {
            assert_eq!(mtu(link), "mtu 1350");
        }
        assert_eq!(old.run(|| mtu("eth0")), before);
        // Without an uplink it stays; a new daemon takes over what changed meanwhile.
        sh("ip -6 route del default");
        drop(bridge);
        sh("ip link set up2 mtu 1380; ip -6 route add default via fd00:9::1");
        let _bridge = Bridge::open(&config(&[V4]), dir.path()).await.unwrap();
        assert_eq!(mtu("br-test"), "mtu 1380");
    });
}
