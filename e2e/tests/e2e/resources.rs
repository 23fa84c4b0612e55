//! UpdateContainerResources and UpdatePodSandboxResources.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use serde_json::Value;
use stave_e2e::cri::*;
use stave_e2e::{Config, Daemon, newer_client, newer_cri};
use tonic::{Code, Status};

use crate::{daemon_with_pod, sh, sleeper};

type Resources = LinuxContainerResources;

async fn update(daemon: &Daemon, id: &str, change: impl FnOnce(&mut Resources)) -> Result<(), Status> {
    let mut resources = Resources::default();
    change(&mut resources);
    let request = UpdateContainerResourcesRequest {
        container_id: id.to_owned(),
        linux: Some(resources),
        ..Default::default()
    };
    daemon.cri.runtime.clone().update_container_resources(request).await.map(drop)
}

async fn echo(daemon: &Daemon, id: &str) -> Resources {
    let status = daemon.cri.container(id).await.expect("ContainerStatus");
    status.resources.and_then(|resources| resources.linux).expect("resources")
}

fn limited(config: ContainerConfig, change: impl FnOnce(&mut Resources)) -> ContainerConfig {
    config.with(|config| change(config.linux.get_or_insert_default().resources.get_or_insert_default()))
}

/// The container's directory for a controller, and whether it is one of a v1 hierarchy.
pub(crate) fn cgroup(daemon: &Daemon, id: &str, controller: &str) -> (PathBuf, bool) {
    let v1 = PathBuf::from("/sys/fs/cgroup").join(controller);
    let is_v1 = v1.join("cgroup.procs").exists();
    let top = if is_v1 { v1 } else { "/sys/fs/cgroup".into() };
    let mut queue = vec![top.join(&daemon.cgroup_parent()[1..])];
    while let Some(directory) = queue.pop() {
        if directory.file_name().is_some_and(|name| name == id) {
            return (directory, is_v1);
        }
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        queue.extend(entries.map(|entry| entry.path()).filter(|path| path.is_dir()));
    }
    panic!("no cgroup of {id} below {}", top.display());
}

/// What the kernel has: quota and period, shares or weight, memory limit.
fn kernel(daemon: &Daemon, id: &str) -> [String; 3] {
    let read = |controller: &str, v1: &str, v2: &str| {
        let (directory, is_v1) = cgroup(daemon, id, controller);
        let words: Vec<_> = if is_v1 { v1 } else { v2 }
            .split(' ')
            .map(|file| fs::read_to_string(directory.join(file)).expect("cgroup file").trim().to_owned())
            .collect();
        words.join(" ")
    };
    [
        read("cpu", "cpu.cfs_quota_us cpu.cfs_period_us", "cpu.max"),
        read("cpu", "cpu.shares", "cpu.weight"),
        read("memory", "memory.limit_in_bytes", "memory.max"),
    ]
}

fn wanted(
    daemon: &Daemon,
    id: &str,
    quota: &str,
    (shares, weight): (&str, &str),
    memory: i64,
) -> [String; 3] {
    let shares = if cgroup(daemon, id, "cpu").1 { shares } else { weight };
    [quota.to_owned(), shares.to_owned(), memory.to_string()]
}

async fn info(daemon: &Daemon, pod: &str) -> Value {
    let request = PodSandboxStatusRequest { pod_sandbox_id: pod.to_owned(), verbose: true };
    let answer = daemon.cri.pod_sandbox_status(request).await.expect("PodSandboxStatus");
    serde_json::from_str(&answer.info["info"]).expect("JSON")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_changes_what_it_names_and_survives_the_daemon() {
    let (mut daemon, pod) = daemon_with_pod().await;
    let config = limited(sleeper("main"), |resources| {
        resources.cpu_period = 50_000;
        resources.cpu_quota = 20_000;
        resources.cpu_shares = 512;
        resources.memory_limit_in_bytes = 64 << 20;
        resources.oom_score_adj = 500;
    });
    let id = daemon.create(&pod, &config).await.expect("CreateContainer");
    let half = ("512", "59");
    assert_eq!(kernel(&daemon, &id), wanted(&daemon, &id, "20000 50000", half, 64 << 20));

    // Created, not started yet. The period is not named, and stays.
    update(&daemon, &id, |resources| resources.cpu_quota = 30_000).await.expect("update while created");
    assert_eq!(kernel(&daemon, &id), wanted(&daemon, &id, "30000 50000", half, 64 << 20));
    daemon.cri.start(&id).await.expect("StartContainer");
    assert_eq!(kernel(&daemon, &id), wanted(&daemon, &id, "30000 50000", half, 64 << 20));

    update(&daemon, &id, |resources| {
        resources.memory_limit_in_bytes = 128 << 20;
        resources.cpu_shares = 1024;
        resources.oom_score_adj = -7;
    })
    .await
    .expect("update while running");
    let whole = ("1024", "100");
    assert_eq!(kernel(&daemon, &id), wanted(&daemon, &id, "30000 50000", whole, 128 << 20));
    // Of processes, not of the cgroup: neither changed nor told to be.
    assert_eq!(daemon.cri.output(&id, &["cat", "/proc/1/oom_score_adj"]).await, "500\n");
    let told = echo(&daemon, &id).await;
    let numbers = (told.cpu_quota, told.cpu_period, told.cpu_shares, told.memory_limit_in_bytes);
    assert_eq!(numbers, (30_000, 50_000, 1024, 128 << 20));
    assert_eq!(told.oom_score_adj, 500);

    daemon.kill();
    daemon.restart().await;
    assert_eq!(echo(&daemon, &id).await, told);
    // Nothing named: nothing changed.
    update(&daemon, &id, |_| {}).await.expect("empty update");
    assert_eq!(echo(&daemon, &id).await, told);
    assert_eq!(kernel(&daemon, &id), wanted(&daemon, &id, "30000 50000", whole, 128 << 20));

    daemon.cri.stop(&id, 0).await.expect("StopContainer");
    let error = update(&daemon, &id, |resources| resources.cpu_shares = 2).await.expect_err("exited");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    assert!(error.message().contains(&id) && error.message().contains("exited"), "{error:?}");
    let error = update(&daemon, "unknown", |resources| resources.cpu_shares = 2).await.expect_err("unknown");
    assert_eq!(error.code(), Code::NotFound, "{error:?}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_is_all_or_nothing() {
    let (daemon, pod) = daemon_with_pod().await;
    // 40 MiB of memory that can't be given back: there is no swap in the limit.
    let script = "trap 'exit 0' TERM; dd if=/dev/zero of=/dev/shm/full bs=1M count=40 2>/dev/null; \
                  echo full; while :; do sleep 3600 & wait $!; done";
    let config = limited(sh("main", script), |resources| {
        resources.cpu_shares = 512;
        resources.memory_limit_in_bytes = 128 << 20;
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    stave_e2e::eventually("40 MiB in use", async || {
        let (directory, is_v1) = cgroup(&daemon, &id, "memory");
        let file = if is_v1 { "memory.usage_in_bytes" } else { "memory.current" };
        let used: u64 = fs::read_to_string(directory.join(file)).ok()?.trim().parse().ok()?;
        (used > 40 << 20).then_some(())
    })
    .await;
    let before = (kernel(&daemon, &id), echo(&daemon, &id).await);

    let error = update(&daemon, &id, |resources| {
        resources.cpu_shares = 2048;
        resources.memory_limit_in_bytes = 8 << 20;
    })
    .await
    .expect_err("a limit below what is used");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    assert!(error.message().contains(&(8 << 20).to_string()), "{error:?}");
    assert_eq!((kernel(&daemon, &id), echo(&daemon, &id).await), before);
    let status = daemon.cri.container(&id).await.expect("ContainerStatus");
    assert_eq!(status.state(), ContainerState::ContainerRunning);

    // The first value would be fine; the list of CPUs is not.
    let error = update(&daemon, &id, |resources| {
        resources.cpu_shares = 2048;
        resources.cpuset_cpus = "60000".into();
    })
    .await
    .expect_err("a CPU that is not there");
    assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
    assert!(error.message().contains("60000"), "{error:?}");
    assert_eq!((kernel(&daemon, &id), echo(&daemon, &id).await), before);

    for (field, change) in [
        ("cpu_period", (|r| r.cpu_period = 10) as fn(&mut Resources)),
        ("cpu_quota", |r| r.cpu_quota = 10),
        ("memory_limit_in_bytes", |r| r.memory_limit_in_bytes = -5),
        // Together with the limit in force.
        ("memory_swap_limit_in_bytes", |r| r.memory_swap_limit_in_bytes = 1 << 20),
        ("unified", |r| r.unified = HashMap::from([("cgroup.kill".into(), "1".into())])),
    ] {
        let error = update(&daemon, &id, change).await.expect_err(field);
        assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
        assert!(error.message().contains(&format!("linux.{field}")), "{error:?}");
    }
    assert_eq!((kernel(&daemon, &id), echo(&daemon, &id).await), before);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn resources_of_a_pod_are_recorded_and_shown() {
    let (mut daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let before = kernel(&daemon, &id);
    assert!(info(&daemon, &pod.id).await["resources"].is_null());
    let memory =
        |bytes| newer_cri::LinuxContainerResources { memory_limit_in_bytes: bytes, ..Default::default() };
    let request = |pod: &str, bytes: i64| newer_cri::UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.to_owned(),
        overhead: Some(memory(1 << 20)),
        resources: Some(memory(bytes)),
    };
    let mut client = newer_client(&daemon.socket()).await;
    client.update_pod_sandbox_resources(request(&pod.id, 77 << 20)).await.expect("UpdatePodSandboxResources");
    assert_eq!(kernel(&daemon, &id), before);
    let (pod_directory, is_v1) = cgroup(&daemon, &id, "memory");
    let file = if is_v1 { "memory.limit_in_bytes" } else { "memory.max" };
    let limit =
        fs::read_to_string(pod_directory.parent().expect("pod").join(file)).expect("limit of the pod");
    assert_ne!(limit.trim(), (77 << 20).to_string());
    daemon.kill();
    daemon.restart().await;
    let shown = info(&daemon, &pod.id).await;
    assert_eq!(shown["resources"]["memory_limit_in_bytes"], 77 << 20);
    assert_eq!(shown["overhead"]["memory_limit_in_bytes"], 1 << 20);
    let mut client = newer_client(&daemon.socket()).await;
    let error = client.update_pod_sandbox_resources(request("unknown", 1)).await;
    assert_eq!(error.expect_err("unknown").code(), Code::NotFound);
    daemon.finish().await;
}

/// The record of a container, as a daemon leaves it that is killed in an update: before, in, or after its write to the
/// cgroup.
fn cut_short(daemon: &Daemon, id: &str, change: impl FnOnce(&mut Value)) {
    let path = daemon.directory().join(format!("root/records/containers/{id}.json"));
    let mut record: Value = serde_json::from_slice(&fs::read(&path).expect("record")).expect("JSON");
    assert!(record["update"].is_null(), "nothing is under way: {record}");
    record["update"] = record["resources"].clone();
    for (_, value) in record["update"].as_object_mut().expect("resources") {
        if value.is_number() {
            *value = 0.into();
        }
    }
    change(&mut record["update"]);
    fs::write(&path, record.to_string()).expect("record");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_that_was_cut_short_is_carried_out_or_taken_back() {
    let (mut daemon, pod) = daemon_with_pod().await;
    let config = limited(sleeper("main"), |resources| {
        resources.cpu_period = 50_000;
        resources.cpu_quota = 20_000;
        resources.cpu_shares = 512;
        resources.memory_limit_in_bytes = 64 << 20;
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let half = ("512", "59");
    daemon.kill();
    cut_short(&daemon, &id, |update| {
        update["cpu_quota"] = 30_000.into();
        update["memory_limit_in_bytes"] = (128 << 20).into();
    });
    daemon.restart().await;
    assert_eq!(kernel(&daemon, &id), wanted(&daemon, &id, "30000 50000", half, 128 << 20));
    let shown = echo(&daemon, &id).await;
    assert_eq!((shown.cpu_quota, shown.cpu_period, shown.memory_limit_in_bytes), (30_000, 50_000, 128 << 20));
    // One that the kernel refuses: less memory than is in use. Part of it was written before the kill.
    daemon.kill();
    cut_short(&daemon, &id, |update| {
        update["cpu_quota"] = 10_000.into();
        update["memory_limit_in_bytes"] = 4096.into();
    });
    let (directory, is_v1) = cgroup(&daemon, &id, "cpu");
    let (file, value) = if is_v1 { ("cpu.cfs_quota_us", "10000") } else { ("cpu.max", "10000 50000") };
    fs::write(directory.join(file), value).expect("cgroup file");
    daemon.restart().await;
    if is_v1 {
        assert_eq!(kernel(&daemon, &id), wanted(&daemon, &id, "30000 50000", half, 128 << 20));
        assert_eq!(echo(&daemon, &id).await.memory_limit_in_bytes, 128 << 20);
    }
    // What had no limit has none again.
    let free = limited(sleeper("free"), |resources| resources.memory_limit_in_bytes = 64 << 20);
    let free = daemon.run(&pod, &free).await.expect("start");
    let unlimited = kernel(&daemon, &free);
    daemon.kill();
    cut_short(&daemon, &free, |update| {
        update["cpu_quota"] = 10_000.into();
        update["cpu_shares"] = 2048.into();
        update["cpuset_cpus"] = "60000".into();
    });
    let (directory, is_v1) = cgroup(&daemon, &free, "cpu");
    let written = if is_v1 {
        [("cpu.shares", "2048"), ("cpu.cfs_quota_us", "10000")]
    } else {
        [("cpu.weight", "174"), ("cpu.max", "10000 100000")]
    };
    for (file, value) in written {
        fs::write(directory.join(file), value).expect("cgroup file");
    }
    assert_ne!(kernel(&daemon, &free), unlimited);
    daemon.restart().await;
    assert_eq!(kernel(&daemon, &free), unlimited);
    // It is over: the next daemon finds nothing to do, and updates go on.
    daemon.kill();
    cut_short(&daemon, &id, |_| {});
    daemon.restart().await;
    update(&daemon, &id, |resources| resources.cpu_quota = 40_000).await.expect("update");
    assert!(kernel(&daemon, &id)[0].starts_with("40000"));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_that_cant_be_recorded_changes_nothing() {
    let (daemon, pod) = daemon_with_pod().await;
    let config = limited(sleeper("main"), |resources| {
        resources.cpu_shares = 512;
        resources.memory_limit_in_bytes = 64 << 20;
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let before = (kernel(&daemon, &id), echo(&daemon, &id).await);
    let memory = newer_cri::LinuxContainerResources { memory_limit_in_bytes: 77 << 20, ..Default::default() };
    let of_pod = || newer_cri::UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.id.clone(),
        overhead: None,
        resources: Some(memory.clone()),
    };
    let mut client = newer_client(&daemon.socket()).await;
    {
        let _read_only = ["containers", "pods"]
            .map(|kind| ReadOnly::over(&daemon.directory().join("root/records").join(kind)));
        let error = update(&daemon, &id, |resources| {
            resources.cpu_shares = 2048;
            resources.memory_limit_in_bytes = 128 << 20;
        })
        .await
        .expect_err("no record");
        assert_eq!(error.code(), Code::Internal, "{error:?}");
        assert_eq!((kernel(&daemon, &id), echo(&daemon, &id).await), before);
        client.update_pod_sandbox_resources(of_pod()).await.expect_err("no record");
        assert!(info(&daemon, &pod.id).await["resources"].is_null());
    }
    // The repeats of the kubelet succeed.
    update(&daemon, &id, |resources| resources.cpu_shares = 2048).await.expect("update");
    assert_eq!(kernel(&daemon, &id), wanted(&daemon, &id, &before.0[0], ("2048", "174"), 64 << 20));
    client.update_pod_sandbox_resources(of_pod()).await.expect("UpdatePodSandboxResources");
    assert_eq!(info(&daemon, &pod.id).await["resources"]["memory_limit_in_bytes"], 77 << 20);
    daemon.finish().await;
}

/// A directory that nothing can be written to.
struct ReadOnly(PathBuf);

impl ReadOnly {
    fn over(path: &std::path::Path) -> ReadOnly {
        let none: Option<&str> = None;
        nix::mount::mount(Some(path), path, none, nix::mount::MsFlags::MS_BIND, none).expect("bind mount");
        let read_only = ReadOnly(path.to_owned());
        let flags =
            nix::mount::MsFlags::MS_BIND | nix::mount::MsFlags::MS_REMOUNT | nix::mount::MsFlags::MS_RDONLY;
        nix::mount::mount(none, path, none, flags, none).expect("read-only");
        read_only
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}
