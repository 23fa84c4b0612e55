//! AppArmor profiles of containers. What a profile does is tested where the kernel has AppArmor (`hack/vm` has); what
//! becomes of requests without it, everywhere else.

use std::io::Write as _;
use std::process::{Command, Stdio};

use stave_e2e::cri::*;
use stave_e2e::{Config, Daemon, Options, Pod};
use tonic::Code;

use crate::{daemon_with_pod, sleeper};

const RUNTIME_DEFAULT: i32 = 0;
const UNCONFINED: i32 = 1;
const LOCALHOST: i32 = 2;

const DEFAULT: &str = "stave-default (enforce)\n";

/// Whether the kernel has AppArmor; says loudly what is not tested without.
fn apparmor(what: &str) -> bool {
    let enabled = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    let here = enabled.is_ok_and(|text| text.trim() == "Y");
    if !here {
        eprintln!("SKIPPED: {what}: this kernel has no AppArmor; `hack/test vm` runs this in a VM that has");
    }
    here
}

fn context(
    config: ContainerConfig,
    change: impl FnOnce(&mut LinuxContainerSecurityContext),
) -> ContainerConfig {
    config.with(|config| change(config.linux.as_mut().unwrap().security_context.get_or_insert_default()))
}

fn profile(config: ContainerConfig, kind: i32, name: &str) -> ContainerConfig {
    context(config, |context| {
        context.apparmor = Some(SecurityProfile { profile_type: kind, localhost_ref: name.to_owned() });
    })
}

/// By the field of older clients.
#[allow(deprecated)]
fn old(config: ContainerConfig, name: &str) -> ContainerConfig {
    context(config, |context| context.apparmor_profile = name.to_owned())
}

/// A profile of the host, gone when this is dropped. It denies writing to /tmp/denied.
struct Loaded(String);

impl Loaded {
    fn new(name: &str) -> Loaded {
        let name = format!("{name}-{}", std::process::id());
        let text = format!(
            "profile {name} flags=(attach_disconnected) {{\n  file,\n  network,\n  capability,\n  signal,\n  deny /tmp/denied w,\n}}\n"
        );
        parser("--replace", &text);
        Loaded(name)
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        parser("--remove", &format!("profile {} {{\n}}\n", self.0));
    }
}

fn parser(option: &str, text: &str) {
    let mut child = Command::new("apparmor_parser")
        .args([option, "--skip-cache"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("apparmor_parser, of Debian's package apparmor");
    child.stdin.take().unwrap().write_all(text.as_bytes()).expect("profile");
    assert!(child.wait().expect("apparmor_parser").success(), "{text}");
}

/// The labels of PID 1 and of an exec.
async fn labels(daemon: &Daemon, id: &str) -> String {
    daemon.cri.output(id, &["cat", "/proc/1/attr/current", "/proc/self/attr/current"]).await
}

async fn config_json(daemon: &Daemon, pod: &Pod, id: &str) -> serde_json::Value {
    let state = daemon.directory().join("state/pods");
    let file = state.join(&pod.id).join("containers").join(id).join("config.json");
    serde_json::from_slice(&std::fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display())))
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn without_apparmor_a_named_profile_is_refused_and_the_default_is_none() {
    if std::fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.trim() == "Y")
    {
        eprintln!("SKIPPED: requests on a host without AppArmor: this kernel has it");
        return;
    }
    let (daemon, pod) = daemon_with_pod().await;
    for (n, config) in [
        profile(sleeper("new"), LOCALHOST, "web"),
        profile(sleeper("prefix"), LOCALHOST, "localhost/web"),
        old(sleeper("old"), "localhost/web"),
    ]
    .into_iter()
    .enumerate()
    {
        let error = daemon.create(&pod, &config).await.expect_err("no AppArmor");
        assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
        let field = ["apparmor", "apparmor", "apparmor_profile"][n];
        let wanted = format!("config.linux.security_context.{field}: value \"web\"");
        assert!(error.message().contains(&wanted), "{error:?}");
    }
    assert_eq!(daemon.cri.containers(None).await.unwrap().len(), 0);
    for config in [
        sleeper("unset"),
        profile(sleeper("default"), RUNTIME_DEFAULT, ""),
        profile(sleeper("unconfined"), UNCONFINED, ""),
        old(sleeper("old-default"), "runtime/default"),
    ] {
        let id = daemon.run(&pod, &config).await.expect("start");
        let json = config_json(&daemon, &pod, &id).await;
        assert!(json["process"].get("apparmorProfile").is_none(), "{json:#}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_default_profile_confines_containers_and_execs() {
    if !apparmor("the default AppArmor profile") {
        return;
    }
    let (daemon, pod) = daemon_with_pod().await;
    for config in [
        sleeper("unset"),
        profile(sleeper("default"), RUNTIME_DEFAULT, ""),
        old(sleeper("old"), "runtime/default"),
        context(profile(sleeper("nnp"), RUNTIME_DEFAULT, ""), |context| {
            context.no_new_privs = true;
            context.run_as_user = Some(Int64Value { value: 1000 });
            context.seccomp = Some(SecurityProfile::default());
        }),
    ] {
        let name = config.metadata.clone().unwrap().name;
        let id = daemon.run(&pod, &config).await.expect("start");
        assert_eq!(labels(&daemon, &id).await, DEFAULT.repeat(2), "{name}");
        let json = config_json(&daemon, &pod, &id).await;
        assert_eq!(json["process"]["apparmorProfile"], "stave-default");
        let report = crate::inspect::report(&daemon, &id);
        let row = crate::inspect::row(&report, "process", "LSM label");
        assert_ne!(row["differs"], true, "{row}");
        assert_eq!(row["kernel"], DEFAULT.trim(), "{row}");
        // The container ends by its signal, which comes from outside of the profile.
        daemon.cri.stop(&id, 10).await.expect("StopContainer");
        let status = daemon.cri.container(&id).await.expect("ContainerStatus");
        assert_eq!(status.exit_code, 0, "SIGTERM arrives: {status:?}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_default_profile_denies_what_reaches_the_host() {
    if !apparmor("what the default AppArmor profile denies") {
        return;
    }
    let (daemon, pod) = daemon_with_pod().await;
    // With all capabilities and nothing masked or read-only, so that only the profile is in the way.
    let mighty = |name| {
        context(sleeper(name), |context| {
            context.capabilities =
                Some(Capability { add_capabilities: vec!["ALL".into()], ..Default::default() });
        })
    };
    let copy = |file| format!("cat {file} >{file}");
    let script: String = [
        ("file", "touch /tmp/file".to_owned()),
        ("mount", "mount -t tmpfs t /mnt".to_owned()),
        ("core_pattern", copy("/proc/sys/kernel/core_pattern")),
        ("swappiness", copy("/proc/sys/vm/swappiness")),
        ("sysrq", ": >/proc/sysrq-trigger".to_owned()),
        ("kcore", "head -c 1 /proc/kcore >/dev/null".to_owned()),
        ("firmware", "ls /sys/firmware/acpi >/dev/null".to_owned()),
        ("oom", copy("/proc/self/oom_score_adj")),
        ("shm", copy("/proc/sys/kernel/shmmax")),
    ]
    .iter()
    .map(|(word, command)| format!("({command}) 2>/dev/null && echo {word};"))
    .collect();
    let tries = format!("{script} true");
    let confined = daemon.run(&pod, &mighty("confined")).await.expect("start");
    let answer = daemon.cri.shell(&confined, &tries).await;
    assert_eq!(answer, "file\noom\nshm\n");
    let free = daemon.run(&pod, &profile(mighty("free"), UNCONFINED, "")).await.expect("start");
    let answer = daemon.cri.shell(&free, &tries).await;
    for done in ["file", "mount", "core_pattern", "swappiness", "oom", "shm"] {
        assert!(answer.lines().any(|line| line == done), "{done} in {answer}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unconfined_and_privileged_containers_have_no_profile() {
    if !apparmor("unconfined containers") {
        return;
    }
    let (daemon, pod) = daemon_with_pod().await;
    let privileged = stave_e2e::pod("privileged").with(|config| {
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    });
    let privileged = daemon.run_pod(privileged).await.expect("RunPodSandbox");
    let all = |config| context(config, |context| context.privileged = true);
    for (pod, config) in [
        (&pod, profile(sleeper("unconfined"), UNCONFINED, "")),
        (&pod, old(sleeper("old"), "unconfined")),
        (&privileged, all(sleeper("privileged"))),
        (&privileged, all(profile(sleeper("privileged-default"), RUNTIME_DEFAULT, ""))),
    ] {
        let id = daemon.run(pod, &config).await.expect("start");
        assert_eq!(labels(&daemon, &id).await, "unconfined\n".repeat(2), "{:?}", config.metadata);
    }
    let loaded = Loaded::new("stave-test-privileged");
    let config = all(profile(sleeper("privileged-local"), LOCALHOST, &loaded.0));
    let id = daemon.run(&privileged, &config).await.expect("start");
    assert_eq!(labels(&daemon, &id).await, format!("{} (enforce)\n", loaded.0).repeat(2));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loaded_profile_is_applied_in_every_form_of_its_name() {
    if !apparmor("profiles of the host") {
        return;
    }
    let (daemon, pod) = daemon_with_pod().await;
    let loaded = Loaded::new("stave-test-local");
    let name = loaded.0.clone();
    for config in [
        profile(sleeper("new"), LOCALHOST, &name),
        profile(sleeper("prefix"), LOCALHOST, &format!("localhost/{name}")),
        old(sleeper("old"), &format!("localhost/{name}")),
    ] {
        let id = daemon.run(&pod, &config).await.expect("start");
        assert_eq!(labels(&daemon, &id).await, format!("{name} (enforce)\n").repeat(2));
        let made = daemon.cri.exec(&id, &["touch", "/tmp/denied"]).await.expect("ExecSync");
        assert_ne!(made.exit_code, 0);
        daemon.cri.output(&id, &["touch", "/tmp/allowed"]).await;
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_profile_that_is_not_loaded_is_refused_before_anything_is_made() {
    if !apparmor("profiles that are not loaded") {
        return;
    }
    let (daemon, pod) = daemon_with_pod().await;
    for config in [
        profile(sleeper("new"), LOCALHOST, "stave-test-absent"),
        // A prefix of one that is loaded is not it.
        profile(sleeper("part"), LOCALHOST, "stave-defaul"),
        old(sleeper("old"), "localhost/stave-test-absent"),
    ] {
        let error = daemon.create(&pod, &config).await.expect_err("not loaded");
        assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
        assert!(error.message().contains("apparmor") && error.message().contains("stave-"), "{error:?}");
    }
    assert_eq!(daemon.cri.containers(None).await.unwrap().len(), 0);
    // Unloaded between CreateContainer and StartContainer: the container must not run without it.
    let loaded = Loaded::new("stave-test-gone");
    let id = daemon.create(&pod, &profile(sleeper("gone"), LOCALHOST, &loaded.0)).await.expect("create");
    drop(loaded);
    let error = daemon.cri.start(&id).await.expect_err("the profile is gone");
    assert!(error.message().contains("apparmor"), "{error:?}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2019_16884() {
    // A /proc that is a volume: the label is written all the same, and not into files there.
    if !apparmor("CVE-2019-16884, a false /proc and the label") {
        return;
    }
    let (daemon, pod) = daemon_with_pod().await;
    let proc = daemon.directory().join("proc");
    for directory in ["self", "thread-self", "1", "2"] {
        let attr = proc.join(directory).join("attr/apparmor");
        std::fs::create_dir_all(&attr).expect("directory");
        for file in ["exec", "current", "../exec", "../current"] {
            std::fs::write(attr.join(file), "untouched").expect("file");
        }
    }
    let config = sleeper("main").with(|config| {
        config.mounts = vec![Mount {
            host_path: proc.to_string_lossy().into_owned(),
            container_path: "/proc".into(),
            ..Default::default()
        }];
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    // An exec has nothing but that /proc around it.
    assert_eq!(daemon.cri.output(&id, &["cat", "/proc/thread-self/attr/apparmor/exec"]).await, "untouched");
    let request = ContainerStatusRequest { container_id: id.clone(), verbose: true };
    let info = daemon.cri.container_status(request).await.expect("ContainerStatus").info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).expect("JSON");
    let label = std::fs::read_to_string(format!("/proc/{}/attr/current", info["pid"])).expect("label");
    assert_eq!(label, DEFAULT);
    // The exec shows by what it may not do.
    let mounted =
        daemon.cri.exec(&id, &["sh", "-c", "echo x >/proc/self/attr/exec; : >/sys/power/state"]).await;
    assert_ne!(mounted.expect("ExecSync").exit_code, 0);
    for directory in ["thread-self", "1", "2"] {
        let attr = proc.join(directory).join("attr/apparmor/exec");
        assert_eq!(std::fs::read_to_string(attr).expect("file"), "untouched");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_default_profile_is_told_with_its_line() {
    if !apparmor("a broken default profile") {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "profile stave-default {\n  file,\n  nonsense here,\n}\n").unwrap();
    let config = format!("\n[apparmor]\nprofile = \"{}\"\n", file.path().display());
    let daemon = Daemon::with(Options { config, ..Options::default() }).await;
    daemon.cri.pull(&crate::busybox()).await.expect("PullImage");
    let pod = daemon.run_pod(stave_e2e::pod("pod")).await.expect("RunPodSandbox");
    let error =
        daemon.create(&pod, &profile(sleeper("default"), RUNTIME_DEFAULT, "")).await.expect_err("broken");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    assert!(error.message().contains("line 3"), "{error:?}");
    assert!(daemon.log().contains("line 3"), "{}", daemon.log());
    let id = daemon.run(&pod, &sleeper("unset")).await.expect("start");
    assert_eq!(labels(&daemon, &id).await, "unconfined\n".repeat(2));
    daemon.finish().await;
}
