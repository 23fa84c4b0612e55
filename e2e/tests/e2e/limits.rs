use std::fs;
use std::path::PathBuf;

use stave_e2e::cri::{ContainerConfig, LinuxContainerResources};
use stave_e2e::{Config, Daemon, eventually};

use crate::{daemon_with_pod, sh, sleeper};

fn limited(config: ContainerConfig, change: impl FnOnce(&mut LinuxContainerResources)) -> ContainerConfig {
    config.with(|config| change(config.linux.get_or_insert_default().resources.get_or_insert_default()))
}

/// The value of a controller's file for the container: that of v1's name on hosts with a hierarchy for each
/// controller, else that of v2.
fn limit(daemon: &Daemon, id: &str, controller: &str, v1: &str, v2: &str) -> (bool, String) {
    // The container's cgroup ends in its id, wherever the layout puts it.
    let hierarchy = PathBuf::from("/sys/fs/cgroup").join(controller);
    let (top, file, is_v1) = if hierarchy.join("tasks").exists() {
        (hierarchy, v1, true)
    } else {
        (PathBuf::from("/sys/fs/cgroup"), v2, false)
    };
    let mut queue = vec![top.join(&daemon.cgroup_parent()[1..])];
    while let Some(directory) = queue.pop() {
        if directory.file_name().is_some_and(|name| name.to_string_lossy().contains(id)) {
            let path = directory.join(file);
            let value = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            return (is_v1, value.trim().to_owned());
        }
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        queue.extend(entries.map(|entry| entry.path()).filter(|path| path.is_dir()));
    }
    panic!("no cgroup of {id} below {}{}", top.display(), daemon.cgroup_parent());
}

#[tokio::test(flavor = "multi_thread")]
async fn over_its_memory_a_container_is_oom_killed() {
    let (daemon, pod) = daemon_with_pod().await;
    // As the conformance suite does it: a child of the shell takes too much.
    let config =
        limited(sh("hungry", "dd if=/dev/zero of=/dev/null bs=100M count=1; exit $?"), |resources| {
            resources.memory_limit_in_bytes = 15 << 20;
        });
    let id = daemon.run(&pod, &config).await.expect("start");
    let status = daemon.cri.exited(&id).await;
    assert_eq!(status.exit_code, 137);
    eventually("the reason OOMKilled", async || {
        let status = daemon.cri.container(&id).await.expect("ContainerStatus");
        (status.reason == "OOMKilled").then_some(())
    })
    .await;
    let echoed = status.resources.and_then(|resources| resources.linux).expect("resources");
    assert_eq!(echoed.memory_limit_in_bytes, 15 << 20);
    // Killed by us is not killed for memory.
    let config = limited(sleeper("killed"), |resources| resources.memory_limit_in_bytes = 64 << 20);
    let id = daemon.run(&pod, &config).await.expect("start");
    daemon.cri.stop(&id, 0).await.expect("StopContainer");
    let status = daemon.cri.container(&id).await.expect("ContainerStatus");
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_the_kernel_killed_is_oom_killed() {
    let (daemon, pod) = daemon_with_pod().await;
    let little = |name: &str, script: &str| {
        limited(sh(name, script), |resources| resources.memory_limit_in_bytes = 16 << 20)
    };
    // Once the line is there, a child has been killed, and the init lives.
    let child = "dd if=/dev/zero of=/dev/null bs=100M count=1; test $? = 137 && echo killed; ";
    let ended = async |name: &str, rest: &str, stop: Option<i64>| {
        let id = daemon.run(&pod, &little(name, &format!("{child}{rest}"))).await.expect("start");
        if let Some(timeout) = stop {
            crate::logs::wait_for_line(&pod, name, "killed").await;
            daemon.cri.stop(&id, timeout).await.expect("StopContainer");
        }
        let status = daemon.cri.exited(&id).await;
        assert!(stave_e2e::read_log(&status.log_path).iter().any(|line| line.text == "killed"), "{name}");
        (status.exit_code, status.reason)
    };
    let sleep = "trap '' TERM; while :; do sleep 1; done";
    for (name, rest, stop, code, reason) in [
        ("completed", "exit 0", None, 0, "Completed"),
        ("failed", "exit 3", None, 3, "Error"),
        ("killed-at-once", sleep, Some(0), 137, "Error"),
        ("killed-at-the-deadline", sleep, Some(1), 137, "Error"),
    ] {
        assert_eq!(ended(name, rest, stop).await, (code, reason.to_owned()), "{name}");
    }
    let init = little("init", "exec dd if=/dev/zero of=/dev/null bs=100M count=1");
    let id = daemon.run(&pod, &init).await.expect("start");
    let status = daemon.cri.exited(&id).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cpu_and_memory_limits_are_in_the_cgroup_and_in_the_status() {
    let (daemon, pod) = daemon_with_pod().await;
    let config = limited(sleeper("main"), |resources| {
        resources.cpu_period = 100_000;
        resources.cpu_quota = 50_000;
        resources.cpu_shares = 512;
        resources.memory_limit_in_bytes = 64 << 20;
        resources.oom_score_adj = 500;
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let (v1, memory) = limit(&daemon, &id, "memory", "memory.limit_in_bytes", "memory.max");
    assert_eq!(memory, (64 << 20).to_string());
    let (_, quota) = limit(&daemon, &id, "cpu", "cpu.cfs_quota_us", "cpu.max");
    assert_eq!(quota, if v1 { "50000" } else { "50000 100000" });
    let (_, weight) = limit(&daemon, &id, "cpu", "cpu.shares", "cpu.weight");
    assert_eq!(weight, if v1 { "512" } else { "59" });
    assert_eq!(daemon.cri.output(&id, &["cat", "/proc/1/oom_score_adj"]).await, "500\n");
    let status = daemon.cri.container(&id).await.expect("ContainerStatus");
    let echoed = status.resources.and_then(|resources| resources.linux).expect("resources");
    assert_eq!((echoed.cpu_period, echoed.cpu_quota, echoed.cpu_shares), (100_000, 50_000, 512));
    assert_eq!(echoed.memory_limit_in_bytes, 64 << 20);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_slows_down() {
    let (daemon, pod) = daemon_with_pod().await;
    let config = limited(sh("busy", "while :; do :; done"), |resources| {
        resources.cpu_period = 100_000;
        resources.cpu_quota = 10_000;
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let used = async || {
        // utime and stime of PID 1, in ticks of 10 ms.
        let stat = daemon.cri.output(&id, &["cat", "/proc/1/stat"]).await;
        let fields: Vec<u64> =
            stat.rsplit(") ").next().unwrap().split(' ').filter_map(|f| f.parse().ok()).collect();
        fields[10] + fields[11]
    };
    let before = used().await;
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    let ticks = used().await - before;
    assert!(ticks < 60, "a tenth of a core for two seconds is 20 ticks; used {ticks}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_supervisor_is_in_no_containers_cgroup() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let (_, procs) = limit(&daemon, &id, "memory", "cgroup.procs", "cgroup.procs");
    for pid in procs.lines() {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        assert!(
            // One that a ready supervisor has started is "memfd:stave-pod".
            !comm.contains("stave"),
            "process {pid} ({}) of ours is charged to the container",
            comm.trim()
        );
    }
    assert!(!procs.is_empty());
    daemon.finish().await;
}
