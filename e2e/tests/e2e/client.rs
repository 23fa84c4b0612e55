//! The command-line client for people.

use std::process::{Command, Output};

use serde_json::Value;
use stave_e2e::{Daemon, image};

/// Runs `stave` against a daemon.
fn output(daemon: &Daemon, arguments: &[&str]) -> Output {
    let program = std::fs::read_link(format!("/proc/{}/exe", daemon.pid())).expect("exe");
    Command::new(program).arg("--address").arg(daemon.socket()).args(arguments).output().expect("stave")
}

/// Its stdout; it must succeed.
fn stave(daemon: &Daemon, arguments: &[&str]) -> String {
    let output = output(daemon, arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "stave {arguments:?}: {}: {stderr}", output.status);
    String::from_utf8(output.stdout).expect("stave's output is UTF-8")
}

fn json(daemon: &Daemon, arguments: &[&str]) -> Value {
    let stdout = stave(daemon, arguments);
    serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("stave {arguments:?}: {e}: {stdout}"))
}

/// `stave run` keeps logs by the pod's name outside of the daemon's directory: each test has names of its own.
fn name(text: &str) -> String {
    format!("e2e-{text}-{}", std::process::id())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_runs_in_one_go() {
    let daemon = Daemon::start().await;
    let (name, busybox) = (name("one-go"), image("stave/busybox"));
    let script = "echo hello people; trap 'exit 0' TERM; while :; do sleep 0.1; done";
    let started = stave(&daemon, &["run", "--name", &name, &busybox, "sh", "-c", script]);
    assert!(started.contains(&name), "{started}");
    let pods = stave(&daemon, &["pods"]);
    assert!(pods.contains(&name), "{pods}");
    let pods = json(&daemon, &["pods", "-o", "json"]);
    assert_eq!(pods.as_array().expect("a list").len(), 1, "{pods}");
    assert!(stave(&daemon, &["ps"]).contains(&name));
    assert!(stave(&daemon, &["images"]).contains(&busybox));
    stave_e2e::eventually("the line in stave logs", async || {
        (stave(&daemon, &["logs", &name]) == "hello people\n").then_some(())
    })
    .await;
    assert_eq!(stave(&daemon, &["exec", &name, "echo", "from", "exec"]), "from exec\n");
    assert_eq!(output(&daemon, &["exec", &name, "sh", "-c", "exit 3"]).status.code(), Some(3));
    stave(&daemon, &["stop", &name]);
    assert!(!stave(&daemon, &["ps"]).contains(&name));
    assert!(stave(&daemon, &["ps", "--all"]).contains(&name));
    stave(&daemon, &["rm", &name]);
    assert!(!stave(&daemon, &["pods"]).contains(&name));
    daemon.assert_clean().await;
    stave(&daemon, &["rmi", &busybox]);
    assert!(!stave(&daemon, &["images"]).contains(&busybox));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_command_is_followed_to_its_end_and_its_code() {
    let daemon = Daemon::start().await;
    let (name, busybox) = (name("short"), image("stave/busybox"));
    let output = output(&daemon, &["run", "--rm", "--name", &name, &busybox, "sh", "-c", "echo out; exit 5"]);
    assert_eq!(output.status.code(), Some(5), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("out\n"));
    assert!(daemon.cri.pods(None).await.expect("ListPodSandbox").is_empty(), "--rm removes the pod");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_say_what_was_wrong() {
    let daemon = Daemon::start().await;
    let fails = |arguments: &[&str], word: &str| {
        let output = output(&daemon, arguments);
        assert!(!output.status.success(), "stave {arguments:?} succeeded");
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(stderr.contains(word), "{word} in {stderr}");
    };
    fails(&["pull", &image("stave/no-such-image")], "no-such-image");
    fails(&["logs", "nobody"], "nobody");
    fails(&["exec", "nobody", "true"], "nobody");
    fails(&["stop", "nobody"], "nobody");
    daemon.finish().await;
}
