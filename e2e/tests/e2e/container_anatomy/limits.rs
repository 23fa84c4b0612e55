//! Limits that hold, measured on the host.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use stave_e2e::cri::*;
use stave_e2e::{Config, Daemon, eventually};

use super::{host_pid, status_line};
use crate::resources::cgroup;
use crate::{daemon_with_pod, sh, sleeper};

fn limited(config: ContainerConfig, change: impl FnOnce(&mut LinuxContainerResources)) -> ContainerConfig {
    config.with(|config| change(config.linux.get_or_insert_default().resources.get_or_insert_default()))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A line "NAME NUMBER" of a file like cpu.stat.
fn field(directory: &Path, file: &str, name: &str) -> u64 {
    let content = read(&directory.join(file));
    let value = content.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    value.unwrap_or_else(|| panic!("{name} in {file}: {content}"))
}

/// Processor time that the container has used.
fn used(daemon: &Daemon, id: &str) -> Duration {
    let (directory, is_v1) = cgroup(daemon, id, "cpuacct");
    if is_v1 {
        Duration::from_nanos(read(&directory.join("cpuacct.usage")).trim().parse().expect("nanoseconds"))
    } else {
        Duration::from_micros(field(&directory, "cpu.stat", "usage_usec"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn half_a_core_is_half_a_core() {
    let (daemon, pod) = daemon_with_pod().await;
    let config = limited(sh("busy", "while :; do :; done"), |resources| {
        resources.cpu_period = 100_000;
        resources.cpu_quota = 50_000;
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let (directory, is_v1) = cgroup(&daemon, &id, "cpu");
    // On a busy machine it would not come to its half: this daemon's pods go first.
    let parent = daemon.cgroup_parent();
    let pods =
        directory.ancestors().find(|path| path.ends_with(&parent[1..])).expect("the parent of all pods");
    let (file, most) = if is_v1 { ("cpu.shares", "262144") } else { ("cpu.weight", "10000") };
    fs::write(pods.join(file), most).expect(file);
    if is_v1 {
        assert_eq!(read(&directory.join("cpu.cfs_quota_us")), "50000\n");
        assert_eq!(read(&directory.join("cpu.cfs_period_us")), "100000\n");
    } else {
        assert_eq!(read(&directory.join("cpu.max")), "50000 100000\n");
    }
    let (start, before) = (Instant::now(), used(&daemon, &id));
    tokio::time::sleep(Duration::from_secs(3)).await;
    let spent = used(&daemon, &id) - before;
    let elapsed = start.elapsed();
    // Two periods more at most: one that had begun, and one that has not ended.
    let most = elapsed / 2 + Duration::from_millis(100);
    assert!(spent <= most, "used {spent:?} of {elapsed:?}");
    // A machine that is busy otherwise gives it less. That it wanted more shows in what was held back.
    assert!(spent > elapsed / 10, "used {spent:?} of {elapsed:?}");
    eventually("the loop to be held back", async || {
        (field(&directory, "cpu.stat", "nr_throttled") > 0).then_some(())
    })
    .await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_of_cores() {
    let (daemon, pod) = daemon_with_pod().await;
    let cores = std::thread::available_parallelism().expect("cores").get();
    for (count, list) in [(1, "0"), (2, "0-1")] {
        if count > cores {
            eprintln!("a set of {count} cores is left out: the machine has {cores}");
            continue;
        }
        let config =
            limited(sleeper(&format!("on-{count}")), |resources| resources.cpuset_cpus = list.into());
        let id = daemon.run(&pod, &config).await.expect("start");
        assert_eq!(daemon.cri.output(&id, &["nproc"]).await, format!("{count}\n"), "inside");
        let pid = host_pid(&daemon, &id).await;
        assert_eq!(status_line(pid, "Cpus_allowed_list"), list, "on the host");
        let (directory, _) = cgroup(&daemon, &id, "cpuset");
        assert_eq!(read(&directory.join("cpuset.cpus")).trim(), list);
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_processes_than_the_limit() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    // The CRI has no field for it: the kubelet writes the file itself, and so does the test.
    let (directory, _) = cgroup(&daemon, &id, "pids");
    let current = || read(&directory.join("pids.current")).trim().parse::<u32>().expect("a number");
    let limit = current() + 10;
    fs::write(directory.join("pids.max"), limit.to_string()).expect("pids.max");
    let script = "i=0; while test $i -lt 50; do sleep 20 & i=$((i+1)); done; echo all";
    let result = daemon.cri.exec(&id, &["/bin/sh", "-c", script]).await.expect("ExecSync");
    let stderr = String::from_utf8_lossy(&result.stderr).into_owned();
    assert!(stderr.contains("fork") && stderr.contains("Resource temporarily unavailable"), "{stderr}");
    assert!(!result.stdout.starts_with(b"all"), "50 processes within a limit of {limit}");
    assert!((limit - 2..=limit).contains(&current()), "{} of {limit}", current());
    daemon.cri.stop(&id, 0).await.expect("StopContainer");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_memory_than_the_limit() {
    let (daemon, pod) = daemon_with_pod().await;
    let limit = 16 << 20;
    let config = limited(sleeper("main"), |resources| {
        resources.memory_limit_in_bytes = limit;
        resources.memory_swap_limit_in_bytes = limit;
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let (directory, is_v1) = cgroup(&daemon, &id, "memory");
    let fits = ["dd", "if=/dev/zero", "of=/dev/null", "bs=4M", "count=1"];
    assert_eq!(daemon.cri.exec(&id, &fits).await.expect("ExecSync").exit_code, 0, "4 MiB fit");
    let script = "dd if=/dev/zero of=/dev/null bs=64M count=1; echo $?";
    let result = daemon.cri.exec(&id, &["/bin/sh", "-c", script]).await.expect("ExecSync");
    assert_eq!(String::from_utf8_lossy(&result.stdout), "137\n", "{result:?}");
    if is_v1 {
        let most: i64 = read(&directory.join("memory.max_usage_in_bytes")).trim().parse().expect("bytes");
        assert!(most <= limit, "{most} bytes were in use");
        assert!(field(&directory, "memory.oom_control", "oom_kill ") > 0);
    } else {
        assert!(field(&directory, "memory.events", "oom_kill ") > 0);
    }
    // Only what took too much.
    assert_eq!(daemon.cri.shell(&id, "echo alive").await, "alive\n");
    daemon.finish().await;
}
