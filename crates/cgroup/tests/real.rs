//! On the cgroup hierarchies of this host, as root, in a subtree of our own that is removed afterwards.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use stave_cgroup::{CgroupError, Cgroups, ContainerCgroup, Layout, Resources, detect};

/// A parent of one test's own; everything below is killed and removed at the end.
struct Own {
    cgroups: Cgroups,
    parent: String,
}

impl Own {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        assert!(rustix::process::geteuid().is_root(), "this test needs root");
        let parent = format!("/stave-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Self { cgroups: Cgroups::new(detect().unwrap(), &parent), parent }
    }

    fn pod(&self, id: &str) -> String {
        let path = self.cgroups.pod_path("", id).unwrap();
        self.cgroups.create_pod(&path).unwrap();
        path
    }

    fn dirs(&self, path: &str) -> Vec<PathBuf> {
        let layout = self.cgroups.layout();
        let mounts = layout.v2().into_iter().chain(layout.v1().iter().map(|m| m.mount.as_path()));
        mounts.map(|m| m.join(path.trim_start_matches('/'))).collect()
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let kill = self.cgroups.kill_pod(&self.parent);
        // The parent as a pod of the root removes the whole tree.
        let remove = Cgroups::new(self.cgroups.layout().clone(), "/").remove_pod(&self.parent, true);
        if !std::thread::panicking() {
            kill.unwrap();
            remove.unwrap();
            assert!(self.dirs(&self.parent).iter().all(|d| !d.exists()));
        }
    }
}

fn v1_dir<'a>(c: &'a ContainerCgroup, name: &str) -> Option<&'a Path> {
    c.v1.iter().find(|(n, _)| n.split(',').any(|n| n == name)).map(|(_, d)| d.as_path())
}

fn read(dir: &Path, file: &str) -> String {
    let path = dir.join(file);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).trim().to_owned()
}

/// What a limit reads as: the v1 file where its controller is v1, else the v2 file.
fn limit(c: &ContainerCgroup, controller: &str, v1: &str, v2: &str) -> String {
    match v1_dir(c, controller) {
        Some(dir) => read(dir, v1),
        None => read(c.v2_dir.as_deref().unwrap(), v2),
    }
}

/// A shell in all of a container's cgroups, and reaped at the end.
struct Shell(Child);

impl Shell {
    fn start(c: &ContainerCgroup, script: &str) -> Self {
        let mut all = String::new();
        for dir in c.v2_dir.iter().chain(c.v1.iter().map(|(_, d)| d)) {
            all.push_str(&format!("echo $$ > {}/cgroup.procs || exit 99\n", dir.display()));
        }
        all.push_str(script);
        let child =
            Command::new("sh").arg("-c").arg(all).stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        Self(child)
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(10), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn some_limits() -> Resources {
    Resources {
        cpu_shares: Some(512),
        cpu_quota: Some(20_000),
        cpu_period: Some(50_000),
        cpuset_cpus: "0".into(),
        memory_limit: Some(64 << 20),
        pids_limit: Some(33),
        ..Resources::default()
    }
}

#[test]
fn limits_read_back() {
    let own = Own::new();
    let pod = own.pod("p1");
    let c = own.cgroups.create_container(&pod, "c1", &some_limits()).unwrap();
    assert_eq!(
        limit(&c, "cpu", "cpu.shares", "cpu.weight"),
        if v1_dir(&c, "cpu").is_some() { "512" } else { "59" }
    );
    if let Some(dir) = v1_dir(&c, "cpu") {
        assert_eq!(read(dir, "cpu.cfs_quota_us"), "20000");
        assert_eq!(read(dir, "cpu.cfs_period_us"), "50000");
    }
    assert_eq!(limit(&c, "cpuset", "cpuset.cpus", "cpuset.cpus"), "0");
    assert_eq!(limit(&c, "memory", "memory.limit_in_bytes", "memory.max"), (64 << 20).to_string());
    assert_eq!(limit(&c, "pids", "pids.max", "pids.max"), "33");
    assert!(c.oom_file.as_ref().unwrap().exists());
    if let Some(dir) = v1_dir(&c, "memory")
        && dir.join("memory.memsw.limit_in_bytes").exists()
    {
        assert_eq!(read(dir, "memory.memsw.limit_in_bytes"), (64 << 20).to_string());
    }
    // A process can enter all of them: cpuset has memory nodes, too.
    let mut shell = Shell::start(&c, "exit 7");
    assert_eq!(shell.0.wait().unwrap().code(), Some(7));
}

#[test]
fn updates_up_and_down_and_lifts() {
    let own = Own::new();
    let pod = own.pod("p1");
    let c = own.cgroups.create_container(&pod, "c1", &some_limits()).unwrap();
    for bytes in [128 << 20, 32 << 20, 256 << 20_i64] {
        let r = Resources { memory_limit: Some(bytes), ..Resources::default() };
        own.cgroups.update_container(&pod, "c1", &r).unwrap();
        assert_eq!(limit(&c, "memory", "memory.limit_in_bytes", "memory.max"), bytes.to_string());
    }
    let r = Resources {
        memory_limit: Some(-1),
        pids_limit: Some(-1),
        cpu_quota: Some(-1),
        ..Resources::default()
    };
    own.cgroups.update_container(&pod, "c1", &r).unwrap();
    assert_eq!(limit(&c, "pids", "pids.max", "pids.max"), "max");
    if let Some(dir) = v1_dir(&c, "cpu") {
        assert_eq!(read(dir, "cpu.cfs_quota_us"), "-1");
    }
}

#[test]
fn failed_update_changes_nothing() {
    let own = Own::new();
    let pod = own.pod("p1");
    let c = own.cgroups.create_container(&pod, "c1", &some_limits()).unwrap();
    let values = |c: &ContainerCgroup| {
        [
            limit(c, "cpu", "cpu.shares", "cpu.weight"),
            limit(c, "memory", "memory.limit_in_bytes", "memory.max"),
            limit(c, "cpuset", "cpuset.cpus", "cpuset.cpus"),
            limit(c, "pids", "pids.max", "pids.max"),
        ]
    };
    let before = values(&c);
    // Written after cpu and memory; the kernel refuses a number of processes that is out of range.
    let r = Resources {
        cpu_shares: Some(1024),
        memory_limit: Some(128 << 20),
        cpuset_cpus: "0-1".into(),
        pids_limit: Some(i64::MAX),
        ..Resources::default()
    };
    let error = own.cgroups.update_container(&pod, "c1", &r).unwrap_err();
    assert!(matches!(error, CgroupError::Write { .. }), "{error}");
    assert_eq!(values(&c), before);
}

#[test]
fn failed_create_leaves_nothing() {
    let own = Own::new();
    let pod = own.pod("p1");
    let bad = [
        Resources { cpuset_cpus: "4000".into(), ..some_limits() },
        Resources { unified: BTreeMap::from([("memory.nope".into(), "1".into())]), ..some_limits() },
    ];
    for r in bad {
        let error = own.cgroups.create_container(&pod, "c1", &r).unwrap_err().to_string();
        assert!(error.contains("4000") || error.contains("memory.nope"), "{error}");
        assert!(own.dirs(&format!("{pod}/c1")).iter().all(|d| !d.exists()));
    }
    own.cgroups.create_container(&pod, "c1", &some_limits()).unwrap();
    let again = own.cgroups.create_container(&pod, "c1", &some_limits());
    assert!(matches!(again, Err(CgroupError::Exists { .. })), "{again:?}");
    assert!(own.dirs(&format!("{pod}/c1")).iter().all(|d| d.exists()));
}

#[test]
fn pids_limit_bites() {
    let own = Own::new();
    let pod = own.pod("p1");
    let r = Resources { pids_limit: Some(3), ..Resources::default() };
    let c = own.cgroups.create_container(&pod, "c1", &r).unwrap();
    let mut shell = Shell::start(&c, "sleep 60 & sleep 60 & sleep 60 & sleep 60 & exit 0");
    assert_ne!(shell.0.wait().unwrap().code(), Some(0), "four children under a limit of three processes");
    own.cgroups.kill_container(&pod, "c1").unwrap();
    own.cgroups.remove_container(&pod, "c1").unwrap();
}

#[test]
fn memory_limit_bites() {
    let own = Own::new();
    let pod = own.pod("p1");
    let r = Resources { memory_limit: Some(16 << 20), ..Resources::default() };
    let c = own.cgroups.create_container(&pod, "c1", &r).unwrap();
    let kills = || {
        let text = fs::read_to_string(c.oom_file.as_ref().unwrap()).unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix("oom_kill ")).unwrap().to_owned();
        line.parse::<u64>().unwrap()
    };
    assert_eq!(kills(), 0);
    let mut shell = Shell::start(&c, "exec tail /dev/zero");
    assert_eq!(shell.0.wait().unwrap().signal(), Some(9));
    assert!(kills() > 0);
}

#[test]
fn kill_takes_grandchildren_in_nested_cgroups() {
    let own = Own::new();
    let pod = own.pod("p1");
    let c = own.cgroups.create_container(&pod, "c1", &Resources::default()).unwrap();
    // What a container with a writable cgroup mount may do.
    for dir in c.v1.iter().map(|(_, d)| d).filter(|d| !d.ends_with("x") && d.join("pids.max").exists()) {
        fs::create_dir(dir.join("nested")).unwrap();
    }
    if let Some(dir) = &c.v2_dir {
        fs::create_dir(dir.join("nested")).unwrap();
    }
    let nested = c.v2_dir.as_ref().map(|d| d.join("nested/cgroup.procs"));
    let moves = nested.as_ref().map(|f| format!("echo $$ > {}\n", f.display())).unwrap_or_default();
    let mut shell = Shell::start(&c, &format!("{moves}setsid sleep 60 & sleep 60"));
    let procs = c.v1.first().map(|(_, d)| d.clone()).or(c.v2_dir.clone()).unwrap();
    wait_until("three processes", || {
        let nested = procs.join("nested/cgroup.procs");
        let n = |p: &Path| fs::read_to_string(p).unwrap_or_default().lines().count();
        n(&procs.join("cgroup.procs")) + n(&nested) >= 3
    });
    // Busy: not removed while it lives.
    assert!(fs::remove_dir(&procs).is_err());
    own.cgroups.kill_pod(&pod).unwrap();
    assert_eq!(shell.0.wait().unwrap().signal(), Some(9));
    own.cgroups.remove_container(&pod, "c1").unwrap();
    assert!(own.dirs(&format!("{pod}/c1")).iter().all(|d| !d.exists()));
}

#[test]
fn v1_alone_kills_by_pidfd() {
    let own = Own::new();
    let Layout::Hybrid { v1, .. } = own.cgroups.layout().clone() else { return };
    let only_v1 = Cgroups::new(Layout::Hybrid { v2: None, v1 }, &own.parent);
    let pod = only_v1.pod_path("", "p1").unwrap();
    let made = only_v1.create_pod(&pod).unwrap();
    assert_eq!((made.supervisor_dir, made.v2_dir), (None, None));
    let c = only_v1.create_container(&pod, "c1", &some_limits()).unwrap();
    let mut shell = Shell::start(&c, "sleep 60 & sleep 60");
    let procs = c.v1[0].1.join("cgroup.procs");
    wait_until("two processes", || fs::read_to_string(&procs).unwrap().lines().count() >= 2);
    only_v1.kill_container(&pod, "c1").unwrap();
    assert_eq!(shell.0.wait().unwrap().signal(), Some(9));
    only_v1.remove_pod(&pod, true).unwrap();
    let r =
        Resources { unified: BTreeMap::from([("memory.high".into(), "1".into())]), ..Resources::default() };
    only_v1.create_pod(&pod).unwrap();
    assert!(only_v1.create_container(&pod, "c1", &r).unwrap_err().to_string().contains("no cgroup2 mount"));
}

#[test]
fn removal_is_idempotent_and_keeps_what_others_use() {
    let own = Own::new();
    let pod = own.pod("p1");
    assert!(own.cgroups.is_exclusive(&pod));
    assert_eq!(own.cgroups.list_pods_under_default_parent().unwrap(), std::slice::from_ref(&pod));
    own.cgroups.create_container(&pod, "c1", &Resources::default()).unwrap();
    for _ in 0..2 {
        own.cgroups.remove_container(&pod, "c1").unwrap();
        own.cgroups.kill_container(&pod, "c1").unwrap();
    }
    // Leaks that a crash left go with the pod.
    own.cgroups.create_container(&pod, "c2", &Resources::default()).unwrap();
    for _ in 0..2 {
        own.cgroups.remove_pod(&pod, true).unwrap();
        own.cgroups.kill_pod(&pod).unwrap();
    }
    assert!(own.cgroups.list_pods_under_default_parent().unwrap().is_empty());

    // Two sandboxes of one pod uid in the kubelet's cgroup.
    let shared = own.cgroups.pod_path(&format!("{}/burstable/podu1", own.parent), "p2").unwrap();
    assert!(!own.cgroups.is_exclusive(&shared));
    let first = own.cgroups.create_pod(&shared).unwrap();
    let second = own.cgroups.create_pod(&shared).unwrap();
    assert!(first.ours && !second.ours);
    own.cgroups.create_container(&shared, "next", &Resources::default()).unwrap();
    own.cgroups.remove_pod(&shared, true).unwrap();
    assert!(own.dirs(&format!("{shared}/next")).iter().all(|d| d.exists()), "the other sandbox's container");
    own.cgroups.remove_container(&shared, "next").unwrap();
    own.cgroups.remove_pod(&shared, true).unwrap();
    assert!(own.dirs(&shared).iter().all(|d| !d.exists()));
}

/// Leaves the root of the cgroup2 mount as it was.
struct SubtreeControl(Option<(PathBuf, bool)>);

impl SubtreeControl {
    fn keep_hugetlb(layout: &Layout) -> Self {
        Self(layout.v2().map(|mount| {
            let file = mount.join("cgroup.subtree_control");
            let on = fs::read_to_string(&file).unwrap().contains("hugetlb");
            (file, on)
        }))
    }
}

impl Drop for SubtreeControl {
    fn drop(&mut self) {
        if let Some((file, false)) = &self.0 {
            let _ = fs::write(file, "-hugetlb");
        }
    }
}

#[test]
fn hugetlb_of_the_cgroup2_mount() {
    // Declared first, dropped last.
    let _control = SubtreeControl::keep_hugetlb(&detect().unwrap());
    let own = Own::new();
    let pod = own.pod("p1");
    let r = Resources { hugepage_limits: vec![("2MB".into(), 4 << 20)], ..Resources::default() };
    let known = own.cgroups.layout().controllers().iter().any(|c| c == "hugetlb");
    match own.cgroups.create_container(&pod, "c1", &r) {
        Ok(c) => {
            assert_eq!(
                limit(&c, "hugetlb", "hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max"),
                (4 << 20).to_string()
            );
        }
        Err(error) => assert!(!known && error.to_string().contains("hugetlb"), "{error}"),
    }
}
