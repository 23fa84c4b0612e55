//! `stave inspect`: what the kernel has, beside what was asked for.

use std::process::Command;

use rustix::fs::StatVfsMountFlags;
use serde_json::Value;
use stave_e2e::cri::*;
use stave_e2e::{Config, Daemon, image, pod};

use crate::{daemon, daemon_with_pod, sleeper};

/// The program beside the daemon's own.
fn inspect(daemon: &Daemon, arguments: &[&str]) -> (bool, String) {
    let program = std::fs::read_link(format!("/proc/{}/exe", daemon.pid())).expect("the daemon's program");
    let output = Command::new(program)
        .arg("--address")
        .arg(daemon.socket())
        .arg("inspect")
        .args(arguments)
        .output()
        .expect("stave inspect");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).expect("UTF-8"))
}

pub(crate) fn report(daemon: &Daemon, id: &str) -> Value {
    let (good, text) = inspect(daemon, &[id, "-o", "json"]);
    assert!(good, "{text}");
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

fn rows<'a>(report: &'a Value, section: &str) -> &'a Vec<Value> {
    let sections = report["sections"].as_array().expect("sections");
    let section = sections.iter().find(|one| one["title"] == section).expect("section");
    section["rows"].as_array().expect("rows")
}

pub(crate) fn row<'a>(report: &'a Value, section: &str, what: &str) -> &'a Value {
    rows(report, section)
        .iter()
        .find(|row| row["what"] == what)
        .unwrap_or_else(|| panic!("no {what} in {:#}", report["sections"]))
}

fn kernel<'a>(report: &'a Value, section: &str, what: &str) -> &'a str {
    row(report, section, what)["kernel"].as_str().expect("kernel")
}

/// The bounding set of this process lacks something that the kernel knows.
fn stave_has_less_than_all() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let set = status.lines().find_map(|line| line.strip_prefix("CapBnd:")).expect("CapBnd").trim().to_owned();
    let last: u32 = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap")
        .expect("cap_last_cap")
        .trim()
        .parse()
        .expect("a number");
    u64::from_str_radix(&set, 16).expect("a mask").count_ones() <= last
}

fn differing(report: &Value) -> Vec<&Value> {
    let sections = report["sections"].as_array().expect("sections");
    sections
        .iter()
        .flat_map(|one| one["rows"].as_array().expect("rows"))
        .filter(|row| row["differs"] == true)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restricted_container_has_what_was_asked_for() {
    let (daemon, pod) = daemon_with_pod().await;
    daemon.cri.pull(&image("stave/layers")).await.expect("PullImage");
    let host_file = daemon.directory().join("data");
    std::fs::create_dir(&host_file).expect("directory");
    let config = sleeper("main").with(|config| {
        config.mounts = vec![
            Mount {
                container_path: "/data".into(),
                host_path: host_file.to_string_lossy().into_owned(),
                readonly: true,
                ..Default::default()
            },
            Mount {
                container_path: "/image".into(),
                readonly: true,
                image: Some(ImageSpec { image: image("stave/layers"), ..Default::default() }),
                ..Default::default()
            },
        ];
        let linux = config.linux.get_or_insert_default();
        linux.resources = Some(LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 64 << 20,
            oom_score_adj: 300,
            cpuset_cpus: "0".into(),
            ..Default::default()
        });
        let context = linux.security_context.get_or_insert_default();
        context.run_as_user = Some(Int64Value { value: 1000 });
        context.run_as_group = Some(Int64Value { value: 3000 });
        context.supplemental_groups = vec![5000];
        context.readonly_rootfs = true;
        context.no_new_privs = true;
        context.masked_paths =
            ["/proc/interrupts", "/proc/acpi", "/sys/firmware", "/proc/nothing"].map(String::from).to_vec();
        context.readonly_paths = ["/proc/sys", "/proc/irq"].map(String::from).to_vec();
        context.capabilities = Some(Capability {
            drop_capabilities: vec!["ALL".into()],
            add_capabilities: vec!["CHOWN".into()],
            ..Default::default()
        });
        context.seccomp = Some(SecurityProfile { profile_type: 0, ..Default::default() });
    });
    // Before its start, and after.
    let id = daemon.create(&pod, &config).await.expect("CreateContainer");
    let created = report(&daemon, &id);
    assert_eq!(
        (&created["state"], created["differences"].as_u64()),
        (&"created".into(), Some(0)),
        "{:#?}",
        differing(&created)
    );
    daemon.cri.start(&id).await.expect("StartContainer");
    let found = report(&daemon, &id);
    assert_eq!(found["differences"], 0, "{:#?}", differing(&found));
    assert_eq!(found["state"], "running");
    for (namespace, whose) in [
        ("mnt", "container"),
        ("pid", "container"),
        ("net", "pod"),
        ("ipc", "pod"),
        ("uts", "pod"),
        ("user", "node"),
    ] {
        assert_eq!(kernel(&found, "namespaces", namespace), whose, "{namespace}");
    }
    for (what, value) in [
        ("uid", "1000"),
        ("gid", "3000"),
        ("groups", "3000 5000"),
        ("capabilities: bounding", "chown"),
        ("capabilities: effective", "none"),
        ("no_new_privs", "on"),
        ("seccomp", "filter"),
        ("oom_score_adj", "300"),
        ("uid_map", "0 0 4294967295"),
    ] {
        assert_eq!(kernel(&found, "process", what), value, "{what}");
    }
    assert_eq!(kernel(&found, "mounts", "/"), "ro");
    assert_eq!(kernel(&found, "mounts", "/proc/interrupts"), "masked");
    assert_eq!(kernel(&found, "mounts", "/proc/sys"), "ro");
    assert!(rows(&found, "mounts").iter().all(|row| row["what"] != "/proc/nothing"));
    assert!(kernel(&found, "mounts", "/data").starts_with("bind,ro"));
    assert_eq!(row(&found, "mounts", "/image")["detail"], "overlay");
    assert_eq!(kernel(&found, "limits", "memory"), (64 << 20).to_string());
    assert_eq!(kernel(&found, "limits", "cpu quota"), "50000 100000");
    assert_eq!(kernel(&found, "limits", "cpus"), "0");
    // For people.
    let (good, text) = inspect(&daemon, &["main"]);
    assert!(good && text.contains("Nothing differs.") && text.contains("memory"), "{text}");

    // An update is what was asked for from then on.
    let resources = LinuxContainerResources { memory_limit_in_bytes: 96 << 20, ..Default::default() };
    let request = UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(resources),
        ..Default::default()
    };
    daemon.cri.runtime.clone().update_container_resources(request).await.expect("UpdateContainerResources");
    let found = report(&daemon, &id);
    assert_eq!(found["differences"], 0, "{:#?}", differing(&found));
    assert_eq!(kernel(&found, "limits", "memory"), (96 << 20).to_string());

    daemon.cri.stop(&id, 0).await.expect("StopContainer");
    let (good, text) = inspect(&daemon, &[&id]);
    assert!(!good && text.contains("exited"), "{text}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_changed_by_hand_is_marked() {
    let daemon = daemon().await;
    let config = pod("privileged").with(|config| {
        let linux = config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = true;
    });
    let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
    let config = sleeper("main").with(|config| {
        let linux = config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = true;
        linux.resources.get_or_insert_default().cpu_shares = 512;
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let found = report(&daemon, &id);
    // A host that lacks a capability itself can't give it: that is told, and all there is.
    let lacking = differing(&found).len();
    let whole = !stave_has_less_than_all();
    assert_eq!(lacking, if whole { 0 } else { 3 }, "{:#?}", differing(&found));
    assert!(
        differing(&found)
            .iter()
            .all(|row| row["what"].as_str().is_some_and(|what| what.starts_with("capabilities: ")))
    );
    assert!(kernel(&found, "process", "capabilities: effective") == "all" || !whole);
    assert_eq!(kernel(&found, "process", "seccomp"), "none");

    daemon
        .cri
        .shell(&id, "mkdir /by-hand && mount -t tmpfs none /by-hand && mount -o remount,bind,rw /sys || true")
        .await;
    let cgroup = found["cgroup"].as_str().expect("cgroup").to_owned();
    let (v1, v2) =
        (format!("/sys/fs/cgroup/cpu{cgroup}/cpu.shares"), format!("/sys/fs/cgroup{cgroup}/cpu.weight"));
    let file = if std::path::Path::new(&v1).exists() { v1 } else { v2 };
    std::fs::write(&file, "1000").expect("cgroup file");
    let found = report(&daemon, &id);
    let marked: Vec<&str> =
        differing(&found).iter().skip(lacking).filter_map(|row| row["what"].as_str()).collect();
    assert_eq!(marked, ["/by-hand", "cpu weight"], "{:#?}", differing(&found));
    let (good, text) = inspect(&daemon, &[&id]);
    let line = text.lines().find(|line| line.contains("/by-hand")).expect("a line");
    assert!(
        good && line.starts_with('!') && text.contains(&format!("{} lines differ", 2 + lacking)),
        "{text}"
    );
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_namespace_of_a_target_is_told() {
    let (daemon, pod) = daemon_with_pod().await;
    let target = daemon.run(&pod, &sleeper("target")).await.expect("start");
    let debug = sleeper("debug").with(|config| {
        config.namespaces().pid = NamespaceMode::Target as i32;
        config.namespaces().target_id = target.clone();
    });
    let id = daemon.run(&pod, &debug).await.expect("start");
    let found = report(&daemon, &id);
    assert_eq!(kernel(&found, "namespaces", "pid"), "target");
    assert_eq!(found["differences"], 0, "{:#?}", differing(&found));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn user_and_time_namespaces_are_compared() {
    use crate::container_anatomy::user;
    if stave_e2e::skipped_without("time") {
        return;
    }
    let daemon = daemon().await;
    let config = user::pod("pod").with(|config| {
        config.annotations.insert("stave.dev/time-offsets".into(), "boottime=86400s,monotonic=-1ns".into());
    });
    let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
    // Outside of /dev a device is a mount, which nobody has asked for in these words.
    let config = user::inside(sleeper("main")).with(|config| {
        config.devices = vec![Device {
            host_path: "/dev/zero".into(),
            container_path: "/opt/zero".into(),
            permissions: "r".into(),
        }];
        config.mounts = vec![Mount {
            host_path: daemon.directory().join("logs").display().to_string(),
            container_path: "/volume".into(),
            uid_mappings: user::mapping(),
            gid_mappings: user::mapping(),
            ..Default::default()
        }];
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let report = report(&daemon, &id);
    assert_eq!(kernel(&report, "mounts", "/opt/zero"), "c 1:5");
    // What the file system that it is from forbids stays forbidden.
    let flags = rustix::fs::statvfs(daemon.directory()).expect("statvfs").f_flag;
    let kept = [(StatVfsMountFlags::NOSUID, "nosuid,"), (StatVfsMountFlags::NODEV, "nodev,")];
    let kept: String = kept.iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, name)| *name).collect();
    assert_eq!(kernel(&report, "mounts", "/volume"), format!("bind,rw,{kept}private,idmapped"));
    for name in ["user", "time"] {
        assert_eq!(kernel(&report, "namespaces", name), "pod", "{name}");
    }
    let user = row(&report, "namespaces", "user")["detail"].as_str().expect("detail").to_owned();
    for name in ["mnt", "pid", "net", "ipc", "uts", "cgroup", "time"] {
        let detail = row(&report, "namespaces", name)["detail"].as_str().expect("detail");
        assert!(detail.ends_with(&format!(", of {user}")), "{name}: {detail}");
    }
    let map = format!("0 {} {}", user::FIRST, user::COUNT);
    assert_eq!(kernel(&report, "process", "uid_map"), map);
    assert_eq!(kernel(&report, "process", "gid_map"), map);
    assert_eq!(kernel(&report, "process", "time offsets"), "boottime 86400s 0ns, monotonic -1s 999999999ns");
    let differing = differing(&report);
    assert!(differing.is_empty(), "{differing:#?}");
    daemon.finish().await;
}
