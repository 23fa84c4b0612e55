//! Plugins that are asked what they speak and whether they could, and don't answer as they should.
#![allow(clippy::unwrap_used, clippy::panic)] // a test program

mod node;

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use node::{Node, netns, pod};

/// A script that hangs, will not end by SIGTERM, and has a child that keeps its outputs open and will not either.
const HANG: &str =
    "trap '' TERM; (trap '' TERM; sleep 98301; :) & echo $! $$ >>pids; echo hanging >&2; wait; sleep 98301";

fn pids(node: &Node) -> Vec<String> {
    let text = fs::read_to_string(node.0.path().join("pids")).unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn none_runs(pids: &[String]) -> bool {
    // Killed children of a plugin are PID 1's to reap.
    let runs = |pid: &String| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
    };
    !pids.iter().any(runs)
}

#[tokio::test]
async fn one_that_hangs_when_it_is_first_asked_is_killed_in_time_with_its_children() {
    for command in ["VERSION", "STATUS"] {
        let versions = r#"echo '{"cniVersion": "1.1.0", "supportedVersions": ["1.1.0"]}'"#;
        let node = Node::new("");
        node.program("p", &format!("case $CNI_COMMAND in {command}) {HANG} ;; VERSION) {versions} ;; esac"));
        node.configure(r#"{"cniVersion": "1.1.0", "name": "net", "plugins": [{"type": "p"}]}"#);
        // Longer than the daemon's start waits for the first answer.
        let limit = Duration::from_secs(5);
        let began = Instant::now();
        let cni = node.open_with(limit).await;
        assert!(began.elapsed() < limit, "{command}: the daemon's start waits for it: {:?}", began.elapsed());
        let why = cni.status().unwrap_err();
        assert!(why.contains("not answered yet"), "{command}: {why}");
        eventually("the deadline is told", || {
            cni.status().is_err_and(|why| why.contains(&format!("({command}) did not end within 5s")))
        })
        .await;
        let why = cni.status().unwrap_err();
        assert!(why.contains("it said: hanging"), "{command}: {why}");
        assert!(began.elapsed() < limit + Duration::from_secs(4), "{command}: {:?}", began.elapsed());
        let asked = pids(&node);
        assert_eq!(asked.len(), 2, "{command}: it is asked once");
        assert!(none_runs(&asked), "{command}: {asked:?}");
        // Nor does one stay that is asked when nobody waits any more.
        let other = node.open_with(Duration::from_secs(60)).await;
        eventually("it is asked", || pids(&node).len() >= 4).await;
        drop((other, cni));
        eventually("its end", || none_runs(&pids(&node))).await;
    }
}

#[tokio::test]
async fn one_that_hung_once_is_asked_again() {
    let node = Node::new("");
    let script = "case $CNI_COMMAND in\n\
        VERSION) [ -e well ] || sleep 98302; echo '{\"cniVersion\": \"1.0.0\", \"supportedVersions\": [\"0.4.0\", \"1.0.0\"]}' ;;\n\
        ADD) cat >input; echo '{\"ips\": [{\"address\": \"10.9.9.9/24\"}]}' ;;\n\
        esac";
    node.program("p", script);
    node.configure(
        r#"{"cniVersion": "0.4.0", "cniVersions": ["0.4.0", "1.0.0", "1.1.0"], "name": "net", "plugins": [{"type": "p"}]}"#,
    );
    let cni = Arc::new(node.open_with(Duration::from_millis(500)).await);
    let why = cni.status().unwrap_err();
    assert!(why.contains("(VERSION) did not end"), "{why}");
    // Many that ask at the same time don't wait for each other's answer.
    let began = Instant::now();
    let ask = |_| {
        let cni = Arc::clone(&cni);
        tokio::spawn(async move { cni.ready().await })
    };
    for task in (0..20).map(ask).collect::<Vec<_>>() {
        assert!(task.await.unwrap().is_err());
    }
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    fs::write(node.0.path().join("well"), "").unwrap();
    cni.attach(&pod("one"), netns()).await.unwrap();
    let input = fs::read_to_string(node.0.path().join("input")).unwrap();
    assert!(input.contains(r#""cniVersion":"1.0.0""#), "the version that both speak: {input}");
    cni.detach("one", None).await.unwrap();
}

/// The plugin runs that of its address management itself: without it, every ADD would fail.
#[tokio::test]
async fn without_its_address_management_a_plugin_is_of_no_use() {
    let node = Node::new("");
    node.configure(
        r#"{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "p", "ipam": {"type": "nowhere"}}]}"#,
    );
    let cni = node.open().await;
    let missing = "plugin type=\"nowhere\": not found in";
    assert!(cni.status().unwrap_err().contains(missing), "{:?}", cni.status());
    let error = cni.attach(&pod("one"), netns()).await.unwrap_err().to_string();
    assert!(error.contains(missing) && cni.attached().is_empty(), "{error}");
    node.program("nowhere", "exit 1");
    eventually("it is found", || cni.status().is_ok()).await;
    cni.attach(&pod("one"), netns()).await.unwrap();
    cni.detach("one", None).await.unwrap();
    // None is no name.
    node.configure(
        r#"{"cniVersion": "1.0.0", "name": "none", "plugins": [{"type": "p", "ipam": {"type": ""}}]}"#,
    );
    eventually("it is read", || cni.describe()["network"]["name"] == "none").await;
    cni.status().unwrap();
}

/// ADD will show what it can.
#[tokio::test]
async fn one_that_does_not_know_its_versions_is_used_all_the_same() {
    for script in ["echo usage: p", "echo '{\"supportedVersions\": 1}'", "", "echo no; exit 1", "kill -9 $$"]
    {
        let node = Node::new("");
        let add = r#"echo '{"ips": [{"address": "10.9.9.9/24"}]}'"#;
        node.program(
            "p",
            &format!("case $CNI_COMMAND in VERSION) {script} ;; ADD) cat >input; {add} ;; esac"),
        );
        node.configure(
            r#"{"cniVersion": "0.4.0", "cniVersions": ["1.0.0"], "name": "net", "plugins": [{"type": "p"}]}"#,
        );
        let cni = node.open().await;
        cni.status().unwrap();
        let ips = cni.attach(&pod("one"), netns()).await.unwrap();
        assert_eq!(ips, ["10.9.9.9".parse::<std::net::IpAddr>().unwrap()], "{script}");
        let input = fs::read_to_string(node.0.path().join("input")).unwrap();
        assert!(input.contains(r#""cniVersion":"1.0.0""#), "{script}: {input}");
        cni.detach("one", None).await.unwrap();
    }
}
