//! Namespaces of the node, of the pod and of a target.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use stave_e2e::cri::*;
use stave_e2e::{Config as _, pod};
use tonic::Code;

use super::{daemon_with, knows_namespaces, own_root, processes, run_pod};
use crate::container_anatomy::user;
use crate::sleeper;

#[tokio::test(flavor = "multi_thread")]
async fn a_pid_namespace_of_the_pod_or_of_a_target() {
    let daemon = daemon_with("").await;
    let pod = run_pod(&daemon, "runc", pod("pod")).await.expect("RunPodSandbox");
    let shared = |name: &str| sleeper(name).with(|c| c.namespaces().pid = NamespaceMode::Pod as i32);
    let one = daemon.run(&pod, &shared("one")).await.expect("start");
    let two = daemon.run(&pod, &shared("two")).await.expect("start");
    let own = daemon.run(&pod, &sleeper("own")).await.expect("start");
    let namespace = async |id: &str| daemon.cri.shell(id, "readlink /proc/self/ns/pid").await;
    assert_eq!(namespace(&one).await, namespace(&two).await);
    assert_ne!(namespace(&one).await, namespace(&own).await);
    let debugger = sleeper("debugger").with(|c| {
        c.namespaces().pid = NamespaceMode::Target as i32;
        c.namespaces().target_id = own.clone();
    });
    let debugger = daemon.run(&pod, &debugger).await.expect("start");
    assert_eq!(namespace(&debugger).await, namespace(&own).await);
    let node = run_pod(
        &daemon,
        "runc",
        crate::pod("node").with(|c| c.namespaces().pid = NamespaceMode::Node as i32),
    )
    .await;
    let node = node.expect("RunPodSandbox");
    let config = sleeper("node").with(|c| c.namespaces().pid = NamespaceMode::Node as i32);
    let id = daemon.run(&node, &config).await.expect("start");
    let host = fs::read_link("/proc/self/ns/pid").expect("own PID namespace");
    assert_eq!(namespace(&id).await.trim(), host.to_string_lossy());
    daemon.finish().await;
}

/// The lines of a container's own map.
async fn maps(daemon: &stave_e2e::Daemon, id: &str) -> Vec<String> {
    let text = daemon.cri.shell(id, "cat /proc/self/uid_map /proc/self/gid_map").await;
    text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn root_in_a_user_namespace_is_nobody_outside() {
    if !knows_namespaces("user") {
        eprintln!("SKIPPED: the runtime says nothing of user namespaces: such pods are refused");
        return;
    }
    let daemon = daemon_with("").await;
    let pod = run_pod(&daemon, "runc", user::pod("pod")).await.expect("RunPodSandbox");
    let volume = daemon.directory().join("volume");
    fs::create_dir(&volume).expect("volume");
    fs::write(volume.join("of-root"), "content").expect("file");
    fs::create_dir(volume.join("plain")).expect("directory");
    std::os::unix::fs::chown(volume.join("plain"), Some(user::FIRST), Some(user::FIRST)).expect("chown");
    let config = user::inside(sleeper("main")).with(|c| {
        c.mounts = vec![
            Mount {
                host_path: volume.to_string_lossy().into_owned(),
                container_path: "/volume".into(),
                uid_mappings: user::mapping(),
                gid_mappings: user::mapping(),
                ..Default::default()
            },
            Mount {
                host_path: volume.join("plain").to_string_lossy().into_owned(),
                container_path: "/plain".into(),
                ..Default::default()
            },
        ];
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let line = format!("0 {} {}", user::FIRST, user::COUNT);
    // In the init, as the node sees it, and in what is executed.
    let pid = processes(&daemon, &pod, &id).into_iter().next().expect("a process");
    for file in ["uid_map", "gid_map"] {
        let text = fs::read_to_string(format!("/proc/{pid}/{file}")).expect(file);
        assert_eq!(text.split_whitespace().collect::<Vec<_>>().join(" "), line, "{file}");
    }
    assert_eq!(fs::metadata(format!("/proc/{pid}")).expect("process").uid(), user::FIRST);
    assert_eq!(maps(&daemon, &id).await, [line.clone(), line]);
    // It is the pod's: of all of its containers, and the owner of its network.
    let second = daemon.run(&pod, &user::inside(sleeper("second"))).await.expect("start");
    let namespace = "for ns in user net; do readlink /proc/1/ns/$ns; done";
    assert_eq!(daemon.cri.shell(&id, namespace).await, daemon.cri.shell(&second, namespace).await);
    let own = fs::read_link("/proc/self/ns/user").expect("own user namespace");
    assert_ne!(daemon.cri.shell(&id, "readlink /proc/1/ns/user").await.trim(), own.to_string_lossy());
    // An idmapped volume keeps its owners on the disk, and a plain one shows them as they are. The image is root's, and
    // so is what the runtime made.
    let script = "echo x > /volume/made; echo x > /plain/made; echo x > /made; \
                  stat -c %u /volume/of-root /volume/made /plain/made /bin/busybox /etc/hostname /made /dev";
    let owners = daemon.cri.shell(&id, script).await;
    assert_eq!(owners.split_whitespace().collect::<Vec<_>>(), ["0"; 7]);
    assert_eq!(fs::metadata(volume.join("made")).expect("file").uid(), 0);
    assert_eq!(fs::metadata(volume.join("plain/made")).expect("file").uid(), user::FIRST);
    let upper = daemon.directory().join("root/containers").join(&id).join("upper");
    assert_eq!(fs::metadata(upper.join("made")).expect("file").uid(), user::FIRST);
    // Nothing of the node can be had with it.
    let output = daemon.cri.exec(&id, &["/bin/sh", "-c", "mknod /disk b 8 0"]).await.expect("ExecSync");
    assert_ne!(output.exit_code, 0, "{output:?}");
    let host = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    assert!(!host.contains(&id) && !host.contains("/dev/shm/rootfs"), "{host}");
    // With a terminal, too, and as another user.
    let other = user::inside(crate::sh("other", "id -u; test -t 0 && echo terminal; echo $HOME")).with(|c| {
        c.tty = true;
        super::context(c).run_as_user = Some(Int64Value { value: 1234 });
    });
    let other = daemon.run(&pod, &other).await.expect("start");
    let status = daemon.cri.exited(&other).await;
    let lines: Vec<String> =
        stave_e2e::read_log(&status.log_path).into_iter().map(|line| line.text.trim().to_owned()).collect();
    assert_eq!(lines, ["1234", "terminal", "/"]);
    daemon.cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
    assert!(!own_root(&daemon, "runc", &pod).exists());
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn namespaces_that_a_runtime_does_not_name_are_refused() {
    let programs = tempfile::tempdir().expect("directory");
    let old = programs.path().join("old");
    fs::write(&old, "#!/bin/sh\n[ \"$1\" = --version ] && echo old runtime 0.1\n").expect("script");
    fs::set_permissions(&old, fs::Permissions::from_mode(0o755)).expect("mode");
    let daemon = daemon_with(&super::failures::handler("old", &old)).await;
    let status = daemon.cri.status(StatusRequest::default()).await.expect("Status");
    let offers = |name: &str| {
        let found = status.runtime_handlers.iter().find(|handler| handler.name == name).expect("handler");
        found.features.as_ref().is_some_and(|features| features.user_namespaces)
    };
    assert_eq!(["stave", "runc", "old"].map(offers), [true, knows_namespaces("user"), false]);
    let timed = |name: &str| {
        pod(name).with(|c| {
            c.annotations.insert("stave.dev/time-offsets".into(), "boottime=86400s".into());
        })
    };
    for (config, field, kind) in [
        (user::pod("user"), "userns_options.mode POD", "user"),
        (timed("time"), "config.annotations[\"stave.dev/time-offsets\"]", "time"),
    ] {
        let error = run_pod(&daemon, "old", config).await.expect_err(kind);
        assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
        let wanted = format!("runtime handler \"old\" offers no {kind} namespaces");
        assert!(error.message().contains(field) && error.message().contains(&wanted), "{error:?}");
    }
    // runc has time namespaces since 1.2, and says so.
    let made = run_pod(&daemon, "runc", timed("timed")).await;
    if knows_namespaces("time") {
        let pod = made.expect("RunPodSandbox");
        let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
        let seconds =
            |text: &str| text.split('.').next().and_then(|text| text.parse::<u64>().ok()).expect("seconds");
        let host = seconds(&fs::read_to_string("/proc/uptime").expect("uptime"));
        for path in ["/proc/1/timens_offsets", "/proc/self/timens_offsets"] {
            let offsets = daemon.cri.shell(&id, &format!("cat {path}")).await;
            let words: Vec<&str> = offsets.split_whitespace().collect();
            assert_eq!(words, ["monotonic", "0", "0", "boottime", "86400", "0"], "{path}");
        }
        let inside = seconds(&daemon.cri.shell(&id, "cat /proc/uptime").await);
        assert!((86400..86460).contains(&(inside - host)), "{inside} {host}");
    } else {
        assert_eq!(made.expect_err("time").code(), Code::FailedPrecondition);
    }
    daemon.finish().await;
}
