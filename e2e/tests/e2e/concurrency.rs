use std::time::Instant;

use stave_e2e::pod;

use crate::{daemon, sh, sleeper};

#[tokio::test(flavor = "multi_thread")]
async fn twenty_pods_at_once_come_and_go() {
    let daemon = std::sync::Arc::new(daemon().await);
    let start = Instant::now();
    let tasks: Vec<_> = (0..20)
        .map(|number| {
            let daemon = daemon.clone();
            tokio::spawn(async move {
                let pod = daemon.run_pod(pod(&format!("pod-{number}"))).await.expect("RunPodSandbox");
                let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
                assert_eq!(daemon.cri.shell(&id, "echo $HOSTNAME").await, format!("pod-{number}\n"));
                let short = daemon.run(&pod, &sh("short", &format!("exit {number}"))).await.expect("start");
                assert_eq!(daemon.cri.exited(&short).await.exit_code, number);
                pod
            })
        })
        .collect();
    let mut addresses = std::collections::BTreeSet::new();
    let mut pods = Vec::new();
    for task in tasks {
        let pod = task.await.expect("a pod");
        let status = daemon.cri.pod(&pod.id).await.expect("PodSandboxStatus");
        assert!(addresses.insert(status.network.expect("network").ip), "an address was given twice");
        pods.push(pod);
    }
    assert_eq!(daemon.cri.pods(None).await.expect("ListPodSandbox").len(), 20);
    assert_eq!(daemon.cri.containers(None).await.expect("ListContainers").len(), 40);
    let tasks: Vec<_> = pods
        .into_iter()
        .map(|pod| {
            let daemon = daemon.clone();
            tokio::spawn(async move {
                daemon.cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
                daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("a removal");
    }
    assert!(start.elapsed().as_secs() < 60, "took {:?}", start.elapsed());
    daemon.assert_clean().await;
    std::sync::Arc::into_inner(daemon).expect("the last owner").finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_ten_times_at_once_makes_one_pod() {
    let daemon = daemon().await;
    let config = daemon.with_log_directory(pod("same"));
    let tasks: Vec<_> = (0..10)
        .map(|_| {
            let (cri, config) = (daemon.cri.clone(), config.clone());
            tokio::spawn(async move { cri.run_pod(&config).await })
        })
        .collect();
    let mut ids = std::collections::BTreeSet::new();
    for task in tasks {
        match task.await.expect("a call") {
            Ok(id) => drop(ids.insert(id)),
            Err(error) => assert_eq!(error.code(), tonic::Code::AlreadyExists, "{error:?}"),
        }
    }
    assert_eq!(ids.len(), 1);
    assert_eq!(daemon.cri.pods(None).await.expect("ListPodSandbox").len(), 1);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_execs_at_once() {
    let (daemon, pod) = crate::daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let tasks: Vec<_> = (0..50)
        .map(|number| {
            let (cri, id) = (daemon.cri.clone(), id.clone());
            tokio::spawn(async move {
                let text = cri.shell(&id, &format!("echo {number}")).await;
                assert_eq!(text, format!("{number}\n"));
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("an exec");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_pull_at_once_is_one_pull() {
    let daemon = stave_e2e::Daemon::start().await;
    let name = stave_e2e::image("stave/big");
    let tasks: Vec<_> = (0..5)
        .map(|_| {
            let (cri, name) = (daemon.cri.clone(), name.clone());
            tokio::spawn(async move { cri.pull(&name).await.expect("PullImage") })
        })
        .collect();
    let mut references = std::collections::BTreeSet::new();
    for task in tasks {
        references.insert(task.await.expect("a pull"));
    }
    assert_eq!(references.len(), 1);
    daemon.finish().await;
}
