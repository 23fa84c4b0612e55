//! Ephemeral containers: in the PID namespace of another container.

use stave_e2e::cri::{ContainerConfig, ContainerState, NamespaceMode};
use stave_e2e::{Config, pod};
use tonic::Code;

use crate::{daemon_with_pod, sh, sleeper};

fn into(config: ContainerConfig, target: &str) -> ContainerConfig {
    config.with(|config| {
        config.namespaces().pid = NamespaceMode::Target as i32;
        config.namespaces().target_id = target.to_owned();
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ephemeral_container_joins_its_target() {
    let (mut daemon, pod) = daemon_with_pod().await;
    let script = "trap 'exit 0' TERM; while :; do sleep 98765 & wait $!; done";
    let target = daemon.run(&pod, &sh("target", script)).await.expect("start");
    let other = daemon.run(&pod, &sleeper("other")).await.expect("start");
    let debug = daemon.run(&pod, &into(sleeper("debug"), &target)).await.expect("ephemeral container");
    let namespace = async |id: &str, name: &str| {
        daemon.cri.output(id, &["readlink", &format!("/proc/self/ns/{name}")]).await
    };
    assert_eq!(namespace(&debug, "pid").await, namespace(&target, "pid").await);
    assert_ne!(namespace(&debug, "pid").await, namespace(&other, "pid").await);
    assert_ne!(namespace(&debug, "mnt").await, namespace(&target, "mnt").await);
    // It sees the target's processes, and its file system through them; a command in it does, too.
    assert!(daemon.cri.output(&debug, &["cat", "/proc/1/cmdline"]).await.contains("98765"));
    daemon.cri.shell(&target, "echo here >/tmp/of-the-target").await;
    assert_eq!(daemon.cri.output(&debug, &["cat", "/proc/1/root/tmp/of-the-target"]).await, "here\n");
    // Stopping it leaves the target alone.
    daemon.cri.stop(&debug, 0).await.expect("StopContainer");
    assert_eq!(daemon.cri.container(&target).await.unwrap().state(), ContainerState::ContainerRunning);

    // With the target, its PID namespace ends; a new daemon changes nothing in that.
    let debug = daemon.run(&pod, &into(sleeper("second"), &target)).await.expect("ephemeral container");
    let waiting = daemon.create(&pod, &into(sleeper("waiting"), &target)).await.expect("CreateContainer");
    daemon.kill();
    daemon.restart().await;
    daemon.cri.stop(&target, 5).await.expect("StopContainer");
    assert_eq!(daemon.cri.exited(&debug).await.exit_code, 137);
    let error = daemon.cri.start(&waiting).await.expect_err("the target has ended");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_a_target() {
    let (daemon, first) = daemon_with_pod().await;
    let second = daemon.run_pod(pod("second")).await.expect("RunPodSandbox");
    let elsewhere = daemon.run(&second, &sleeper("elsewhere")).await.expect("start");
    let created = daemon.create(&first, &sleeper("created")).await.expect("CreateContainer");
    let exited = daemon.run(&first, &sh("exited", "exit 0")).await.expect("start");
    daemon.cri.exited(&exited).await;
    let unknown = "0".repeat(64);
    for target in [&elsewhere, &created, &exited, &unknown] {
        let error = daemon.create(&first, &into(sleeper("debug"), target)).await.expect_err("not a target");
        assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
        assert!(
            error.message().contains("target_id") && error.message().contains(target.as_str()),
            "{error:?}"
        );
    }
    let error = daemon.create(&first, &into(sleeper("debug"), "")).await.expect_err("no target");
    assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
    // A refusal leaves nothing: the name is free.
    daemon.create(&first, &sleeper("debug")).await.expect("CreateContainer");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_may_share_its_pid_namespace_with_the_pod() {
    let (daemon, _) = daemon_with_pod().await;
    let config = pod("shared").with(|config| config.namespaces().pid = NamespaceMode::Pod as i32);
    let shared = daemon.run_pod(config).await.expect("RunPodSandbox");
    let in_pod = sleeper("target").with(|config| config.namespaces().pid = NamespaceMode::Pod as i32);
    let target = daemon.run(&shared, &in_pod).await.expect("start");
    let debug = daemon.run(&shared, &into(sleeper("debug"), &target)).await.expect("ephemeral container");
    let namespace = ["readlink", "/proc/self/ns/pid"];
    assert_eq!(daemon.cri.output(&debug, &namespace).await, daemon.cri.output(&target, &namespace).await);
    // Here the namespace is the pod's: the end of the target is not the end of its guest.
    daemon.cri.stop(&target, 0).await.expect("StopContainer");
    assert_eq!(daemon.cri.container(&debug).await.unwrap().state(), ContainerState::ContainerRunning);
    daemon.finish().await;
}
