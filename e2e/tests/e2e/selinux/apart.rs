//! What the labels keep apart, and what they let through.

use std::fs;
use std::path::Path;

use stave_e2e::cri::*;
use stave_e2e::{Config, Daemon, pod};
use tonic::Code;

use super::{
    attribute, context, file, file_label, label, level, options, pod_context, process, selinux, volume,
    with_options,
};
use crate::container_anatomy::host_pid;
use crate::{daemon_with_pod, sleeper};

type Change = fn(&mut LinuxContainerSecurityContext);

const NODE: i32 = NamespaceMode::Node as i32;

/// That the label is in the way of a script.
async fn denied(daemon: &Daemon, id: &str, script: &str) {
    let answer = daemon.cri.exec(id, &["/bin/sh", "-c", script]).await.expect("ExecSync");
    assert_ne!(answer.exit_code, 0, "{script}");
    let said = String::from_utf8_lossy(&answer.stderr);
    assert!(said.contains("Permission denied"), "{script}: {said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_are_relabelled_for_the_one_that_asks() {
    if !selinux("relabelled volumes") {
        return;
    }
    let (daemon, pod) = daemon_with_pod().await;
    let data = daemon.directory().join("data");
    fs::create_dir_all(data.join("below")).unwrap();
    fs::write(data.join("below/file"), "text\n").unwrap();
    let read = "cat /data/below/file";
    let with = |name: &str, relabel| {
        sleeper(name).with(|config| config.mounts = vec![volume(&data, "/data", relabel)])
    };
    let before = file_label(&data);
    let unlabelled = daemon.run(&pod, &with("unlabelled", false)).await.expect("start");
    denied(&daemon, &unlabelled, read).await;
    denied(&daemon, &unlabelled, "echo x >/data/new").await;
    assert_eq!(file_label(&data), before);

    let first = daemon.run(&pod, &with("first", true)).await.expect("start");
    let own = file(&level(&label(&daemon, &first).await));
    for path in ["", "below", "below/file"] {
        assert_eq!(file_label(data.join(path)), own, "{path}");
    }
    assert_eq!(daemon.cri.shell(&first, &format!("echo x >/data/new && {read}")).await, "text\n");
    // In the same pod it is the same label; in another one it is not.
    assert_eq!(daemon.cri.shell(&unlabelled, read).await, "text\n");
    let other = daemon.run_pod(stave_e2e::pod("other")).await.expect("RunPodSandbox");
    let second = daemon.run(&other, &with("second", false)).await.expect("start");
    denied(&daemon, &second, read).await;
    denied(&daemon, &second, "ls /data").await;
    let third = daemon.run(&other, &with("third", true)).await.expect("start");
    assert_eq!(daemon.cri.shell(&third, read).await, "text\n");
    denied(&daemon, &first, read).await;

    // Pods of one level share.
    let mut shared = Vec::new();
    for name in ["share-1", "share-2"] {
        let config = pod_context(stave_e2e::pod(name), |context| {
            context.selinux_options = options("", "", "", "s0:c20,c21");
        });
        let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
        shared.push(daemon.run(&pod, &with(name, true)).await.expect("start"));
    }
    for id in &shared {
        assert_eq!(daemon.cri.shell(id, read).await, "text\n");
    }
    // A single file; what is the host's is refused, and nothing is left of the request.
    let one =
        sleeper("one").with(|config| config.mounts = vec![volume(&data.join("below/file"), "/file", true)]);
    let one = daemon.run(&pod, &one).await.expect("start");
    assert_eq!(daemon.cri.output(&one, &["cat", "/file"]).await, "text\n");
    let containers = daemon.cri.containers(None).await.unwrap().len();
    let etc = sleeper("etc").with(|config| config.mounts = vec![volume(Path::new("/etc"), "/etc2", true)]);
    let error = daemon.create(&pod, &etc).await.expect_err("a directory of the system");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    assert!(error.message().contains("config.mounts[0].host_path: value \"/etc\""), "{error:?}");
    assert_eq!(daemon.cri.containers(None).await.unwrap().len(), containers);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_reaches_neither_files_nor_processes_of_another_pod() {
    if !selinux("what SELinux keeps apart") {
        return;
    }
    let (daemon, pod) = daemon_with_pod().await;
    let victim = daemon.run(&pod, &sleeper("victim")).await.expect("start");
    daemon.cri.shell(&victim, "echo secret >/secret; echo secret >/dev/shm/secret").await;
    let secret = level(&label(&daemon, &victim).await);
    let pid = host_pid(&daemon, &victim).await;
    // It is root with all capabilities and sees the node's processes: only its label is in the way.
    let mighty = |name: &str, level: &str| {
        context(sleeper(name), |context| {
            context.namespace_options.as_mut().unwrap().pid = NODE;
            context.selinux_options = options("", "", "container_t", level);
            let add_capabilities = vec!["ALL".into()];
            context.capabilities = Some(Capability { add_capabilities, ..Default::default() });
        })
    };
    let node = pod_context(stave_e2e::pod("node"), |context| {
        context.namespace_options.as_mut().unwrap().pid = NODE;
    });
    let node = daemon.run_pod(node).await.expect("RunPodSandbox");
    let tries = [
        format!("cat /proc/{pid}/root/secret"),
        format!("cat /proc/{pid}/root/dev/shm/secret"),
        format!("cat /proc/{pid}/attr/current"),
        format!("echo x >/proc/{pid}/root/new"),
        // The node's own.
        "cat /proc/1/attr/current".to_owned(),
        "ls /proc/1/root/".to_owned(),
    ];
    let other = daemon.run(&node, &mighty("other", "s0:c1021,c1022")).await.expect("start");
    for script in &tries {
        denied(&daemon, &other, script).await;
    }
    let kill = daemon.cri.exec(&other, &["kill", "-9", &pid.to_string()]).await.expect("ExecSync");
    assert_ne!(kill.exit_code, 0);
    assert_eq!(daemon.cri.output(&victim, &["cat", "/secret"]).await, "secret\n");
    // The same with the victim's level gets what is the victim's, and still nothing of the node.
    let friend = daemon.run(&node, &mighty("friend", &secret)).await.expect("start");
    for script in &tries[..2] {
        assert_eq!(daemon.cri.shell(&friend, script).await, "secret\n", "{script}");
    }
    for script in &tries[4..] {
        denied(&daemon, &friend, script).await;
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_privileged_or_shares_with_the_node_is_not_confined() {
    if !selinux("privileged containers") {
        return;
    }
    let daemon = crate::daemon().await;
    let mqueue = (file_label("/dev/mqueue"), file_label("/dev/shm"));
    let privileged = pod_context(pod("privileged"), |context| context.privileged = true);
    let pid = pod_context(pod("pid"), |context| context.namespace_options.as_mut().unwrap().pid = NODE);
    let ipc = pod_context(pod("ipc"), |context| context.namespace_options.as_mut().unwrap().ipc = NODE);
    let cases: [(PodSandboxConfig, Change); 3] = [
        (privileged, |context| context.privileged = true),
        (pid, |context| context.namespace_options.as_mut().unwrap().pid = NODE),
        (ipc, |context| context.namespace_options.as_mut().unwrap().ipc = NODE),
    ];
    for (config, change) in cases {
        let name = config.metadata.as_ref().unwrap().name.clone();
        let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
        let id = daemon.run(&pod, &context(sleeper("free"), change)).await.expect("start");
        let pid = host_pid(&daemon, &id).await.to_string();
        assert_eq!(attribute(&pid, "current"), process("spc_t", "s0"), "{name}");
        let inside = daemon.cri.output(&id, &["cat", "/proc/self/attr/current"]).await;
        assert_eq!(inside.trim_end_matches('\0'), process("spc_t", "s0"), "{name}");
        // Its files are the pod's all the same.
        let root = file_label(format!("/proc/{pid}/root/"));
        assert!(root.starts_with(&file("s0:c")), "{name}: {root}");
        daemon.cri.shell(&id, "cat /proc/1/attr/current >/dev/null; touch /dev/shm/stave-selinux && rm /dev/shm/stave-selinux").await;
        let named =
            with_options(context(sleeper("named"), change), options("", "", "container_t", "s0:c8,c9"));
        let id = daemon.run(&pod, &named).await.expect("start");
        let pid = host_pid(&daemon, &id).await.to_string();
        assert_eq!(attribute(&pid, "current"), process("container_t", "s0:c8,c9"), "{name}");
    }
    assert_eq!((file_label("/dev/mqueue"), file_label("/dev/shm")), mqueue, "they are the node's");
    daemon.finish().await;
}
