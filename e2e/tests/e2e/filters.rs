use std::collections::BTreeSet;

use stave_e2e::cri::*;
use stave_e2e::{Config, Daemon, pod, selector, state};

use crate::{daemon, sh, sleeper};

async fn pods(daemon: &Daemon, filter: PodSandboxFilter) -> BTreeSet<String> {
    daemon.cri.pods(Some(filter)).await.expect("ListPodSandbox").into_iter().map(|pod| pod.id).collect()
}

async fn containers(daemon: &Daemon, filter: ContainerFilter) -> BTreeSet<String> {
    daemon
        .cri
        .containers(Some(filter))
        .await
        .expect("ListContainers")
        .into_iter()
        .map(|item| item.id)
        .collect()
}

fn set(ids: &[&String]) -> BTreeSet<String> {
    ids.iter().map(|&id| id.clone()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_by_id_state_and_labels() {
    let daemon = daemon().await;
    let labelled =
        |name: &str, labels: &[(&str, &str)]| pod(name).with(|config| config.labels = selector(labels));
    let a = daemon.run_pod(labelled("a", &[("app", "x"), ("tier", "1")])).await.expect("RunPodSandbox").id;
    let b = daemon.run_pod(labelled("b", &[("app", "x"), ("tier", "2")])).await.expect("RunPodSandbox").id;
    let c = daemon.run_pod(labelled("c", &[])).await.expect("RunPodSandbox").id;
    daemon.cri.stop_pod(&b).await.expect("StopPodSandbox");

    let ready = Some(PodSandboxStateValue { state: PodSandboxState::SandboxReady as i32 });
    let by = |id: &str, labels: &[(&str, &str)]| PodSandboxFilter {
        id: id.to_owned(),
        label_selector: selector(labels),
        ..Default::default()
    };
    assert_eq!(pods(&daemon, PodSandboxFilter::default()).await, set(&[&a, &b, &c]));
    assert_eq!(pods(&daemon, by(&a, &[])).await, set(&[&a]));
    assert_eq!(pods(&daemon, by(&a[..12], &[])).await, set(&[&a]));
    assert_eq!(pods(&daemon, by("0000000000000", &[])).await, set(&[]));
    assert_eq!(pods(&daemon, by("", &[("app", "x")])).await, set(&[&a, &b]));
    assert_eq!(pods(&daemon, by("", &[("app", "x"), ("tier", "2")])).await, set(&[&b]));
    assert_eq!(pods(&daemon, by("", &[("app", "y")])).await, set(&[]));
    assert_eq!(pods(&daemon, PodSandboxFilter { state: ready, ..Default::default() }).await, set(&[&a, &c]));
    let all = PodSandboxFilter { state: ready, ..by("", &[("app", "x")]) };
    assert_eq!(pods(&daemon, all).await, set(&[&a]), "filters are joined by and");
    let all = PodSandboxFilter { state: ready, ..by(&b, &[]) };
    assert_eq!(pods(&daemon, all).await, set(&[]));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_by_id_state_pod_and_labels() {
    let daemon = daemon().await;
    let first = daemon.run_pod(pod("first")).await.expect("RunPodSandbox");
    let second = daemon.run_pod(pod("second")).await.expect("RunPodSandbox");
    let labelled = |value: &str| sleeper(value).with(|config| config.labels = selector(&[("l", value)]));
    let created = daemon.create(&first, &labelled("created")).await.expect("CreateContainer");
    let running = daemon.run(&first, &labelled("running")).await.expect("start");
    let other = daemon.run(&second, &labelled("running")).await.expect("start");
    let exited = daemon.run(&second, &sh("exited", "exit 0")).await.expect("start");
    daemon.cri.exited(&exited).await;

    let of = |filter: ContainerFilter| containers(&daemon, filter);
    let filter = ContainerFilter::default;
    assert_eq!(of(filter()).await, set(&[&created, &running, &other, &exited]));
    let in_state = |wanted| ContainerFilter { state: state(wanted), ..Default::default() };
    assert_eq!(of(in_state(ContainerState::ContainerRunning)).await, set(&[&running, &other]));
    assert_eq!(of(in_state(ContainerState::ContainerCreated)).await, set(&[&created]));
    assert_eq!(of(in_state(ContainerState::ContainerExited)).await, set(&[&exited]));
    let in_pod = ContainerFilter { pod_sandbox_id: second.id.clone(), ..filter() };
    assert_eq!(of(in_pod.clone()).await, set(&[&other, &exited]));
    let in_pod = ContainerFilter { label_selector: selector(&[("l", "running")]), ..in_pod };
    assert_eq!(of(in_pod).await, set(&[&other]));
    assert_eq!(of(ContainerFilter { id: running[..12].to_owned(), ..filter() }).await, set(&[&running]));
    assert_eq!(of(ContainerFilter { pod_sandbox_id: "no-such-pod".to_owned(), ..filter() }).await, set(&[]));
    daemon.finish().await;
}
