//! Containers that an OCI runtime makes: runc as Debian has it, and runtimes that misbehave.

mod failures;
mod features;
mod life;
mod mounts;
mod namespaces;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use stave_e2e::cri::*;
use stave_e2e::{Config as _, Daemon, Options, Pod, cgroup_directories, pod, read_log};
use tonic::Code;

use crate::{busybox, sh, sleeper};

/// Debian's package, or STAVE_E2E_RUNC.
fn runc() -> PathBuf {
    if let Some(path) = std::env::var_os("STAVE_E2E_RUNC") {
        return path.into();
    }
    let found = ["/usr/sbin/runc", "/usr/bin/runc"].into_iter().map(PathBuf::from).find(|path| path.exists());
    found.expect("runc: hack/test installs it (apt-get install runc)")
}

/// What it says that it can do; null where it does not say anything.
fn features() -> serde_json::Value {
    let output = std::process::Command::new(runc()).arg("features").output().expect("features").stdout;
    serde_json::from_slice(&output).unwrap_or_default()
}

/// It says that it knows namespaces of this kind.
fn knows_namespaces(kind: &str) -> bool {
    let features = features();
    let all = features.pointer("/linux/namespaces").and_then(serde_json::Value::as_array);
    all.is_some_and(|all| all.iter().any(|one| one == kind))
}

/// A daemon with the handler "runc", and more configuration.
async fn daemon_with(config: &str) -> Daemon {
    let runc = runc();
    let config = format!("\n[runtimes.runc]\ntype = \"oci\"\npath = \"{}\"\n{config}", runc.display());
    let daemon =
        Daemon::with(Options { config, default_runtime: Some("stave".into()), ..Default::default() }).await;
    daemon.cri.pull(&busybox()).await.expect("PullImage");
    daemon
}

/// A pod of this handler.
async fn run_pod(daemon: &Daemon, handler: &str, config: PodSandboxConfig) -> Result<Pod, tonic::Status> {
    let config = daemon.with_log_directory(config);
    let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.into() };
    let id = daemon.cri.run_pod_sandbox(request).await?.pod_sandbox_id;
    daemon.remember([id.clone()]);
    Ok(Pod { config, id })
}

/// The runtime's own directory of a pod, by default.
fn own_root(daemon: &Daemon, handler: &str, pod: &Pod) -> PathBuf {
    daemon.directory().join("state/runtimes").join(handler).join(&pod.id)
}

/// Host pids of what runs in a container's cgroup.
fn processes(daemon: &Daemon, pod: &Pod, container: &str) -> Vec<String> {
    let cgroup = format!("{}/{container}", daemon.pod_cgroup(&pod.id));
    let read = |dir: &PathBuf| fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    let mut pids: Vec<String> = cgroup_directories(&cgroup)
        .iter()
        .map(read)
        .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
        .collect();
    pids.sort();
    pids.dedup();
    pids
}

fn context(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn runc_makes_it_and_the_host_sees_no_mount() {
    let daemon = daemon_with("").await;
    let pod = run_pod(&daemon, "runc", pod("pod")).await.expect("RunPodSandbox");
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");

    // It is runc's: that has a state of it, with the very process that the cgroup has.
    let root = own_root(&daemon, "runc", &pod);
    let state = std::process::Command::new(runc())
        .arg("--root")
        .arg(&root)
        .args(["state", &id])
        .output()
        .expect("runc state");
    let state: serde_json::Value = serde_json::from_slice(&state.stdout).expect("state of runc");
    assert_eq!(state["status"], "running");
    let pid = state["pid"].to_string();
    assert!(processes(&daemon, &pod, &id).contains(&pid), "{pid}");
    // In every hierarchy, where the executor would have put it.
    let cgroup = format!("{}/{id}", daemon.pod_cgroup(&pod.id));
    for dir in cgroup_directories(&cgroup) {
        let procs =
            fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        assert!(procs.lines().any(|line| line == pid), "{pid} is not in {}: {procs:?}", dir.display());
    }
    // The pod's namespaces are shared, and the root is an overlay that only the container has.
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    assert!(!mounts.contains(&id), "the host's mount table names the container");
    assert!(daemon.cri.shell(&id, "grep ' / / ' /proc/self/mountinfo").await.contains("overlay"));
    let second = daemon.run(&pod, &sleeper("second")).await.expect("start");
    let ns = "for ns in net ipc uts; do readlink /proc/self/ns/$ns; done; hostname";
    assert_eq!(daemon.cri.shell(&id, ns).await, daemon.cri.shell(&second, ns).await);
    assert_ne!(
        daemon.cri.shell(&id, "readlink /proc/self/ns/pid").await,
        daemon.cri.shell(&second, "readlink /proc/self/ns/pid").await
    );

    let status = daemon.cri.pod(&pod.id).await.expect("PodSandboxStatus");
    assert_eq!(status.runtime_handler, "runc");
    daemon.cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
    assert!(!root.exists(), "{} is left", root.display());
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_limits_and_volumes_are_as_asked() {
    let daemon = daemon_with("pids_limit = 77\n").await;
    let pod = run_pod(
        &daemon,
        "runc",
        pod("pod").with(|c| {
            c.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
        }),
    )
    .await
    .expect("RunPodSandbox");
    let volume = daemon.directory().join("volume");
    fs::create_dir_all(volume.join("sub")).expect("volume");
    fs::write(volume.join("file"), "content").expect("file");
    std::os::unix::fs::symlink(&volume, daemon.directory().join("link")).expect("link");
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let config = sleeper("main").with(|c| {
        let read_only = |host: &Path, path: &str| Mount {
            host_path: text(host),
            container_path: path.into(),
            readonly: true,
            ..Default::default()
        };
        c.mounts = vec![
            read_only(&daemon.directory().join("link"), "/ro"),
            read_only(&volume.join("file"), "/etc/one-file"),
            Mount { readonly: false, ..read_only(&volume.join("sub"), "/rw") },
        ];
        context(c).run_as_user = Some(Int64Value { value: 1234 });
        context(c).run_as_group = Some(Int64Value { value: 4321 });
        context(c).supplemental_groups = vec![777];
        context(c).no_new_privs = true;
        context(c).readonly_rootfs = true;
        context(c).masked_paths = vec!["/proc/version".into()];
        context(c).seccomp = Some(SecurityProfile { profile_type: 0, ..Default::default() });
        context(c).capabilities = Some(Capability {
            drop_capabilities: vec!["ALL".into()],
            add_capabilities: vec!["CHOWN".into()],
            ..Default::default()
        });
        let resources = c.linux.as_mut().unwrap().resources.as_mut().unwrap();
        resources.memory_limit_in_bytes = 64 << 20;
        resources.oom_score_adj = 321;
    });
    fs::set_permissions(volume.join("sub"), fs::Permissions::from_mode(0o777)).expect("mode");
    let id = daemon.run(&pod, &config).await.expect("start");
    let status = daemon.cri.shell(&id, "cat /proc/1/status; cat /proc/1/oom_score_adj").await;
    let line = |name: &str| {
        let line =
            status.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {status}"));
        line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(
        (line("Uid:").as_str(), line("Gid:").as_str()),
        ("1234 1234 1234 1234", "4321 4321 4321 4321")
    );
    assert!(line("Groups:").contains("777"), "{status}");
    assert_eq!(line("CapBnd:"), "0000000000000001");
    assert_eq!(line("CapEff:"), "0000000000000000");
    assert_eq!((line("Seccomp:").as_str(), line("NoNewPrivs:").as_str()), ("2", "1"));
    assert!(status.trim_end().ends_with("321"), "{status}");
    // As in the container, so in what is executed in it.
    assert_eq!(
        daemon.cri.shell(&id, "id -u; id -g; grep Seccomp: /proc/self/status").await,
        "1234\n4321\nSeccomp:\t2\n"
    );
    for script in ["touch /file", "touch /ro/x", "echo > /etc/one-file"] {
        let output = daemon.cri.exec(&id, &["/bin/sh", "-c", script]).await.expect("ExecSync");
        assert_ne!(output.exit_code, 0, "{script}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("Read-only"), "{script}: {output:?}");
    }
    assert_eq!(
        daemon.cri.shell(&id, "cat /etc/one-file /ro/file /proc/version; touch /rw/made").await,
        "contentcontent"
    );
    assert!(volume.join("sub/made").exists());
    let cgroup = format!("{}/{id}", daemon.pod_cgroup(&pod.id));
    let read = |name: &str| {
        cgroup_directories(&cgroup).iter().find_map(|dir| fs::read_to_string(dir.join(name)).ok())
    };
    let memory = read("memory.limit_in_bytes").or_else(|| read("memory.max")).expect("memory limit");
    assert_eq!(memory.trim(), (64 << 20).to_string());
    assert_eq!(read("pids.max").expect("pids limit").trim(), "77");
    let request = UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(LinuxContainerResources { memory_limit_in_bytes: 80 << 20, ..Default::default() }),
        ..Default::default()
    };
    daemon.cri.runtime.clone().update_container_resources(request).await.expect("UpdateContainerResources");
    let memory = read("memory.limit_in_bytes").or_else(|| read("memory.max")).expect("memory limit");
    assert_eq!(memory.trim(), (80 << 20).to_string());

    let privileged =
        daemon.run(&pod, &sleeper("privileged").with(|c| context(c).privileged = true)).await.expect("start");
    let own = fs::read_to_string("/proc/self/status").expect("own status");
    let own = own.lines().find(|line| line.starts_with("CapBnd:")).expect("CapBnd").to_owned();
    assert_eq!(daemon.cri.shell(&privileged, "grep CapBnd: /proc/1/status").await.trim(), own);
    assert_eq!(daemon.cri.shell(&privileged, "grep Seccomp: /proc/1/status").await, "Seccomp:\t0\n");
    assert!(
        daemon
            .cri
            .shell(&privileged, "ls /dev")
            .await
            .lines()
            .any(|name| name == "kmsg" || name == "mem" || name == "loop0")
    );
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn users_are_looked_up_in_the_image_and_in_volumes() {
    let daemon = daemon_with("").await;
    let pod = run_pod(&daemon, "runc", pod("pod")).await.expect("RunPodSandbox");
    let named = |name: &str, user: &str| {
        sh(name, "id -u; id -g; id -G; echo $HOME").with(|c| context(c).run_as_username = user.into())
    };
    let error = daemon.create(&pod, &named("nobody-knows", "nobody-knows")).await.expect_err("no such user");
    assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
    assert!(error.message().contains("no user \"nobody-knows\" in /etc/passwd"), "{error:?}");
    let files = daemon.directory().join("etc");
    fs::create_dir(&files).expect("directory");
    fs::write(files.join("passwd"), "root:x:0:0::/:\nalice:x:1001:1002::/home/\"alice\":\n").expect("passwd");
    fs::write(files.join("group"), "staff:x:50:alice\n").expect("group");
    let config = named("alice", "alice").with(|c| {
        for name in ["passwd", "group"] {
            c.mounts.push(Mount {
                host_path: files.join(name).to_string_lossy().into_owned(),
                container_path: format!("/etc/{name}"),
                ..Default::default()
            });
        }
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let status = daemon.cri.exited(&id).await;
    let lines: Vec<String> = read_log(&status.log_path).into_iter().map(|line| line.text).collect();
    assert_eq!(lines, ["1001", "1002", "1002 50", "/home/\"alice\""]);
    let user = status.user.and_then(|user| user.linux).expect("user");
    assert_eq!((user.uid, user.gid), (1001, 1002));
    daemon.finish().await;
}
