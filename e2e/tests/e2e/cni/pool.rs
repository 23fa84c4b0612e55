//! Ready supervisors with CNI: their namespaces wait without an interface, and plugins get each of them once.

use std::collections::BTreeSet;

use stave_e2e::{Daemon, eventually, pod};

use super::*;
use crate::ready::{Pool, exists, full, kill, waiting};
use crate::sleeper;

/// With a pool of this size, and a plugin that writes down which namespace it is given.
async fn pooled(size: usize) -> Daemon {
    let config = format!("\n[pods]\nready = {size}\n");
    let daemon = start_with(Options { config, ..Default::default() }).await;
    let seen = daemon.directory().join("seen");
    let script = format!("[ \"$CNI_COMMAND\" != ADD ] || stat -L -c %i \"$CNI_NETNS\" >>{}", seen.display());
    recorder(&daemon, "seer", &script);
    configure(&daemon, "10-net.conflist", &list("1.0.0", &[json!({ "type": "seer" })]).to_string());
    ready(&daemon).await;
    full(&daemon, size as u64).await;
    daemon
}

/// The namespaces that plugins were given, in order.
fn seen(daemon: &Daemon) -> Vec<String> {
    let text = fs::read_to_string(daemon.directory().join("seen")).unwrap_or_default();
    text.lines().map(|inode| format!("net:[{inode}]")).collect()
}

fn namespace(pid: u32) -> String {
    let link = fs::read_link(format!("/proc/{pid}/ns/net")).expect("ns");
    link.to_string_lossy().into_owned()
}

/// The pods' namespaces that paths lead to: names in the directory, and mounts.
fn paths(daemon: &Daemon) -> (BTreeSet<String>, usize) {
    let dir = daemon.directory().join("netns");
    let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    (names, mounts.lines().filter(|line| line.contains(&format!(" {}/", dir.display()))).count())
}

#[tokio::test(flavor = "multi_thread")]
async fn each_ready_namespace_is_one_pods_and_they_end_with_the_daemon() {
    let mut daemon = pooled(2).await;
    let mut pods = Vec::new();
    for name in ["one", "two", "three"] {
        let before: Vec<_> = waiting(daemon.pid()).into_iter().map(namespace).collect();
        let made = daemon.run_pod(pod(name)).await.expect("RunPodSandbox");
        let main = daemon.run(&made, &sleeper("main")).await.expect("start");
        let own = daemon.cri.output(&main, &["readlink", "/proc/self/ns/net"]).await.trim().to_owned();
        assert!(before.contains(&own), "{name}: {own} of {before:?}");
        assert_eq!(seen(&daemon).last(), Some(&own), "{name}");
        pods.push((made.id, main, own));
        full(&daemon, 2).await;
    }
    assert_eq!(full(&daemon, 2).await, Pool { ready: 2, used: 3, missed: 0 });
    let all: BTreeSet<_> = pods.iter().map(|(.., own)| own).collect();
    assert_eq!(all.len(), 3, "{pods:?}");

    let names: BTreeSet<_> = pods.iter().map(|(id, ..)| format!("stave-{id}")).collect();
    let before = waiting(daemon.pid());
    assert!(daemon.terminate().await.success());
    assert!(before.len() == 2 && before.iter().all(|pid| !exists(*pid)), "an orderly stop waits for them");
    assert_eq!(paths(&daemon), (names, 3), "those of pods alone");
    daemon.restart().await;
    full(&daemon, 2).await;
    assert!(waiting(daemon.pid()).into_iter().all(|pid| !all.contains(&namespace(pid))));
    for (_, main, own) in &pods {
        assert_eq!(daemon.cri.output(main, &["readlink", "/proc/self/ns/net"]).await.trim(), own);
    }
    daemon.cri.remove_all().await.expect("removal of all pods");
    assert_nothing_kept(&daemon);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_was_killed_is_not_used() {
    let daemon = pooled(1).await;
    for pid in waiting(daemon.pid()) {
        kill(pid, nix::sys::signal::Signal::SIGKILL);
        eventually("its end", async || (!exists(pid)).then_some(())).await;
    }
    let made = daemon.run_pod(pod("without")).await.expect("RunPodSandbox");
    let main = daemon.run(&made, &sleeper("main")).await.expect("start");
    let own = daemon.cri.output(&main, &["readlink", "/proc/self/ns/net"]).await;
    assert_eq!(seen(&daemon), [own.trim()]);
    assert_eq!(full(&daemon, 1).await, Pool { ready: 1, used: 0, missed: 1 });
    daemon.finish().await;
}

/// What a plugin began in it, nobody knows.
#[tokio::test(flavor = "multi_thread")]
async fn one_whose_plugin_failed_is_not_used_again() {
    let daemon = pooled(2).await;
    let before = waiting(daemon.pid());
    recorder(&daemon, "seer", "[ \"$CNI_COMMAND\" != ADD ] || exit 1");
    let error = daemon.run_pod(pod("failed")).await.expect_err("ADD fails");
    assert!(error.message().contains("plugin type=\"seer\" failed (ADD)"), "{error:?}");
    assert_eq!(full(&daemon, 2).await, Pool { ready: 2, used: 1, missed: 0 });
    let gone: Vec<_> = before.iter().filter(|pid| !waiting(daemon.pid()).contains(pid)).collect();
    assert_eq!(gone.len(), 1, "{before:?}");
    eventually("its end", async || (!exists(*gone[0])).then_some(())).await;
    assert_nothing_kept(&daemon);
    daemon.finish().await;
}
