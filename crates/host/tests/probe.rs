//! The whole probe as a program: it starts itself again for the user namespace.
#![allow(clippy::expect_used, clippy::print_stdout)] // a test program

use std::process::ExitCode;

use stave_host::{ProbeOptions, Status};

const ROWS: &[&str] = &[
    "cgroup layout",
    "cpu controller",
    "memory controller",
    "pids controller",
    "cpuset controller",
    "hugetlb controller",
    "io controller",
    "namespaces",
    "user namespaces",
    "time namespaces",
    "pidfd",
    "overlayfs",
    "extended attributes",
    "idmapped mounts",
    "recursive read-only",
    "seccomp",
    "AppArmor",
    "SELinux",
    "Landlock",
    "capabilities",
    "bridge",
    "veth",
    "netfilter",
    "netfilter fib",
    "netfilter of bridges",
    "IP forwarding",
    "bridge netfilter",
    "IPv6",
    "fuse",
    "PSI",
    "inotify instances",
    "inotify watches",
    "process ids",
    "open files",
];

fn main() -> ExitCode {
    if let Some(code) = stave_host::run_child_if_asked() {
        return code;
    }
    assert!(rustix::process::geteuid().is_root(), "this test must run as root");
    let root = tempfile::tempdir().expect("temporary directory");
    let options = ProbeOptions { root: root.path().join("lib/stave"), ..ProbeOptions::default() };
    let report = stave_host::probe_with(&options);
    for check in &report.checks {
        println!("{:20} {:9} {} | {}", check.name, check.status.as_str(), check.found, check.cost);
    }

    for row in ROWS {
        let found = report.checks.iter().filter(|check| check.name == *row).count();
        assert_eq!(found, 1, "row {row}");
    }
    for check in &report.checks {
        assert!(!check.found.is_empty(), "{check:?}");
        assert!(check.status == Status::Ok || !check.cost.is_empty(), "{check:?}");
    }
    // What every machine that builds Stave has.
    assert_ne!(report.worst(), Status::Missing);
    let features = &report.features;
    for (name, there) in [
        ("namespaces", features.namespaces),
        ("user namespaces", features.user_namespaces),
        ("overlay", features.overlay),
        ("pidfd", features.pidfd),
        ("seccomp", features.seccomp),
        ("bridge", features.bridge),
        ("veth", features.veth),
        ("nf_tables", features.nf_tables),
        ("idmapped mounts", features.idmapped_mounts),
        ("recursive read-only", features.recursive_read_only),
        ("clone into cgroup", features.clone_into_cgroup),
        ("memory controller", features.memory_controller),
        ("pids controller", features.pids_controller),
    ] {
        assert!(there, "{name}");
    }

    // Nothing is left behind.
    let ours = format!("stave-probe-{}-", std::process::id());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    assert!(!mounts.contains(&ours), "{mounts}");
    assert_eq!(std::fs::read_dir(root.path()).expect("root").count(), 0);
    for mount in mounts.lines().filter(|line| line.contains(" - cgroup")) {
        let point = mount.split(' ').nth(4).expect("mount point");
        for entry in std::fs::read_dir(point).into_iter().flatten().flatten() {
            assert!(!entry.file_name().to_string_lossy().starts_with(&ours), "{:?}", entry.path());
        }
    }
    println!("probe: ok");
    ExitCode::SUCCESS
}
