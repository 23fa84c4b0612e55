//! Containers that an OCI runtime makes: runc as Debian has it, and runtimes that misbehave.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stave_e2e::cri::*;
use stave_e2e::{Config as _, Daemon, Options, Pod, cgroup_directories, eventually, pod, read_log};
use tonic::Code;

use crate::{busybox, sh, sleeper};

/// Debian's package.
fn runc() -> PathBuf {
    let found = ["/usr/sbin/runc", "/usr/bin/runc"].into_iter().map(PathBuf::from).find(|path| path.exists());
    found.expect("runc: hack/test installs it (apt-get install runc)")
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

#[tokio::test(flavor = "multi_thread")]
async fn a_container_over_its_memory_is_oom_killed() {
    let daemon = daemon_with("").await;
    let pod = run_pod(&daemon, "runc", pod("pod")).await.expect("RunPodSandbox");
    let config = sh("hungry", "x=x; while :; do x=$x$x; done").with(|c| {
        c.linux.as_mut().unwrap().resources.as_mut().unwrap().memory_limit_in_bytes = 20 << 20;
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let status = daemon.cri.exited(&id).await;
    assert_eq!((status.reason.as_str(), status.exit_code), ("OOMKilled", 137));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_outlives_the_daemon_and_the_configuration() {
    let mut daemon = daemon_with("").await;
    let pod = run_pod(&daemon, "runc", pod("pod")).await.expect("RunPodSandbox");
    let main = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let short =
        daemon.run(&pod, &sh("short", "read x; exit 7").with(|c| c.stdin = true)).await.expect("start");
    let created = daemon.create(&pod, &sh("created", "exit 5")).await.expect("CreateContainer");
    let pid = processes(&daemon, &pod, &short).into_iter().next().expect("a process");
    daemon.kill();
    // The init of the short one ends while nobody listens.
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid.parse().expect("pid")),
        nix::sys::signal::Signal::SIGKILL,
    )
    .expect("SIGKILL");
    // The handler is gone from the configuration.
    let file = daemon.directory().join("config.toml");
    let config = fs::read_to_string(&file).expect("configuration");
    let config = config.split("\n[runtimes").next().expect("the part before").to_owned();
    fs::write(&file, config).expect("configuration");
    daemon.restart().await;
    assert_eq!(daemon.cri.exited(&short).await.exit_code, 137);
    assert_eq!(daemon.cri.shell(&main, "echo on").await, "on\n");
    daemon.cri.start(&created).await.expect("StartContainer");
    assert_eq!(daemon.cri.exited(&created).await.exit_code, 5);
    let late = daemon.run(&pod, &sleeper("late")).await.expect("a further container of a known pod");
    daemon.cri.stop(&main, 10).await.expect("StopContainer");
    assert_eq!(daemon.cri.container(&main).await.expect("status").exit_code, 0);
    daemon.cri.remove(&late).await.expect("RemoveContainer");
    let error = run_pod(&daemon, "runc", crate::pod("new")).await.expect_err("no such handler");
    assert_eq!(error.code(), Code::NotFound);
    assert!(error.message().contains("\"runc\": unknown; known are [\"stave\"]"), "{error:?}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_supervisor_that_dies_leaves_nothing_of_runcs() {
    let daemon = daemon_with("").await;
    let pod = run_pod(&daemon, "runc", pod("pod")).await.expect("RunPodSandbox");
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let request = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
    let info = daemon.cri.pod_sandbox_status(request).await.expect("PodSandboxStatus").info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).expect("info");
    let supervisor = i32::try_from(info["pid"].as_i64().expect("pid")).expect("pid");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(supervisor), nix::sys::signal::Signal::SIGKILL)
        .expect("SIGKILL");
    let status = daemon.cri.exited(&id).await;
    assert_eq!(status.state(), ContainerState::ContainerExited);
    eventually("the end of the processes", async || processes(&daemon, &pod, &id).is_empty().then_some(()))
        .await;
    daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
    assert!(!own_root(&daemon, "runc", &pod).exists());
    daemon.finish().await;
}

/// runc behind a script, which acts up at one command.
fn wrapper(dir: &Path, name: &str, command: &str, action: &str) -> PathBuf {
    let path = dir.join(name);
    let script = format!(
        "#!/bin/sh\nfor word; do\n  if [ \"$word\" = {command} ]; then {action}; fi\ndone\nexec {} \"$@\"\n",
        runc().display()
    );
    fs::write(&path, script).expect("script");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
    path
}

fn handler(name: &str, path: &Path) -> String {
    format!("[runtimes.{name}]\ntype = \"oci\"\npath = \"{}\"\ntimeout = 3\n", path.display())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_that_fails_hangs_or_raves_is_told_and_leaves_nothing() {
    let programs = tempfile::tempdir().expect("directory");
    let dir = programs.path();
    let cases = [
        ("fails", "create", "echo no such luck >&2; exit 3", "status 3: no such luck"),
        (
            "raves",
            "create",
            "head -c 300000 /dev/urandom >&2; head -c 300000 /dev/urandom; exit 1",
            "create: status 1: ",
        ),
        ("hangs", "create", "sleep 1000", "did not end within 3s, and was killed"),
        ("lies", "create", "exit 0", "init.pid"),
        (
            "points-elsewhere",
            "create",
            "for x; do [ \"$last\" = --pid-file ] && echo $PPID >$x; last=$x; done; exit 0",
            "is no child of the pod's supervisor",
        ),
        ("late", "start", "sleep 1000", "did not end within 3s, and was killed"),
        ("start-fails", "start", "echo not today >&2; exit 9", "status 9: not today"),
    ];
    let mut config = String::new();
    for (name, command, action, _) in &cases {
        config += &handler(name, &wrapper(dir, name, command, action));
    }
    let daemon = daemon_with(&config).await;
    for (name, command, _, wanted) in &cases {
        let pod = run_pod(&daemon, name, pod(name)).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let began = Instant::now();
        let created = daemon.create(&pod, &sleeper("main")).await;
        let error = match *command {
            "create" => created.expect_err(name),
            _ => {
                let id = created.unwrap_or_else(|e| panic!("{name}: {e:?}"));
                let error = daemon.cri.start(&id).await.expect_err(name);
                let status = daemon.cri.exited(&id).await;
                assert_eq!((status.reason.as_str(), status.exit_code), ("StartError", 128), "{name}");
                assert!(status.message.contains(wanted), "{name}: {}", status.message);
                daemon.cri.remove(&id).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
                error
            }
        };
        assert!(
            error.message().contains(wanted)
                && error.message().contains(&format!("runtime handler {name:?}")),
            "{name}: {error:?}"
        );
        assert!(error.message().len() < 4096, "{name}: {} bytes", error.message().len());
        assert!(began.elapsed() < Duration::from_secs(15), "{name}: {:?}", began.elapsed());
        // Nothing but the pod is left, before it goes as well.
        assert!(daemon.cri.containers(None).await.expect("ListContainers").is_empty(), "{name}");
        let bundles = daemon.directory().join("state/pods").join(&pod.id).join("containers");
        assert_eq!(crate::faults::children(&bundles), 0, "{name}: bundles are left");
        assert_eq!(
            crate::faults::children(&own_root(&daemon, name, &pod)),
            0,
            "{name}: runtime's state is left"
        );
        for cgroup in cgroup_directories(&daemon.pod_cgroup(&pod.id)) {
            let left: Vec<_> = fs::read_dir(&cgroup)
                .into_iter()
                .flatten()
                .flatten()
                .filter(|e| e.path().is_dir())
                .map(|e| e.file_name())
                .collect();
            assert!(left.iter().all(|name| name == "stave-pod"), "{name}: {left:?} in {}", cgroup.display());
        }
        daemon.cri.remove_pod(&pod.id).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        daemon.assert_clean().await;
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_that_vanishes_or_hangs_later_stops_neither_stop_nor_removal() {
    let programs = tempfile::tempdir().expect("directory");
    let dir = programs.path();
    let vanishing = wrapper(dir, "vanishing", "never", "exit 1");
    let config = [
        handler("vanishing", &vanishing),
        handler("no-kill", &wrapper(dir, "no-kill", "kill", "exit 4")),
        handler("no-delete", &wrapper(dir, "no-delete", "delete", "exit 5")),
        handler("slow-delete", &wrapper(dir, "slow-delete", "delete", "sleep 1000")),
        handler("no-exec", &wrapper(dir, "no-exec", "exec", "sleep 1000")),
    ];
    let daemon = daemon_with(&config.concat()).await;
    let mut made = Vec::new();
    for name in ["vanishing", "no-kill", "no-delete", "slow-delete", "no-exec"] {
        let pod = run_pod(&daemon, name, pod(name)).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let id = daemon.run(&pod, &sleeper("main")).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        made.push((name, pod, id));
    }
    fs::remove_file(&vanishing).expect("the program goes");
    for (name, pod, id) in &made {
        let output = daemon.cri.exec(id, &["/bin/echo", "on"]).await;
        match *name {
            "vanishing" => {
                let error = output.expect_err(name);
                assert!(error.message().contains(&vanishing.to_string_lossy().into_owned()), "{error:?}");
                let error = daemon.create(pod, &sleeper("more")).await.expect_err(name);
                assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
                assert!(
                    error.message().contains("\"vanishing\": program")
                        && error.message().contains("No such file"),
                    "{error:?}"
                );
                let error = run_pod(&daemon, name, crate::pod("more")).await.expect_err(name);
                assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
            }
            "no-exec" => {
                let error = output.expect_err(name);
                assert!(error.message().contains("exec: did not end within 3s"), "{error:?}");
                let request =
                    ExecSyncRequest { container_id: id.clone(), cmd: vec!["/bin/true".into()], timeout: 1 };
                let error = daemon.cri.exec_sync(request).await.expect_err(name);
                assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
            }
            _ => assert_eq!(output.expect(name).stdout, b"on\n", "{name}"),
        }
        // The stop signal comes even so, and its effect is the exit code 0.
        let began = Instant::now();
        daemon.cri.stop(id, 20).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        assert!(began.elapsed() < Duration::from_secs(10), "{name}: {:?}", began.elapsed());
        assert_eq!(daemon.cri.container(id).await.expect("status").exit_code, 0, "{name}");
        daemon.cri.remove(id).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        assert_eq!(
            crate::faults::children(&own_root(&daemon, name, pod)),
            0,
            "{name}: runtime's state is left"
        );
        daemon.cri.remove_pod(&pod.id).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn handlers_are_listed_with_what_probing_found() {
    let programs = tempfile::tempdir().expect("directory");
    let old = programs.path().join("old");
    fs::write(&old, "#!/bin/sh\n[ \"$1\" = --version ] && echo old runtime 0.1\n").expect("script");
    fs::set_permissions(&old, fs::Permissions::from_mode(0o755)).expect("mode");
    let daemon =
        daemon_with(&(handler("old", &old) + &handler("absent", Path::new("/nonexistent/runtime")))).await;
    let status = daemon.cri.status(StatusRequest { verbose: true }).await.expect("Status");
    let names: Vec<&str> = status.runtime_handlers.iter().map(|handler| handler.name.as_str()).collect();
    assert_eq!(names, ["", "stave", "absent", "old", "runc"]);
    let rro = |name: &str| {
        let found = status.runtime_handlers.iter().find(|handler| handler.name == name).expect("handler");
        found.features.as_ref().is_some_and(|features| features.recursive_read_only_mounts)
    };
    assert_eq!(["stave", "runc", "old", "absent"].map(rro), [true, true, false, false]);
    let info: serde_json::Value = serde_json::from_str(&status.info["runtimes"]).expect("runtimes");
    let found = |name: &str| {
        info.as_array().expect("a list").iter().find(|one| one["name"] == name).expect("handler").clone()
    };
    assert!(found("runc")["found"]["version"].as_str().expect("version").starts_with("runc version"));
    assert_eq!(found("old")["found"]["version"], "old runtime 0.1");
    assert!(
        found("absent")["found"]["error"]
            .as_str()
            .expect("error")
            .contains("/nonexistent/runtime: No such file")
    );

    let error = run_pod(&daemon, "nope", pod("nope")).await.expect_err("no such handler");
    assert_eq!(error.code(), Code::NotFound);
    assert!(error.message().contains("known are [\"stave\", \"absent\", \"old\", \"runc\"]"), "{error:?}");
    let pod = run_pod(&daemon, "old", crate::pod("old")).await.expect("RunPodSandbox");
    let config = sleeper("main").with(|c| {
        c.mounts = vec![Mount {
            host_path: "/usr".into(),
            container_path: "/usr2".into(),
            readonly: true,
            recursive_read_only: true,
            ..Default::default()
        }];
    });
    let error = daemon.create(&pod, &config).await.expect_err("not offered");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    assert!(
        error.message().contains("config.mounts[0].recursive_read_only")
            && error.message().contains("\"old\""),
        "{error:?}"
    );
    daemon.finish().await;
}
