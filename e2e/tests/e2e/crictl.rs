//! The real crictl, as people use it.

use std::path::PathBuf;

use serde_json::json;
use stave_e2e::{Crictl, Daemon, image};

use crate::busybox;

struct Files {
    pod: PathBuf,
    container: PathBuf,
}

fn files(daemon: &Daemon) -> Files {
    let directory = daemon.directory();
    let write = |name: &str, value: serde_json::Value| {
        let path = directory.join(name);
        std::fs::write(&path, value.to_string()).expect("file");
        path
    };
    Files {
        pod: write(
            "pod.json",
            json!({
                "metadata": {"name": "crictl", "namespace": "default", "attempt": 1, "uid": "crictl-uid"},
                "log_directory": directory.join("logs/crictl"),
                "linux": {},
            }),
        ),
        container: write(
            "container.json",
            json!({
                "metadata": {"name": "main"},
                "image": {"image": busybox()},
                "command": ["/bin/sh", "-c", "echo hello from crictl; trap 'exit 0' TERM; while :; do sleep 0.1; done"],
                "log_path": "main.log",
                "linux": {},
            }),
        ),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_verb_of_the_first_day() {
    let daemon = Daemon::start().await;
    let Some(crictl) = Crictl::at(&daemon.socket()) else {
        return daemon.finish().await;
    };
    let files = files(&daemon);
    let (pod_file, container_file) =
        (files.pod.to_str().expect("UTF-8"), files.container.to_str().expect("UTF-8"));

    assert!(crictl.run(&["version"]).contains("RuntimeName:  stave"));
    let info = crictl.json(&["info"]);
    assert_eq!(info["status"]["conditions"][0]["status"], true, "{info}");
    assert!(crictl.run(&["pull", &busybox()]).contains("Image is up to date"));
    let images = crictl.json(&["images", "-o", "json"]);
    assert_eq!(images["images"][0]["repoTags"][0], busybox());
    assert!(crictl.run(&["images"]).contains("e2e-test-images/busybox"));
    assert!(crictl.run(&["inspecti", &busybox()]).contains("sha256:"));
    assert!(crictl.run(&["imagefsinfo"]).contains("mountpoint"));

    let pod = crictl.run(&["runp", pod_file]);
    assert_eq!(pod.len(), 64, "{pod}");
    let container = crictl.run(&["create", &pod, container_file, pod_file]);
    assert_eq!(container.len(), 64, "{container}");
    assert_eq!(crictl.run(&["start", &container]), container);
    assert!(crictl.run(&["ps"]).contains(&container[..13]));
    assert_eq!(crictl.run(&["ps", "-q"]), container);
    assert_eq!(crictl.run(&["pods", "-q"]), pod);
    assert_eq!(crictl.json(&["inspectp", &pod])["status"]["state"], "SANDBOX_READY");
    assert_eq!(crictl.json(&["inspect", &container])["status"]["state"], "CONTAINER_RUNNING");
    stave_e2e::eventually("the line in crictl logs", async || {
        crictl.run(&["logs", &container]).contains("hello from crictl").then_some(())
    })
    .await;
    assert_eq!(crictl.run(&["exec", "-s", &container, "echo", "exec'd"]), "exec'd");
    let failed = crictl.output(&["exec", "-s", &container, "/bin/sh", "-c", "exit 3"]);
    assert!(!failed.status.success());

    assert_eq!(crictl.run(&["stop", &container]), container);
    assert_eq!(crictl.run(&["ps", "-q"]), "");
    assert_eq!(crictl.run(&["ps", "-a", "-q"]), container);
    assert_eq!(crictl.run(&["rm", &container]), container);
    assert_eq!(crictl.run(&["ps", "-a", "-q"]), "");
    assert!(crictl.run(&["stopp", &pod]).contains(&pod));
    assert!(crictl.run(&["rmp", &pod]).contains(&pod));
    assert_eq!(crictl.run(&["pods", "-q"]), "");
    assert!(crictl.run(&["rmi", &busybox()]).contains("Deleted"));
    assert_eq!(crictl.json(&["images", "-o", "json"])["images"], json!([]));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn run_does_it_all_at_once() {
    let daemon = Daemon::start().await;
    let Some(crictl) = Crictl::at(&daemon.socket()) else {
        return daemon.finish().await;
    };
    let files = files(&daemon);
    let container =
        crictl.run(&["run", files.container.to_str().expect("UTF-8"), files.pod.to_str().expect("UTF-8")]);
    let container = container.lines().last().expect("an id").to_owned();
    let hostname = crictl.run(&["exec", "-s", &container, "hostname"]);
    assert_eq!(
        hostname,
        crictl.run(&["exec", "-s", &container, "cat", "/etc/hostname"]),
        "both say the same"
    );
    crictl.run(&["rmp", "-fa"]);
    daemon.assert_clean().await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_reach_the_user() {
    let daemon = Daemon::start().await;
    let Some(crictl) = Crictl::at(&daemon.socket()) else {
        return daemon.finish().await;
    };
    let output = crictl.output(&["pull", &image("stave/no-such-image")]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("stave/no-such-image"));
    let output = crictl.output(&["inspectp", "no-such-pod"]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("no-such-pod"));
    daemon.finish().await;
}
