//! Chains, arguments, and what outlives the daemon, the supervisor and the node.

use std::time::{Duration, Instant};

use stave_e2e::cri::{DnsConfig, PortMapping};
use stave_e2e::{Config as _, pod};

use super::*;

fn two() -> Value {
    let capabilities = json!({ "portMappings": true, "dns": true, "io.kubernetes.cri.pod-annotations": true, "bandwidth": false });
    list(
        "1.1.0",
        &[json!({ "type": "first" }), json!({ "type": "second", "capabilities": capabilities, "mine": 7 })],
    )
}

async fn chain() -> Daemon {
    let daemon = start().await;
    recorder(&daemon, "first", "");
    recorder(&daemon, "second", "");
    configure(&daemon, "10-two.conflist", &two().to_string());
    ready(&daemon).await;
    daemon
}

/// Without those that come by themselves after a restart.
fn asked_for(daemon: &Daemon) -> Vec<Value> {
    calls(daemon).into_iter().filter(|call| call["command"] != "CHECK" && call["command"] != "GC").collect()
}

fn kill_supervisor(id: &str) {
    let found = std::process::Command::new("pgrep").args(["-f", &format!("^stave-pod --id {id}")]).output();
    let found = String::from_utf8_lossy(&found.expect("pgrep").stdout).into_owned();
    assert!(!found.is_empty(), "no supervisor");
    for pid in found.lines() {
        let pid = nix::unistd::Pid::from_raw(pid.parse().expect("a pid"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("SIGKILL");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn plugins_of_a_chain_get_what_the_specification_says() {
    let daemon = chain().await;
    let config = pod("web").with(|config| {
        config.port_mappings = vec![
            PortMapping {
                container_port: 80,
                host_port: 1234,
                host_ip: "127.0.0.1".into(),
                ..Default::default()
            },
            PortMapping { container_port: 81, ..Default::default() },
        ];
        config.dns_config = Some(DnsConfig { servers: vec!["10.0.0.10".into()], ..Default::default() });
        config.annotations.insert("kubernetes.io/ingress-bandwidth".into(), "1M".into());
    });
    let web = daemon.run_pod(config.clone()).await.expect("RunPodSandbox");
    assert_eq!(addresses(&daemon, &web).await, ["10.9.9.9"]);
    daemon.cri.stop_pod(&web.id).await.expect("StopPodSandbox");
    daemon.cri.stop_pod(&web.id).await.expect("StopPodSandbox again");
    let calls = asked_for(&daemon);
    assert_eq!(short(&calls), ["ADD first", "ADD second", "DEL second", "DEL first"]);
    let metadata = config.metadata.clone().expect("metadata");
    let args = format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=stave-e2e;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
        web.id, metadata.uid
    );
    let netns = daemon.directory().join(format!("netns/stave-{}", web.id));
    for call in &calls {
        assert_eq!(
            (call["args"].as_str(), call["id"].as_str()),
            (Some(args.as_str()), Some(web.id.as_str()))
        );
        assert_eq!(call["netns"].as_str(), netns.to_str());
        assert_eq!(call["input"]["cniVersion"], "1.1.0");
        assert!(call["input"].get("capabilities").is_none());
    }
    let [add_first, add_second, del_second, del_first] = &calls[..] else { panic!("{calls:?}") };
    assert!(
        add_first["input"].get("prevResult").is_none() && add_first["input"].get("runtimeConfig").is_none()
    );
    let result = &add_second["input"]["prevResult"];
    assert_eq!(
        (&result["cniVersion"], &result["ips"][0]["address"]),
        (&json!("1.1.0"), &json!("10.9.9.9/24"))
    );
    for del in [del_second, del_first] {
        assert_eq!(&del["input"]["prevResult"], result);
    }
    let given = json!({
        "portMappings": [{ "hostPort": 1234, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1" }],
        "dns": { "servers": ["10.0.0.10"], "searches": [], "options": [] },
        "io.kubernetes.cri.pod-annotations": { "kubernetes.io/ingress-bandwidth": "1M" },
    });
    assert_eq!(add_second["input"]["runtimeConfig"], given);
    assert_eq!(del_second["input"]["runtimeConfig"], given);
    assert_eq!(add_second["input"]["mine"], 7);
    assert_nothing_kept(&daemon);
    for bad in ["fast", "10"] {
        let bad = pod("bad").with(|config| {
            config.annotations.insert("kubernetes.io/egress-bandwidth".into(), bad.into());
        });
        let error = daemon.run_pod(bad).await.expect_err("no bandwidth");
        assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error:?}");
    }
    assert_eq!(asked_for(&daemon).len(), 4, "bad input reaches no plugin");
    daemon.finish().await;
}

/// With a ready supervisor, whose namespace the plugins get before it is the pod's, and without.
#[tokio::test(flavor = "multi_thread")]
async fn plugins_find_the_pods_sysctls_and_may_write_others() {
    let daemon = start().await;
    let seen = daemon.directory().join("seen");
    let script = format!(
        "[ \"$CNI_COMMAND\" != ADD ] || nsenter --net=\"$CNI_NETNS\" sh -c '\n\
           cd /proc/sys/net/ipv4; cat ip_unprivileged_port_start ping_group_range ip_local_port_range >{seen}\n\
           echo 7 >ip_unprivileged_port_start; echo 7 9 >ping_group_range'",
        seen = seen.display()
    );
    recorder(&daemon, "tuner", &script);
    configure(&daemon, "10-net.conflist", &list("1.0.0", &[json!({ "type": "tuner" })]).to_string());
    ready(&daemon).await;
    let numbers = |text: String| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ");
    for (name, own, expected) in [
        ("default", vec![], "0 0 2147483647 32768 60999"),
        ("range", vec![("net.ipv4.ip_local_port_range", "4000 5000")], "0 0 2147483647 4000 5000"),
        ("port", vec![("net.ipv4.ip_unprivileged_port_start", "99")], "99 0 2147483647 32768 60999"),
        ("memory", vec![("kernel.shm_rmid_forced", "1")], "0 0 2147483647 32768 60999"),
    ] {
        let before = crate::ready::full(&daemon, 2).await.used;
        let config = pod(name).with(|config| {
            let sysctls = own.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
            config.linux.get_or_insert_default().sysctls = sysctls;
        });
        let made = daemon.run_pod(config).await.expect("RunPodSandbox");
        assert_eq!(crate::ready::full(&daemon, 2).await.used, before + 1, "{name}");
        assert_eq!(numbers(fs::read_to_string(&seen).expect("what the plugin saw")), expected, "{name}");
        let container = daemon.run(&made, &crate::sleeper("main")).await.expect("start");
        let now = daemon
            .cri
            .shell(&container, "cd /proc/sys/net/ipv4; cat ip_unprivileged_port_start ping_group_range")
            .await;
        assert_eq!(numbers(now), "7 7 9", "{name}: the plugin is the last");
        daemon.cri.remove_pod(&made.id).await.expect("RemovePodSandbox");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_chain_is_taken_down() {
    let daemon = chain().await;
    recorder(
        &daemon,
        "second",
        "if [ $CNI_COMMAND = ADD ]; then echo '{\"code\": 11, \"msg\": \"later\"}'; exit 1; fi",
    );
    let error = daemon.run_pod(pod("pod")).await.expect_err("ADD fails");
    assert!(error.message().contains("plugin type=\"second\" failed (ADD): later"), "{error:?}");
    assert!(error.message().starts_with("attaching to the network"), "{error:?}");
    assert_eq!(short(&asked_for(&daemon)), ["ADD first", "DEL second", "DEL first"]);
    assert_nothing_kept(&daemon);
    assert!(daemon.cri.pods(None).await.expect("ListPodSandbox").is_empty());
    // DEL that fails is told, and comes again with StopPodSandbox.
    recorder(&daemon, "second", "");
    let running = daemon.run_pod(pod("pod")).await.expect("RunPodSandbox");
    recorder(&daemon, "second", "[ $CNI_COMMAND != DEL ] || exit 1");
    let error = daemon.cri.stop_pod(&running.id).await.expect_err("DEL fails");
    assert!(error.message().contains("plugin type=\"second\" failed (DEL)"), "{error:?}");
    assert_eq!(short(&asked_for(&daemon))[3..], ["ADD first", "ADD second", "DEL first"], "the others go on");
    recorder(&daemon, "second", "");
    daemon.cri.remove_pod(&running.id).await.expect("RemovePodSandbox");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_daemon_needs_neither_the_file_nor_the_old_one() {
    let mut daemon = chain().await;
    let stays = daemon.run_pod(pod("stays")).await.expect("RunPodSandbox");
    let goes = daemon.run_pod(pod("goes")).await.expect("RunPodSandbox");
    daemon.kill();
    fs::remove_dir_all(daemon.directory().join("calls")).expect("removal");
    fs::create_dir(daemon.directory().join("calls")).expect("directory of calls");
    daemon.restart().await;
    // Garbage is collected, and what is there is checked, by the way.
    let valid =
        json!([{ "containerID": stays.id, "ifname": "eth0" }, { "containerID": goes.id, "ifname": "eth0" }]);
    stave_e2e::eventually("GC and CHECK", async || {
        let calls = calls(&daemon);
        let of = |command: &str| {
            calls.iter().filter(|call| call["command"] == command).cloned().collect::<Vec<_>>()
        };
        let (gc, check) = (of("GC"), of("CHECK"));
        if gc.len() < 2 || check.len() < 4 {
            return None;
        }
        let mut told = gc[0]["input"]["cni.dev/valid-attachments"].as_array().expect("attachments").clone();
        told.sort_by_key(|entry| entry["containerID"] != stays.id.as_str());
        assert_eq!(Value::from(told), valid);
        assert_eq!((gc.len(), check.len()), (2, 4), "once");
        assert_eq!(check[0]["input"]["prevResult"]["ips"][0]["address"], "10.9.9.9/24");
        Some(())
    })
    .await;
    daemon.kill();
    fs::remove_dir_all(conf_dir(&daemon)).expect("removal");
    daemon.restart().await;
    assert_eq!(addresses(&daemon, &stays).await, ["10.9.9.9"]);
    // Nor does DEL need the supervisor: the namespace is still there.
    kill_supervisor(&goes.id);
    stave_e2e::eventually("the pod's end", async || {
        let status = daemon.cri.pod(&goes.id).await.expect("PodSandboxStatus");
        (status.state() == stave_e2e::cri::PodSandboxState::SandboxNotready).then_some(())
    })
    .await;
    daemon.cri.remove_all().await.expect("removal of all pods");
    let dels: Vec<_> = calls(&daemon).into_iter().filter(|call| call["command"] == "DEL").collect();
    assert_eq!(dels.len(), 4, "{dels:?}");
    assert!(dels.iter().all(|del| del["netns"] != ""), "{dels:?}");
    assert_nothing_kept(&daemon);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_that_fails_is_told_and_changes_nothing() {
    let mut daemon = chain().await;
    let pod = daemon.run_pod(pod("pod")).await.expect("RunPodSandbox");
    let fails =
        "[ $CNI_COMMAND != CHECK ] || { echo '{\"msg\": \"eth0 is gone\"}'; echo really >&2; exit 1; }";
    recorder(&daemon, "first", fails);
    daemon.kill();
    daemon.restart().await;
    stave_e2e::eventually("a warning", async || {
        let words = [&pod.id, "type=\"first\" failed (CHECK)", "eth0 is gone; standard error: really"];
        let log = daemon.log();
        log.lines().any(|line| words.iter().all(|word| line.contains(word))).then_some(())
    })
    .await;
    let status = daemon.cri.pod(&pod.id).await.expect("PodSandboxStatus");
    assert_eq!(status.state(), stave_e2e::cri::PodSandboxState::SandboxReady);
    assert_eq!(addresses(&daemon, &pod).await, ["10.9.9.9"]);
    assert!(condition(&daemon).await.0, "the node is none the worse for it");
    assert_eq!(short(&asked_for(&daemon)), ["ADD first", "ADD second"]);
    daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
    assert_nothing_kept(&daemon);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_reboot_pods_go_without_their_namespace() {
    let mut daemon = chain().await;
    let pod = daemon.run_pod(pod("pod")).await.expect("RunPodSandbox");
    let other = daemon.run_pod(stave_e2e::pod("other")).await.expect("RunPodSandbox");
    let netns = |id: &str| daemon.directory().join(format!("netns/stave-{id}"));
    let paths = [netns(&pod.id), netns(&other.id)];
    daemon.kill();
    // A reboot: no process, no mount, no file of the state directory.
    let state = daemon.directory().join("state");
    for id in [&pod.id, &other.id] {
        let socket = state.join("pods").join(id).join("supervisor.sock");
        kill_supervisor(id);
        assert!(socket.exists());
        nix::mount::umount2(&state.join("pods").join(id).join("shm"), nix::mount::MntFlags::MNT_DETACH)
            .expect("umount");
    }
    for path in &paths {
        nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH).expect("umount");
        fs::remove_file(path).expect("removal");
    }
    fs::remove_dir_all(&state).expect("removal");
    // One record was in the page cache only: half of it is there.
    fs::write(
        daemon.directory().join("root/network/cni").join(format!("{}.json", other.id)),
        "{\"pod_id\": ",
    )
    .expect("write");
    // And one of the plugins can do nothing without the namespace.
    recorder(
        &daemon,
        "second",
        "if [ $CNI_COMMAND = DEL ]; then [ -n \"$CNI_NETNS\" ] || echo fails >> $0.log; fi",
    );
    daemon.restart().await;
    daemon.cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
    daemon.cri.stop_pod(&other.id).await.expect("StopPodSandbox");
    let calls = calls(&daemon);
    for id in [&pod.id, &other.id] {
        let dels: Vec<_> = calls
            .iter()
            .filter(|call| call["command"] == "DEL" && call["id"] == id.as_str())
            .cloned()
            .collect();
        assert_eq!(short(&dels), ["DEL second", "DEL first"]);
        for del in dels {
            assert_eq!(del["netns"], "");
            assert!(del["args"].as_str().expect("args").contains("K8S_POD_NAME="), "{del}");
            assert_eq!(del["input"].get("prevResult").is_some(), *id == pod.id, "unreadable means absent");
        }
    }
    daemon.cri.remove_all().await.expect("removal of all pods");
    assert_nothing_kept(&daemon);
    let _ = fs::remove_dir_all(daemon.directory().join("root/network/cni/.broken"));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_a_dead_daemon_started_is_waited_for() {
    let mut daemon = start().await;
    let started = daemon.directory().join("started");
    recorder(
        &daemon,
        "slow",
        &format!("if [ $CNI_COMMAND = ADD ]; then touch {}; sleep 2; fi", started.display()),
    );
    configure(&daemon, "10-net.conflist", &list("1.0.0", &[json!({ "type": "slow" })]).to_string());
    ready(&daemon).await;
    let cri = daemon.cri.clone();
    let config = daemon.with_log_directory(pod("pod"));
    let request = tokio::spawn(async move { cri.run_pod(&config).await });
    stave_e2e::eventually("the plugin", async || started.exists().then_some(())).await;
    let began = Instant::now();
    daemon.kill();
    assert!(request.await.expect("task").is_err());
    daemon.restart().await;
    stave_e2e::eventually("DEL", async || calls(&daemon).iter().any(|c| c["command"] == "DEL").then_some(()))
        .await;
    // The times are those of the ends, but for the name of the file.
    assert!(began.elapsed() > Duration::from_millis(1500), "{:?}", began.elapsed());
    let calls = calls(&daemon);
    assert!(calls.iter().any(|call| call["command"] == "ADD"), "it came to its end before DEL: {calls:?}");
    stave_e2e::eventually("nothing is left", async || {
        fs::read_dir(daemon.directory().join("root/network/cni")).ok()?.next().is_none().then_some(())
    })
    .await;
    assert_nothing_kept(&daemon);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plugins_that_hang_do_not_keep_a_new_daemon_from_serving() {
    let mut daemon = start().await;
    let names = ["one", "two", "three"];
    let plugins: Vec<_> = names.iter().map(|name| json!({ "type": name })).collect();
    names.iter().for_each(|name| recorder(&daemon, name, ""));
    configure(&daemon, "10-net.conflist", &list("1.0.0", &plugins).to_string());
    ready(&daemon).await;
    let pod = daemon.run_pod(pod("pod")).await.expect("RunPodSandbox");
    daemon.kill();
    kill_supervisor(&pod.id);
    // As after a reboot, when what plugins ask is not there yet: it may be a pod of this node.
    nix::mount::umount2(
        &daemon.directory().join("state/pods").join(&pod.id).join("shm"),
        nix::mount::MntFlags::MNT_DETACH,
    )
    .expect("umount");
    fs::remove_dir_all(daemon.directory().join("state")).expect("removal");
    names.iter().for_each(|name| recorder(&daemon, name, "[ $CNI_COMMAND != DEL ] || sleep 60"));
    let began = Instant::now();
    daemon.restart().await;
    assert!(began.elapsed() < stave_e2e::limit(10), "each has 5 s: {:?}", began.elapsed());
    let status = daemon.cri.pod(&pod.id).await.expect("PodSandboxStatus");
    assert_eq!(status.state(), stave_e2e::cri::PodSandboxState::SandboxNotready);
    // DEL is under way: this waits for it, and does not run it again.
    names.iter().for_each(|name| recorder(&daemon, name, ""));
    daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
    assert_nothing_kept(&daemon);
    daemon.finish().await;
}
