//! Cgroup parents that can't hold pods, and controllers that they don't pass on.

use std::fs;
use std::process::Command;

use stave_e2e::{Config, cgroup_directories, make_cgroup, pod, remove_cgroup, systemd_driver};
use tonic::Code;

use crate::{daemon, sleeper};

/// The directory in the cgroup2 mount.
fn v2(cgroup: &str) -> std::path::PathBuf {
    let mut directories = cgroup_directories(cgroup).into_iter();
    directories.find(|dir| dir.join("cgroup.max.descendants").exists()).expect("a cgroup2 mount")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_outside_the_delegation_is_refused_and_leaves_nothing() {
    if systemd_driver() {
        eprintln!(
            "SKIPPED: a cgroup parent outside the delegation: with the systemd driver systemd makes the scope"
        );
        return;
    }
    let daemon = daemon().await;
    let parent = daemon.kubelet_parent("full", "pod1");
    let above = parent.rsplit_once('/').expect("a parent").0;
    make_cgroup(above);
    // As far as a delegation goes: no cgroup may be made below.
    fs::write(v2(above).join("cgroup.max.descendants"), "0").expect("cgroup.max.descendants");
    let config =
        pod("full").with(|config| config.linux.as_mut().expect("linux").cgroup_parent = parent.clone());
    let error = daemon.run_pod(config).await.expect_err("no cgroup can be made there");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    for word in ["config.linux.cgroup_parent", &parent, "mkdir"] {
        assert!(error.message().contains(word), "{word}: {error:?}");
    }
    assert!(daemon.cri.pods(None).await.expect("ListPodSandbox").is_empty());
    assert!(cgroup_directories(&parent).iter().all(|dir| !dir.exists()), "its cgroups are gone");
    remove_cgroup(&parent);
    daemon.assert_clean().await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_the_parent_keeps_is_named() {
    if fs::metadata("/sys/fs/cgroup/cgroup.controllers").is_err() {
        eprintln!(
            "SKIPPED: a parent that passes no controller on: needs cgroup v2; `hack/vm-tests` runs this"
        );
        return;
    }
    if systemd_driver() {
        eprintln!(
            "SKIPPED: a parent that passes no controller on: systemd starts no scope in a slice with processes"
        );
        return;
    }
    let daemon = daemon().await;
    let parent = daemon.kubelet_parent("busy", "pod1");
    make_cgroup(&parent);
    // cgroup v2: a cgroup with processes passes no controller on.
    let mut sleep = Command::new("sleep").arg("600").spawn().expect("sleep");
    let above = parent.rsplit_once('/').expect("a parent").0;
    for control in [&parent, above].map(|cgroup| v2(cgroup).join("cgroup.subtree_control")) {
        fs::write(&control, "-cpu -memory -pids -cpuset -hugetlb -io").expect("subtree_control");
    }
    fs::write(v2(above).join("cgroup.procs"), sleep.id().to_string()).expect("cgroup.procs");
    let config =
        pod("busy").with(|config| config.linux.as_mut().expect("linux").cgroup_parent = parent.clone());
    let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
    let limited = sleeper("limited").with(|config| {
        let resources = config.linux.get_or_insert_default().resources.get_or_insert_default();
        resources.memory_limit_in_bytes = 64 << 20;
    });
    let error = daemon.create(&pod, &limited).await.expect_err("no controller");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    for word in ["config.linux.resources", "67108864", above, "memory", "processes of its own"] {
        assert!(error.message().contains(word), "{word}: {error:?}");
    }
    assert!(daemon.cri.containers(None).await.expect("ListContainers").is_empty());
    // Without a limit there is nothing to pass on.
    let id = daemon.run(&pod, &sleeper("free")).await.expect("start");
    assert_eq!(daemon.cri.shell(&id, "echo alive").await, "alive\n");
    daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
    sleep.kill().expect("SIGKILL");
    sleep.wait().expect("wait");
    remove_cgroup(&parent);
    daemon.finish().await;
}
