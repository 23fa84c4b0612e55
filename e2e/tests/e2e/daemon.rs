use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::process::Command;

use stave_e2e::Daemon;
use stave_e2e::cri::{StatusRequest, VersionRequest};

use crate::{daemon_with_pod, sleeper};

#[tokio::test(flavor = "multi_thread")]
async fn version_and_status_are_what_the_kubelet_wants() {
    let daemon = Daemon::start().await;
    let version = daemon.cri.version(VersionRequest::default()).await.expect("Version");
    assert_eq!((version.version.as_str(), version.runtime_name.as_str()), ("0.1.0", "stave"));
    assert_eq!(version.runtime_api_version, "v1");
    assert!(!version.runtime_version.is_empty());
    let status = daemon.cri.status(StatusRequest { verbose: false }).await.expect("Status");
    let conditions = status.status.expect("status").conditions;
    for name in ["RuntimeReady", "NetworkReady"] {
        let condition = conditions.iter().find(|condition| condition.r#type == name);
        assert!(condition.is_some_and(|condition| condition.status), "{name} in {conditions:?}");
    }
    assert!(status.info.is_empty());
    assert!(status.runtime_handlers.iter().any(|handler| handler.name.is_empty()), "the default handler");
    let verbose = daemon.cri.status(StatusRequest { verbose: true }).await.expect("Status");
    let value: serde_json::Value = serde_json::from_str(&verbose.info["config"]).expect("config is JSON");
    assert!(value.is_object());
    let config = daemon.cri.runtime_config(Default::default()).await.expect("RuntimeConfig");
    assert!(config.linux.is_some());
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_socket_is_roots_alone_and_goes_with_the_daemon() {
    let mut daemon = Daemon::start().await;
    let meta = daemon.socket().metadata().expect("socket");
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    assert!(daemon.terminate().await.success());
    daemon.restart().await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_on_the_same_root_is_refused() {
    let daemon = Daemon::start().await;
    let directory = daemon.directory();
    let program = std::fs::read_link(format!("/proc/{}/exe", daemon.pid())).expect("exe");
    let output = Command::new(program)
        .arg("serve")
        .arg("--config")
        .arg(directory.join("config.toml"))
        .arg("--root")
        .arg(directory.join("root"))
        .arg("--state")
        .arg(directory.join("other-state"))
        .arg("--listen")
        .arg(directory.join("other.sock"))
        .output()
        .expect("a second daemon");
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    let stdout = String::from_utf8_lossy(&output.stdout);
    let root = directory.join("root");
    assert!(format!("{stderr}{stdout}").contains(root.to_str().expect("UTF-8")), "{stderr}{stdout}");
    daemon.cri.version(VersionRequest::default()).await.expect("the first one goes on");
    let _ = std::fs::remove_dir_all(directory.join("other-state"));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_key_stops_the_start_and_is_named() {
    let daemon = Daemon::start().await;
    let program = std::fs::read_link(format!("/proc/{}/exe", daemon.pid())).expect("exe");
    let file = daemon.directory().join("bad.toml");
    std::fs::write(&file, "[network]\nmode = \"bridge\"\nno_such_key = 1\n").expect("file");
    let output = Command::new(program)
        .arg("serve")
        .arg("--config")
        .arg(&file)
        .arg("--root")
        .arg(daemon.directory().join("other-root"))
        .arg("--state")
        .arg(daemon.directory().join("other-state"))
        .arg("--listen")
        .arg(daemon.directory().join("other.sock"))
        .output()
        .expect("a daemon");
    assert!(!output.status.success());
    let text =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("no_such_key") && text.contains("bad.toml"), "{text}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_stops_the_daemon_and_no_pod() {
    let (mut daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    assert!(daemon.terminate().await.success());
    daemon.restart().await;
    let status = daemon.cri.container(&id).await.expect("ContainerStatus");
    assert_eq!(status.state(), stave_e2e::cri::ContainerState::ContainerRunning);
    assert_eq!(daemon.cri.shell(&id, "echo alive").await, "alive\n");
    daemon.finish().await;
}
