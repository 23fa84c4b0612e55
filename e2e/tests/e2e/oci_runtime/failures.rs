//! Runtimes that fail, hang, rave or vanish.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stave_e2e::cri::*;
use stave_e2e::{cgroup_directories, pod};
use tonic::Code;

use super::{daemon_with, own_root, run_pod, runc};
use crate::container_anatomy::user;
use crate::sleeper;

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

pub(super) fn handler(name: &str, path: &Path) -> String {
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

/// Some runtimes know fewer hierarchies than the host has (youki: no cgroup2 beside v1). Whatever they leave out, the limits
/// hold and the kill reaches all.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_runtime_leaves_outside_of_the_cgroups_is_put_into_them() {
    let programs = tempfile::tempdir().expect("directory");
    let path = programs.path().join("careless");
    let tops: Vec<String> =
        cgroup_directories("/").iter().map(|dir| dir.join("cgroup.procs").display().to_string()).collect();
    let script = format!(
        "#!/bin/sh\nfor word; do [ \"$last\" = --pid-file ] && file=$word; last=$word; done\n{} \"$@\" || exit $?\n\
         [ -z \"$file\" ] || for top in {}; do cat \"$file\" >$top; done 2>/dev/null\nexit 0\n",
        runc().display(),
        tops.join(" ")
    );
    fs::write(&path, script).expect("script");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
    let daemon = daemon_with(&handler("careless", &path)).await;
    let pod = run_pod(&daemon, "careless", pod("pod")).await.expect("RunPodSandbox");
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let pid = super::processes(&daemon, &pod, &id).first().cloned().unwrap_or_default();
    let dirs = cgroup_directories(&format!("{}/{id}", daemon.pod_cgroup(&pod.id)));
    let holds = |dir: &PathBuf, pid: &str| {
        let procs = fs::read_to_string(dir.join("cgroup.procs")).expect("cgroup.procs");
        procs.lines().any(|line| line == pid)
    };
    for dir in &dirs {
        assert!(holds(dir, &pid), "{pid} is not in {}", dir.display());
    }
    // What is executed as well, once it is known.
    let exec = {
        let cri = daemon.cri.clone();
        let id = id.clone();
        tokio::spawn(async move { cri.exec(&id, &["sleep", "4"]).await })
    };
    stave_e2e::eventually("the exec's process in all of them", async || {
        let found = super::processes(&daemon, &pod, &id).into_iter().find(|pid| {
            fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|text| text == "sleep\x004\0")
        })?;
        dirs.iter().all(|dir| holds(dir, &found)).then_some(())
    })
    .await;
    assert_eq!(exec.await.expect("task").expect("ExecSync").exit_code, 0);
    daemon.finish().await;
}

/// Root of the container would be root of the node (youki's exec forgets the namespace).
#[tokio::test(flavor = "multi_thread")]
async fn what_a_runtime_starts_in_the_nodes_user_namespace_is_killed() {
    let programs = tempfile::tempdir().expect("directory");
    let (path, pid) = (programs.path().join("careless"), programs.path().join("pid"));
    let script = format!(
        "#!/bin/sh\nfor word; do [ \"$last\" = --pid-file ] && file=$word; [ \"$word\" = exec ] && executes=1; last=$word; done\n\
         [ -z \"$executes\" ] || {{ sleep 300 >/dev/null 2>&1 & echo $! | tee {} >\"$file\"; exit 0; }}\nexec {} \"$@\"\n",
        pid.display(),
        runc().display()
    );
    fs::write(&path, script).expect("script");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
    let daemon = daemon_with(&handler("careless", &path)).await;
    if !super::knows_namespaces("user") {
        eprintln!("SKIPPED: the runtime says nothing of user namespaces: such pods are refused");
        return daemon.finish().await;
    }
    let pod = run_pod(&daemon, "careless", user::pod("pod")).await.expect("RunPodSandbox");
    let id = daemon.run(&pod, &user::inside(sleeper("main"))).await.expect("start");
    let error = daemon.cri.exec(&id, &["true"]).await.expect_err("a process of the node");
    assert!(error.message().contains("into the node's user namespace"), "{error:?}");
    let pid = fs::read_to_string(&pid).expect("pid").trim().to_owned();
    stave_e2e::eventually("the end of the process", async || {
        (!Path::new("/proc").join(&pid).exists()).then_some(())
    })
    .await;
    daemon.finish().await;
}
