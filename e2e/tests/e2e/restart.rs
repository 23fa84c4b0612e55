use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use stave_e2e::cri::{ContainerState, PodSandboxState};
use stave_e2e::{eventually, image, pod, read_log};

use crate::{busybox, daemon, daemon_with_pod, now, sh, sleeper};

#[tokio::test(flavor = "multi_thread")]
async fn pods_go_on_and_log_while_the_daemon_is_dead() {
    let (mut daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sh("ticker", "while :; do echo tick; sleep 0.05; done")).await.expect("start");
    let before = daemon.cri.container(&id).await.expect("ContainerStatus");
    let pod_before = daemon.cri.pod(&pod.id).await.expect("PodSandboxStatus");
    crate::logs::wait_for_line(&pod, "ticker", "tick").await;
    daemon.kill();
    let lines = |path: &str| std::fs::read_to_string(path).expect("log").lines().count();
    let at_death = lines(&before.log_path);
    eventually("lines in the log with no daemon", async || {
        (lines(&before.log_path) > at_death + 3).then_some(())
    })
    .await;
    daemon.restart().await;
    assert_eq!(
        daemon.cri.container(&id).await.expect("ContainerStatus"),
        before,
        "the same container, unchanged"
    );
    assert_eq!(
        daemon.cri.pod(&pod.id).await.expect("PodSandboxStatus"),
        pod_before,
        "the same pod, unchanged"
    );
    assert_eq!(daemon.cri.pods(None).await.expect("ListPodSandbox").len(), 1);
    assert!(daemon.cri.image(&busybox()).await.expect("ImageStatus").is_some(), "images are found again");
    assert_eq!(daemon.cri.shell(&id, "echo alive").await, "alive\n");
    let at_restart = lines(&before.log_path);
    eventually("lines in the log after the restart", async || {
        (lines(&before.log_path) > at_restart + 3).then_some(())
    })
    .await;
    assert!(read_log_whole(&before.log_path), "no line is broken");
    daemon.cri.stop(&id, 0).await.expect("StopContainer after a restart");
    assert_eq!(daemon.cri.container(&id).await.expect("ContainerStatus").exit_code, 137);
    daemon.finish().await;
}

fn read_log_whole(path: &str) -> bool {
    let content = std::fs::read_to_string(path).expect("log");
    let whole = &content[..content.rfind('\n').map_or(0, |end| end + 1)];
    stave_e2e::parse_log(whole).iter().all(|line| line.text == "tick" && !line.partial)
}

#[tokio::test(flavor = "multi_thread")]
async fn exits_in_between_are_found_with_their_code_and_time() {
    let (mut daemon, pod) = daemon_with_pod().await;
    let short = daemon.run(&pod, &sh("short", "sleep 1; echo last words; exit 42")).await.expect("start");
    let long = daemon.run(&pod, &sleeper("long")).await.expect("start");
    let created = daemon.create(&pod, &sh("created", "exit 6")).await.expect("CreateContainer");
    daemon.kill();
    crate::logs::wait_for_line(&pod, "short", "last words").await;
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    let ended_before = now();
    daemon.restart().await;
    let status = daemon.cri.container(&short).await.expect("ContainerStatus");
    assert_eq!((status.state(), status.exit_code), (ContainerState::ContainerExited, 42));
    assert_eq!(status.reason, "Error");
    assert!(status.started_at < status.finished_at && status.finished_at < ended_before, "{status:?}");
    assert_eq!(read_log(&status.log_path).last().expect("a line").text, "last words");
    let status = daemon.cri.container(&long).await.expect("ContainerStatus");
    assert_eq!(status.state(), ContainerState::ContainerRunning);
    // A container that was only created can still be started.
    assert_eq!(
        daemon.cri.container(&created).await.expect("ContainerStatus").state(),
        ContainerState::ContainerCreated
    );
    daemon.cri.start(&created).await.expect("StartContainer after a restart");
    assert_eq!(daemon.cri.exited(&created).await.exit_code, 6);
    // And the pod takes new ones.
    let new = daemon.run(&pod, &sh("new", "exit 0")).await.expect("start");
    assert_eq!(daemon.cri.exited(&new).await.exit_code, 0);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_told_the_same_after_three_kills() {
    let mut daemon = daemon().await;
    let ready = daemon.run_pod(pod("ready")).await.expect("RunPodSandbox");
    let stopped = daemon.run_pod(pod("stopped")).await.expect("RunPodSandbox");
    daemon.run(&ready, &sleeper("main")).await.expect("start");
    let ended = daemon.run(&ready, &sh("ended", "exit 1")).await.expect("start");
    daemon.cri.exited(&ended).await;
    daemon.run(&stopped, &sleeper("main")).await.expect("start");
    daemon.cri.stop_pod(&stopped.id).await.expect("StopPodSandbox");
    let told = async |daemon: &stave_e2e::Daemon| {
        let mut pods = daemon.cri.pods(None).await.expect("ListPodSandbox");
        let mut containers = daemon.cri.containers(None).await.expect("ListContainers");
        pods.sort_by(|a, b| a.id.cmp(&b.id));
        containers.sort_by(|a, b| a.id.cmp(&b.id));
        let images = daemon.cri.list_images(Default::default()).await.expect("ListImages").images;
        (pods, containers, images)
    };
    let before = told(&daemon).await;
    for _ in 0..3 {
        daemon.kill();
        daemon.restart().await;
        assert_eq!(told(&daemon).await, before);
    }
    daemon.finish().await;
}

/// The pod's supervisor, by its command line.
fn supervisor_of(pod_id: &str) -> Pid {
    let mut processes = std::fs::read_dir("/proc").expect("/proc").flatten();
    let found = processes.find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse::<i32>().ok()?;
        let cmdline = std::fs::read_to_string(entry.path().join("cmdline")).ok()?;
        (cmdline.starts_with("stave-pod\0") && cmdline.contains(pod_id)).then_some(pid)
    });
    Pid::from_raw(found.expect("the pod's supervisor"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_supervisor_does_not_answer_is_not_lost() {
    let (mut daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let hung = daemon.run_pod(stave_e2e::pod("hung")).await.expect("RunPodSandbox");
    daemon.run(&hung, &sleeper("main")).await.expect("start");
    let (supervisor, other) = (supervisor_of(&pod.id), supervisor_of(&hung.id));
    // As when the storage of the logs hangs.
    for pid in [supervisor, other] {
        kill(pid, Signal::SIGSTOP).expect("SIGSTOP");
    }
    daemon.kill();
    daemon.restart().await;
    // Long enough for the hello to be given up.
    tokio::time::sleep(std::time::Duration::from_secs(6)).await;
    let status = daemon.cri.pod(&pod.id).await.expect("PodSandboxStatus");
    assert_eq!(status.state(), PodSandboxState::SandboxReady);
    let status = daemon.cri.container(&id).await.expect("ContainerStatus");
    assert_eq!(status.state(), ContainerState::ContainerRunning);
    let error = daemon.cri.exec(&id, &["true"]).await.expect_err("ExecSync");
    assert!(format!("{error:?}").contains("its supervisor does not answer"), "{error:?}");
    // It can be stopped all the same.
    daemon.cri.stop_pod(&hung.id).await.expect("StopPodSandbox");
    daemon.cri.remove_pod(&hung.id).await.expect("RemovePodSandbox");
    kill(supervisor, Signal::SIGCONT).expect("SIGCONT");
    eventually("the pod to be taken up", async || daemon.cri.exec(&id, &["true"]).await.ok()).await;
    daemon.cri.stop(&id, 0).await.expect("StopContainer");
    assert_eq!(daemon.cri.container(&id).await.expect("ContainerStatus").exit_code, 137);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_supervisor_died_is_not_ready_and_can_be_removed() {
    let (mut daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    daemon.kill();
    kill(supervisor_of(&pod.id), Signal::SIGKILL).expect("SIGKILL");
    daemon.restart().await;
    eventually("the pod to be not ready", async || {
        let status = daemon.cri.pod(&pod.id).await.expect("PodSandboxStatus");
        (status.state() == PodSandboxState::SandboxNotready).then_some(())
    })
    .await;
    let status = daemon.cri.container(&id).await.expect("ContainerStatus");
    assert_eq!(status.state(), ContainerState::ContainerExited);
    assert_ne!(status.exit_code, 0);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn removal_works_after_a_restart() {
    let (mut daemon, pod) = daemon_with_pod().await;
    daemon.run(&pod, &sleeper("one")).await.expect("start");
    daemon.run(&pod, &sleeper("two")).await.expect("start");
    daemon.kill();
    daemon.restart().await;
    daemon.cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
    daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
    daemon.assert_clean().await;
    daemon.cri.remove_image_named(&busybox()).await.expect("RemoveImage");
    assert_eq!(daemon.cri.image(&busybox()).await.expect("ImageStatus"), None);
    daemon.cri.pull(&image("stave/busybox")).await.expect("PullImage");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_cant_be_read_stops_nothing() {
    let (mut daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let other = daemon.run_pod(stave_e2e::pod("other")).await.expect("RunPodSandbox");
    daemon.kill();
    // Garbage where records are: in every directory of records there may be a file that is none.
    let mut damaged = 0;
    for top in ["root", "state"] {
        for sub in ["pods", "containers", "images"] {
            let directory = daemon.directory().join(top).join(sub);
            if directory.is_dir() {
                std::fs::write(directory.join("damaged.json"), b"{ half a reco").expect("garbage");
                damaged += 1;
            }
        }
    }
    daemon.restart().await;
    assert_eq!(
        daemon.cri.container(&id).await.expect("ContainerStatus").state(),
        ContainerState::ContainerRunning
    );
    assert_eq!(
        daemon.cri.pod(&other.id).await.expect("PodSandboxStatus").state(),
        PodSandboxState::SandboxReady
    );
    assert!(damaged > 0, "found no directory of records to damage");
    daemon.finish().await;
}

/// Changes a record while no daemon runs.
fn edit_record(daemon: &stave_e2e::Daemon, name: &str, change: impl FnOnce(String) -> String) {
    let path = daemon.directory().join("root/records").join(name);
    let text = std::fs::read_to_string(&path).expect("a record");
    std::fs::write(path, change(text)).expect("write");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_container_of_a_stopped_pod_runs_whatever_its_record_says() {
    let (mut daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    daemon.cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
    daemon.kill();
    // As if the disk had been full when it ended.
    edit_record(&daemon, &format!("containers/{id}.json"), |text| {
        assert!(text.contains("\"Exited\""), "{text}");
        text.replace("\"Exited\"", "\"Running\"")
    });
    daemon.restart().await;
    let status = daemon.cri.container(&id).await.expect("ContainerStatus");
    assert_eq!(status.state(), ContainerState::ContainerExited);
    daemon.cri.stop(&id, 2).await.expect("StopContainer");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_record_cant_be_read_does_not_run_on_unseen() {
    let (mut daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let other = daemon.run_pod(stave_e2e::pod("other")).await.expect("RunPodSandbox");
    daemon.kill();
    edit_record(&daemon, &format!("pods/{}.json", pod.id), |text| text[..text.len() / 2].to_owned());
    daemon.restart().await;
    let error = daemon.cri.pod(&pod.id).await.expect_err("no such pod");
    assert_eq!(error.code(), tonic::Code::NotFound, "{error:?}");
    let error = daemon.cri.container(&id).await.expect_err("no such container");
    assert_eq!(error.code(), tonic::Code::NotFound, "{error:?}");
    let status = daemon.cri.pod(&other.id).await.expect("PodSandboxStatus");
    assert_eq!(status.state(), PodSandboxState::SandboxReady);
    let processes = || {
        std::fs::read_dir("/proc").expect("/proc").flatten().filter(|entry| {
            let read = |name: &str| std::fs::read_to_string(entry.path().join(name)).unwrap_or_default();
            read("cmdline").contains(&pod.id) || read("cgroup").contains(&id)
        })
    };
    eventually("the end of its processes", async || (processes().count() == 0).then_some(())).await;
    let _ = std::fs::remove_dir_all(daemon.directory().join("root/records/pods/.broken"));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cant_be_read_now_is_left_alone() {
    let (mut daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let other = daemon.run_pod(stave_e2e::pod("other")).await.expect("RunPodSandbox");
    let lost = daemon.run(&other, &sleeper("lost")).await.expect("start");
    let records = daemon.directory().join("root/records");
    for damaged in [format!("pods/{}.json", pod.id), format!("containers/{lost}.json")] {
        daemon.kill();
        let path = records.join(&damaged);
        let whole = std::fs::read(&path).expect("a record");
        std::fs::write(&path, &whole[..whole.len() / 2]).expect("write");
        // It can't be set aside, as on a disk with errors.
        let broken = path.parent().expect("directory").join(".broken");
        std::fs::write(&broken, "").expect("write");
        daemon.restart().await;
        daemon.kill();
        std::fs::write(&path, &whole).expect("write");
        std::fs::remove_file(&broken).expect("removal");
        daemon.restart().await;
        for (pod, id) in [(&pod.id, &id), (&other.id, &lost)] {
            let status = daemon.cri.pod(pod).await.expect("PodSandboxStatus");
            assert_eq!(status.state(), PodSandboxState::SandboxReady, "{damaged}");
            let status = daemon.cri.container(id).await.expect("ContainerStatus");
            assert_eq!(status.state(), ContainerState::ContainerRunning, "{damaged}");
        }
        assert_eq!(daemon.cri.output(&id, &["echo", "there"]).await.trim(), "there");
    }
    daemon.finish().await;
}
