//! Where the network's configuration comes from, and what the node's status says of it.

use stave_e2e::cri::{NamespaceMode, NetworkConfig, RuntimeConfig, UpdateRuntimeConfigRequest};
use stave_e2e::{Config as _, pod};

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn the_directory_is_followed() {
    let daemon = start().await;
    // It does not exist yet.
    let (ready_now, reason, message) = condition(&daemon).await;
    assert!(!ready_now && reason == "NetworkPluginNotReady", "{reason}: {message}");
    let expected = "Network plugin returns error: cni plugin not initialized: no network configuration in";
    assert!(message.starts_with(expected), "{message}");
    let error = daemon.run_pod(pod("early")).await.expect_err("no network");
    assert!(
        error.code() == tonic::Code::FailedPrecondition && error.message().contains("net.d"),
        "{error:?}"
    );
    // A pod on the node's network needs none.
    let host = pod("host").with(|config| {
        config.namespaces().network = NamespaceMode::Node as i32;
        config.hostname.clear();
    });
    daemon.run_pod(host).await.expect("RunPodSandbox on the node's network");

    recorder(&daemon, "first", "");
    recorder(&daemon, "second", "");
    configure(&daemon, "20-second.conf", r#"{"cniVersion": "0.3.1", "name": "two", "type": "second"}"#);
    ready(&daemon).await;
    daemon.run_pod(pod("a")).await.expect("RunPodSandbox");
    // One before it that can't be used is named, and passed over.
    configure(&daemon, "05-broken.conflist", "{ half a file");
    stave_e2e::eventually("a warning", async || {
        daemon
            .log()
            .lines()
            .any(|line| line.contains("05-broken.conflist") && line.contains("no JSON"))
            .then_some(())
    })
    .await;
    daemon.run_pod(pod("b")).await.expect("RunPodSandbox");
    // One that can be used takes over for new pods; the others are taken off the network that they are on.
    configure(&daemon, "10-first.conflist", &list("1.0.0", &[json!({ "type": "first" })]).to_string());
    stave_e2e::eventually("the other network", async || {
        let log = daemon.log();
        log.lines()
            .any(|line| line.contains("CNI network ") && line.contains("10-first.conflist"))
            .then_some(())
    })
    .await;
    daemon.run_pod(pod("c")).await.expect("RunPodSandbox");
    // The directory is renamed, and comes back.
    let away = daemon.directory().join("net.d1");
    fs::rename(conf_dir(&daemon), &away).expect("rename");
    unready(&daemon, "no network configuration").await;
    fs::rename(&away, conf_dir(&daemon)).expect("rename");
    ready(&daemon).await;
    fs::remove_dir_all(conf_dir(&daemon)).expect("removal");
    unready(&daemon, "no network configuration").await;
    daemon.cri.remove_all().await.expect("DEL needs no configuration");
    let mut calls = short(&calls(&daemon));
    calls.sort();
    let expected = ["ADD first", "ADD second", "ADD second", "DEL first", "DEL second", "DEL second"];
    assert_eq!(calls, expected, "and none for the pod on the node's network");
    assert_nothing_kept(&daemon);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plugins_with_status_are_asked() {
    let daemon = start().await;
    let sick = daemon.directory().join("sick");
    recorder(
        &daemon,
        "main",
        &format!(
            "if [ $CNI_COMMAND = STATUS ] && [ -e {} ]; then echo '{{\"code\": 50, \"msg\": \"the agent is away\"}}'; exit 1; fi",
            sick.display()
        ),
    );
    // The versions are settled: the highest that both sides speak.
    let mut network = list("0.4.0", &[json!({ "type": "main" })]);
    network["cniVersions"] = json!(["0.4.0", "1.1.0", "2.0.0"]);
    configure(&daemon, "10-net.conflist", &network.to_string());
    ready(&daemon).await;
    let pod = daemon.run_pod(pod("pod")).await.expect("RunPodSandbox");
    assert_eq!(calls(&daemon)[0]["input"]["cniVersion"], "1.1.0");
    fs::write(&sick, "").expect("file");
    // What is known is old at some time, and somebody asks.
    let end = std::time::Instant::now() + stave_e2e::limit(20);
    loop {
        let (ready_now, _, message) = condition(&daemon).await;
        if !ready_now {
            assert!(message.contains("the agent is away"), "{message}");
            break;
        }
        assert!(std::time::Instant::now() < end, "STATUS is not asked");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    fs::remove_file(&sick).expect("removal");
    ready(&daemon).await;
    daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_is_made_of_the_template_and_the_nodes_ranges() {
    let daemon = start().await;
    let update = |cidr: &str| {
        let network = NetworkConfig { pod_cidr: cidr.to_owned() };
        let config = RuntimeConfig { network_config: Some(network) };
        daemon.cri.update_runtime_config(UpdateRuntimeConfigRequest { runtime_config: Some(config) })
    };
    let error = update("10.1.0.0/24,nonsense").await.expect_err("no range");
    assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error:?}");
    let template = daemon.directory().join("template");
    fs::write(&template, "{{.Nonsense}}").expect("template");
    let error = update("10.1.0.0/24").await.expect_err("a bad template");
    assert!(error.message().contains("template") && error.message().contains(".Nonsense"), "{error:?}");
    recorder(&daemon, "main", "");
    let text = r#"{"cniVersion": "1.0.0", "name": "made", "plugins": [{"type": "main", "capabilities": {"ipRanges": true},
        "ranges": [{{range $i, $range := .PodCIDRRanges}}{{if $i}}, {{end}}[{"subnet": "{{$range}}"}]{{end}}], "first": "{{.PodCIDR}}"}]}"#;
    fs::write(&template, text).expect("template");
    update("").await.expect("no range is no news");
    assert!(!condition(&daemon).await.0);
    update("10.1.0.0/24,fd00:1::/64").await.expect("UpdateRuntimeConfig");
    ready(&daemon).await;
    let pod = daemon.run_pod(pod("pod")).await.expect("RunPodSandbox");
    let input = calls(&daemon)[0]["input"].clone();
    let ranges = json!([[{ "subnet": "10.1.0.0/24" }], [{ "subnet": "fd00:1::/64" }]]);
    assert_eq!((&input["ranges"], &input["first"]), (&ranges, &json!("10.1.0.0/24")));
    assert_eq!(input["runtimeConfig"], json!({ "ipRanges": ranges }));
    daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
    daemon.finish().await;
}
