//! What there is not enough of, or what another has. In network namespaces that play the host; needs root.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::*;
use stave_network::{Bridge, BridgeConfig, NetworkError};

#[test]
fn exhausted_and_colliding_subnets() {
    on_a_host(|| async {
        let (bridge, _dir) = open(&["10.77.0.0/30"]).await;
        let (a, b) = (Netns::new(), Netns::new());
        attach(&bridge, 'a', &a, &[]).await;
        let error = refused(&bridge, 'b', &b, &[]).await;
        assert!(error.to_string().contains("10.77.0.0/30"), "{error}");
        bridge.detach("aaaaaaaaaaaaaaaa").await.unwrap();
        attach(&bridge, 'b', &b, &[]).await;

        // A second daemon: another name needs another subnet.
        let other_dir = tempfile::tempdir().unwrap();
        let other = |subnet: &str| BridgeConfig { name: "br-other".into(), subnets: vec![subnet.to_owned()] };
        let error = Bridge::open(&other("10.77.0.0/16"), other_dir.path()).await.unwrap_err().to_string();
        assert!(error.contains("br-test") && error.contains("10.77.0.0/16"), "{error}");
        assert!(!links().contains("br-other"));
        sh(
            "ip link add eth9 type bridge; ip link set eth9 up; ip addr add 192.0.2.9/24 dev eth9; ip route add 10.80.0.0/16 via 192.0.2.1",
        );
        let error = Bridge::open(&other("10.80.3.0/24"), other_dir.path()).await.unwrap_err().to_string();
        assert!(error.contains("route 10.80.0.0/16") && error.contains("eth9"), "{error}");
        // What a VPN lays over the default route.
        sh("ip route add 0.0.0.0/1 via 192.0.2.1; ip route add 128.0.0.0/1 via 192.0.2.1");
        let second = Bridge::open(&other("10.81.0.0/24"), other_dir.path()).await.unwrap();
        attach(&second, 'a', &a, &[]).await;
        assert!(rules().contains("10.77.0.0/30"));
        second.remove_all().await.unwrap();
        bridge.status().await.unwrap();
        // A name that is no bridge.
        let error = Bridge::open(
            &BridgeConfig { name: "lo".into(), subnets: vec!["10.82.0.0/24".into()] },
            other_dir.path(),
        )
        .await;
        assert!(matches!(error, Err(NetworkError::NotABridge { .. })), "{error:?}");
    });
}

#[test]
fn a_full_bridge_is_told() {
    on_a_host(|| async {
        let (bridge, _dir) = open(&[V4]).await;
        let (pairs, ends) = (0..511, 0..1022);
        let pairs = pairs.map(|n| format!("link add port{} type veth peer name port{}\n", 2 * n, 2 * n + 1));
        let ports = pairs.chain(ends.map(|n| format!("link set port{n} master br-test\n")));
        let batch = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(batch.path(), ports.collect::<String>()).unwrap();
        sh(&format!("ip -batch {}", batch.path().display()));
        let (a, b) = (Netns::new(), Netns::new());
        attach(&bridge, 'a', &a, &[]).await;
        let error = refused(&bridge, 'b', &b, &[]).await.to_string();
        assert!(error.contains("br-test has the 1023 ports"), "{error}");
        bridge.detach("aaaaaaaaaaaaaaaa").await.unwrap();
        attach(&bridge, 'b', &b, &[]).await;
    });
}
