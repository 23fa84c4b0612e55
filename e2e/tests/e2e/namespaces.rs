use std::fs;

use stave_e2e::cri::{NamespaceMode, NamespaceOption};
use stave_e2e::{Config, Daemon, pod};

use crate::{daemon, daemon_with_pod, sh, sleeper};

async fn namespace(daemon: &Daemon, id: &str, name: &str) -> String {
    daemon.cri.output(id, &["readlink", &format!("/proc/self/ns/{name}")]).await.trim().to_owned()
}

fn host_namespace(name: &str) -> String {
    fs::read_link(format!("/proc/self/ns/{name}")).expect("namespace").to_string_lossy().into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_pod_shares_and_what_it_does_not() {
    let (daemon, pod) = daemon_with_pod().await;
    let one = daemon.run(&pod, &sleeper("one")).await.expect("start");
    let two = daemon.run(&pod, &sleeper("two")).await.expect("start");
    for name in ["net", "ipc", "uts"] {
        let (first, second) = (namespace(&daemon, &one, name).await, namespace(&daemon, &two, name).await);
        assert_eq!(first, second, "{name} is the pod's");
        assert_ne!(first, host_namespace(name), "{name} is not the node's");
    }
    for name in ["mnt", "pid"] {
        let (first, second) = (namespace(&daemon, &one, name).await, namespace(&daemon, &two, name).await);
        assert_ne!(first, second, "{name} is the container's");
        assert_ne!(first, host_namespace(name), "{name} is not the node's");
    }
    // An exec is in the same ones as the container.
    for name in ["net", "ipc", "uts", "mnt", "pid", "cgroup"] {
        let init = daemon.cri.output(&one, &["readlink", &format!("/proc/1/ns/{name}")]).await;
        assert_eq!(init.trim(), namespace(&daemon, &one, name).await, "{name}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pid_of_the_container() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let init = daemon.cri.shell(&id, "tr '\\0' ' ' </proc/1/cmdline").await;
    assert!(init.starts_with("/bin/sh -c trap"), "PID 1 is the container's own: {init}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pid_of_the_pod() {
    let daemon = daemon().await;
    let shared = |options: &mut NamespaceOption| options.pid = NamespaceMode::Pod as i32;
    let pod = daemon
        .run_pod(pod("shared").with(|config| shared(config.namespaces())))
        .await
        .expect("RunPodSandbox");
    let one =
        daemon.run(&pod, &sleeper("one").with(|config| shared(config.namespaces()))).await.expect("start");
    let two =
        daemon.run(&pod, &sleeper("two").with(|config| shared(config.namespaces()))).await.expect("start");
    assert_eq!(namespace(&daemon, &one, "pid").await, namespace(&daemon, &two, "pid").await);
    let init = daemon.cri.shell(&one, "tr '\\0' ' ' </proc/1/cmdline").await;
    assert!(!init.starts_with("/bin/sh"), "PID 1 is the pod's holder: {init}");
    let seen = daemon.cri.shell(&one, "pgrep -fx 'sleep 3600' | wc -l").await;
    assert_eq!(seen.trim(), "2", "each sees the other's processes");
    // The holder reaps what loses its parent.
    daemon.cri.shell(&one, "sh -c 'sleep 0.1 &' && sleep 0.5").await;
    let zombies = daemon.cri.shell(&one, "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l").await;
    assert_eq!(zombies.trim(), "0", "no zombies");
    // The end of one is not the end of the other.
    daemon.cri.stop(&one, 0).await.expect("StopContainer");
    assert_eq!(daemon.cri.shell(&two, "echo alive").await, "alive\n");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_a_container_of_a_shared_pid_namespace_takes_its_children() {
    let daemon = daemon().await;
    let shared = |options: &mut NamespaceOption| options.pid = NamespaceMode::Pod as i32;
    let pod = daemon
        .run_pod(pod("shared").with(|config| shared(config.namespaces())))
        .await
        .expect("RunPodSandbox");
    let forker = sh("forker", "sleep 4242 & sleep 4242").with(|config| shared(config.namespaces()));
    let one = daemon.run(&pod, &forker).await.expect("start");
    let two =
        daemon.run(&pod, &sleeper("two").with(|config| shared(config.namespaces()))).await.expect("start");
    daemon.cri.stop(&one, 0).await.expect("StopContainer");
    stave_e2e::eventually("the children's end", async || {
        let left = daemon.cri.shell(&two, "pgrep -fx 'sleep 4242' | wc -l").await;
        (left.trim() == "0").then_some(())
    })
    .await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pid_of_the_node() {
    let daemon = daemon().await;
    let node = |options: &mut NamespaceOption| options.pid = NamespaceMode::Node as i32;
    let pod =
        daemon.run_pod(pod("node").with(|config| node(config.namespaces()))).await.expect("RunPodSandbox");
    let id =
        daemon.run(&pod, &sleeper("main").with(|config| node(config.namespaces()))).await.expect("start");
    assert_eq!(namespace(&daemon, &id, "pid").await, host_namespace("pid"));
    let own = std::process::id();
    assert!(
        !daemon.cri.shell(&id, &format!("cat /proc/{own}/comm")).await.is_empty(),
        "sees the node's processes"
    );
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ipc_of_the_node() {
    let daemon = daemon().await;
    let node = |options: &mut NamespaceOption| options.ipc = NamespaceMode::Node as i32;
    let pod =
        daemon.run_pod(pod("node").with(|config| node(config.namespaces()))).await.expect("RunPodSandbox");
    let id =
        daemon.run(&pod, &sleeper("main").with(|config| node(config.namespaces()))).await.expect("start");
    assert_eq!(namespace(&daemon, &id, "ipc").await, host_namespace("ipc"));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_memory_is_the_pods() {
    let (daemon, pod) = daemon_with_pod().await;
    let one = daemon.run(&pod, &sleeper("one")).await.expect("start");
    let two = daemon.run(&pod, &sleeper("two")).await.expect("start");
    daemon.cri.shell(&one, "echo shared >/dev/shm/file").await;
    assert_eq!(daemon.cri.output(&two, &["cat", "/dev/shm/file"]).await, "shared\n");
    let mount = daemon.cri.shell(&one, "grep ' /dev/shm ' /proc/self/mounts").await;
    for option in ["tmpfs", "nosuid", "nodev", "noexec", "size=65536k"] {
        assert!(mount.contains(option), "{option} in {mount}");
    }
    assert_eq!(daemon.cri.output(&one, &["stat", "-c", "%a", "/dev/shm"]).await, "1777\n");

    let sized = stave_e2e::pod("sized").with(|config| {
        config.annotations.insert("io.kubernetes.cri-o.ShmSize".into(), "3Mi".into());
    });
    let sized = daemon.run_pod(sized).await.expect("RunPodSandbox");
    let id = daemon.run(&sized, &sleeper("sized")).await.expect("start");
    let filled = daemon
        .cri
        .shell(&id, "dd if=/dev/zero of=/dev/shm/full bs=1M count=9 2>/dev/null; stat -c %s /dev/shm/full")
        .await;
    assert_eq!(filled, format!("{}\n", 3 << 20));
    daemon.finish().await;
}
