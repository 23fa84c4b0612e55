//! The tests of the whole program, one module a behaviour.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test's way to fail is to panic"
)]

mod apparmor;
mod bad_input;
mod block_io;
mod broken_pulls;
mod cgroup_limits_table;
mod cgroup_parents;
mod client;
mod client_go;
mod cni;
mod concurrency;
mod container_anatomy;
mod containers;
mod crash;
mod crictl;
mod daemon;
mod devices;
mod escapes;
mod execs;
mod faults;
mod filters;
mod huge_pages;
mod idempotence;
mod image_volumes;
mod images;
mod impossible;
mod inspect;
mod lifecycle;
mod limits;
mod logs;
mod many;
mod mapped;
mod metrics;
mod namespaces;
mod network;
mod oci_runtime;
mod pid_target;
mod ready;
mod reboot;
mod resources;
mod restart;
mod seccomp;
mod security;
mod selinux;
mod start_path;
mod streaming;
mod systemd_driver;

use stave_e2e::cri::ContainerConfig;
use stave_e2e::{Daemon, Options, Pod, container, image, pod};

/// The image of most tests: a shell that runs applets as programs.
fn busybox() -> String {
    image("e2e-test-images/busybox:1.29-2")
}

/// A container of [`busybox`].
fn sh(name: &str, script: &str) -> ContainerConfig {
    container(name, &busybox(), &["/bin/sh", "-c", script])
}

/// One that stays: it ends quickly on SIGTERM, which a PID 1 must ask for.
fn sleeper(name: &str) -> ContainerConfig {
    sh(name, "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done")
}

/// A daemon with the busybox image.
async fn daemon() -> Daemon {
    Daemon::with(Options { image: Some(busybox()), ..Options::default() }).await
}

/// A daemon with the busybox image and a pod.
async fn daemon_with_pod() -> (Daemon, Pod) {
    let daemon = daemon().await;
    let pod = daemon.run_pod(pod("pod")).await.expect("RunPodSandbox");
    (daemon, pod)
}

/// Now, in nanoseconds since 1970.
fn now() -> i64 {
    let since =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock after 1970");
    since.as_nanos() as i64
}
