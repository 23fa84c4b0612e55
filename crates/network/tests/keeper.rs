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
        within_a_second("no other", || {
            sh("nft list tables") == "table inet stave-br-test\ntable bridge stave-br-test\n"
        })
        .await;
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

#[test]
fn an_interface_that_is_not_in_the_bridge_yet_gets_there_with_its_pod() {
    on_a_host(|| async {
        let (bridge, _dir) = open(&[V4]).await;
        let (a, b) = (Netns::new(), Netns::new());
        let ready = bridge.prepare(a.fd()).await.unwrap();
        // As it is while a bridge that was deleted gets its ports back.
        sh("ip link set $(ip -o link | grep -o 'stvready[0-9a-f]*') nomaster");
        bridge.attach_prepared("aaaaaaaaaaaaaaaa", ready, &[], Bandwidth::default()).await.unwrap();
        attach(&bridge, 'b', &b, &[]).await;
        a.serve("10.77.0.2:80");
        b.call("10.77.0.2:80").unwrap();
        call("10.77.0.2:80").unwrap();
    });
}

/// Somebody has written all rules to the file that the firewall loads, and pods have come and gone since.
#[test]
fn rules_of_yesterday_are_not_taken_for_todays() {
    on_a_host(|| async {
        let (bridge, dir) = open(&[V4, V6]).await;
        let (a, b) = (Netns::new(), Netns::new());
        attach(&bridge, 'a', &a, &[tcp(8080, 80, None)]).await;
        let file = dir.path().join("nftables.conf");
        std::fs::write(&file, format!("flush ruleset\n{}", sh("nft list ruleset"))).unwrap();
        bridge.detach("aaaaaaaaaaaaaaaa").await.unwrap();
        attach(&bridge, 'b', &b, &[tcp(8080, 80, None)]).await;
        b.serve("10.77.0.3:80");
        call("127.0.0.1:8080").unwrap();
        let today = rules();
        sh(&format!("nft -f {}", file.display()));
        assert!(!rules_are(&today));
        within_a_second("today's rules", || rules_are(&today)).await;
        call("127.0.0.1:8080").unwrap();
    });
}

#[test]
fn host_ports_come_and_go_while_the_rules_are_away() {
    on_a_host(|| async {
        let (bridge, dir) = open(&[V4]).await;
        let before = rules();
        let (a, b) = (Netns::new(), Netns::new());
        attach(&bridge, 'a', &a, &[tcp(8080, 80, None)]).await;
        let with_one = rules();
        // No more than a moment passes until they are put back; a pod may start or end in it.
        sh("nft flush ruleset");
        attach(&bridge, 'b', &b, &[tcp(8081, 80, None)]).await;
        a.serve("10.77.0.2:80");
        b.serve("10.77.0.3:80");
        call("127.0.0.1:8080").unwrap();
        call("127.0.0.1:8081").unwrap();
        sh("nft flush ruleset");
        bridge.retire("bbbbbbbbbbbbbbbb").await.unwrap();
        bridge.detach("bbbbbbbbbbbbbbbb").await.unwrap();
        assert_eq!(rules(), with_one);
        sh("nft delete chain inet stave-br-test output; nft flush chain inet stave-br-test prerouting
            nft delete chain inet stave-br-test host-ports");
        bridge.detach("aaaaaaaaaaaaaaaa").await.unwrap();
        assert_eq!(rules(), before);
        assert!(stored(dir.path()).is_empty());
    });
}

#[test]
fn an_address_is_nobodys_as_long_as_a_host_port_leads_to_it() {
    on_a_host(|| async {
        let (bridge, dir) = open(&[V4]).await;
        let before = rules();
        let pod = Netns::new();
        attach(&bridge, 'a', &pod, &[tcp(8080, 80, None)]).await;
        // A table that another process owns can't be changed.
        let mut owner = std::process::Command::new("nft")
            .arg("-i")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let mut orders = owner.stdin.take().unwrap();
        std::io::Write::write_all(
            &mut orders,
            b"flush ruleset\nadd table inet stave-br-test { flags owner; }\n",
        )
        .unwrap();
        within_a_second("the owner", || {
            sh("nft list tables").contains("stave") && !rules().contains("guard")
        })
        .await;
        for _ in 0..2 {
            bridge.detach("aaaaaaaaaaaaaaaa").await.unwrap_err();
            assert_eq!(stored(dir.path()).len(), 1, "the lease is there to be freed");
        }
        drop(orders);
        owner.wait().unwrap();
        bridge.detach("aaaaaaaaaaaaaaaa").await.unwrap();
        assert_eq!(rules(), before);
        assert!(stored(dir.path()).is_empty());
    });
}
