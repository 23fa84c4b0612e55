//! Real bridges, veth pairs and nftables rules. All but one test make a network namespace that plays the
//! host, so that nothing meets the networks of this machine; all need root, and the nft program to look at rules.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::Write;
use std::net::{IpAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::thread;
use std::time::Duration;

use common::*;
use stave_network::{Bandwidth, Bridge, BridgeConfig, NetworkError};

#[test]
fn pods_reach_each_other_and_the_host() {
    on_a_host(|| async {
        let (bridge, _dir) = open(&[V4, V6]).await;
        bridge.status().await.unwrap();
        let (a, b) = (Netns::new(), Netns::new());
        let got = attach(&bridge, 'a', &a, &[]).await;
        attach(&bridge, 'b', &b, &[]).await;
        let ips: Vec<String> = got.ips.iter().map(IpAddr::to_string).collect();
        assert_eq!(ips, ["10.77.0.2", "fd00:77::2"]);
        let gateways: Vec<String> = got.gateways.iter().map(IpAddr::to_string).collect();
        assert_eq!(
            (got.interface.as_str(), gateways),
            ("eth0", vec!["10.77.0.1".to_owned(), "fd00:77::1".to_owned()])
        );
        assert_eq!(got.mac, "0a:58:0a:4d:00:02");
        assert_eq!(bridge.attached().await, ["aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb"]);

        a.serve("10.77.0.2:80");
        a.serve("[fd00:77::2]:80");
        // From the other pod, and from the host.
        assert_eq!(b.call("10.77.0.2:80").unwrap(), "10.77.0.3");
        assert_eq!(b.call("[fd00:77::2]:80").unwrap(), "fd00:77::3");
        assert_eq!(call("10.77.0.2:80").unwrap(), "10.77.0.1");
        assert_eq!(call("[fd00:77::2]:80").unwrap(), "fd00:77::1");
        // lo is up.
        a.serve("127.0.0.1:81");
        assert_eq!(a.call("127.0.0.1:81").unwrap(), "127.0.0.1");
        // Pods reach the host by the bridge's address.
        thread::spawn({
            let listeners =
                [TcpListener::bind("10.77.0.1:82").unwrap(), TcpListener::bind("[fd00:77::1]:82").unwrap()];
            move || {
                for listener in &listeners {
                    let (mut stream, peer) = listener.accept().unwrap();
                    stream.write_all(peer.ip().to_string().as_bytes()).unwrap();
                }
            }
        });
        assert_eq!(b.call("10.77.0.1:82").unwrap(), "10.77.0.3");
        assert_eq!(b.call("[fd00:77::1]:82").unwrap(), "fd00:77::3");
        assert_eq!(a.sysctl("ipv6/conf/eth0/accept_dad"), "0");
    });
}

#[test]
fn a_bridge_that_can_not_be_set_up_leaves_nothing() {
    on_a_host(|| async {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        sh("mount --make-rprivate /; mount --bind /proc/sys /proc/sys; mount -o remount,ro,bind /proc/sys");
        let dir = tempfile::tempdir().unwrap();
        let error = Bridge::open(&config(&[V4, V6]), dir.path()).await.unwrap_err();
        assert!(error.to_string().contains("/proc/sys/net"), "{error}");
        assert_eq!((links().as_str(), sh("nft list tables").trim()), ("lo", ""));
    });
}

#[test]
fn a_node_without_ipv6_of_its_own_has_pods_with_it() {
    on_a_host(|| async {
        sh(
            "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6",
        );
        let (bridge, _dir) = open(&[V4, V6]).await;
        let (a, b) = (Netns::new(), Netns::new());
        attach(&bridge, 'a', &a, &[]).await;
        attach(&bridge, 'b', &b, &[]).await;
        a.serve("[fd00:77::2]:80");
        assert_eq!(b.call("[fd00:77::2]:80").unwrap(), "fd00:77::3");
        assert_eq!(call("[fd00:77::2]:80").unwrap(), "fd00:77::1");
    });
}

#[test]
fn detach_frees_everything() {
    on_a_host(|| async {
        let (bridge, dir) = open(&[V4, V6]).await;
        let before = (links(), rules());
        let pod = Netns::new();
        attach(&bridge, 'a', &pod, &[tcp(8080, 80, None)]).await;
        assert!(links().contains("stvaaaaaaaaaaa"));
        assert_eq!(
            sh("cat /sys/class/net/br-test/brif/*/hairpin_mode 2>/dev/null || bridge -d link")
                .matches("hairpin off")
                .count(),
            0
        );
        assert!(rules().contains("8080"), "{}", rules());
        for _ in 0..2 {
            bridge.detach("aaaaaaaaaaaaaaaa").await.unwrap();
            assert_eq!((links(), rules()), before);
            assert!(stored(dir.path()).is_empty() && bridge.attached().await.is_empty());
        }
        // The same namespace again, and then its end before the detach.
        attach(&bridge, 'a', &pod, &[tcp(8080, 80, None)]).await;
        drop(pod);
        for _ in 0..200 {
            if !links().contains("stv") {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(links(), before.0, "the kernel removes the pair with the namespace");
        bridge.detach("aaaaaaaaaaaaaaaa").await.unwrap();
        assert_eq!((links(), rules()), before);
        assert!(stored(dir.path()).is_empty());

        // Nothing of ours holds the host's namespace longer than the bridge lives.
        let threads = || {
            let names = std::fs::read_dir("/proc/self/task").unwrap();
            let here = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
            names
                .filter_map(|t| {
                    let path = t.unwrap().path();
                    let same = std::fs::read_link(path.join("ns/net")).ok()? == here;
                    let name = std::fs::read_to_string(path.join("comm")).ok()?;
                    (same && name.trim() == "rtnetlink").then_some(())
                })
                .count()
        };
        assert_eq!(threads(), 2, "one to make, one to remove");
        bridge.remove_all().await.unwrap();
        assert_eq!(links(), "lo");
        assert_eq!(sh("nft list tables").trim(), "");
        for _ in 0..200 {
            if threads() == 0 {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("the netlink thread goes on");
    });
}

#[test]
fn an_interface_made_in_advance_is_as_any_other() {
    on_a_host(|| async {
        let (bridge, dir) = open(&[V4, V6]).await;
        let before = (links(), rules());
        let (a, b) = (Netns::new(), Netns::new());
        let ready = bridge.prepare(a.fd()).await.unwrap();
        assert!(ready.exists() && links().contains("stvready"), "{}", links());
        assert!(stored(dir.path()).is_empty() && bridge.attached().await.is_empty(), "no address is taken");
        let got = bridge
            .attach_prepared("aaaaaaaaaaaaaaaa", ready, &[tcp(8080, 80, None)], Bandwidth::default())
            .await
            .unwrap();
        assert!(!links().contains("stvready") && links().contains("stvaaaaaaaaaaa"), "{}", links());
        assert_eq!(got, {
            let fresh = attach(&bridge, 'b', &b, &[]).await;
            stave_network::Attachment {
                ips: vec!["10.77.0.2".parse().unwrap(), "fd00:77::2".parse().unwrap()],
                mac: "0a:58:0a:4d:00:02".into(),
                ..fresh
            }
        });
        // Both look the same from inside but for their addresses.
        let look = |pod: &Netns| {
            let text = pod.run(|| sh("ip -d link show eth0 | grep -o 'mtu [0-9]*\\|link/ether [0-9a-f:]*\\|state [A-Z]*'; ip route; ip -6 route; cat /proc/sys/net/ipv6/conf/eth0/accept_ra"));
            text.replace("0a:58:0a:4d:00:03", "0a:58:0a:4d:00:02")
                .replace("10.77.0.3", "10.77.0.2")
                .replace("::3", "::2")
        };
        assert_eq!(look(&a), look(&b));
        a.serve("10.77.0.2:80");
        a.serve("[fd00:77::2]:80");
        call("10.77.0.2:80").unwrap();
        b.call("[fd00:77::2]:80").unwrap();
        call("127.0.0.1:8080").unwrap();
        a.call("10.77.0.1:8080").unwrap();
        bridge.detach("aaaaaaaaaaaaaaaa").await.unwrap();
        bridge.detach("bbbbbbbbbbbbbbbb").await.unwrap();
        assert_eq!((links(), rules()), before);

        // One that is never used goes with its namespace, and one that is gone is refused and leaves nothing.
        let (c, d) = (Netns::new(), Netns::new());
        let unused = bridge.prepare(c.fd()).await.unwrap();
        let broken = bridge.prepare(d.fd()).await.unwrap();
        drop((unused, c));
        d.run(|| sh("ip link del eth0"));
        assert!(!broken.exists());
        bridge
            .attach_prepared("cccccccccccccccc", broken, &[tcp(8080, 80, None)], Bandwidth::default())
            .await
            .unwrap_err();
        for _ in 0..200 {
            if links() == before.0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!((links(), rules()), before);
        assert!(stored(dir.path()).is_empty());
    });
}

#[test]
fn a_retired_pod_is_cut_off_and_the_rest_follows() {
    on_a_host(|| async {
        let (bridge, dir) = open(&["10.77.0.0/30"]).await;
        let before = (links(), rules());
        let pod = Netns::new();
        attach(&bridge, 'a', &pod, &[tcp(8080, 80, None)]).await;
        pod.serve("10.77.0.2:80");
        call("10.77.0.2:80").unwrap();
        // Somebody keeps the namespace: nothing reaches it all the same.
        bridge.retire("aaaaaaaaaaaaaaaa").await.unwrap();
        assert_eq!(rules(), before.1, "its host ports went at once");
        call("10.77.0.2:80").unwrap_err();
        bridge.retire("aaaaaaaaaaaaaaaa").await.unwrap();
        assert!(bridge.drain(Duration::from_secs(5)).await);
        assert_eq!(links(), before.0);
        assert!(stored(dir.path()).is_empty() && bridge.attached().await.is_empty());
        bridge.retire("aaaaaaaaaaaaaaaa").await.unwrap();
        bridge.retire("never-attached").await.unwrap();

        // The lease ends with the link, and not before: the address is nobody else's until then.
        let (pod, other) = (Netns::new(), Netns::new());
        attach(&bridge, 'a', &pod, &[tcp(8080, 80, None)]).await;
        bridge.retire("aaaaaaaaaaaaaaaa").await.unwrap();
        assert!(links().contains("stvaaaaaaaaaaa") && stored(dir.path()).len() == 1);
        // Its host port is free: what is missing is an address.
        let error = refused(&bridge, 'b', &other, &[tcp(8080, 80, None)]).await;
        assert!(matches!(error, NetworkError::Exhausted { .. }), "{error}");
        bridge.detach("aaaaaaaaaaaaaaaa").await.unwrap();

        // With the namespace goes the link, without our doing; `detach` waits for it.
        attach(&bridge, 'b', &other, &[]).await;
        drop(other);
        bridge.retire("bbbbbbbbbbbbbbbb").await.unwrap();
        bridge.detach("bbbbbbbbbbbbbbbb").await.unwrap();
        assert_eq!((links(), rules()), before);
        assert!(stored(dir.path()).is_empty());

        // A daemon that dies in between: the next one finds the lease.
        attach(&bridge, 'c', &pod, &[]).await;
        bridge.retire("cccccccccccccccc").await.unwrap();
        let second = Bridge::open(&config(&["10.77.0.0/30"]), dir.path()).await.unwrap();
        assert_eq!(second.attached().await, ["cccccccccccccccc"]);
        second.retire("cccccccccccccccc").await.unwrap();
        second.detach("cccccccccccccccc").await.unwrap();
        assert_eq!(links(), before.0);
    });
}

#[test]
fn failed_attach_leaves_nothing() {
    on_a_host(|| async {
        let (bridge, dir) = open(&[V4]).await;
        let before = (links(), rules());
        let pod = Netns::new();
        // The name of the pod's interface is taken.
        pod.run(|| sh("ip link add eth0 type bridge"));
        let error = refused(&bridge, 'a', &pod, &[tcp(8080, 80, None)]).await;
        assert!(error.to_string().contains("stvaaaaaaaaaaa"), "{error}");
        // No namespace at all.
        let file: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
        bridge.attach("bbbbbbbbbbbbbbbb", file, &[], Bandwidth::default()).await.unwrap_err();
        assert!(matches!(
            bridge.attach("../x", pod.fd(), &[], Bandwidth::default()).await,
            Err(NetworkError::PodId { .. })
        ));
        assert_eq!((links(), rules()), before);
        assert!(stored(dir.path()).is_empty() && bridge.attached().await.is_empty());
        // A second attach is refused and leaves the first alone.
        let pod = Netns::new();
        let got = attach(&bridge, 'a', &pod, &[]).await;
        let again = bridge.attach("aaaaaaaaaaaaaaaa", pod.fd(), &[], Bandwidth::default()).await;
        assert!(matches!(again, Err(NetworkError::Attached { .. })), "{again:?}");
        let address = format!("{}:80", got.ips[0]);
        pod.serve(&address);
        call(&address).unwrap();
    });
}

#[test]
fn reopening_keeps_pods() {
    on_a_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        let pod = Netns::new();
        let first = Bridge::open(&config(&[V4, V6]), dir.path()).await.unwrap();
        attach(&first, 'a', &pod, &[tcp(8080, 80, None)]).await;
        pod.serve("10.77.0.2:80");
        let before = (links(), rules());
        drop(first);
        let second = Bridge::open(&config(&[V4, V6]), dir.path()).await.unwrap();
        assert_eq!((links(), rules()), before);
        second.status().await.unwrap();
        assert_eq!(second.attached().await, ["aaaaaaaaaaaaaaaa"]);
        call("10.77.0.2:80").unwrap();
        call("127.0.0.1:8080").unwrap();
        let other = Netns::new();
        let error = refused(&second, 'b', &other, &[tcp(8080, 80, None)]).await;
        assert!(matches!(error, NetworkError::PortInUse { .. }), "{error}");
        second.detach("aaaaaaaaaaaaaaaa").await.unwrap();
        assert!(!links().contains("stv") && !rules().contains("8080"));
        // After a reboot there are leases, but no links and no table.
        attach(&second, 'b', &other, &[tcp(8080, 80, None)]).await;
        sh("ip link del stvbbbbbbbbbbb; ip link del br-test; nft delete table inet stave-br-test");
        assert!(second.status().await.unwrap_err().to_string().contains("gone"));
        drop(second);
        let third = Bridge::open(&config(&[V4, V6]), dir.path()).await.unwrap();
        third.status().await.unwrap();
        third.detach("bbbbbbbbbbbbbbbb").await.unwrap();
        third.detach("never-attached").await.unwrap();
        assert!(third.attached().await.is_empty());
    });
}

#[test]
fn status_tells_what_is_missing() {
    on_a_host(|| async {
        let (bridge, _dir) = open(&[V4]).await;
        for (break_it, repair, word) in [
            ("ip link set br-test down", "ip link set br-test up", "is down"),
            (
                "echo 0 > /proc/sys/net/ipv4/ip_forward",
                "echo 1 > /proc/sys/net/ipv4/ip_forward",
                "ip_forward",
            ),
            ("ip addr del 10.77.0.1/24 dev br-test", "ip addr add 10.77.0.1/24 dev br-test", "10.77.0.1"),
            ("nft delete table inet stave-br-test", "", "nftables"),
        ] {
            sh(break_it);
            let error = bridge.status().await.unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
            sh(repair);
        }
    });
}

#[test]
fn many_pods_at_once() {
    on_a_host(|| async {
        let dir = tempfile::tempdir().unwrap();
        let bridge = std::sync::Arc::new(Bridge::open(&config(&[V4, V6]), dir.path()).await.unwrap());
        let pods: Vec<Netns> = (0..20).map(|_| Netns::new()).collect();
        let tasks: Vec<_> = pods
            .iter()
            .zip(9000u16..)
            .map(|(pod, port)| {
                let (bridge, fd) = (bridge.clone(), pod.fd());
                tokio::spawn(async move {
                    bridge
                        .attach(
                            &format!("{port}-aaaaaaaaaaaa"),
                            fd,
                            &[tcp(port, 80, None)],
                            Bandwidth { ingress: None, egress: Some(1 << 20) },
                        )
                        .await
                })
            })
            .collect();
        let mut ips = std::collections::BTreeSet::new();
        for task in tasks {
            ips.extend(task.await.unwrap().unwrap().ips);
        }
        assert_eq!(ips.len(), 40);
        // All rules are there, whatever the order in which they were replaced.
        let all = || sh("nft list ruleset");
        for rule in ["dnat ip to", "limit rate"] {
            assert_eq!(all().matches(rule).count(), 20, "{}", all());
        }
        let tasks: Vec<_> = bridge
            .attached()
            .await
            .into_iter()
            .map(|pod| {
                let bridge = bridge.clone();
                tokio::spawn(async move { bridge.detach(&pod).await })
            })
            .collect();
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        assert!(!all().contains("dnat ip to") && !all().contains("limit rate"), "{}", all());
        assert!(!links().contains("stv"));
    });
}

/// The one test in the namespace of this machine, under names of its own.
#[test]
fn in_the_namespace_of_the_machine() {
    struct Cleanup(String);
    impl Drop for Cleanup {
        fn drop(&mut self) {
            let _ = Command::new("ip").args(["link", "del", &self.0]).output();
            let _ =
                Command::new("nft").args(["delete", "table", "inet", &format!("stave-{}", self.0)]).output();
        }
    }
    let pid = std::process::id();
    let name = format!("stvt{pid}");
    let _cleanup = Cleanup(name.clone());
    let subnet = format!("10.{}.{}.0/24", 200 + pid % 50, pid / 50 % 250);
    let config = BridgeConfig { name: name.clone(), subnets: vec![subnet] };
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let bridge = Bridge::open(&config, dir.path()).await.unwrap();
        let pod = Netns::new();
        let got =
            bridge.attach(&format!("{pid}-test-pod"), pod.fd(), &[], Bandwidth::default()).await.unwrap();
        let address = format!("{}:80", got.ips[0]);
        pod.serve(&address);
        call(&address).unwrap();
        bridge.status().await.unwrap();
        bridge.remove_all().await.unwrap();
        assert!(!links().contains(&name));
    });
}
