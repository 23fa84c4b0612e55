//! The pod CIDR that the kubelet tells.

use stave_e2e::cri::{NetworkConfig, RuntimeConfig, UpdateRuntimeConfigRequest};
use stave_e2e::{Config as _, Daemon, Options, eventually, pod};
use tonic::{Code, Status};

use super::packets::{addresses, answers};
use crate::cni::condition;
use crate::{busybox, sh};

async fn update(daemon: &Daemon, cidr: &str) -> Result<(), Status> {
    let network_config = Some(NetworkConfig { pod_cidr: cidr.to_owned() });
    let request = UpdateRuntimeConfigRequest { runtime_config: Some(RuntimeConfig { network_config }) };
    daemon.cri.update_runtime_config(request).await.map(|_| ())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bridge_takes_the_ranges_that_the_kubelet_tells() {
    let mut daemon = Daemon::with(Options { told_ranges: true, ..Default::default() }).await;
    daemon.cri.pull(&busybox()).await.expect("PullImage");
    let (ready, reason, message) = condition(&daemon).await;
    assert!(!ready && reason == "NetworkPluginNotReady", "{reason}: {message}");
    assert!(
        message.contains("UpdateRuntimeConfig") && message.contains("network.bridge.subnets"),
        "{message}"
    );
    let error = daemon.run_pod(pod("early")).await.expect_err("no network");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");

    let (four, six) = (daemon.subnet(), daemon.subnet6());
    update(&daemon, "").await.expect("no range is no news");
    let error = update(&daemon, &four.replace(".0/24", ".1/24")).await.expect_err("host bits");
    assert!(error.code() == Code::InvalidArgument && error.message().contains("host bits"), "{error:?}");
    assert!(!condition(&daemon).await.0);
    update(&daemon, &format!("{four},{six}")).await.expect("UpdateRuntimeConfig");
    assert!(condition(&daemon).await.0);
    let web = daemon.run_pod(pod("web")).await.expect("RunPodSandbox");
    daemon.run(&web, &sh("server", super::packets::SERVER)).await.expect("start");
    let ips = addresses(&daemon, &web).await;
    assert_eq!(ips.len(), 2, "{ips:?}");
    for ip in &ips {
        answers((*ip, 8080)).await;
    }
    // Told again, as the kubelet does; others wait until the node is drained.
    update(&daemon, &format!("{four},{six}")).await.expect("UpdateRuntimeConfig");
    let smaller = four.replace("/24", "/25");
    let error = update(&daemon, &smaller).await.expect_err("a pod has an address");
    assert!(error.code() == Code::FailedPrecondition && error.message().contains(&web.id), "{error:?}");

    // A daemon that comes after need not be told.
    daemon.kill();
    daemon.restart().await;
    assert!(condition(&daemon).await.0);
    assert_eq!(addresses(&daemon, &web).await, ips);
    for ip in &ips {
        answers((*ip, 8080)).await;
    }
    daemon.cri.remove_pod(&web.id).await.expect("RemovePodSandbox");
    update(&daemon, &smaller).await.expect("UpdateRuntimeConfig");
    let next = daemon.run_pod(pod("next")).await.expect("RunPodSandbox");
    assert_eq!(addresses(&daemon, &next).await.len(), 1);
    daemon.cri.remove_pod(&next.id).await.expect("RemovePodSandbox");
    eventually("nothing of pods", async || {
        let mut entries = std::fs::read_dir(daemon.directory().join("root/network")).ok()?.flatten();
        entries.all(|entry| entry.file_name() == "ranges").then_some(())
    })
    .await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn configured_subnets_are_not_the_kubelets_to_change() {
    let daemon = crate::daemon().await;
    update(&daemon, &daemon.subnet()).await.expect("the same");
    let error = update(&daemon, "10.251.0.0/24").await.expect_err("another");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    assert!(error.message().contains("network.bridge.subnets"), "{error:?}");
    daemon.run_pod(pod("pod")).await.expect("RunPodSandbox");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_pods_had_that_ended_without_a_network_is_free_with_the_next() {
    let mut daemon = Daemon::with(Options { told_ranges: true, ..Default::default() }).await;
    let range = daemon.subnet();
    update(&daemon, &range).await.expect("UpdateRuntimeConfig");
    let config =
        |name: &str| pod(name).with(|config| config.port_mappings = super::packets::ports(39_005, 39_006));
    let first = daemon.run_pod(config("first")).await.expect("RunPodSandbox");
    // Meanwhile the node gets an address in the way.
    daemon.kill();
    let other = format!("{}x", daemon.bridge());
    let ip = |script: String| {
        let status = std::process::Command::new("sh").args(["-ec", &script]).status();
        assert!(status.expect("ip").success(), "{script}");
    };
    let inside = range.replace(".0/24", ".9/30");
    ip(format!("ip link add {other} type bridge; ip addr add {inside} dev {other}"));
    daemon.restart().await;
    let not_ready = condition(&daemon).await;
    daemon.cri.remove_pod(&first.id).await.expect("RemovePodSandbox");
    ip(format!("ip link del {other}"));
    assert!(!not_ready.0 && not_ready.2.contains(&other), "{not_ready:?}");
    update(&daemon, &range).await.expect("UpdateRuntimeConfig");
    eventually("no lease", async || {
        let mut entries = std::fs::read_dir(daemon.directory().join("root/network")).ok()?.flatten();
        entries.all(|entry| entry.file_name() == "ranges").then_some(())
    })
    .await;
    daemon.run_pod(config("second")).await.expect("its host port is free");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bridge_that_could_not_be_set_up_is_set_up_when_it_can_be() {
    let mut daemon = crate::daemon().await;
    let web = daemon.run_pod(pod("web")).await.expect("RunPodSandbox");
    let gone = daemon.run_pod(pod("gone")).await.expect("RunPodSandbox");
    daemon.run(&web, &sh("server", super::packets::SERVER)).await.expect("start");
    let ips = addresses(&daemon, &web).await;
    daemon.kill();
    let other = format!("{}x", daemon.bridge());
    let ip = |script: String| {
        let status = std::process::Command::new("sh").args(["-ec", &script]).status();
        assert!(status.expect("ip").success(), "{script}");
    };
    let inside = daemon.subnet().replace(".0/24", ".253/32");
    ip(format!("ip link add {other} type bridge; ip addr add {inside} dev {other}"));
    daemon.restart().await;
    let not_ready = condition(&daemon).await;
    let error = daemon.run_pod(pod("early")).await.map(|pod| pod.id);
    daemon.cri.remove_pod(&gone.id).await.expect("RemovePodSandbox");
    ip(format!("ip link del {other}"));
    assert!(!not_ready.0 && not_ready.2.contains(&other), "{not_ready:?}");
    assert_eq!(error.expect_err("no network").code(), Code::FailedPrecondition);
    eventually("the network", async || condition(&daemon).await.0.then_some(())).await;
    answers((ips[0], 8080)).await;
    let next = daemon.run_pod(pod("next")).await.expect("RunPodSandbox");
    assert_ne!(addresses(&daemon, &next).await, ips);
    eventually("two leases", async || {
        let entries = std::fs::read_dir(daemon.directory().join("root/network")).ok()?;
        (entries.count() == 2).then_some(())
    })
    .await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_ranges_comes_to_its_end_without_the_kubelet() {
    let daemon = Daemon::with(Options { told_ranges: true, ..Default::default() }).await;
    let daemon = std::sync::Arc::new(daemon);
    let whole = daemon.subnet();
    let parts = [whole.clone(), whole.replace("/24", "/25")];
    update(&daemon, &whole).await.expect("UpdateRuntimeConfig");
    for turn in 1..40 {
        let (changing, range) = (daemon.clone(), parts[turn % 2].clone());
        let request = tokio::spawn(async move { update(&changing, &range).await });
        // Wherever it is by then.
        tokio::time::sleep(std::time::Duration::from_micros(500 * turn as u64)).await;
        request.abort();
        let _ = request.await;
        eventually("the network", async || condition(&daemon).await.0.then_some(())).await;
    }
    std::sync::Arc::into_inner(daemon).expect("the last owner").finish().await;
}
