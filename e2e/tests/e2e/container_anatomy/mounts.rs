//! Bind mounts private, slave, shared and unbindable.

use std::fs;
use std::path::Path;

use nix::mount::MsFlags;
use stave_e2e::Config;
use stave_e2e::cri::*;

use super::{HostMount, host_pid};
use crate::{daemon, sleeper};

fn bind(host: &Path, inside: &str, propagation: MountPropagation) -> Mount {
    Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: inside.to_owned(),
        propagation: propagation as i32,
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn private_slave_and_shared() {
    let daemon = daemon().await;
    let top = daemon.directory().join("peer");
    let host = HostMount::new(&top, MsFlags::MS_SHARED);
    for name in ["later", "in-private", "in-slave", "in-shared"] {
        fs::create_dir(top.join(name)).expect("mount point");
    }
    // To mount something inside takes CAP_SYS_ADMIN.
    let config = stave_e2e::pod("pod").with(|config| {
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    });
    let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
    let config = sleeper("main").with(|config| {
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
        config.mounts = vec![
            bind(&top, "/private", MountPropagation::PropagationPrivate),
            bind(&top, "/slave", MountPropagation::PropagationHostToContainer),
            bind(&top, "/shared", MountPropagation::PropagationBidirectional),
        ];
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let cri = &daemon.cri;

    // A mount of the host, made while the container runs.
    let later = HostMount::new(&top.join("later"), MsFlags::MS_SHARED);
    fs::write(top.join("later/file"), "").expect("file");
    let seen = cri
        .shell(&id, "for d in private slave shared; do test -e /$d/later/file && echo $d; done; true")
        .await;
    assert_eq!(seen, "slave\nshared\n");
    drop(later);
    let seen = cri
        .shell(&id, "for d in private slave shared; do test -e /$d/later/file && echo $d; done; true")
        .await;
    assert_eq!(seen, "", "unmounted as well");

    // Mounts of the container.
    let script = "for d in private slave shared; do mount -t tmpfs none /$d/in-$d && touch /$d/in-$d/file; ls /$d/in-$d; done";
    assert_eq!(cri.shell(&id, script).await, "file\nfile\nfile\n");
    let seen: Vec<_> = ["private", "slave", "shared"]
        .into_iter()
        .filter(|name| top.join(format!("in-{name}/file")).exists())
        .collect();
    assert_eq!(seen, ["shared"], "on the host");
    let table = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let point = top.join("in-shared").to_string_lossy().into_owned();
    assert_eq!(table.lines().filter(|line| line.split(' ').nth(4) == Some(&point)).count(), 1);
    // What the kernel calls each of them.
    let inside = cri.output(&id, &["cat", "/proc/self/mountinfo"]).await;
    for (path, tag) in [("/private", None), ("/slave", Some("master:")), ("/shared", Some("shared:"))] {
        let line = inside.lines().find(|line| line.split(' ').nth(4) == Some(path)).expect(path);
        let fields = line.split(" - ").next().unwrap();
        match tag {
            Some(tag) => assert!(fields.contains(tag), "{line}"),
            None => assert!(!fields.contains("shared:") && !fields.contains("master:"), "{line}"),
        }
    }
    cri.shell(&id, "umount /shared/in-shared").await;
    assert!(!top.join("in-shared/file").exists(), "unmounted on the host as well");
    drop(host);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unbindable() {
    let daemon = daemon().await;
    let privileged = stave_e2e::pod("pod").with(|config| {
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    });
    let pod = daemon.run_pod(privileged).await.expect("RunPodSandbox");
    let config = sleeper("main").with(|config| {
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let cri = &daemon.cri;
    let script = "set -e; mkdir /top /copy; mount -t tmpfs none /top; cd /top; mkdir inner beside; \
        for d in inner beside; do mount -t tmpfs none $d; touch $d/file; done; mount -o make-unbindable none /top/inner";
    cri.shell(&id, script).await;
    // By itself it can't be bound, and a recursive bind of what is above leaves it out.
    let refused = cri.exec(&id, &["mount", "--bind", "/top/inner", "/copy"]).await.expect("ExecSync");
    assert_ne!(refused.exit_code, 0, "an unbindable mount was bound");
    cri.shell(&id, "mount --bind /top/beside /copy && umount /copy").await;
    assert_eq!(cri.shell(&id, "mount --rbind /top /copy; cd /copy; ls */file").await, "beside/file\n");
    // The kernel's word for it, read on the host, where none of these mounts is.
    let table = |pid: &str| fs::read_to_string(format!("/proc/{pid}/mountinfo")).expect("mountinfo");
    let inside = table(&host_pid(&daemon, &id).await.to_string());
    let line = inside.lines().find(|line| line.split(' ').nth(4) == Some("/top/inner")).expect("the mount");
    assert!(line.split(" - ").next().unwrap().ends_with(" unbindable"), "{line}");
    assert!(!table("self").lines().any(|line| line.split(' ').nth(4) == Some("/top/inner")));
    daemon.finish().await;
}
