//! A tree of plain files in the form of cgroup v2, where the kernel of this host may have v1: what is written where.
//! A directory here gets no files by itself, as one of the kernel's would.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use stave_cgroup::{CgroupError, Cgroups, Layout, Resources};

const FILES: [(&str, &str); 7] = [
    ("cpu.weight", "100\n"),
    ("cpu.max", "max 100000\n"),
    ("memory.max", "max\n"),
    ("memory.swap.max", "max\n"),
    ("memory.oom.group", "0\n"),
    ("pids.max", "max\n"),
    ("cgroup.procs", ""),
];

fn cgroups(root: &Path) -> Cgroups {
    Cgroups::new(Layout::Unified { mount: root.to_path_buf() }, "/stave")
}

/// A pod with one container whose files exist.
fn pod(root: &Path) -> String {
    let cgroups = cgroups(root);
    let path = cgroups.pod_path("", "p1").unwrap();
    let made = cgroups.create_pod(&path).unwrap();
    assert!(made.ours && made.v1.is_empty());
    assert_eq!(made.supervisor_dir, Some(root.join("stave/p1/stave-pod")));
    assert!(root.join("stave/p1/stave-pod").is_dir());
    assert!(!cgroups.create_pod(&path).unwrap().ours);
    fs::create_dir(root.join("stave/p1/c1")).unwrap();
    for (name, value) in FILES {
        fs::write(root.join("stave/p1/c1").join(name), value).unwrap();
    }
    path
}

fn read(root: &Path, name: &str) -> String {
    fs::read_to_string(root.join("stave/p1/c1").join(name)).unwrap()
}

#[test]
fn values_reach_the_v2_files() {
    let root = tempfile::tempdir().unwrap();
    let path = pod(root.path());
    let r = Resources {
        cpu_shares: Some(2048),
        cpu_quota: Some(50_000),
        memory_limit: Some(1 << 30),
        pids_limit: Some(1000),
        unified: BTreeMap::from([("memory.oom.group".into(), "1".into())]),
        ..Resources::default()
    };
    cgroups(root.path()).update_container(&path, "c1", &r).unwrap();
    // A plain file keeps the tail of a longer old value; these are all longer, or of one length.
    for (name, value) in [
        ("cpu.weight", "174"),
        ("cpu.max", "50000 100000"),
        ("memory.max", "1073741824"),
        ("pids.max", "1000"),
        ("memory.oom.group", "1"),
    ] {
        assert_eq!(read(root.path(), name).trim(), value, "{name}");
    }
    assert!(read(root.path(), "memory.swap.max").starts_with('0'), "a memory limit alone allows no swap");
}

#[test]
fn a_missing_controller_is_named_and_nothing_changes() {
    let root = tempfile::tempdir().unwrap();
    let path = pod(root.path());
    let r = Resources { cpu_shares: Some(1024), cpuset_cpus: "0".into(), ..Resources::default() };
    let error = cgroups(root.path()).update_container(&path, "c1", &r).unwrap_err();
    assert!(
        matches!(&error, CgroupError::NoController { controller, .. } if controller == "cpuset"),
        "{error}"
    );
    assert!(error.to_string().contains("cpuset_cpus 0"), "{error}");
    assert_eq!(read(root.path(), "cpu.weight").trim(), "100");
    // A new container's files are all missing here: its directory must not stay.
    let error = cgroups(root.path()).create_container(&path, "c2", &r).unwrap_err();
    assert!(matches!(&error, CgroupError::NoController { .. }), "{error}");
    assert!(!root.path().join("stave/p1/c2").exists());
    // Nothing asked, nothing missed.
    let c = cgroups(root.path()).create_container(&path, "c2", &Resources::default()).unwrap();
    assert_eq!((c.v2_dir, c.v1.len(), c.oom_file), (Some(root.path().join("stave/p1/c2")), 0, None));
}

#[test]
fn paths_of_the_systemd_driver_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let cgroups = cgroups(root.path());
    let parent = "/kubepods.slice/kubepods-pod1.slice";
    assert!(cgroups.pod_path(parent, "p1").unwrap_err().to_string().contains("cgroupfs driver"));
    assert_eq!(cgroups.pod_path("/kubepods/pod1", "p1").unwrap(), "/kubepods/pod1");
    for bad in ["../x", "/a/../../etc", "/a//b", "relative"] {
        assert!(matches!(cgroups.create_pod(bad), Err(CgroupError::InvalidPath { .. })), "{bad}");
        assert!(matches!(cgroups.remove_pod(bad, true), Err(CgroupError::InvalidPath { .. })), "{bad}");
        assert!(matches!(cgroups.kill_pod(bad), Err(CgroupError::InvalidPath { .. })), "{bad}");
    }
    for bad in ["", "..", "a/b", "stave-pod"] {
        assert!(cgroups.remove_container("/stave/p1", bad).is_err(), "{bad:?}");
        assert!(cgroups.create_container("/stave/p1", bad, &Resources::default()).is_err(), "{bad:?}");
    }
}
