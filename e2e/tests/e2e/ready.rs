//! The pool of ready supervisors: used once each, filled again, and gone with the daemon.

use std::fs;
use std::process::Command;

use nix::sys::signal::Signal;
use stave_e2e::cri::{NamespaceMode, StatusRequest};
use stave_e2e::{Config, Daemon, Options, eventually, pod};

use crate::{busybox, sleeper};

async fn daemon(ready: usize) -> Daemon {
    daemon_with(ready, Options::default()).await
}

async fn daemon_with(ready: usize, options: Options) -> Daemon {
    let options = Options { config: format!("\n[pods]\nready = {ready}\n"), ..options };
    let daemon = Daemon::with(options).await;
    daemon.cri.pull(&busybox()).await.expect("PullImage");
    daemon
}

#[derive(Debug, PartialEq)]
pub(crate) struct Pool {
    pub(crate) ready: u64,
    pub(crate) used: u64,
    pub(crate) missed: u64,
}

async fn pool(daemon: &Daemon) -> Pool {
    let status = daemon.cri.status(StatusRequest { verbose: true }).await.expect("Status");
    let value: serde_json::Value = serde_json::from_str(&status.info["ready_supervisors"]).expect("JSON");
    let number = |key: &str| value[key].as_u64().expect(key);
    Pool { ready: number("ready"), used: number("used"), missed: number("missed") }
}

pub(crate) async fn full(daemon: &Daemon, count: u64) -> Pool {
    eventually("a full pool", async || Some(pool(daemon).await).filter(|pool| pool.ready == count)).await
}

/// The daemon's children that wait for a pod.
pub(crate) fn waiting(daemon: u32) -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap_or_default();
        parent.trim() == daemon.to_string() && command.starts_with(b"stave-pod\0--ready\0")
    })
    .collect()
}

pub(crate) fn kill(pid: u32, signal: Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal).expect("kill");
}

pub(crate) fn exists(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

/// Interfaces in the bridge that no pod has yet.
fn prepared(daemon: &Daemon) -> usize {
    let entries = fs::read_dir(format!("/sys/class/net/{}/brif", daemon.bridge())).expect("the bridge");
    entries.flatten().filter(|port| port.file_name().to_string_lossy().starts_with("stvready")).count()
}

/// What `stave check` says of the daemon's pool: the JSON, and the row of the table.
fn checked(daemon: &Daemon) -> (serde_json::Value, String) {
    let program = fs::read_link(format!("/proc/{}/exe", daemon.pid())).expect("exe");
    let check = |format: &str| {
        let mut command = Command::new(&program);
        command.args(["check", "--output", format, "--config"]).arg(daemon.directory().join("config.toml"));
        let output = command.arg("--address").arg(daemon.socket()).output().expect("stave check");
        // Other rows may be degraded on this host.
        assert!(matches!(output.status.code(), Some(0 | 1)), "{output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let json: serde_json::Value = serde_json::from_str(&check("json")).expect("JSON");
    let table = check("table");
    let row = table.lines().find(|line| line.starts_with("ready supervisors  ")).expect("its row");
    (json["ready_supervisors"].clone(), row.split_whitespace().collect::<Vec<_>>().join(" "))
}

#[tokio::test(flavor = "multi_thread")]
async fn check_shows_the_pool_of_the_daemon() {
    let daemon = daemon(2).await;
    full(&daemon, 2).await;
    daemon.run_pod(pod("one")).await.expect("RunPodSandbox");
    full(&daemon, 2).await;
    let (json, row) = checked(&daemon);
    let state = serde_json::json!({ "wanted": 2, "ready": 2, "used": 1, "missed": 0, "error": null });
    assert_eq!(json, serde_json::json!({ "size": 2, "daemon": state, "no_answer": null }));
    assert_eq!(row, "ready supervisors ok 2 of 2 ready; used 1, missed 0");

    // Those that somebody killed wait for nobody.
    for pid in waiting(daemon.pid()) {
        kill(pid, Signal::SIGKILL);
        eventually("its end", async || (!exists(pid)).then_some(())).await;
    }
    assert_eq!(checked(&daemon).0["daemon"]["ready"], 0);
    assert_eq!(
        full(&daemon, 2).await,
        Pool { ready: 2, used: 1, missed: 0 },
        "whoever looks gets others made"
    );

    // A daemon that hangs.
    kill(daemon.pid(), Signal::SIGSTOP);
    let begin = std::time::Instant::now();
    let (json, row) = checked(&daemon);
    kill(daemon.pid(), Signal::SIGCONT);
    assert!(begin.elapsed() < stave_e2e::limit(15), "{:?}", begin.elapsed());
    assert!(json["daemon"].is_null() && row.contains("ok pods.ready = 2; no answer at"), "{json}: {row}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn check_says_why_none_can_be_made() {
    let options = Options {
        config: "\n[pods]\nready = 2\n".to_owned(),
        supervisor: Some("#!/bin/sh\nexit 1\n".to_owned()),
        ..Default::default()
    };
    let daemon = Daemon::with(options).await;
    let (json, row) = eventually("the error", async || {
        Some(checked(&daemon)).filter(|(json, _)| !json["daemon"]["error"].is_null())
    })
    .await;
    assert_eq!(json["daemon"]["ready"], 0, "{json}");
    let words = ["degraded 0 of 2 ready; used 0, missed 0; the last could not be made: ", "more slowly"];
    assert!(words.iter().all(|words| row.contains(words)), "{row}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sysctls_of_the_interface_are_written_with_and_without() {
    for ready in [0, 1] {
        let daemon = daemon(ready).await;
        full(&daemon, ready as u64).await;
        let config = pod("arp").with(|config| {
            let linux = config.linux.as_mut().expect("linux");
            linux.sysctls = [("net.ipv4.conf.eth0.arp_notify".to_owned(), "1".to_owned())].into();
        });
        let pod = daemon.run_pod(config).await.unwrap_or_else(|e| panic!("{ready} ready: {e:?}"));
        let main = daemon.run(&pod, &sleeper("main")).await.expect("start");
        let value = daemon.cri.output(&main, &["cat", "/proc/sys/net/ipv4/conf/eth0/arp_notify"]).await;
        assert_eq!(value, "1\n", "{ready} ready");
        daemon.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sysctls_of_all_interfaces_count_with_and_without() {
    for ready in [0, 1] {
        let daemon = daemon_with(ready, Options { dual_stack: true, ..Default::default() }).await;
        full(&daemon, ready as u64).await;
        let config = pod("all").with(|config| {
            let sysctls =
                [("net.ipv4.conf.default.arp_notify", "1"), ("net.ipv6.conf.all.disable_ipv6", "1")];
            config.linux.as_mut().expect("linux").sysctls =
                sysctls.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        });
        let pod = daemon.run_pod(config).await.unwrap_or_else(|e| panic!("{ready} ready: {e:?}"));
        let main = daemon.run(&pod, &sleeper("main")).await.expect("start");
        let files =
            "cd /proc/sys/net; cat ipv4/conf/eth0/arp_notify ipv6/conf/eth0/disable_ipv6; ip addr show eth0";
        let shown = daemon.cri.shell(&main, files).await;
        // A pod has the addresses that it is said to have: IPv6 is on again for the interface.
        assert!(shown.starts_with("1\n0\n"), "{ready} ready: {shown}");
        let status = daemon.cri.pod(&pod.id).await.expect("PodSandboxStatus").network.expect("network");
        for ip in [status.ip].into_iter().chain(status.additional_ips.into_iter().map(|more| more.ip)) {
            assert!(shown.contains(&format!(" {ip}/")), "{ready} ready: {ip}: {shown}");
        }
        daemon.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_ready_supervisor_is_used_once_and_the_pool_is_filled_again() {
    let daemon = daemon(2).await;
    full(&daemon, 2).await;
    let before = waiting(daemon.pid());
    assert_eq!((before.len(), prepared(&daemon)), (2, 2));
    let namespaces: Vec<_> = before
        .iter()
        .map(|pid| fs::read_link(format!("/proc/{pid}/ns/net")).expect("ns").to_string_lossy().into_owned())
        .collect();

    let config = pod("late").with(|config| {
        config.hostname = "late-name".into();
        let linux = config.linux.as_mut().expect("linux");
        linux.sysctls = [("net.ipv4.ip_local_port_range".to_owned(), "2000 3000".to_owned())].into();
    });
    let first = daemon.run_pod(config).await.expect("RunPodSandbox");
    let main = daemon.run(&first, &sleeper("main")).await.expect("start");
    let namespace = daemon.cri.output(&main, &["readlink", "/proc/self/ns/net"]).await;
    assert!(namespaces.contains(&namespace.trim().to_owned()), "{namespace} of {namespaces:?}");
    assert_eq!(daemon.cri.output(&main, &["hostname"]).await, "late-name\n");
    let range = daemon.cri.output(&main, &["cat", "/proc/sys/net/ipv4/ip_local_port_range"]).await;
    assert_eq!(range.split_whitespace().collect::<Vec<_>>(), ["2000", "3000"]);
    let status = daemon.cri.pod(&first.id).await.expect("PodSandboxStatus");
    let ip = status.network.expect("network").ip;
    assert!(daemon.cri.shell(&main, "ip addr show eth0").await.contains(&format!("inet {ip}/24")));
    let gateway = daemon.subnet().replace(".0/24", ".1");
    daemon.cri.shell(&main, &format!("ping -c 1 -W 2 {gateway}")).await;

    let pool = full(&daemon, 2).await;
    assert_eq!(pool, Pool { ready: 2, used: 1, missed: 0 });
    let after = waiting(daemon.pid());
    assert_eq!(after.iter().filter(|pid| before.contains(pid)).count(), 1, "{before:?}, then {after:?}");
    // Two pods never have the same.
    let second = daemon.run_pod(pod("second")).await.expect("RunPodSandbox");
    let other = daemon.run(&second, &sleeper("main")).await.expect("start");
    assert_ne!(daemon.cri.output(&other, &["readlink", "/proc/self/ns/net"]).await, namespace);
    // One on the node's network gets none.
    full(&daemon, 2).await;
    let host = pod("host").with(|config| {
        config.namespaces().network = NamespaceMode::Node as i32;
        config.hostname.clear();
    });
    daemon.run_pod(host).await.expect("RunPodSandbox");
    assert_eq!(full(&daemon, 2).await, Pool { ready: 2, used: 2, missed: 0 });
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pool_ends_with_its_daemon_and_its_pods_go_on() {
    let mut daemon = daemon(2).await;
    full(&daemon, 2).await;
    let one = daemon.run_pod(pod("one")).await.expect("RunPodSandbox");
    let main = daemon.run(&one, &sleeper("main")).await.expect("start");
    full(&daemon, 2).await;
    for kill in [true, false] {
        let before = waiting(daemon.pid());
        assert_eq!(before.len(), 2);
        if kill {
            daemon.kill();
        } else {
            assert!(daemon.terminate().await.success());
            assert!(before.iter().all(|pid| !exists(*pid)), "an orderly stop waits for them");
        }
        eventually("their end", async || before.iter().all(|pid| !exists(*pid)).then_some(())).await;
        eventually("the end of their interfaces", async || (prepared(&daemon) == 0).then_some(())).await;
        daemon.restart().await;
        full(&daemon, 2).await;
        assert!(waiting(daemon.pid()).iter().all(|pid| !before.contains(pid)));
        assert_eq!(daemon.cri.output(&main, &["echo", "here"]).await, "here\n");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_was_killed_is_not_used() {
    let daemon = daemon(1).await;
    full(&daemon, 1).await;
    for pid in waiting(daemon.pid()) {
        kill(pid, Signal::SIGKILL);
        eventually("its end", async || (!exists(pid)).then_some(())).await;
    }
    let pod = daemon.run_pod(pod("without")).await.expect("RunPodSandbox");
    daemon.run(&pod, &sleeper("main")).await.expect("start");
    assert_eq!(full(&daemon, 1).await, Pool { ready: 1, used: 0, missed: 1 });
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_pool_nothing_waits() {
    let daemon = daemon(0).await;
    let pod = daemon.run_pod(pod("slow")).await.expect("RunPodSandbox");
    daemon.run(&pod, &sleeper("main")).await.expect("start");
    assert_eq!(pool(&daemon).await, Pool { ready: 0, used: 0, missed: 0 });
    assert!(waiting(daemon.pid()).is_empty() && prepared(&daemon) == 0);
    daemon.finish().await;
}
