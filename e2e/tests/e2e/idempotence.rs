use stave_e2e::cri::{ContainerState, RemoveImageRequest};
use stave_e2e::{Config, container, image, pod, state};

use crate::{busybox, daemon, daemon_with_pod, sh, sleeper};

const UNKNOWN: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

#[tokio::test(flavor = "multi_thread")]
async fn stop_and_remove_of_the_unknown_succeed() {
    let daemon = daemon().await;
    let cri = &daemon.cri;
    cri.stop_pod(UNKNOWN).await.expect("StopPodSandbox");
    cri.remove_pod(UNKNOWN).await.expect("RemovePodSandbox");
    cri.stop(UNKNOWN, 1).await.expect("StopContainer");
    cri.remove(UNKNOWN).await.expect("RemoveContainer");
    cri.remove_image_named(&image("stave/never-pulled")).await.expect("RemoveImage");
    cri.remove_image_named(&format!("sha256:{UNKNOWN}")).await.expect("RemoveImage by id");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_and_remove_succeed_twice() {
    let (daemon, pod) = daemon_with_pod().await;
    let cri = &daemon.cri;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    for _ in 0..2 {
        cri.stop(&id, 0).await.expect("StopContainer");
    }
    // One that was never started can be stopped too.
    let created = daemon.create(&pod, &sh("created", "exit 0")).await.expect("CreateContainer");
    cri.stop(&created, 0).await.expect("StopContainer of a created one");
    for _ in 0..2 {
        cri.remove(&id).await.expect("RemoveContainer");
        cri.remove(&created).await.expect("RemoveContainer");
    }
    for _ in 0..2 {
        cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
    }
    for _ in 0..2 {
        cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_pod_again_is_the_same_pod_or_an_error_and_never_a_second_one() {
    let daemon = daemon().await;
    let first = daemon.run_pod(pod("twin")).await.expect("RunPodSandbox");
    match daemon.cri.run_pod(&first.config).await {
        Ok(id) => assert_eq!(id, first.id, "a retry gets the pod that is there"),
        Err(error) => assert_eq!(error.code(), tonic::Code::AlreadyExists, "{error:?}"),
    }
    assert_eq!(daemon.cri.pods(None).await.expect("ListPodSandbox").len(), 1);
    // The next attempt is another pod, and a removed one's name is free again.
    let next = first.config.clone().with(|config| config.metadata.as_mut().unwrap().attempt = 1);
    let next = daemon.run_pod(next).await.expect("the next attempt");
    assert_ne!(next.id, first.id);
    daemon.cri.remove_pod(&first.id).await.expect("RemovePodSandbox");
    let again = daemon.run_pod(first.config.clone()).await.expect("the name of a removed pod");
    assert_ne!(again.id, first.id);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_container_again_is_the_same_or_an_error_and_never_a_second_one() {
    let (daemon, pod) = daemon_with_pod().await;
    let config = sh("twin", "exit 0");
    let first = daemon.create(&pod, &config).await.expect("CreateContainer");
    match daemon.cri.create(&pod.id, &config, &pod.config).await {
        Ok(id) => assert_eq!(id, first),
        Err(error) => assert_eq!(error.code(), tonic::Code::AlreadyExists, "{error:?}"),
    }
    let other = container("twin", &busybox(), &["/bin/false"]);
    let error =
        daemon.cri.create(&pod.id, &other, &pod.config).await.expect_err("the same name, another content");
    assert_eq!(error.code(), tonic::Code::AlreadyExists, "{error:?}");
    assert!(error.message().contains("twin"), "{error:?}");
    assert_eq!(daemon.cri.containers(None).await.expect("ListContainers").len(), 1);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_starts_once() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let error = daemon.cri.start(&id).await.expect_err("a second start");
    assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error:?}");
    daemon.cri.stop(&id, 0).await.expect("StopContainer");
    let error = daemon.cri.start(&id).await.expect_err("a start after the end");
    assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error:?}");
    let filter = stave_e2e::cri::ContainerFilter {
        state: state(ContainerState::ContainerExited),
        ..Default::default()
    };
    assert_eq!(daemon.cri.containers(Some(filter)).await.expect("ListContainers").len(), 1);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_removed_once_and_again() {
    let daemon = daemon().await;
    let request = |name: String| RemoveImageRequest {
        image: Some(stave_e2e::cri::ImageSpec { image: name, ..Default::default() }),
    };
    let five = (0..5).map(|_| {
        let cri = daemon.cri.clone();
        let request = request(busybox());
        tokio::spawn(async move {
            cri.remove_image(request).await.expect("RemoveImage");
            assert_eq!(
                cri.image(&busybox()).await.expect("ImageStatus"),
                None,
                "gone when RemoveImage returns"
            );
        })
    });
    for task in five.collect::<Vec<_>>() {
        task.await.expect("a removal");
    }
    daemon.finish().await;
}
