//! Holes that other runtimes had, each as a test; and the defaults that keep a container in.

use stave_e2e::cri::*;
use stave_e2e::{Config, container};

use crate::container_anatomy::user;
use crate::{busybox, daemon, daemon_with_pod, sh, sleeper};

fn context(
    config: ContainerConfig,
    change: impl FnOnce(&mut LinuxContainerSecurityContext),
) -> ContainerConfig {
    config.with(|config| change(config.linux.as_mut().unwrap().security_context.get_or_insert_default()))
}

/// A hexadecimal mask of /proc/PID/status.
fn mask(status: &str, name: &str) -> u64 {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .unwrap_or_else(|| panic!("{name} in {status}"));
    u64::from_str_radix(line.trim_start_matches(':').trim(), 16).expect("a mask")
}

const DEFAULT_CAPABILITIES: u64 = {
    // chown dac_override fowner fsetid kill setgid setuid setpcap net_bind_service net_raw sys_chroot mknod
    // audit_write setfcap
    let numbers = [0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31];
    let (mut mask, mut index) = (0, 0);
    while index < numbers.len() {
        mask |= 1u64 << numbers[index];
        index += 1;
    }
    mask
};

#[tokio::test(flavor = "multi_thread")]
async fn capabilities() {
    let (daemon, pod) = daemon_with_pod().await;
    let own = std::fs::read_to_string("/proc/self/status").expect("status");
    let bound = mask(&own, "CapBnd");
    let with = |name: &str, add: &[&str], drop: &[&str]| {
        let list = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        context(sleeper(name), |context| {
            context.capabilities = Some(Capability {
                add_capabilities: list(add),
                drop_capabilities: list(drop),
                ..Default::default()
            });
        })
    };
    let net_admin = 1 << 12;
    let net_raw = 1 << 13;
    let all = (1u64 << 41) - 1;
    for (name, add, drop, wanted) in [
        ("default", &[][..], &[][..], DEFAULT_CAPABILITIES),
        ("added", &["NET_ADMIN"][..], &[][..], DEFAULT_CAPABILITIES | net_admin),
        ("dropped", &[][..], &["NET_RAW"][..], DEFAULT_CAPABILITIES & !net_raw),
        ("nothing", &[][..], &["ALL"][..], 0),
        ("all", &["ALL"][..], &[][..], all),
        ("one", &["NET_ADMIN"][..], &["ALL"][..], net_admin),
    ] {
        let id = daemon.run(&pod, &with(name, add, drop)).await.expect("start");
        for process in ["1", "self"] {
            let status = daemon.cri.output(&id, &["cat", &format!("/proc/{process}/status")]).await;
            assert_eq!(mask(&status, "CapBnd"), wanted & bound, "{name}, {process}");
            assert_eq!(mask(&status, "CapEff"), wanted & bound, "{name}, {process}");
            // CVE-2022-29162, CVE-2018-1000400
            assert_eq!((mask(&status, "CapInh"), mask(&status, "CapAmb")), (0, 0), "{name}, {process}");
        }
        daemon.cri.remove(&id).await.expect("RemoveContainer");
    }
    let id = daemon
        .run(&pod, &context(sleeper("user"), |c| c.run_as_user = Some(Int64Value { value: 1000 })))
        .await
        .expect("start");
    let status = daemon.cri.output(&id, &["cat", "/proc/1/status"]).await;
    assert_eq!((mask(&status, "CapEff"), mask(&status, "CapPrm"), mask(&status, "CapAmb")), (0, 0, 0));
    daemon.finish().await;
}

/// Ambient ones outlive execve(2) without any file capability: the way to give a right to a user that is not root.
#[tokio::test(flavor = "multi_thread")]
async fn ambient_capabilities_reach_a_user_that_is_not_root() {
    let (daemon, pod) = daemon_with_pod().await;
    let net_bind = 1 << 10;
    let config = context(sleeper("main"), |context| {
        context.run_as_user = Some(Int64Value { value: 1000 });
        context.capabilities = Some(Capability {
            drop_capabilities: vec!["ALL".into()],
            add_ambient_capabilities: vec!["NET_BIND_SERVICE".into()],
            ..Default::default()
        });
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    for process in ["1", "self"] {
        let status = daemon.cri.output(&id, &["cat", &format!("/proc/{process}/status")]).await;
        for set in ["CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb"] {
            assert_eq!(mask(&status, set), net_bind, "{set} of {process}");
        }
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn masked_and_readonly_paths() {
    let (daemon, pod) = daemon_with_pod().await;
    let config = context(sleeper("main"), |context| {
        context.masked_paths =
            ["/bin/ls", "/proc/keys", "/sys/firmware", "/no/such/path"].map(String::from).to_vec();
        context.readonly_paths = ["/tmp", "/proc/sys"].map(String::from).to_vec();
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let cri = &daemon.cri;
    let stderr = async |command: &[&str]| {
        String::from_utf8(cri.exec(&id, command).await.expect("ExecSync").stderr).unwrap()
    };
    assert_eq!(stderr(&["/bin/sh", "-c", "ls"]).await, "/bin/sh: ls: Permission denied\n");
    assert_eq!(cri.shell(&id, "cat /proc/keys; find /sys/firmware -mindepth 1").await, "");
    assert_eq!(stderr(&["touch", "/tmp/x"]).await, "touch: /tmp/x: Read-only file system\n");
    let result = cri
        .exec(&id, &["/bin/sh", "-c", "echo 1 >/proc/sys/kernel/shm_rmid_forced"])
        .await
        .expect("ExecSync");
    assert_ne!(result.exit_code, 0, "/proc/sys is read-only");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2025_31133_a_mask_is_our_own_null_device() {
    // The mask must be the device that we opened, whatever the container makes of its /dev/null.
    let (daemon, pod) = daemon_with_pod().await;
    let config = context(sleeper("main"), |context| context.masked_paths = vec!["/proc/timer_list".into()]);
    let id = daemon.run(&pod, &config).await.expect("start");
    let shown = daemon.cri.output(&id, &["stat", "-c", "%F %t:%T", "/proc/timer_list"]).await;
    assert_eq!(shown, "character special file 1:3\n");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2024_21626_no_file_of_ours_leaks() {
    let (daemon, pod) = daemon_with_pod().await;
    let cri = &daemon.cri;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    // The shell of PID 1 has the standard three, and none of ours.
    assert_eq!(
        cri.shell(&id, "for f in /proc/1/fd/*; do echo ${f##*/}; done | grep -vE '^(0|1|2|10|255)$' || true")
            .await,
        ""
    );
    let config = container("list", &busybox(), &["/bin/ls", "/proc/self/fd"]);
    let list = daemon.run(&pod, &config).await.expect("start");
    let status = cri.exited(&list).await;
    let seen: Vec<_> = stave_e2e::read_log(status.log_path).into_iter().map(|line| line.text).collect();
    assert_eq!(seen, ["0", "1", "2", "3"], "3 is the directory that ls reads");
    let shown = cri.output(&id, &["/bin/ls", "/proc/self/fd"]).await;
    assert_eq!(shown, "0\n1\n2\n3\n", "the same for an exec");
    for number in 3..20 {
        let config = sh("cwd", "pwd").with(|config| config.working_dir = format!("/proc/self/fd/{number}"));
        match daemon.create(&pod, &config).await {
            Ok(id) => {
                let started = cri.start(&id).await;
                if started.is_ok() {
                    let status = cri.exited(&id).await;
                    let shown: Vec<_> =
                        stave_e2e::read_log(status.log_path).into_iter().map(|line| line.text).collect();
                    assert!(
                        shown.iter().all(|line| line.starts_with('/') && !line.contains("..")),
                        "{shown:?}"
                    );
                    assert!(
                        !shown.iter().any(|line| line.contains("stave")),
                        "outside of the container: {shown:?}"
                    );
                }
                cri.remove(&id).await.expect("RemoveContainer");
            }
            // A runtime may say it in other words.
            Err(error) => assert!(
                stave_e2e::oci_runtime().is_some() || error.message().contains("/proc/self/fd"),
                "{error:?}"
            ),
        }
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2019_5736_our_programs_are_out_of_reach() {
    // In a PID namespace that the pod shares, containers see processes that run our program: the namespace's init, and
    // the init of a container that was not started yet. Neither can be opened by way of its exe link.
    let (daemon, _) = user::daemon_with_user_namespace().await;
    let script = "for p in /proc/[0-9]*; do exe=$(readlink $p/exe) || exe=hidden; case $exe in /bin/*) ;; *) \
                  echo $(cat $p/comm) $exe; head -c 4 $p/exe 2>/dev/null | cut -c2-4; \
                  (echo x >>$p/exe) 2>/dev/null && echo WRITTEN ;; esac; done; true";
    // Where root is the node's without CAP_SYS_PTRACE, which may look into everything; in a user namespace with all
    // capabilities that there are.
    let plain: fn(ContainerConfig) -> ContainerConfig = |config| config;
    let mapped: fn(ContainerConfig) -> ContainerConfig =
        |config| user::inside(config).with(|config| user::capabilities(config, &["ALL"]));
    for (label, pod, change) in
        [("plain", stave_e2e::pod("plain"), plain), ("mapped", user::pod("mapped"), mapped)]
    {
        let shared = |config: ContainerConfig| {
            change(config).with(|config| config.namespaces().pid = NamespaceMode::Pod as i32)
        };
        let pod = pod.with(|config| config.namespaces().pid = NamespaceMode::Pod as i32);
        let pod = daemon.run_pod(pod).await.expect("RunPodSandbox");
        let id = daemon.run(&pod, &shared(sleeper("watcher"))).await.expect("start");
        daemon.create(&pod, &shared(sleeper("waiting"))).await.expect("create");
        let shown = daemon.cri.shell(&id, script).await;
        let lines: Vec<_> = shown.lines().collect();
        assert!(lines.contains(&"pod-init hidden"), "{label}: {shown}");
        assert!(lines.len() == 2 && lines.iter().all(|line| line.ends_with(" hidden")), "{label}: {shown}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2022_0811_sysctls_have_no_separators() {
    let daemon = daemon().await;
    let before = std::fs::read_to_string("/proc/sys/kernel/core_pattern").expect("core_pattern");
    // With the values that are there, so that the host stays as it is even if one gets through.
    let smuggled = format!("1\nkernel.core_pattern={}", before.trim_end());
    let named = "kernel.shm_rmid_forced=1\nkernel.core_pattern";
    for (name, value) in [
        ("kernel.shm_rmid_forced", smuggled.as_str()),
        ("kernel.shm_rmid_forced+kernel.core_pattern", before.trim_end()),
        (named, before.trim_end()),
        ("kernel.core_pattern", before.trim_end()),
    ] {
        let config = stave_e2e::pod("x").with(|config| {
            config.linux.as_mut().unwrap().sysctls = [(name.to_owned(), value.to_owned())].into();
        });
        let error = daemon.run_pod(config).await.expect_err("a bad sysctl");
        assert!(error.message().contains(&format!("config.linux.sysctls[{name:?}]")), "{error:?}");
        assert_eq!(std::fs::read_to_string("/proc/sys/kernel/core_pattern").expect("core_pattern"), before);
    }
    daemon.assert_clean().await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2022_0532_no_sysctl_of_the_node() {
    let daemon = daemon().await;
    type Change = fn(&mut NamespaceOption);
    for (name, change) in [
        (
            "net.ipv4.ip_local_port_range",
            (|namespaces| namespaces.network = NamespaceMode::Node as i32) as Change,
        ),
        ("net/ipv4/ip_local_port_range", |namespaces| namespaces.network = NamespaceMode::Node as i32),
        ("kernel.shm_rmid_forced", |namespaces| namespaces.ipc = NamespaceMode::Node as i32),
        ("fs.mqueue.msg_max", |namespaces| namespaces.ipc = NamespaceMode::Node as i32),
    ] {
        // The node's own value, so that it stays as it is even if this gets through.
        let file = format!("/proc/sys/{}", name.replace('.', "/"));
        let value = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{file}: {e}"));
        let config = stave_e2e::pod("x").with(|config| {
            change(config.namespaces());
            config.linux.as_mut().unwrap().sysctls = [(name.to_owned(), value.trim_end().to_owned())].into();
        });
        let error = daemon.run_pod(config).await.expect_err("a sysctl of the node");
        assert!(error.message().contains(&format!("config.linux.sysctls[{name:?}]")), "{error:?}");
    }
    daemon.assert_clean().await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sysctls_are_the_pods() {
    let daemon = daemon().await;
    let config = stave_e2e::pod("x").with(|config| {
        config.linux.as_mut().unwrap().sysctls =
            [("kernel.shm_rmid_forced", "1"), ("fs.mqueue.msg_max", "100")]
                .map(|(k, v)| (k.into(), v.into()))
                .into();
    });
    let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let shown =
        daemon.cri.shell(&id, "cat /proc/sys/kernel/shm_rmid_forced /proc/sys/fs/mqueue/msg_max").await;
    assert_eq!(shown, "1\n100\n");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2022_1708_much_output_of_an_exec_is_capped() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let request = ExecSyncRequest {
        container_id: id.clone(),
        cmd: ["/bin/sh", "-c", "head -c 60000000 /dev/zero; echo done >/tmp/done"].map(String::from).to_vec(),
        timeout: 50,
    };
    // The client takes messages of 16 MiB, as the kubelet does: what comes must fit.
    let response = daemon.cri.exec_sync(request).await.expect("ExecSync");
    assert!(response.stdout.len() >= 15 << 20, "{} bytes", response.stdout.len());
    assert_eq!(response.exit_code, 0, "the command goes on while the rest is thrown away");
    assert_eq!(daemon.cri.output(&id, &["cat", "/tmp/done"]).await, "done\n");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2026_53495_a_child_in_the_background_holds_no_exec() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let files = || std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("fd").count();
    let run = async || {
        let start = std::time::Instant::now();
        let result =
            daemon.cri.exec(&id, &["/bin/sh", "-c", "sleep 300 & echo started"]).await.expect("ExecSync");
        assert_eq!(result.stdout, b"started\n");
        assert!(start.elapsed().as_secs() < 8, "took {:?}", start.elapsed());
    };
    run().await;
    let before = files();
    for _ in 0..5 {
        run().await;
    }
    stave_e2e::eventually("the daemon's files to be closed", async || (files() <= before + 2).then_some(()))
        .await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2023_25809_the_cgroup_tree_is_readonly() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let script =
        "for d in /sys/fs/cgroup /sys/fs/cgroup/*/; do mkdir $d/escaped 2>/dev/null && echo $d; done; true";
    assert_eq!(daemon.cri.shell(&id, script).await, "");
    let result =
        daemon.cri.exec(&id, &["/bin/sh", "-c", ": >/sys/kernel/uevent_helper"]).await.expect("ExecSync");
    assert_ne!(result.exit_code, 0, "/sys is read-only");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2024_25621_the_directories_are_ours_alone() {
    use std::os::unix::fs::PermissionsExt;
    let (daemon, _pod) = daemon_with_pod().await;
    for name in ["root", "state"] {
        let mode = daemon.directory().join(name).metadata().expect("directory").permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "{name}");
    }
    let mode = daemon.socket().metadata().expect("socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_new_privileges_only_when_asked_for() {
    let (daemon, pod) = daemon_with_pod().await;
    let name = stave_e2e::image("e2e-test-images/nonewprivs:1.3");
    daemon.cri.pull(&name).await.expect("PullImage");
    for (label, no_new_privs, wanted) in
        [("off", false, "Effective uid: 0"), ("on", true, "Effective uid: 1000")]
    {
        let config = context(container(label, &name, &[]), |context| {
            context.no_new_privs = no_new_privs;
            context.run_as_user = Some(Int64Value { value: 1000 });
        });
        let id = daemon.run(&pod, &config).await.expect("start");
        let status = daemon.cri.exited(&id).await;
        assert_eq!(stave_e2e::read_log(status.log_path)[0].text, wanted);
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_is_all_that_the_daemon_itself_may() {
    let daemon = daemon().await;
    let config = stave_e2e::pod("x").with(|config| {
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    });
    let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
    let id = daemon
        .run(&pod, &context(sleeper("main"), |context| context.privileged = true))
        .await
        .expect("start");
    let own = std::fs::read_to_string("/proc/self/status").expect("status");
    let status = daemon.cri.output(&id, &["cat", "/proc/1/status"]).await;
    assert_eq!(mask(&status, "CapEff"), mask(&own, "CapBnd") & ((1 << 41) - 1));
    assert!(status.contains("Seccomp:\t0"), "{status}");
    daemon.cri.shell(&id, "mkdir /tmp/m && mount -t tmpfs none /tmp/m && umount /tmp/m").await;
    // Not in an unprivileged pod.
    let plain = daemon.run_pod(stave_e2e::pod("plain")).await.expect("RunPodSandbox");
    let config = context(sleeper("main"), |context| context.privileged = true);
    let error = daemon.create(&plain, &config).await.expect_err("privileged in an unprivileged pod");
    assert!(error.message().contains("privileged"), "{error:?}");
    daemon.finish().await;
}
