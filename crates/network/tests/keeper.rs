//! What others take away is put back, in network namespaces that play the host. They need root, ip and nft.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::time::Duration;

use common::*;
use stave_network::Bandwidth;

/// Whether the table is as it was; `nft list` fails while there is none.
fn rules_are(wanted: &str) -> bool {
    sh("nft list table inet stave-br-test 2>/dev/null || true") == wanted
}

#[test]
fn rules_are_put_back() {
    on_a_host(|| async {
        let (bridge, _dir) = open(&[V4, V6]).await;
        let pod = Netns::new();
        attach(&bridge, 'a', &pod, &[tcp(8080, 80, None)]).await;
        pod.serve("10.77.0.2:80");
        let before = rules();
        for damage in [
            "nft flush ruleset",
            "nft delete table inet stave-br-test",
            "nft flush table inet stave-br-test",
            "nft flush chain inet stave-br-test guard",
            "nft flush chain inet stave-br-test host-ports",
        ] {
            sh(damage);
            assert!(!rules_are(&before), "{damage}");
            within_a_second(damage, || rules_are(&before)).await;
            call("127.0.0.1:8080").unwrap();
            bridge.status().await.unwrap();
        }
        // The tables of others are theirs.
        sh("nft add table inet other; nft add chain inet other one; nft flush ruleset");
        within_a_second("ours", || rules_are(&before)).await;
        assert_eq!(sh("nft list tables").lines().count(), 1);
        // What goes by our own doing stays away.
        bridge.detach("aaaaaaaaaaaaaaaa").await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!rules().contains("8080"));
        bridge.remove_all().await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!((links().as_str(), sh("nft list tables").trim()), ("lo", ""));
    });
}

#[test]
fn a_deleted_bridge_is_made_again_with_its_pods() {
    on_a_host(|| async {
        let (bridge, dir) = open(&[V4, V6]).await;
        let (a, b, c) = (Netns::new(), Netns::new(), Netns::new());
        let limits = Bandwidth::default();
        attach(&bridge, 'a', &a, &[tcp(8080, 80, None)]).await;
        let ready = bridge.prepare(c.fd()).await.unwrap();
        a.serve("10.77.0.2:80");
        a.serve("[fd00:77::2]:80");
        let settings = || {
            sh("cat /proc/sys/net/ipv6/conf/br-test/accept_ra /proc/sys/net/ipv4/conf/br-test/route_localnet
                ip -o addr show br-test | grep -o 'inet6\\? [^ ]*' | grep -v fe80 | sort
                ip link show br-test | grep -o 'link/ether [^ ]*'
                bridge -d link | grep -o 'stv[a-z]*\\|hairpin o[nf]*\\|master br-test'")
        };
        let before = settings();
        for damage in ["ip link del br-test", "nft flush ruleset; ip link del br-test"] {
            sh(damage);
            call("10.77.0.2:80").unwrap_err();
            within_a_second(damage, || links().contains("br-test")).await;
            let mut last = String::new();
            for _ in 0..100 {
                last = match bridge.status().await {
                    Ok(()) => settings(),
                    Err(error) => error.to_string(),
                };
                if last == before {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            assert_eq!(last, before, "{damage}");
            for address in ["10.77.0.2:80", "[fd00:77::2]:80", "127.0.0.1:8080"] {
                call(address).unwrap();
            }
        }
        // New pods get on it, one with an interface made before the damage too.
        attach(&bridge, 'b', &b, &[]).await;
        bridge.attach_prepared("cccccccccccccccc", ready, &[], limits).await.unwrap();
        for pod in [&b, &c] {
            pod.call("10.77.0.2:80").unwrap();
        }
        // A bridge that is gone at this moment is told.
        sh("ip link del br-test");
        let d = Netns::new();
        let error = refused(&bridge, 'd', &d, &[]).await;
        assert!(error.to_string().contains("stv") || error.to_string().contains("br-test"), "{error}");
        within_a_second("the bridge", || links().contains("br-test")).await;
        assert_eq!(stored(dir.path()).len(), 3, "and leaves nothing");
    });
}
