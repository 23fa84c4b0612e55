//! Ranges for pods that the kubelet tells, in network namespaces that play the host. They need root.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::*;
use stave_network::{Bandwidth, BridgeNetwork, NetworkError};

fn ranges(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

#[test]
fn there_is_a_bridge_as_soon_as_there_are_ranges() {
    on_a_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        let network = BridgeNetwork::open(config(&[]), dir.path()).await.unwrap();
        let error = network.get().await.unwrap_err().to_string();
        assert!(error.contains("network.bridge.subnets") && error.contains("UpdateRuntimeConfig"), "{error}");
        assert_eq!(links(), "lo");
        let error = network.set_ranges(&ranges(&["10.77.0.1/24"])).await.unwrap_err();
        assert!(matches!(&error, NetworkError::Config { value, .. } if value == "10.77.0.1/24"), "{error}");
        assert_eq!(links(), "lo");

        let first = ranges(&[V4, V6]);
        network.set_ranges(&first).await.unwrap();
        let bridge = network.get().await.unwrap();
        let (a, b) = (Netns::new(), Netns::new());
        attach(&bridge, 'a', &a, &[tcp(8080, 80, None)]).await;
        let ready = bridge.prepare(b.fd()).await.unwrap();
        drop(bridge);
        a.serve("10.77.0.2:80");
        call("127.0.0.1:8080").unwrap();

        // The same again changes nothing; others are refused, as long as there is a pod.
        let second = ranges(&["10.78.0.0/24"]);
        network.set_ranges(&first).await.unwrap();
        let error = network.set_ranges(&second).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, NetworkError::Ranges { .. }), "{text}");
        assert!(
            text.contains("10.78.0.0/24") && text.contains(V4) && text.contains("aaaaaaaaaaaaaaaa"),
            "{text}"
        );
        call("127.0.0.1:8080").unwrap();

        // They outlive the daemon.
        drop(network);
        let network = BridgeNetwork::open(config(&[]), dir.path()).await.unwrap();
        assert_eq!(network.get().await.unwrap().attached().await, ["aaaaaaaaaaaaaaaa"]);
        call("127.0.0.1:8080").unwrap();
        network.get().await.unwrap().detach("aaaaaaaaaaaaaaaa").await.unwrap();

        // Without pods the bridge gets the others, also for interfaces that were made before.
        network.set_ranges(&second).await.unwrap();
        let addresses = sh("ip -o addr show br-test | grep -o 'inet6\\? [^ ]*' | grep -v fe80");
        assert_eq!(addresses.trim(), "inet 10.78.0.1/24");
        let bridge = network.get().await.unwrap();
        bridge.status().await.unwrap();
        bridge.attach_prepared("bbbbbbbbbbbbbbbb", ready, &[], Bandwidth::default()).await.unwrap();
        b.serve("10.78.0.2:80");
        call("10.78.0.2:80").unwrap();
        assert!(rules().contains("10.78.0.0/24") && !rules().contains("10.77"), "{}", rules());
        bridge.detach("bbbbbbbbbbbbbbbb").await.unwrap();
        drop(bridge);

        // Ranges that the host has otherwise: told, and others mend it.
        sh("ip link add eth9 type bridge; ip addr add 10.79.0.9/24 dev eth9");
        let error = network.set_ranges(&ranges(&["10.79.0.0/16"])).await.unwrap_err().to_string();
        assert!(error.contains("eth9"), "{error}");
        assert!(network.get().await.unwrap_err().to_string().contains("eth9"));
        network.set_ranges(&second).await.unwrap();
        network.get().await.unwrap().status().await.unwrap();
    });
}

#[test]
fn the_configurations_subnets_stay() {
    on_a_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        let network = BridgeNetwork::open(config(&[V4, V6]), dir.path()).await.unwrap();
        network.set_ranges(&ranges(&[V6, V4])).await.unwrap();
        let error = network.set_ranges(&ranges(&["10.78.0.0/24"])).await.unwrap_err().to_string();
        assert!(error.contains("network.bridge.subnets") && error.contains("10.78.0.0/24"), "{error}");
        network.get().await.unwrap().status().await.unwrap();
    });
}

#[test]
fn ranges_that_can_not_be_kept_are_no_success_the_second_time_either() {
    on_a_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        let network = BridgeNetwork::open(config(&[]), dir.path()).await.unwrap();
        // In the place of the record.
        std::fs::create_dir(dir.path().join("ranges")).unwrap();
        for _ in 0..2 {
            let error = network.set_ranges(&ranges(&[V4])).await.unwrap_err().to_string();
            assert!(error.contains("ranges"), "{error}");
        }
        std::fs::remove_dir(dir.path().join("ranges")).unwrap();
        network.set_ranges(&ranges(&[V4])).await.unwrap();
        drop(network);
        let network = BridgeNetwork::open(config(&[]), dir.path()).await.unwrap();
        network.get().await.unwrap().status().await.unwrap();
    });
}
