//! What such a container outlives, and what ends it.

use std::fs;

use stave_e2e::cri::*;
use stave_e2e::{Config as _, eventually, pod};
use tonic::Code;

use super::{daemon_with, own_root, processes, run_pod};
use crate::{sh, sleeper};

#[tokio::test(flavor = "multi_thread")]
async fn it_outlives_the_daemon_and_the_configuration() {
    let mut daemon = daemon_with("").await;
    let pod = run_pod(&daemon, "runc", pod("pod")).await.expect("RunPodSandbox");
    let main = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let short =
        daemon.run(&pod, &sh("short", "read x; exit 7").with(|c| c.stdin = true)).await.expect("start");
    let created = daemon.create(&pod, &sh("created", "exit 5")).await.expect("CreateContainer");
    let pid = processes(&daemon, &pod, &short).into_iter().next().expect("a process");
    daemon.kill();
    // The init of the short one ends while nobody listens.
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid.parse().expect("pid")),
        nix::sys::signal::Signal::SIGKILL,
    )
    .expect("SIGKILL");
    // The handler is gone from the configuration.
    let file = daemon.directory().join("config.toml");
    let config = fs::read_to_string(&file).expect("configuration");
    let config = config.split("\n[runtimes").next().expect("the part before").to_owned();
    fs::write(&file, config).expect("configuration");
    daemon.restart().await;
    assert_eq!(daemon.cri.exited(&short).await.exit_code, 137);
    assert_eq!(daemon.cri.shell(&main, "echo on").await, "on\n");
    daemon.cri.start(&created).await.expect("StartContainer");
    assert_eq!(daemon.cri.exited(&created).await.exit_code, 5);
    let late = daemon.run(&pod, &sleeper("late")).await.expect("a further container of a known pod");
    daemon.cri.stop(&main, 10).await.expect("StopContainer");
    assert_eq!(daemon.cri.container(&main).await.expect("status").exit_code, 0);
    daemon.cri.remove(&late).await.expect("RemoveContainer");
    let error = run_pod(&daemon, "runc", crate::pod("new")).await.expect_err("no such handler");
    assert_eq!(error.code(), Code::NotFound);
    assert!(error.message().contains("\"runc\": unknown; known are [\"stave\"]"), "{error:?}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_supervisor_that_dies_leaves_nothing_of_runcs() {
    let daemon = daemon_with("").await;
    let pod = run_pod(&daemon, "runc", pod("pod")).await.expect("RunPodSandbox");
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let request = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
    let info = daemon.cri.pod_sandbox_status(request).await.expect("PodSandboxStatus").info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).expect("info");
    let supervisor = i32::try_from(info["pid"].as_i64().expect("pid")).expect("pid");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(supervisor), nix::sys::signal::Signal::SIGKILL)
        .expect("SIGKILL");
    let status = daemon.cri.exited(&id).await;
    assert_eq!(status.state(), ContainerState::ContainerExited);
    eventually("the end of the processes", async || processes(&daemon, &pod, &id).is_empty().then_some(()))
        .await;
    daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
    assert!(!own_root(&daemon, "runc", &pod).exists());
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_over_its_memory_is_oom_killed() {
    let daemon = daemon_with("").await;
    let pod = run_pod(&daemon, "runc", pod("pod")).await.expect("RunPodSandbox");
    let config = sh("hungry", "x=x; while :; do x=$x$x; done").with(|c| {
        c.linux.as_mut().unwrap().resources.as_mut().unwrap().memory_limit_in_bytes = 20 << 20;
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let status = daemon.cri.exited(&id).await;
    assert_eq!((status.reason.as_str(), status.exit_code), ("OOMKilled", 137));
    daemon.finish().await;
}
