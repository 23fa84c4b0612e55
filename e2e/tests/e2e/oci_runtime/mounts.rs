//! Mounts that runtimes would make in another way than the executor.

use std::fs;

use nix::mount::MsFlags;
use stave_e2e::cri::*;
use stave_e2e::{Config as _, pod};
use tonic::Code;

use super::{context, daemon_with, knows_namespaces, run_pod};
use crate::container_anatomy::{HostMount, user};
use crate::sleeper;

fn bind(host: &std::path::Path, inside: &str, propagation: MountPropagation) -> Mount {
    Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: inside.to_owned(),
        propagation: propagation as i32,
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cgroup_tree_is_read_only_and_private_is_private() {
    let daemon = daemon_with("").await;
    let config = pod("pod").with(|c| {
        c.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
    });
    let pod = run_pod(&daemon, "runc", config).await.expect("RunPodSandbox");
    let plain = daemon.run(&pod, &sleeper("plain")).await.expect("start");
    let script = "for d in /sys/fs/cgroup /sys/fs/cgroup/*/; do mkdir $d/escaped 2>/dev/null && echo $d; done; \
                  ls /sys/fs/cgroup | wc -l";
    let shown = daemon.cri.shell(&plain, script).await;
    assert!(shown.trim().parse::<u32>().is_ok_and(|count| count > 2), "{shown}");

    let top = daemon.directory().join("peer");
    let host = HostMount::new(&top, MsFlags::MS_SHARED);
    fs::create_dir(top.join("in")).expect("mount point");
    let config = sleeper("main").with(|c| {
        context(c).privileged = true;
        c.mounts = vec![
            bind(&top, "/private", MountPropagation::PropagationPrivate),
            bind(&top, "/shared", MountPropagation::PropagationBidirectional),
        ];
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    daemon.cri.shell(&id, "mount -t tmpfs none /shared/in && touch /shared/in/file").await;
    assert!(top.join("in/file").exists(), "it propagates to the host");
    let table = daemon.cri.output(&id, &["cat", "/proc/self/mountinfo"]).await;
    let fields = |path: &str| {
        let line = table.lines().find(|line| line.split(' ').nth(4) == Some(path)).expect(path);
        line.split(" - ").next().expect("a part before").to_owned()
    };
    assert!(fields("/shared").contains("shared:"), "{table}");
    assert!(!fields("/private").contains("shared:") && !fields("/private").contains("master:"), "{table}");
    daemon.cri.shell(&id, "umount /shared/in").await;
    drop(host);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_user_namespace_makes_of_devices_and_of_propagation() {
    if !knows_namespaces("user") {
        eprintln!("SKIPPED: the runtime says nothing of user namespaces: such pods are refused");
        return;
    }
    let daemon = daemon_with("").await;
    let pod = run_pod(&daemon, "runc", user::pod("pod")).await.expect("RunPodSandbox");
    // At a path that the node does not have.
    let device = |path: &str| Device {
        host_path: "/dev/zero".into(),
        container_path: path.into(),
        permissions: "rwm".into(),
    };
    let config = user::inside(sleeper("main"))
        .with(|c| c.devices = vec![device("/dev/nothing/zero"), device("/opt/zero"), device("/dev/zero")]);
    let id = daemon.run(&pod, &config).await.expect("start");
    let script = "for f in /dev/nothing/zero /opt/zero /dev/zero; do stat -c '%F %t:%T' $f; head -c 3 $f | wc -c; done";
    assert_eq!(daemon.cri.shell(&id, script).await, "character special file 1:5\n3\n".repeat(3));
    // The kernel makes a slave of it: refused, so that nobody waits for mounts that never come.
    let top = daemon.directory().join("peer");
    let host = HostMount::new(&top, MsFlags::MS_SHARED);
    let config = user::inside(sleeper("shared")).with(|c| {
        let plain = bind(&top, "/slave", MountPropagation::PropagationHostToContainer);
        c.mounts = vec![plain, bind(&top, "/shared", MountPropagation::PropagationBidirectional)];
    });
    let error = daemon.create(&pod, &config).await.expect_err("bidirectional");
    let wanted =
        "config.mounts[1].propagation PROPAGATION_BIDIRECTIONAL: runtime handler \"runc\" does not offer it";
    assert!(error.message().contains(wanted), "{error:?}");
    assert_eq!(error.code(), Code::FailedPrecondition);
    drop(host);
    daemon.finish().await;
}
