//! Time namespaces: clocks that the pod has for itself.

use std::fs;

use stave_e2e::{Config, Pod};
use tonic::Code;

use super::{host_pid, user};
use crate::{daemon, sleeper};

const DAY: f64 = 86_400.0;

fn uptime(text: &str) -> f64 {
    text.split(' ')
        .next()
        .and_then(|word| word.parse().ok())
        .unwrap_or_else(|| panic!("{text:?} is no uptime"))
}

#[tokio::test(flavor = "multi_thread")]
async fn clocks_of_the_pod() {
    if stave_e2e::skipped_without("time") {
        return;
    }
    let mut daemon = daemon().await;
    for (name, in_user_namespace) in [("plain", false), ("mapped", true)] {
        let config = if in_user_namespace { user::pod(name) } else { stave_e2e::pod(name) };
        let config = config.with(|config| {
            config.annotations.insert("stave.dev/time-offsets".into(), "boottime=86400s,monotonic=1h".into());
        });
        let pod: Pod = daemon.run_pod(config).await.expect("RunPodSandbox");
        let container = |name: &str| {
            if in_user_namespace { user::inside(sleeper(name)) } else { sleeper(name) }
        };
        let one = daemon.run(&pod, &container("one")).await.expect("start");
        daemon.kill();
        daemon.restart().await;
        let two = daemon.run(&pod, &container("two")).await.expect("start");
        let own = fs::read_link("/proc/self/ns/time").expect("time namespace");
        let mut seen = Vec::new();
        for id in [&one, &two] {
            let inside = uptime(&daemon.cri.output(id, &["cat", "/proc/uptime"]).await);
            let outside = uptime(&fs::read_to_string("/proc/uptime").expect("uptime"));
            assert!((inside - outside - DAY).abs() < 60.0, "{name}: {inside} inside, {outside} outside");
            let offsets = daemon.cri.output(id, &["cat", "/proc/1/timens_offsets"]).await;
            let words: Vec<&str> = offsets.split_whitespace().collect();
            assert_eq!(words, ["monotonic", "3600", "0", "boottime", "86400", "0"], "{name}");
            let init =
                fs::read_link(format!("/proc/{}/ns/time", host_pid(&daemon, id).await)).expect("namespace");
            assert_ne!(init, own);
            // An exec has the same clocks.
            let exec = daemon.cri.output(id, &["readlink", "/proc/self/ns/time"]).await;
            assert_eq!(exec.trim(), init.to_str().unwrap());
            seen.push(init);
        }
        assert_eq!(seen[0], seen[1], "{name}: one for the whole pod");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_offsets_are_refused() {
    let daemon = daemon().await;
    for value in
        ["", "boottime=1", "realtime=1s", "monotonic=1s,monotonic=1s", "boottime=1000d1x", "monotonic=-200d"]
    {
        let config = stave_e2e::pod("bad").with(|config| {
            config.annotations.insert("stave.dev/time-offsets".into(), value.into());
        });
        let error = daemon.run_pod(config).await.expect_err(value);
        assert_eq!(error.code(), Code::InvalidArgument, "{value:?}: {error}");
    }
    assert!(daemon.cri.pods(None).await.expect("ListPodSandbox").is_empty());
    daemon.finish().await;
}
