//! Many pods, many containers, and many of both one after the other.

use std::fs;

use stave_e2e::{Daemon, pod};

use crate::{daemon, daemon_with_pod, sh, sleeper};

/// Resident memory in KiB, and number of descriptors.
fn use_of(pid: u32) -> (u64, usize) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    let rss = rss.trim().trim_end_matches(" kB").parse().expect("a number");
    (rss, fs::read_dir(format!("/proc/{pid}/fd")).expect("fd").count())
}

async fn one_life(daemon: &Daemon, number: usize) {
    let pod = daemon.run_pod(pod(&format!("pod-{number}"))).await.expect("RunPodSandbox");
    let id = daemon.run(&pod, &sh("main", "exit 3")).await.expect("start");
    assert_eq!(daemon.cri.exited(&id).await.exit_code, 3);
    daemon.cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
    daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
}

#[tokio::test(flavor = "multi_thread")]
async fn three_hundred_pods_one_after_the_other_leave_no_memory_and_no_descriptor() {
    let daemon = daemon().await;
    for number in 0..60 {
        one_life(&daemon, number).await;
    }
    let (rss, fds) = use_of(daemon.pid());
    for number in 60..300 {
        one_life(&daemon, number).await;
    }
    let (rss_after, fds_after) = use_of(daemon.pid());
    eprintln!("daemon: {rss} to {rss_after} KiB, {fds} to {fds_after} descriptors");
    assert!(fds_after <= fds + 2, "{fds} descriptors became {fds_after}");
    // 240 pods that left 10 KiB each would be 2400 KiB.
    assert!(rss_after < rss + 2400, "{rss} KiB became {rss_after}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_execs_leave_no_memory_and_no_descriptor() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let supervisor = crate::crash::supervisor(&pod.id).expect("supervisor").as_raw() as u32;
    let mut before = None;
    for number in 0..1000 {
        assert_eq!(daemon.cri.shell(&id, &format!("echo {number}")).await, format!("{number}\n"));
        if number == 200 {
            before = Some((use_of(daemon.pid()), use_of(supervisor)));
        }
    }
    let ((rss, fds), (pod_rss, pod_fds)) = before.expect("200 execs");
    let ((rss_after, fds_after), (pod_rss_after, pod_fds_after)) = (use_of(daemon.pid()), use_of(supervisor));
    eprintln!("daemon: {rss} to {rss_after} KiB, {fds} to {fds_after} descriptors");
    eprintln!("supervisor: {pod_rss} to {pod_rss_after} KiB, {pod_fds} to {pod_fds_after} descriptors");
    assert!(fds_after <= fds + 2 && pod_fds_after <= pod_fds);
    assert!(rss_after < rss + 2000 && pod_rss_after <= pod_rss + 64);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_containers_in_one_pod() {
    let (daemon, pod) = daemon_with_pod().await;
    let supervisor = crate::crash::supervisor(&pod.id).expect("supervisor").as_raw() as u32;
    let (_, before) = use_of(supervisor);
    let daemon = std::sync::Arc::new(daemon);
    let tasks: Vec<_> = (0..100)
        .map(|number| {
            let (daemon, pod) = (daemon.clone(), pod.clone());
            tokio::spawn(
                async move { daemon.run(&pod, &sleeper(&format!("c{number}"))).await.expect("start") },
            )
        })
        .collect();
    let mut ids = Vec::new();
    for task in tasks {
        ids.push(task.await.expect("a container"));
    }
    for id in &ids {
        assert_eq!(daemon.cri.shell(id, "echo alive").await, "alive\n");
    }
    for id in &ids {
        daemon.cri.remove(id).await.expect("RemoveContainer");
    }
    let (_, after) = use_of(supervisor);
    assert!(after <= before, "the supervisor has {after} descriptors, and had {before}");
    std::sync::Arc::into_inner(daemon).expect("the last owner").finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_pods_at_once() {
    let daemon = std::sync::Arc::new(daemon().await);
    let (_, before) = use_of(daemon.pid());
    let tasks: Vec<_> = (0..60)
        .map(|number| {
            let daemon = daemon.clone();
            tokio::spawn(async move {
                let pod = daemon.run_pod(pod(&format!("pod-{number}"))).await.expect("RunPodSandbox");
                daemon.run(&pod, &sleeper("main")).await.expect("start");
                pod.id
            })
        })
        .collect();
    let mut ids = Vec::new();
    for task in tasks {
        ids.push(task.await.expect("a pod"));
    }
    let tasks: Vec<_> = ids
        .into_iter()
        .map(|id| {
            let daemon = daemon.clone();
            tokio::spawn(async move { daemon.cri.remove_pod(&id).await.expect("RemovePodSandbox") })
        })
        .collect();
    for task in tasks {
        task.await.expect("a removal");
    }
    daemon.assert_clean().await;
    let (_, after) = use_of(daemon.pid());
    assert!(after <= before + 4, "{before} descriptors became {after}");
    std::sync::Arc::into_inner(daemon).expect("the last owner").finish().await;
}
