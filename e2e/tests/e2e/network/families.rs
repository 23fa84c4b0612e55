//! IPv4 and IPv6, TCP and UDP, to the pod and from it, on the built-in bridge; and what a daemon's end does to that: nothing.

use std::net::IpAddr;
use std::path::PathBuf;

use stave_e2e::cri::PortMapping;
use stave_e2e::{Config as _, Daemon, Options, pod};

use super::packets::*;
use crate::container_anatomy::host_pid;
use crate::{busybox, sh, sleeper};

async fn start() -> Daemon {
    let daemon = Daemon::with(Options { dual_stack: true, ..Default::default() }).await;
    daemon.cri.pull(&busybox()).await.expect("PullImage");
    daemon
}

fn gateways(daemon: &Daemon) -> [IpAddr; 2] {
    let first = |subnet: String| -> IpAddr {
        let (network, _) = subnet.split_once('/').expect("a subnet");
        let text =
            network.strip_suffix(".0").map_or_else(|| format!("{network}1"), |start| format!("{start}.1"));
        text.parse().expect("an address")
    };
    [first(daemon.subnet()), first(daemon.subnet6())]
}

#[tokio::test(flavor = "multi_thread")]
async fn packets_of_both_families_go_both_ways() {
    let daemon = start().await;
    let (tcp, udp) = (free_port(), free_port());
    let web = daemon.run_pod(pod("web").with(|config| config.port_mappings = ports(tcp, udp))).await;
    let web = web.expect("RunPodSandbox");
    let other = daemon.run_pod(pod("other")).await.expect("RunPodSandbox");
    let (ips, others) = (addresses(&daemon, &web).await, addresses(&daemon, &other).await);
    assert!(ips.len() == 2 && ips[0].is_ipv4() && ips[1].is_ipv6(), "{ips:?}");
    let server = daemon.run(&web, &sh("server", SERVER)).await.expect("start");
    let client = daemon.run(&other, &sleeper("client")).await.expect("start");
    let gateways = gateways(&daemon);
    let localhost = IpAddr::from([127, 0, 0, 1]);

    // TCP: the node, another pod, and the pod itself; to the pod's addresses and to its host port at the node's.
    for ip in &ips {
        answers((*ip, 8080)).await;
        answers_in(&daemon, &client, *ip, 8080).await;
    }
    for ip in [gateways[0], gateways[1], localhost] {
        answers((ip, tcp)).await;
    }
    for ip in gateways {
        answers_in(&daemon, &client, ip, tcp).await;
        answers_in(&daemon, &server, ip, tcp).await;
    }
    // UDP: the same, and from the pod to the node.
    let netns = |pid: u32| PathBuf::from(format!("/proc/{pid}/ns/net"));
    let (inside, beside) = (netns(host_pid(&daemon, &server).await), netns(host_pid(&daemon, &client).await));
    let served = udp_in(inside.clone(), "[::]:53");
    for to in [ips[0], ips[1]] {
        there_and_back(&udp_to(to).await, (to, 53).into(), &served).await;
    }
    for to in [gateways[0], gateways[1], localhost] {
        there_and_back(&udp_to(to).await, (to, udp).into(), &served).await;
    }
    for (n, to) in gateways.into_iter().enumerate() {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let from = there_and_back(&udp_in(beside.clone(), any), (ips[n], 53).into(), &served).await;
        assert_eq!(from, others[n], "pods see each other's addresses");
        there_and_back(&udp_in(beside.clone(), any), (to, udp).into(), &served).await;
        let node = tokio::net::UdpSocket::bind((to, 0)).await.expect("a UDP port of the node");
        let at = node.local_addr().expect("address");
        assert_eq!(there_and_back(&udp_in(inside.clone(), any), at, &node).await, ips[n]);
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_with_a_user_namespace() {
    let daemon = start().await;
    a_user_namespace_and_a_network(&daemon, gateways(&daemon)).await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_and_rules_are_reconciled_at_the_start() {
    let mut daemon = start().await;
    let (tcp, udp) = (free_port(), free_port());
    let web = daemon.run_pod(pod("web").with(|config| config.port_mappings = ports(tcp, udp))).await;
    let web = web.expect("RunPodSandbox");
    let ips = addresses(&daemon, &web).await;
    daemon.run(&web, &sh("server", SERVER)).await.expect("start");
    let gateways = gateways(&daemon);
    answers((gateways[0], tcp)).await;

    // While there is no daemon, packets go on.
    daemon.kill();
    for ip in gateways {
        answers((ip, tcp)).await;
    }
    // Somebody takes the rules away; and there are the lease of a pod that never was, and the interface of another.
    let table = format!("stave-{}", daemon.bridge());
    let nft = std::process::Command::new("nft").args(["delete", "table", "inet", &table]).status();
    assert!(nft.expect("nft").success());
    let stray = format!("{:064x}", 7);
    let lease = serde_json::json!({
        "pod_id": stray, "link": "stv00000000000", "ips": [daemon.subnet().replace(".0/24", ".77")],
        "ports": [{ "protocol": "tcp", "container_port": 1, "host_port": 1, "host_ip": "192.0.2.1" }],
    });
    let leases = daemon.directory().join("root/network");
    std::fs::write(leases.join(format!("{stray}.json")), lease.to_string()).expect("lease");
    daemon.restart().await;
    for ip in [gateways[0], gateways[1], IpAddr::from([127, 0, 0, 1])] {
        answers((ip, tcp)).await;
    }
    assert_eq!(addresses(&daemon, &web).await, ips);
    let names = || std::fs::read_dir(&leases).expect("leases").flatten().map(|entry| entry.file_name());
    stave_e2e::eventually("one lease", async || {
        let names: Vec<_> = names().collect();
        (names == [format!("{}.json", web.id).as_str()]).then_some(())
    })
    .await;
    let rules =
        std::process::Command::new("nft").args(["list", "table", "inet", &table]).output().expect("nft");
    assert!(!String::from_utf8_lossy(&rules.stdout).contains("192.0.2.1"));

    // A lease that can't be read: what the pod has stays its own.
    daemon.kill();
    std::fs::write(leases.join(format!("{}.json", web.id)), "{").expect("rubbish");
    daemon.restart().await;
    std::fs::remove_dir_all(leases.join(".broken")).expect("it was set aside");
    for ip in [gateways[0], gateways[1], IpAddr::from([127, 0, 0, 1])] {
        answers((ip, tcp)).await;
    }
    let other = daemon.run_pod(pod("other")).await.expect("RunPodSandbox");
    let others = addresses(&daemon, &other).await;
    assert!(ips.iter().all(|ip| !others.contains(ip)), "{ips:?} and {others:?}");
    daemon.cri.remove_pod(&other.id).await.expect("RemovePodSandbox");

    // The port is still this pod's; another is told whose, and leaves nothing.
    let twice = pod("twice").with(|config| config.port_mappings = ports(tcp, udp));
    let error = daemon.run_pod(twice).await.expect_err("the port is taken");
    assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error:?}");
    assert!(
        error.message().contains(&web.id) && error.message().contains(&format!("{tcp}/tcp")),
        "{error:?}"
    );
    // What can't be, is refused by name.
    for (ip, word) in [("::1", "::1"), ("224.0.0.1", "multicast"), ("fast", "host_ip")] {
        let bad = pod("bad").with(|config| {
            config.port_mappings = vec![PortMapping {
                container_port: 1,
                host_port: 2,
                host_ip: ip.into(),
                ..Default::default()
            }];
        });
        let error = daemon.run_pod(bad).await.expect_err("no such host port");
        assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error:?}");
        assert!(error.message().contains("port_mappings") && error.message().contains(word), "{error:?}");
    }
    assert_eq!(daemon.cri.pods(None).await.expect("ListPodSandbox").len(), 1);
    assert_eq!(names().count(), 1);
    daemon.finish().await;
}
