//! SELinux labels of containers, and what they keep apart (`apart`). Tested where the kernel has SELinux on and enforcing (`hack/vm
//! --selinux` has, with the policy hack/guest/selinux.cil); what becomes of requests without it, everywhere else.

mod apart;

use std::fs;
use std::path::Path;
use std::process::Command;

use stave_e2e::cri::*;
use stave_e2e::{Config, Daemon, Options, Pod, eventually, image};
use tonic::Code;

use crate::container_anatomy::{host_pid, user};
use crate::{busybox, daemon_with_pod, sleeper};

const AT: &str = "config.linux.security_context.selinux_options";

/// Whether the kernel enforces a policy; says loudly what is not tested without.
fn selinux(what: &str) -> bool {
    let here = fs::read_to_string("/sys/fs/selinux/enforce").is_ok_and(|text| text.trim() == "1");
    if !here {
        eprintln!(
            "SKIPPED: {what}: this kernel does not enforce SELinux; `hack/test vm` runs this in a VM that does"
        );
    }
    here
}

fn options(user: &str, role: &str, kind: &str, level: &str) -> Option<SeLinuxOption> {
    let [user, role, r#type, level] = [user, role, kind, level].map(str::to_owned);
    Some(SeLinuxOption { user, role, r#type, level })
}

fn context(
    config: ContainerConfig,
    change: impl FnOnce(&mut LinuxContainerSecurityContext),
) -> ContainerConfig {
    config.with(|config| change(config.linux.as_mut().unwrap().security_context.get_or_insert_default()))
}

fn with_options(config: ContainerConfig, options: Option<SeLinuxOption>) -> ContainerConfig {
    context(config, |context| context.selinux_options = options)
}

fn pod_context(
    config: PodSandboxConfig,
    change: impl FnOnce(&mut LinuxSandboxSecurityContext),
) -> PodSandboxConfig {
    config.with(|config| change(config.linux.as_mut().unwrap().security_context.as_mut().unwrap()))
}

fn volume(host_path: &Path, container_path: &str, relabel: bool) -> Mount {
    Mount {
        host_path: host_path.display().to_string(),
        container_path: container_path.to_owned(),
        selinux_relabel: relabel,
        ..Default::default()
    }
}

fn process(kind: &str, level: &str) -> String {
    format!("system_u:system_r:{kind}:{level}")
}

fn file(level: &str) -> String {
    format!("system_u:object_r:container_file_t:{level}")
}

fn attribute(pid: &str, name: &str) -> String {
    let path = format!("/proc/{pid}/attr/{name}");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    text.trim_end_matches(['\0', '\n']).to_owned()
}

/// The label of a container's init and of an exec, which are the same; the init's from both sides.
async fn label(daemon: &Daemon, id: &str) -> String {
    let label = attribute(&host_pid(daemon, id).await.to_string(), "current");
    let inside = daemon
        .cri
        .shell(id, "tr -d '\\0' </proc/1/attr/current; echo; tr -d '\\0' </proc/self/attr/current")
        .await;
    assert_eq!(inside.trim_end(), format!("{label}\n{label}"));
    label
}

/// Of the label of a usual container.
fn level(label: &str) -> String {
    let level = label.strip_prefix("system_u:system_r:container_t:").unwrap_or_else(|| panic!("{label}"));
    let two = level.strip_prefix("s0:").and_then(|categories| categories.split_once(','));
    assert!(two.is_some_and(|(one, two)| one.starts_with('c') && two.starts_with('c')), "{level}");
    level.to_owned()
}

/// The label of a file of the host.
fn file_label(path: impl AsRef<Path>) -> String {
    let output = Command::new("stat").args(["-c", "%C"]).arg(path.as_ref()).output().expect("stat");
    assert!(output.status.success(), "{:?}: {output:?}", path.as_ref());
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn mountinfo_has(mountinfo: &str, path: &str, label: &str) {
    let line = mountinfo.lines().find(|line| line.split(' ').nth(4) == Some(path));
    let line = line.unwrap_or_else(|| panic!("{path} in {mountinfo}"));
    assert!(line.contains(&format!(",context=\"{label}\"")), "{label} in {line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_selinux_options_are_checked_and_have_no_effect() {
    if Path::new("/sys/fs/selinux/enforce").exists() {
        eprintln!("SKIPPED: requests on a host without SELinux: this kernel has it");
        return;
    }
    let (daemon, pod) = daemon_with_pod().await;
    let bad = with_options(sleeper("bad"), options("", "", "", "s0,c4,c5"));
    let error = daemon.create(&pod, &bad).await.expect_err("no level");
    assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
    assert!(error.message().contains(&format!("{AT}.level")), "{error:?}");
    let named = with_options(sleeper("named"), options("any_u", "any_r", "any_t", "s0:c1"));
    daemon.run(&pod, &named).await.expect("start");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_of_a_pod_have_its_level_and_no_other_pods() {
    if !selinux("SELinux levels of pods") {
        return;
    }
    let (mut daemon, pod) = daemon_with_pod().await;
    let first = daemon.run(&pod, &sleeper("first")).await.expect("start");
    let own = label(&daemon, &first).await;
    level(&own);
    // Without new privileges and rights, by a user.
    let strict = context(sleeper("strict"), |context| {
        context.no_new_privs = true;
        context.run_as_user = Some(Int64Value { value: 1000 });
        context.seccomp = Some(SecurityProfile::default());
        context.capabilities =
            Some(Capability { drop_capabilities: vec!["ALL".into()], ..Default::default() });
    });
    let strict = daemon.run(&pod, &strict).await.expect("start");
    assert_eq!(label(&daemon, &strict).await, own);
    let row = crate::inspect::report(&daemon, &strict);
    let row = crate::inspect::row(&row, "process", "LSM label");
    assert_ne!(row["differs"], true, "{row}");
    assert_eq!(row["kernel"], own.as_str(), "{row}");

    let other = daemon.run_pod(stave_e2e::pod("other")).await.expect("RunPodSandbox");
    let second = daemon.run(&other, &sleeper("second")).await.expect("start");
    let others = label(&daemon, &second).await;
    assert_ne!(level(&others), level(&own));
    // Its signal comes from outside of the level.
    daemon.cri.stop(&second, 10).await.expect("StopContainer");
    assert_eq!(daemon.cri.container(&second).await.expect("ContainerStatus").exit_code, 0);
    // The next daemon knows the level.
    daemon.kill();
    daemon.restart().await;
    let third = daemon.run(&pod, &sleeper("third")).await.expect("start");
    assert_eq!(label(&daemon, &third).await, own);
    assert_eq!(label(&daemon, &first).await, own);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn options_of_containers_and_of_pods() {
    if !selinux("SELinux options") {
        return;
    }
    let (daemon, pod) = daemon_with_pod().await;
    let plain = daemon.run(&pod, &sleeper("plain")).await.expect("start");
    let own = level(&label(&daemon, &plain).await);
    let optioned = pod_context(stave_e2e::pod("optioned"), |context| {
        context.selinux_options = options("", "", "container_init_t", "s0:c7,c6");
    });
    let optioned = daemon.run_pod(optioned).await.expect("RunPodSandbox");
    for (n, (pod, options, process, file_level)) in [
        (
            &pod,
            options("other_u", "other_r", "container_init_t", "s0:c9"),
            "other_u:other_r:container_init_t:s0:c9".into(),
            "s0:c9",
        ),
        (
            &pod,
            options("", "", "container_init_t", ""),
            process("container_init_t", own.as_str()),
            own.as_str(),
        ),
        // Not as the kernel writes them: an older name of the type, categories in another order, a range of them.
        (
            &pod,
            options("", "", "svirt_lxc_net_t", "s0:c5,c4"),
            process("container_t", "s0:c4,c5"),
            "s0:c4,c5",
        ),
        (&pod, options("", "", "", "s0:c3,c2,c1"), process("container_t", "s0:c1.c3"), "s0:c1.c3"),
        (&pod, options("", "", "", "s0-s0:c2,c1"), process("container_t", "s0-s0:c1,c2"), "s0-s0:c1,c2"),
        (&pod, options("", "", "", "s0"), process("container_t", "s0"), "s0"),
        (&optioned, None, process("container_init_t", "s0:c6,c7"), "s0:c6,c7"),
        (&optioned, options("", "", "container_t", ""), process("container_t", "s0:c6,c7"), "s0:c6,c7"),
    ]
    .into_iter()
    .enumerate()
    {
        let config = with_options(sleeper(&format!("container-{n}")), options.clone());
        let id = daemon.run(pod, &config).await.unwrap_or_else(|e| panic!("{options:?}: {e:?}"));
        assert_eq!(label(&daemon, &id).await, process, "{options:?}");
        daemon.cri.output(&id, &["touch", "/new"]).await;
        let root = format!("/proc/{}/root/new", host_pid(&daemon, &id).await);
        assert!(
            file_label(&root).ends_with(&format!(":object_r:container_file_t:{file_level}")),
            "{options:?}"
        );
        daemon.cri.remove(&id).await.expect("RemoveContainer");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_and_mounts_have_the_pods_label_and_are_of_use() {
    if !selinux("SELinux labels of files") {
        return;
    }
    let (daemon, pod) = daemon_with_pod().await;
    // One layer, three layers.
    let images = ["stave/busybox", "stave/layers"].map(image);
    for name in &images {
        daemon.cri.pull(name).await.expect("PullImage");
    }
    let of = |name: &String, path: &str| Mount {
        container_path: path.to_owned(),
        readonly: true,
        image: Some(ImageSpec { image: name.clone(), ..Default::default() }),
        ..Default::default()
    };
    let inside = daemon.run_pod(user::pod("user-namespace")).await.expect("RunPodSandbox");
    for (pod, mapped) in [(&pod, false), (&inside, true)] {
        let config = if mapped { user::inside(sleeper("main")) } else { sleeper("main") };
        let config =
            config.with(|config| config.mounts = vec![of(&images[0], "/one"), of(&images[1], "/three")]);
        // What the label of the process may not use, this would not do.
        let script = "set -e; for d in / /dev/shm /dev/mqueue; do touch $d/file $d/made; rm $d/file; done; echo x >/made; echo x >/dev/shm/made; \
                      echo x >/dev/null; head -c 1 /dev/urandom >/dev/null; cat /etc/hosts /etc/resolv.conf >/dev/null; \
                      /one/bin/busybox true; /three/bin/busybox true; cat /three/changed";
        let id = daemon.run(pod, &config).await.expect("start");
        assert_eq!(daemon.cri.shell(&id, script).await, "upper\n", "mapped: {mapped}");
        let wanted = file(&level(&label(&daemon, &id).await));
        let root = format!("/proc/{}/root", host_pid(&daemon, &id).await);
        for path in [
            "",
            "etc/passwd",
            "made",
            "etc/hosts",
            "etc/resolv.conf",
            "etc/hostname",
            "dev",
            "dev/shm",
            "dev/shm/made",
            "dev/mqueue",
            "dev/mqueue/made",
            "dev/pts",
            "dev/pts/ptmx",
            "one",
            "one/bin/busybox",
            "three/changed",
        ] {
            assert_eq!(file_label(format!("{root}/{path}")), wanted, "{path}, mapped: {mapped}");
        }
        let mountinfo = daemon.cri.output(&id, &["cat", "/proc/self/mountinfo"]).await;
        for path in ["/", "/dev", "/dev/shm", "/dev/pts", "/one", "/three"] {
            mountinfo_has(&mountinfo, path, &wanted);
        }
        // A terminal of the container's own.
        let tty = config.with(|config| {
            config.metadata.as_mut().unwrap().name = "tty".into();
            config.tty = true;
        });
        let tty = daemon.run(pod, &tty).await.expect("start");
        daemon.cri.shell(&tty, "echo x >/proc/1/fd/1 && echo x >/dev/console").await;
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keyring_is_the_containers_own() {
    if !selinux("SELinux labels of keys") {
        return;
    }
    let (daemon, pod) = daemon_with_pod().await;
    // Not masked here: it shows the keys that the process may see.
    let config = context(sleeper("main"), |context| context.masked_paths = vec!["/proc/timer_list".into()]);
    let id = daemon.run(&pod, &config).await.expect("start");
    let keys = daemon.cri.output(&id, &["cat", "/proc/keys"]).await;
    assert!(keys.lines().any(|line| line.contains(" keyring ") && line.contains("_ses")), "{keys:?}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_init_of_a_shared_pid_namespace_has_the_pods_label() {
    if !selinux("the label of a pod's init") {
        return;
    }
    let (daemon, pod) = daemon_with_pod().await;
    let config = sleeper("main").with(|config| config.namespaces().pid = NamespaceMode::Pod as i32);
    let id = daemon.run(&pod, &config).await.expect("start");
    let own = attribute(&host_pid(&daemon, &id).await.to_string(), "current");
    let init = daemon.cri.output(&id, &["cat", "/proc/1/attr/current"]).await;
    assert_eq!(init.trim_end_matches('\0'), own);
    let mountinfo = daemon.cri.output(&id, &["cat", "/proc/1/mountinfo"]).await;
    mountinfo_has(&mountinfo, "/", &file(&level(&own)));
    // It ends with its supervisor's signal, although it is in another domain.
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_label_that_the_policy_does_not_have_is_refused_before_anything_is_made() {
    if !selinux("labels that are not in the policy") {
        return;
    }
    let (daemon, pod) = daemon_with_pod().await;
    for (wrong, code, told) in [
        (options("", "", "absent_t", ""), Code::FailedPrecondition, "system_u:system_r:absent_t:s0:c"),
        (options("absent_u", "", "", ""), Code::FailedPrecondition, "absent_u:system_r:container_t:s0:c"),
        (options("", "absent_r", "", ""), Code::FailedPrecondition, "system_u:absent_r:container_t:s0:c"),
        // A type of files, which no process can have; a role that is not for this user.
        (options("", "", "container_file_t", ""), Code::FailedPrecondition, "system_r:container_file_t"),
        (options("", "other_r", "", ""), Code::FailedPrecondition, "system_u:other_r:container_t"),
        (options("", "", "", "s1:c1,c2"), Code::FailedPrecondition, "container_t:s1:c1,c2"),
        (options("", "", "", "s0,c4,c5"), Code::InvalidArgument, "s0,c4,c5"),
        (options("", "", "", "s0:c1024"), Code::InvalidArgument, "s0:c1024"),
        (options("", "", "spc_t:s0", ""), Code::InvalidArgument, "spc_t:s0"),
    ] {
        let error =
            daemon.create(&pod, &with_options(sleeper("wrong"), wrong.clone())).await.expect_err(told);
        assert_eq!(error.code(), code, "{error:?}");
        assert!(error.message().contains(AT) && error.message().contains(told), "{error:?}");
        let config = pod_context(stave_e2e::pod("wrong"), |context| context.selinux_options = wrong);
        let error = daemon.run_pod(config).await.expect_err(told);
        assert_eq!(error.code(), code, "{error:?}");
        assert!(error.message().contains(AT) && error.message().contains(told), "{error:?}");
    }
    assert_eq!(daemon.cri.containers(None).await.unwrap().len(), 0);
    assert_eq!(daemon.cri.pods(None).await.unwrap().len(), 1);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2019_16884() {
    // A /proc that is a volume: the labels are written to the kernel all the same, and not into files there.
    if !selinux("CVE-2019-16884, a false /proc and the label") {
        return;
    }
    let (daemon, pod) = daemon_with_pod().await;
    let proc = daemon.directory().join("proc");
    for directory in ["self", "thread-self", "1", "2"] {
        let attr = proc.join(directory).join("attr");
        fs::create_dir_all(&attr).expect("directory");
        for file in ["exec", "current", "keycreate"] {
            fs::write(attr.join(file), "untouched").expect("file");
        }
    }
    let config = sleeper("main").with(|config| config.mounts = vec![volume(&proc, "/proc", true)]);
    let id = daemon.run(&pod, &config).await.expect("start");
    level(&attribute(&host_pid(&daemon, &id).await.to_string(), "current"));
    assert_eq!(daemon.cri.output(&id, &["cat", "/proc/thread-self/attr/exec"]).await, "untouched");
    // Of an exec too, which has nothing but that /proc around it.
    let of_exec = eventually("the exec", async || {
        let is_it = |pid: &String| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line == b"sleep\x0077\0")
        };
        let mut pids = fs::read_dir("/proc")
            .expect("/proc")
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned());
        pids.find(is_it).map(|pid| attribute(&pid, "current"))
    });
    let of_exec = tokio::select! {
        label = of_exec => label,
        answer = daemon.cri.exec(&id, &["sleep", "77"]) => panic!("{answer:?}"),
    };
    level(&of_exec);
    for directory in ["self", "thread-self", "1", "2"] {
        for file in ["exec", "current", "keycreate"] {
            let path = proc.join(directory).join("attr").join(file);
            assert_eq!(fs::read_to_string(&path).expect("file"), "untouched", "{}", path.display());
        }
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oci_runtime_gets_the_labels_too() {
    if !selinux("SELinux labels by way of runc") {
        return;
    }
    let config = "\n[runtimes.runc]\ntype = \"oci\"\npath = \"/usr/sbin/runc\"\n".to_owned();
    let daemon =
        Daemon::with(Options { config, default_runtime: Some("stave".into()), ..Default::default() }).await;
    daemon.cri.pull(&busybox()).await.expect("PullImage");
    let config = daemon.with_log_directory(stave_e2e::pod("runc"));
    let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: "runc".into() };
    let id = daemon.cri.run_pod_sandbox(request).await.expect("RunPodSandbox").pod_sandbox_id;
    daemon.remember([id.clone()]);
    let pod = Pod { config, id };
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let own = level(&label(&daemon, &id).await);
    let root = format!("/proc/{}/root", host_pid(&daemon, &id).await);
    daemon.cri.shell(&id, "touch /made /dev/shm/made /dev/mqueue/made").await;
    for path in ["", "made", "dev/shm/made", "dev/mqueue/made"] {
        assert_eq!(file_label(format!("{root}/{path}")), file(own.as_str()), "{path}");
    }
    daemon.finish().await;
}
