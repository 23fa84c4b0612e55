//! A process of an exec is as the container's own, seen from the host.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use stave_e2e::cri::*;
use stave_e2e::{Config as _, Daemon, container};

use crate::busybox;
use crate::container_anatomy::user::{daemon_with_user_namespace, inside};
use crate::container_anatomy::{host_pid, status_line};

const RUNTIME_DEFAULT: i32 = 0;

/// What a process has from its container, by name.
fn rights(pid: u32) -> BTreeMap<String, String> {
    let proc = |name: &str| format!("/proc/{pid}/{name}");
    let mut rights = BTreeMap::new();
    for entry in fs::read_dir(proc("ns")).expect("namespaces") {
        let name = format!("ns/{}", entry.expect("namespace").file_name().to_string_lossy());
        rights.insert(name.clone(), fs::read_link(proc(&name)).expect("namespace").display().to_string());
    }
    // Of the status, what a program does not change by running.
    for name in [
        "Umask",
        "Uid",
        "Gid",
        "Groups",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
        "Seccomp_filters",
        "SigBlk",
        "SigIgn",
        "Cpus_allowed_list",
        "Mems_allowed_list",
    ] {
        rights.insert(name.to_owned(), status_line(pid, name));
    }
    for name in ["limits", "oom_score_adj", "personality", "coredump_filter", "uid_map", "gid_map"] {
        rights.insert(name.to_owned(), fs::read_to_string(proc(name)).expect(name));
    }
    // EINVAL where there is no security module.
    let label = fs::read_to_string(proc("attr/current")).unwrap_or_else(|error| error.to_string());
    rights.insert("attr/current".to_owned(), label);
    let environment = fs::read(proc("environ")).expect("environ");
    let variables: Vec<_> = environment.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    rights.insert("environ".to_owned(), variables.join("\n"));
    for name in ["cwd", "root"] {
        rights.insert(name.to_owned(), fs::read_link(proc(name)).expect(name).display().to_string());
    }
    rights
}

/// The cgroup of each hierarchy.
fn cgroups(pid: u32) -> BTreeMap<String, String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("cgroup");
    let hierarchy = |line: &str| {
        let mut fields = line.splitn(3, ':');
        Some((fields.next()?.to_owned() + ":" + fields.next()?, fields.next()?.to_owned()))
    };
    text.lines().map(|line| hierarchy(line).expect(line)).collect()
}

/// Waits for the process that has this command line. Until its execve it has the supervisor's.
fn process(arguments: &[&str]) -> u32 {
    let wanted: Vec<u8> = arguments.iter().flat_map(|word| [word.as_bytes(), b"\0"].concat()).collect();
    let end = Instant::now() + stave_e2e::limit(20);
    loop {
        for entry in fs::read_dir("/proc").expect("/proc").flatten() {
            let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
            let Some(pid) = pid else { continue };
            if fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|words| words == wanted) {
                return pid;
            }
        }
        assert!(Instant::now() < end, "{arguments:?} does not run");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What differs between the container's init and a process of an exec.
fn differences(init: u32, other: u32) -> Vec<String> {
    let (ours, theirs) = (rights(init), rights(other));
    assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
    let mut differences: Vec<_> = ours
        .iter()
        .filter(|(name, value)| theirs[*name] != **value)
        .map(|(name, value)| format!("{name}: {value:?} of the init, {:?} of the exec", theirs[name]))
        .collect();
    let (ours, theirs) = (cgroups(init), cgroups(other));
    assert!(!ours.is_empty() && ours.len() == theirs.len(), "{ours:?} {theirs:?}");
    for (hierarchy, path) in ours {
        let other = &theirs[&hierarchy];
        // Below the container's, on cgroup2: it is killed with all that it leaves.
        let below = hierarchy == "0:" && other.starts_with(&format!("{path}/"));
        if *other != path && !below {
            differences.push(format!("cgroup {hierarchy} {path} of the init, {other} of the exec"));
        }
    }
    differences
}

/// Runs an exec of each kind and compares it with the container's init.
async fn compare(daemon: &Daemon, name: &str, id: &str) -> Vec<String> {
    let init = host_pid(daemon, id).await;
    let mut wrong = Vec::new();
    // A number that no other test's process has: with the pid of this container's init.
    let words = |kind: u32| ["/bin/sleep".to_owned(), format!("{init}{kind}")];
    let of = |kind: &str, process: u32| -> Vec<String> {
        let found = differences(init, process);
        kill(Pid::from_raw(process.try_into().expect("a pid")), Signal::SIGKILL).expect("SIGKILL");
        found.into_iter().map(|line| format!("{name}, {kind}: {line}")).collect()
    };

    let command = words(1);
    let request = ExecSyncRequest { container_id: id.to_owned(), cmd: command.to_vec(), timeout: 60 };
    let found = tokio::task::spawn_blocking(move || process(&[&command[0], &command[1]]));
    let call = daemon.cri.exec_sync(request);
    let looked = async { of("ExecSync", found.await.expect("the process of ExecSync")) };
    let (answer, found) = tokio::join!(call, looked);
    assert_eq!(answer.expect("ExecSync").exit_code, 137);
    wrong.extend(found);

    // With -i, the client asks for the URL of a stream.
    let command = words(2);
    let program = fs::read_link(format!("/proc/{}/exe", daemon.pid())).expect("exe");
    let mut client = Command::new(program)
        .arg("--address")
        .arg(daemon.socket())
        .args(["exec", "-i", id])
        .args(&command)
        .stdin(Stdio::piped())
        .spawn()
        .expect("stave exec");
    let found = tokio::task::spawn_blocking(move || process(&[&command[0], &command[1]]));
    wrong.extend(of("Exec", found.await.expect("the process of Exec")));
    assert_eq!(client.wait().expect("stave exec").code(), Some(137));
    wrong
}

fn idle(name: &str) -> ContainerConfig {
    // A program that changes nothing about itself.
    container(name, &busybox(), &["/bin/sleep", "100000"]).with(|config| {
        config.working_dir = "/var/tmp".into();
        config.envs = vec![
            KeyValue { key: "SECOND".into(), value: "a b".into() },
            KeyValue { key: "FIRST".into(), value: String::new() },
        ];
        config.linux.as_mut().unwrap().resources.as_mut().unwrap().oom_score_adj = 321;
    })
}

fn context(
    config: ContainerConfig,
    change: impl FnOnce(&mut LinuxContainerSecurityContext),
) -> ContainerConfig {
    config.with(|config| change(config.linux.as_mut().unwrap().security_context.get_or_insert_default()))
}

fn restricted(config: ContainerConfig) -> ContainerConfig {
    context(config, |context| {
        let default = || Some(SecurityProfile { profile_type: RUNTIME_DEFAULT, ..Default::default() });
        (context.seccomp, context.apparmor) = (default(), default());
        context.capabilities =
            Some(Capability { drop_capabilities: vec!["ALL".into()], ..Default::default() });
        context.no_new_privs = true;
        context.readonly_rootfs = true;
        context.run_as_user = Some(Int64Value { value: 1000 });
        context.run_as_group = Some(Int64Value { value: 1001 });
        context.supplemental_groups = vec![2000, 3000];
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exec_has_all_that_the_containers_init_has() {
    let (daemon, mapped) = daemon_with_user_namespace().await;
    let plain = daemon.run_pod(stave_e2e::pod("plain")).await.expect("RunPodSandbox");
    let privileged = stave_e2e::pod("privileged").with(|config| {
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    });
    let privileged = daemon.run_pod(privileged).await.expect("RunPodSandbox");
    let mut wrong = Vec::new();
    for (pod, config) in [
        (&plain, idle("default")),
        (&plain, restricted(idle("restricted"))),
        (&privileged, context(idle("privileged"), |context| context.privileged = true)),
        (&mapped, inside(idle("mapped"))),
        (&mapped, inside(restricted(idle("mapped-restricted")))),
    ] {
        let name = config.metadata.as_ref().unwrap().name.clone();
        let id = daemon.run(pod, &config).await.expect("start");
        let init = rights(host_pid(&daemon, &id).await);
        if name.ends_with("restricted") {
            // The rows are what they say.
            let shown = ["Seccomp", "NoNewPrivs", "CapEff", "CapBnd"].map(|key| init[key].as_str());
            assert_eq!(shown, ["2", "1", "0000000000000000", "0000000000000000"], "{name}");
            assert_eq!(init["Groups"].split(' ').count(), 3, "{name}: {}", init["Groups"]);
        }
        assert_eq!((init["cwd"].as_str(), init["oom_score_adj"].trim()), ("/var/tmp", "321"), "{name}");
        assert!(init["environ"].contains("FIRST=\n"), "{name}: {}", init["environ"]);
        wrong.extend(compare(&daemon, &name, &id).await);
        daemon.cri.stop(&id, 0).await.expect("StopContainer");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    daemon.finish().await;
}
