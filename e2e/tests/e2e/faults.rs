//! What goes wrong half-way leaves nothing, and what is broken can be removed.

use std::fs;
use std::path::Path;

use stave_e2e::cri::{ContainerState, PodSandboxState, PortMapping, StatusRequest};
use stave_e2e::{Config, Daemon, Options, cgroup_directories, eventually, make_cgroup, pod, remove_cgroup};
use tonic::Code;

use crate::{busybox, daemon, daemon_with_pod, sh, sleeper};

/// How many cgroups are right below one.
pub(crate) fn children(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|entry| entry.path().is_dir()).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_full_disk_nothing_starts_and_everything_can_be_removed() {
    let daemon = Daemon::with(Options { root_size: Some(64 << 20), ..Default::default() }).await;
    daemon.cri.pull(&busybox()).await.expect("PullImage");
    let first = daemon.run_pod(pod("first")).await.expect("RunPodSandbox");
    let main = daemon.run(&first, &sleeper("main")).await.expect("start");
    let created = daemon.create(&first, &sh("created", "exit 0")).await.expect("CreateContainer");
    // tmpfs gives no page to a new file either, then; its inodes are limited apart.
    let full = fs::File::create(daemon.directory().join("root/full")).expect("a file");
    let mut block = 1 << 20;
    while block > 0 {
        if std::io::Write::write_all(&mut &full, &vec![1; block]).is_err() {
            block /= 2;
        }
    }
    let error = daemon.run_pod(pod("second")).await.expect_err("a full disk");
    assert!(matches!(error.code(), Code::Internal | Code::ResourceExhausted), "{error:?}");
    assert!(error.message().contains("space"), "{error:?}");
    let error = daemon.create(&first, &sh("late", "exit 0")).await.expect_err("a full disk");
    assert!(error.message().contains("space"), "{error:?}");
    assert_eq!(daemon.cri.pods(None).await.expect("ListPodSandbox").len(), 1);
    assert_eq!(daemon.cri.containers(None).await.expect("ListContainers").len(), 2);
    daemon.cri.stop(&main, 0).await.expect("StopContainer on a full disk");
    let status = daemon.cri.container(&main).await.expect("ContainerStatus");
    assert_eq!((status.state(), status.exit_code), (ContainerState::ContainerExited, 137));
    daemon.cri.remove(&created).await.expect("RemoveContainer on a full disk");
    daemon.cri.stop_pod(&first.id).await.expect("StopPodSandbox on a full disk");
    let status = daemon.cri.pod(&first.id).await.expect("PodSandboxStatus");
    assert_eq!(status.state(), PodSandboxState::SandboxNotready);
    daemon.cri.remove_pod(&first.id).await.expect("RemovePodSandbox on a full disk");
    daemon.assert_clean().await;
    fs::remove_file(daemon.directory().join("root/full")).expect("room");
    let again = daemon.run_pod(first.config.clone()).await.expect("RunPodSandbox with room again");
    daemon.run(&again, &sleeper("main")).await.expect("start");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_bridge_is_made_again_with_its_pods() {
    let (daemon, first) = daemon_with_pod().await;
    let main = daemon.run(&first, &sleeper("main")).await.expect("start");
    let bridge = daemon.bridge();
    let shell = |script: &str| {
        let status = std::process::Command::new("sh").args(["-ec", script]).status();
        assert!(status.expect("sh").success(), "{script}");
    };
    let ping =
        format!("ping -c 1 -W 1 {} >/dev/null && echo reached", daemon.subnet().replace(".0/24", ".1"));
    for damage in [
        format!("ip link delete {bridge}"),
        format!("nft delete table inet stave-{bridge}; ip link delete {bridge}"),
    ] {
        shell(&damage);
        stave_e2e::eventually("the pod's way out", async || {
            let result = daemon.cri.exec(&main, &["sh", "-c", &ping]).await.expect("ExecSync");
            (result.exit_code == 0).then_some(())
        })
        .await;
    }
    daemon.run_pod(pod("second")).await.expect("RunPodSandbox");

    // Something else has its name: that is told, and ends with it.
    // In one go, since the bridge is made again soon; and again where that was not soon enough.
    shell(&format!(
        "ip link add {bridge}y type veth peer name {bridge}x
         for try in 1 2 3 4 5 6 7 8 9; do
             printf 'link delete {bridge}\\nlink set {bridge}y name {bridge}\\n' | ip -batch - && exit 0
             sleep 0.3
         done; exit 1"
    ));
    let error = daemon.run_pod(pod("third")).await.expect_err("no bridge");
    assert_eq!(error.code(), Code::Internal, "{error:?}");
    assert!(error.message().starts_with("attaching to the network: "), "{error:?}");
    let ready = async || {
        let status =
            daemon.cri.status(StatusRequest::default()).await.expect("Status").status.expect("status");
        status.conditions.into_iter().find(|one| one.r#type == "NetworkReady").expect("NetworkReady")
    };
    let network = ready().await;
    assert!(!network.status && network.message.contains(&bridge), "{network:?}");
    assert_eq!(daemon.cri.pods(None).await.expect("ListPodSandbox").len(), 2, "the third left nothing");
    shell(&format!("ip link delete {bridge}"));
    stave_e2e::eventually("the bridge", async || ready().await.status.then_some(())).await;
    daemon.run_pod(pod("third")).await.expect("RunPodSandbox");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_supervisor_that_does_not_come_up_leaves_nothing() {
    let scripts = ["#!/bin/sh\nexit 3\n", "no program at all"];
    for script in scripts {
        let options = Options { supervisor: Some(script.to_owned()), ..Default::default() };
        let daemon = Daemon::with(options).await;
        let config = daemon.with_log_directory(pod("broken"));
        for _ in 0..3 {
            let error = daemon.cri.run_pod(&config).await.expect_err("no supervisor");
            assert_eq!(error.code(), Code::Internal, "{error:?}");
            assert!(error.message().starts_with("starting the supervisor: "), "{error:?}");
        }
        assert!(daemon.cri.pods(None).await.expect("ListPodSandbox").is_empty());
        assert_eq!(fs::read_dir(daemon.directory().join("state/pods")).expect("pods").count(), 0);
        assert_eq!(fs::read_dir(daemon.directory().join("root/records/pods")).expect("records").count(), 0);
        daemon.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_directory_that_cant_be_made_refuses_the_container_and_leaves_nothing() {
    let daemon = daemon().await;
    fs::write(daemon.directory().join("file"), "").expect("a file");
    let config = pod("logless").with(|config| {
        config.log_directory = daemon.directory().join("file/logs").to_string_lossy().into_owned();
    });
    // Whoever tells it first: the pod, or its container.
    match daemon.run_pod(config).await {
        Err(error) => assert!(error.message().contains("file/logs"), "{error:?}"),
        Ok(pod) => {
            let error = daemon.create(&pod, &sh("main", "exit 0")).await.expect_err("no place for its log");
            assert!(error.message().contains("file/logs"), "{error:?}");
            assert!(daemon.cri.containers(None).await.expect("ListContainers").is_empty());
            let state = daemon.directory().join("state/pods").join(&pod.id).join("containers");
            assert_eq!(fs::read_dir(state).expect("bundles").count(), 0);
        }
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_cgroup_was_removed_takes_no_container_and_can_be_removed() {
    let (daemon, pod) = daemon_with_pod().await;
    let cgroup = daemon.pod_cgroup(&pod.id);
    let removed = cgroup_directories(&cgroup).iter().filter(|dir| fs::remove_dir(dir).is_ok()).count();
    let result = daemon.create(&pod, &sh("main", "exit 0")).await;
    // Where all are held by the supervisor in them, nothing could be removed.
    if removed > 0 {
        let error = result.expect_err("no cgroup");
        assert_eq!(error.code(), Code::Internal, "{error:?}");
        assert!(error.message().contains(&cgroup), "{error:?}");
    }
    assert_eq!(daemon.cri.containers(None).await.expect("ListContainers").len(), usize::from(removed == 0));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_port_is_one_pods_only() {
    let daemon = daemon().await;
    let config = |name: &str| {
        pod(name).with(|config| {
            let mapping = PortMapping { container_port: 80, host_port: 39_999, ..Default::default() };
            config.port_mappings = vec![mapping];
        })
    };
    let first = daemon.run_pod(config("first")).await.expect("RunPodSandbox");
    let error = daemon.run_pod(config("second")).await.expect_err("the port is taken");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    for word in ["config.port_mappings", "39999", &first.id] {
        assert!(error.message().contains(word), "{word}: {error:?}");
    }
    assert_eq!(daemon.cri.pods(None).await.expect("ListPodSandbox").len(), 1);
    daemon.cri.stop_pod(&first.id).await.expect("StopPodSandbox");
    daemon.run_pod(config("second")).await.expect("the port is free with the pod's stop");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_that_share_the_kubelets_cgroup_leave_it_to_the_kubelet() {
    let mut daemon = daemon().await;
    for kubelets in [true, false] {
        let cgroup = daemon.kubelet_parent(&format!("kube{}", u8::from(kubelets)), "pod1");
        if kubelets {
            make_cgroup(&cgroup);
        }
        let config = pod("twice").with(|config| {
            config.linux.as_mut().expect("linux").cgroup_parent.clone_from(&cgroup);
        });
        let first = daemon.run_pod(config.clone()).await.expect("RunPodSandbox");
        let one = daemon.run(&first, &sleeper("main")).await.expect("start");
        let config = config.with(|config| config.metadata.as_mut().expect("metadata").attempt = 1);
        let second = daemon.run_pod(config).await.expect("the next sandbox of the same pod");
        let two = daemon.run(&second, &sleeper("main")).await.expect("start");
        daemon.kill();
        daemon.restart().await;
        daemon.cri.stop_pod(&first.id).await.expect("StopPodSandbox");
        assert_eq!(daemon.cri.exited(&one).await.exit_code, 137);
        assert_eq!(daemon.cri.shell(&two, "echo alive").await, "alive\n", "the other one goes on");
        daemon.cri.remove_pod(&first.id).await.expect("RemovePodSandbox");
        assert_eq!(daemon.cri.shell(&two, "echo alive").await, "alive\n");
        daemon.cri.remove_pod(&second.id).await.expect("RemovePodSandbox");
        let there =
            || -> Vec<_> { cgroup_directories(&cgroup).into_iter().filter(|dir| dir.exists()).collect() };
        // systemd needs a moment to see that nobody needs a slice.
        if !kubelets {
            eventually("the end of the pod's cgroup", async || there().is_empty().then_some(())).await;
        }
        let left = there();
        let full: Vec<_> = left.iter().filter(|dir| children(dir) > 0).collect();
        assert!(full.is_empty(), "something of a pod is left in {full:?}");
        assert_eq!(left.is_empty(), !kubelets, "{left:?}");
        remove_cgroup(&cgroup);
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_that_are_stopped_while_containers_are_made_leave_nothing() {
    let daemon = std::sync::Arc::new(daemon().await);
    for turn in 0..12 {
        let pod = daemon.run_pod(pod(&format!("pod-{turn}"))).await.expect("RunPodSandbox");
        let makers: Vec<_> = (0..4)
            .map(|maker| {
                let (daemon, pod) = (daemon.clone(), pod.clone());
                tokio::spawn(async move {
                    for number in 0.. {
                        let config = sleeper(&format!("c{maker}-{number}"));
                        match daemon.run(&pod, &config).await {
                            Ok(_) => {}
                            Err(error) => return error,
                        }
                    }
                    unreachable!()
                })
            })
            .collect();
        tokio::time::sleep(std::time::Duration::from_millis(30 + 7 * turn)).await;
        if turn % 2 == 0 {
            daemon.cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
        }
        daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
        for maker in makers {
            let error = maker.await.expect("a maker");
            let codes = [Code::NotFound, Code::FailedPrecondition, Code::Internal];
            assert!(codes.contains(&error.code()), "{error:?}");
        }
        assert!(daemon.cri.containers(None).await.expect("ListContainers").is_empty());
        daemon.assert_clean().await;
    }
    std::sync::Arc::into_inner(daemon).expect("the last owner").finish().await;
}

/// A file system that hangs: a FUSE whose server never answers. Dropped, it is gone, and whoever waits for it goes on.
struct Hanging {
    dir: std::path::PathBuf,
    _server: fs::File,
}

impl Hanging {
    fn mount() -> Self {
        // Not in the daemon's directory: who removes that must not meet it.
        let dir = std::env::temp_dir().join(format!("stave-e2e-hanging-{}", std::process::id()));
        fs::create_dir(&dir).expect("mount point");
        let server = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").expect("/dev/fuse");
        let options =
            format!("fd={},rootmode=40000,user_id=0,group_id=0", std::os::fd::AsRawFd::as_raw_fd(&server));
        let none = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("hanging"), &dir, Some("fuse"), none, Some(options.as_str())).expect("mount");
        Self { dir, _server: server }
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.dir, nix::mount::MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.dir);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_hangs_holds_up_its_containers_and_nothing_else() {
    let (daemon, pod) = daemon_with_pod().await;
    let hanging = Hanging::mount();
    // As many as the daemon has threads for requests, and more.
    let makers: Vec<_> = (0..2 * std::thread::available_parallelism().map_or(8, usize::from))
        .map(|number| {
            let config = sleeper(&format!("c{number}")).with(|config| {
                config.mounts = vec![stave_e2e::cri::Mount {
                    container_path: "/data".into(),
                    host_path: hanging.dir.to_string_lossy().into_owned(),
                    ..Default::default()
                }];
            });
            let (cri, pod) = (daemon.cri.clone(), pod.clone());
            tokio::spawn(async move { cri.create(&pod.id, &config, &pod.config).await })
        })
        .collect();
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    let other = tokio::time::timeout(stave_e2e::limit(10), async {
        let other = daemon.run_pod(stave_e2e::pod("other")).await.expect("RunPodSandbox");
        daemon.run(&other, &sleeper("main")).await.expect("a container without that volume");
        other
    });
    let other = other.await.expect("the daemon answers");
    assert!(makers.iter().all(|maker| !maker.is_finished()), "the volume does not hang");
    // Nor does the pod's end wait for it.
    tokio::time::timeout(stave_e2e::limit(10), daemon.cri.remove_pod(&pod.id))
        .await
        .expect("the pod's end")
        .expect("RemovePodSandbox");
    for maker in makers {
        let error = maker.await.expect("a maker").expect_err("CreateContainer");
        assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
        assert!(error.message().starts_with("checking the request: "), "{error:?}");
    }
    daemon.cri.remove_pod(&other.id).await.expect("RemovePodSandbox");
    // And not the daemon's.
    daemon.finish().await;
    drop(hanging);
}
