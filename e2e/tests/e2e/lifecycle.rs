use std::collections::HashMap;

use stave_e2e::cri::{ContainerState, ContainerStatusRequest, PodSandboxState, PodSandboxStatusRequest};
use stave_e2e::{Config, pod, read_log};

use crate::{busybox, daemon, daemon_with_pod, now, sh, sleeper};

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_runs_from_pull_to_removal() {
    let daemon = daemon().await;
    let cri = &daemon.cri;
    let before = now();
    let config = pod("whole").with(|config| {
        config.labels = HashMap::from([("app".into(), "e2e".into())]);
        config.annotations = HashMap::from([("note".into(), "kept as it is: {\"a\": 1}\n".into())]);
    });
    let pod = daemon.run_pod(config.clone()).await.expect("RunPodSandbox");

    let status = cri.pod(&pod.id).await.expect("PodSandboxStatus");
    assert_eq!(status.id, pod.id);
    assert_eq!(status.metadata, config.metadata);
    assert_eq!(status.state(), PodSandboxState::SandboxReady);
    assert!((before..=now()).contains(&status.created_at), "created_at {}", status.created_at);
    assert_eq!((status.labels, status.annotations), (config.labels.clone(), config.annotations.clone()));
    assert_eq!(status.runtime_handler, "");
    let options = status.linux.and_then(|linux| linux.namespaces).and_then(|namespaces| namespaces.options);
    assert_eq!(options.as_ref(), Some(&*config.clone().namespaces()), "namespace options are echoed whole");

    let config = sh("hello", "echo out; echo err >&2; exit 3").with(|config| {
        config.labels = HashMap::from([("part".into(), "main".into())]);
        config.annotations = HashMap::from([("k".into(), "v".into())]);
    });
    let id = daemon.create(&pod, &config).await.expect("CreateContainer");
    let created = cri.container(&id).await.expect("ContainerStatus");
    assert_eq!(created.state(), ContainerState::ContainerCreated);
    assert_eq!((created.started_at, created.finished_at), (0, 0));
    assert!((before..=now()).contains(&created.created_at));
    assert_eq!(created.metadata, config.metadata);
    assert_eq!((created.labels, created.annotations), (config.labels.clone(), config.annotations.clone()));
    let image = cri.image(&busybox()).await.expect("ImageStatus").expect("the image");
    assert_eq!(created.image_id, image.id);
    assert_eq!(created.image_ref, image.repo_digests[0]);
    assert_eq!(created.image.expect("image").image, busybox());
    assert_eq!(created.log_path, format!("{}/hello.log", pod.config.log_directory));

    cri.start(&id).await.expect("StartContainer");
    let exited = cri.exited(&id).await;
    assert_eq!((exited.exit_code, exited.reason.as_str()), (3, "Error"));
    assert!(created.created_at <= exited.started_at && exited.started_at <= exited.finished_at);
    assert!(exited.finished_at <= now());
    let log = read_log(&exited.log_path);
    let mut lines: Vec<_> =
        log.iter().map(|line| (line.stream.as_str(), line.partial, line.text.as_str())).collect();
    lines.sort();
    assert_eq!(lines, [("stderr", false, "err"), ("stdout", false, "out")]);

    cri.remove(&id).await.expect("RemoveContainer");
    assert_eq!(cri.container(&id).await.expect_err("a removed container").code(), tonic::Code::NotFound);
    assert!(cri.containers(None).await.expect("ListContainers").is_empty());
    assert!(std::path::Path::new(&exited.log_path).exists(), "the log file is the kubelet's to delete");

    cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
    let stopped = cri.pod(&pod.id).await.expect("PodSandboxStatus");
    assert_eq!(stopped.state(), PodSandboxState::SandboxNotready);
    cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
    assert_eq!(cri.pod(&pod.id).await.expect_err("a removed pod").code(), tonic::Code::NotFound);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_are_64_hex_digits_and_a_unique_prefix_is_enough() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    for id in [&pod.id, &id] {
        assert!(id.len() == 64 && id.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f')), "id {id}");
    }
    assert_eq!(daemon.cri.pod(&pod.id[..13]).await.expect("PodSandboxStatus").id, pod.id);
    assert_eq!(daemon.cri.container(&id[..13]).await.expect("ContainerStatus").id, id);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_and_reasons() {
    let (daemon, pod) = daemon_with_pod().await;
    for (name, script, code, reason) in [
        ("zero", "exit 0", 0, "Completed"),
        ("one", "exit 1", 1, "Error"),
        ("most", "exit 255", 255, "Error"),
        ("term", "sh -c 'kill -TERM $$' ; exit $?", 143, "Error"),
    ] {
        let id = daemon.run(&pod, &sh(name, script)).await.expect("start");
        let status = daemon.cri.exited(&id).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (code, reason), "{script}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_sends_the_stop_signal_then_kills() {
    let (daemon, pod) = daemon_with_pod().await;
    let cri = &daemon.cri;
    // Ends on SIGTERM with a code of its own.
    let polite = daemon
        .run(&pod, &sh("polite", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done"))
        .await
        .expect("start");
    crate::logs::wait_for_line(&pod, "polite", "ready").await;
    let start = std::time::Instant::now();
    cri.stop(&polite, 20).await.expect("StopContainer");
    assert!(start.elapsed().as_secs() < 10, "took {:?}", start.elapsed());
    let status = cri.container(&polite).await.expect("ContainerStatus");
    assert_eq!(status.state(), ContainerState::ContainerExited, "EXITED must be visible when Stop returns");
    assert_eq!(status.exit_code, 7);

    // Deaf to SIGTERM: killed when the time is over, not before.
    let deaf = daemon
        .run(&pod, &sh("deaf", "trap '' TERM; echo ready; while :; do sleep 0.1; done"))
        .await
        .expect("start");
    crate::logs::wait_for_line(&pod, "deaf", "ready").await;
    let start = std::time::Instant::now();
    cri.stop(&deaf, 1).await.expect("StopContainer");
    assert!((900..6000).contains(&start.elapsed().as_millis()), "took {:?}", start.elapsed());
    let status = cri.container(&deaf).await.expect("ContainerStatus");
    assert_eq!((status.state(), status.exit_code), (ContainerState::ContainerExited, 137));

    // No time at all: killed at once.
    let killed = daemon.run(&pod, &sleeper("killed")).await.expect("start");
    let start = std::time::Instant::now();
    cri.stop(&killed, 0).await.expect("StopContainer");
    assert!(start.elapsed().as_millis() < 1000, "took {:?}", start.elapsed());
    assert_eq!(cri.container(&killed).await.expect("ContainerStatus").exit_code, 137);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_is_not_in_the_image_is_refused_at_create() {
    let (daemon, pod) = daemon_with_pod().await;
    let config = stave_e2e::container("main", &busybox(), &["/no/such/program"]);
    let error = daemon.create(&pod, &config).await.expect_err("a command that is not there");
    assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error:?}");
    assert!(error.message().contains("/no/such/program"), "{error:?}");
    assert!(daemon.cri.containers(None).await.expect("ListContainers").is_empty());
    // The pod is none the worse for it.
    let next = daemon.run(&pod, &sh("next", "exit 0")).await.expect("start");
    assert_eq!(daemon.cri.exited(&next).await.exit_code, 0);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_a_pod_kills_its_containers_and_keeps_their_records() {
    let (daemon, pod) = daemon_with_pod().await;
    let first = daemon.run(&pod, &sleeper("first")).await.expect("start");
    let second = daemon.run(&pod, &sleeper("second")).await.expect("start");
    daemon.cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
    for id in [&first, &second] {
        let status = daemon.cri.container(id).await.expect("ContainerStatus");
        assert_eq!((status.state(), status.exit_code), (ContainerState::ContainerExited, 137));
    }
    assert_eq!(daemon.cri.containers(None).await.expect("ListContainers").len(), 2);
    let error = daemon.create(&pod, &sh("late", "exit 0")).await.expect_err("a container in a stopped pod");
    assert!(error.message().contains(&pod.id[..12]), "{error:?}");
    daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
    assert!(
        daemon.cri.containers(None).await.expect("ListContainers").is_empty(),
        "containers go with their pod"
    );
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn removing_running_ones_kills_them() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    daemon.cri.remove(&id).await.expect("RemoveContainer of a running container");
    assert!(daemon.cri.containers(None).await.expect("ListContainers").is_empty());
    daemon.run(&pod, &sleeper("again")).await.expect("start");
    daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox of a running pod");
    assert!(daemon.cri.pods(None).await.expect("ListPodSandbox").is_empty());
    daemon.assert_clean().await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_sync_gives_output_and_exit_code() {
    let (daemon, pod) = daemon_with_pod().await;
    let cri = &daemon.cri;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let result =
        cri.exec(&id, &["/bin/sh", "-c", "printf out; printf err >&2; exit 5"]).await.expect("ExecSync");
    assert_eq!(
        (result.stdout.as_slice(), result.stderr.as_slice(), result.exit_code),
        (&b"out"[..], &b"err"[..], 5)
    );
    // No time limit at all.
    let request = stave_e2e::cri::ExecSyncRequest {
        container_id: id.clone(),
        cmd: vec!["/bin/echo".into(), "-n".into(), "x y".into()],
        timeout: 0,
    };
    assert_eq!(cri.exec_sync(request).await.expect("ExecSync").stdout, b"x y");
    // What can't be executed is an error, in the words that people know from runc.
    for (program, reason) in [
        ("no-such-program", "executable file not found in $PATH"),
        ("/no/such/program", "no such file or directory"),
        ("/etc/passwd", "permission denied"),
    ] {
        let error = cri.exec(&id, &[program]).await.expect_err(program);
        let named = format!("exec: \"{program}\": ");
        assert!(error.message().contains(&named) && error.message().contains(reason), "{error:?}");
    }
    assert_eq!(cri.exec(&id, &[]).await.expect_err("no command").code(), tonic::Code::InvalidArgument);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_sync_ends_at_its_timeout_with_its_children() {
    let (daemon, pod) = daemon_with_pod().await;
    let cri = &daemon.cri;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let request = stave_e2e::cri::ExecSyncRequest {
        container_id: id.clone(),
        cmd: ["/bin/sh", "-c", "sleep 4321 & sleep 4321"].map(String::from).to_vec(),
        timeout: 1,
    };
    let start = std::time::Instant::now();
    let error = cri.exec_sync(request).await.expect_err("a command over its time");
    assert_eq!(error.code(), tonic::Code::DeadlineExceeded, "{error:?}");
    assert!((900..5000).contains(&start.elapsed().as_millis()), "took {:?}", start.elapsed());
    assert_eq!(cri.shell(&id, "pgrep -fx 'sleep 4321' || true").await, "", "nothing of it goes on");
    // pgrep does not see zombies: they have no command line.
    stave_e2e::eventually("the end of all zombies", async || {
        cri.shell(&id, "grep -l '^State:.Z' /proc/[0-9]*/status || true").await.is_empty().then_some(())
    })
    .await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn verbose_status_has_json_for_people() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let request = ContainerStatusRequest { container_id: id.clone(), verbose: true };
    let info = daemon.cri.container_status(request).await.expect("ContainerStatus").info;
    let value: serde_json::Value = serde_json::from_str(&info["info"]).expect("info is JSON");
    assert!(value["pid"].as_i64().is_some_and(|pid| pid > 1), "pid in {value}");
    assert_eq!(value["sandboxID"], pod.id.as_str());
    assert!(value["runtimeSpec"].is_object(), "runtimeSpec in {value}");
    let request = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
    let info = daemon.cri.pod_sandbox_status(request).await.expect("PodSandboxStatus").info;
    let value: serde_json::Value = serde_json::from_str(&info["info"]).expect("info is JSON");
    assert!(value["pid"].as_i64().is_some_and(|pid| pid > 1), "pid in {value}");
    daemon.finish().await;
}
