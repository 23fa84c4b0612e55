//! Plugins that fail in all the ways that programs can.

use std::time::Instant;

use stave_e2e::{limit, pod};
use tonic::Code;

use super::*;

/// Runs a pod on a network of this one plugin, which fails in ADD, and gives the error.
async fn failing(daemon: &Daemon, name: &str, script: &str) -> tonic::Status {
    plugin(daemon, name, script);
    configure(daemon, "10-net.conflist", &list("1.0.0", &[json!({ "type": name })]).to_string());
    // The one before may still be in use.
    stave_e2e::eventually("the configuration", async || {
        let request = stave_e2e::cri::StatusRequest { verbose: true };
        let info = daemon.cri.status(request).await.expect("Status").info;
        info["cniconfig"].contains(&format!("\"{name}\"")).then_some(())
    })
    .await;
    let error = daemon.run_pod(pod(name)).await.expect_err("the plugin fails");
    assert!(daemon.cri.pods(None).await.expect("ListPodSandbox").is_empty(), "{name}: a pod is left");
    assert_nothing_kept(daemon);
    error
}

/// What a plugin answers to VERSION, and DEL.
const OTHERWISE: &str = "case $CNI_COMMAND in\n\
    VERSION) echo '{\"cniVersion\": \"1.0.0\", \"supportedVersions\": [\"1.0.0\"]}'; exit ;;\n\
    DEL) exit ;;\n\
    esac\n";

#[tokio::test(flavor = "multi_thread")]
async fn no_failure_leaves_a_half_made_pod() {
    let daemon = start().await;
    let cases = [
        ("rubbish", "echo Segmentation fault; echo because >&2", "no JSON"),
        ("silent", "echo because >&2", "printed nothing"),
        ("empty-object", "echo '{}'; echo because >&2", "no address"),
        ("bad-address", "echo '{\"ips\": [{\"address\": \"10.0.0.300/8\"}]}'", "ips[0].address"),
        (
            "of-the-host",
            "echo '{\"interfaces\": [{\"name\": \"veth\"}], \"ips\": [{\"address\": \"10.0.0.3/8\", \"interface\": 0}]}'",
            "no address",
        ),
        ("text", "echo panic: at the disco; echo because >&2; exit 2", "panic: at the disco"),
        ("stderr", "echo because >&2; exit 1", "because"),
        (
            "error",
            "echo '{\"code\": 7, \"msg\": \"invalid\", \"details\": \"network configuration\"}'; exit 1",
            "invalid; network configuration",
        ),
        ("flood", "echo because >&2; yes", "more than 1048576 bytes"),
        ("deaf", "exec <&-; exit 3", "exit status: 3"),
    ];
    for (name, script, words) in cases {
        let error = failing(&daemon, name, &format!("{OTHERWISE}{script}")).await;
        assert!(error.message().contains(words), "{name}: {error:?}");
        assert!(
            error.message().contains(&format!("type=\"{name}\"")) || words == "no address",
            "{name}: {error:?}"
        );
        let told = error.message().contains("standard error: because");
        assert_eq!(told, script.contains(">&2"), "{name}: {error:?}");
    }
    // One that fails in all it does, too: nobody knows the pod, so nobody could ask again.
    let error = failing(&daemon, "never", "echo no; exit 1").await;
    assert!(error.message().contains("type=\"never\" failed (ADD)"), "{error:?}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_hangs_is_killed_after_its_time() {
    let drop_in = "[network.cni]\ntimeout = 5\n".to_owned();
    let daemon = start_with(Options { drop_in, ..Default::default() }).await;
    let began = Instant::now();
    // So long that nobody else sleeps.
    let seconds = 98_000_000 + std::process::id();
    let error = failing(&daemon, "hang", &format!("{OTHERWISE}sleep {seconds} & wait")).await;
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
    assert!(error.message().contains("did not end within 5s"), "{error:?}");
    assert!(began.elapsed() < limit(12), "{:?}", began.elapsed());
    stave_e2e::eventually("the end of its child", async || {
        let pattern = format!("^sleep {seconds}$");
        let left = std::process::Command::new("pgrep").args(["-f", &pattern]).output().expect("pgrep");
        left.stdout.is_empty().then_some(())
    })
    .await;
    // Requests for pods without it go on meanwhile, and one in the background holds up nobody.
    let script = format!("{OTHERWISE}sleep 20 & echo '{{\"ips\": [{{\"address\": \"10.9.9.9/24\"}}]}}'");
    plugin(&daemon, "background", &script);
    configure(&daemon, "10-net.conflist", &list("1.0.0", &[json!({ "type": "background" })]).to_string());
    stave_e2e::eventually("the configuration", async || {
        let began = Instant::now();
        let pod = daemon.run_pod(pod("quick")).await.ok()?;
        assert!(began.elapsed() < limit(5), "{:?}", began.elapsed());
        daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
        Some(())
    })
    .await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_run_is_told_by_status_and_by_name() {
    let daemon = start().await;
    configure(&daemon, "10-net.conflist", &list("1.0.0", &[json!({ "type": "nowhere" })]).to_string());
    unready(&daemon, "plugin type=\"nowhere\": not found in").await;
    let error = daemon.run_pod(pod("pod")).await.expect_err("no plugin");
    assert!(error.code() == Code::FailedPrecondition && error.message().contains("nowhere"), "{error:?}");
    // Here it is.
    recorder(&daemon, "nowhere", "");
    ready(&daemon).await;
    let running = daemon.run_pod(pod("pod")).await.expect("RunPodSandbox");
    // Gone again, the pod can't be taken off its network, and says why until it can.
    let path = daemon.directory().join("plugins/nowhere");
    fs::rename(&path, daemon.directory().join("away")).expect("rename");
    for _ in 0..2 {
        let error = daemon.cri.stop_pod(&running.id).await.expect_err("DEL can't be run");
        assert!(error.message().contains("plugin type=\"nowhere\": not found"), "{error:?}");
    }
    fs::rename(daemon.directory().join("away"), &path).expect("rename");
    daemon.cri.stop_pod(&running.id).await.expect("StopPodSandbox");
    assert_eq!(short(&calls(&daemon)), ["ADD nowhere", "DEL nowhere"]);
    // No path is a type: neither a plugin's nor that of its address management.
    for (kind, ipam) in [("../plugins/nowhere", "x"), ("/bin/sh", "x"), ("nowhere", "../../bin/sh")] {
        let network = list("1.0.0", &[json!({ "type": kind, "ipam": { "type": ipam } })]);
        configure(&daemon, "10-net.conflist", &network.to_string());
        unready(&daemon, "10-net.conflist").await;
        let error = daemon.run_pod(pod("pod")).await.expect_err("no configuration");
        assert!(error.message().contains("type"), "{error:?}");
    }
    // Debian's bridge, which runs another program for the address.
    let network = json!({ "type": "bridge", "bridge": "unmade", "ipam": { "type": "not-here-yet" } });
    configure(&daemon, "10-net.conflist", &list("1.0.0", &[network]).to_string());
    unready(&daemon, "plugin type=\"not-here-yet\": not found in").await;
    let error = daemon.run_pod(pod("pod")).await.expect_err("no address management");
    assert!(error.message().contains("not-here-yet"), "{error:?}");
    plugin(&daemon, "not-here-yet", "exit 1");
    ready(&daemon).await;
    // A version that the plugin does not speak.
    plugin(&daemon, "old", "echo '{\"cniVersion\": \"0.3.1\", \"supportedVersions\": [\"0.3.1\"]}'");
    configure(&daemon, "10-net.conflist", &list("1.0.0", &[json!({ "type": "old" })]).to_string());
    unready(&daemon, "speaks CNI 0.3.1").await;
    daemon.finish().await;
}
