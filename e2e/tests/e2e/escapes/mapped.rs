//! The same holes in pods with a user namespace, where other code mounts, clones and opens: the builder, the helper of a
//! clone, an init that is root of no more than its namespace.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use stave_e2e::cri::*;
use stave_e2e::{Config, container, read_log};

use super::{Host, Outside, bind, context, hostile};
use crate::container_anatomy::host_pid;
use crate::container_anatomy::user::{daemon_with_user_namespace, inside, mapping};
use crate::{busybox, sleeper};

/// What becomes of a hostile container.
enum Fate {
    /// It writes these lines.
    Writes(&'static [&'static str]),
    /// CreateContainer refuses it with this in the message.
    Refused(&'static str),
}
use Fate::{Refused, Writes};

fn script(name: &str, image: &str, script: &str) -> ContainerConfig {
    inside(container(name, image, &["/bin/sh", "-c", script]))
}

/// A volume that root of the container may write to.
fn volume(host: &Path, inside: &str) -> Mount {
    Mount { uid_mappings: mapping(), gid_mappings: mapping(), ..bind(host, inside) }
}

fn user(value: i64) -> impl Fn(&mut LinuxContainerSecurityContext) {
    move |context| context.run_as_user = Some(Int64Value { value })
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_images_and_requests() {
    let (daemon, pod) = daemon_with_user_namespace().await;
    let busybox = busybox();
    let dev = hostile(&daemon, "dev-entries").await;
    let data = daemon.directory().join("data");
    fs::create_dir(&data).expect("data");
    fs::write(data.join("file"), "of the volume\n").expect("file");
    let outside = ["links", "volume", "workdir"].map(|name| {
        // What the images' links name is there on the host too.
        Outside::new(&format!("/var/tmp/stave-hostile-{name}"))
    });
    let mask =
        |context: &mut LinuxContainerSecurityContext| context.masked_paths = vec!["/proc/timer_list".into()];
    const NONE: &[&str] = &["CapInh: 0000000000000000", "CapAmb: 0000000000000000"];
    let sets = "sed -n 's/^\\(CapInh\\|CapAmb\\):./\\1: /p' /proc/self/status";
    let mut rows = vec![
        (
            context(script("cve_2025_31133", &dev, "stat -c %t:%T /dev/null /proc/timer_list"), mask),
            Writes(&["1:3", "1:3"]),
        ),
        (
            script("cve_2025_52565", &dev, "stat -c %t:%T /dev/console; tty")
                .with(|config| config.tty = true),
            Writes(&["88:0", "/dev/pts/0"]),
        ),
        (
            context(script("cve_2026_88265", &dev, "stat -L -c '%t:%T %u' /proc/self/fd/0"), user(1000)),
            Writes(&["1:3 65534"]),
        ),
        (
            inside(container("cve_2024_21626", &busybox, &["/bin/ls", "/proc/self/fd"])),
            Writes(&["0", "1", "2", "3"]),
        ),
        (
            script(
                "cve_2023_25809",
                &busybox,
                "for d in /sys/fs/cgroup /sys/fs/cgroup/*/; do mkdir $d/x 2>/dev/null && echo $d; done; true",
            ),
            Writes(&[]),
        ),
        (context(script("cve_2022_29162", &busybox, sets), user(0)), Writes(NONE)),
        (context(script("cve_2018_1000400", &busybox, sets), user(1000)), Writes(NONE)),
        // The last id that the pod has, and the first that it has not.
        (context(script("cve_2024_40635", &busybox, "id -u"), user(65535)), Writes(&["65535"])),
        (context(script("cve_2024_40635-beyond", &busybox, "id -u"), user(65536)), Refused("65536")),
    ];
    // A /dev of the container's making.
    let made = daemon.directory().join("dev");
    fs::create_dir(&made).expect("dev");
    symlink("/proc/version", made.join("null")).expect("link");
    for (name, command, wanted) in [
        ("cve_2025_31133-volume", "stat -c %t:%T /proc/timer_list", &["1:3"]),
        ("cve_2026_88265-volume", "stat -L -c %t:%T /proc/self/fd/0", &["1:3"]),
    ] {
        let config = context(script(name, &busybox, command), mask);
        rows.push((config.with(|config| config.mounts = vec![volume(&made, "/dev")]), Writes(wanted)));
    }
    for number in 3..20 {
        let config = script(&format!("cve_2024_21626-{number}"), &busybox, "pwd")
            .with(|config| config.working_dir = format!("/proc/self/fd/{number}"));
        rows.push((config, Refused("/proc/self/fd")));
    }
    let links = |config: &mut ContainerConfig| {
        config.mounts = vec![
            bind(&data, "/absolute/below"),
            bind(&data.join("file"), "/up/stave-hostile-up/file"),
            bind(&data, "/absolute/../../../../stave-hostile-up2"),
        ];
    };
    for (name, image, command, fate) in [
        ("cve_2026_41579", "dev-link", "stat -c %t:%T /dev/null", Writes(&["1:3"])),
        ("cve_2026_41579-up", "dev-link-up", "stat -c %t:%T /dev/null", Writes(&["1:3"])),
        ("cve_2019_19921", "proc-link", "echo ran", Refused("symbolic link")),
        ("cve_2019_19921-sys", "sys-link", "echo ran", Refused("symbolic link")),
        (
            "cve_2024_45310",
            "links",
            "cat /absolute/below/file /stave-hostile-up/file",
            Writes(&["of the volume", "of the volume"]),
        ),
        (
            "cve_2022_23648",
            "volume-link",
            "cd /var/tmp/stave-hostile-volume; ls; touch new",
            Writes(&["below"]),
        ),
        (
            "ghsa_q6r4_3wmg_fwcq",
            "workdir",
            "pwd -P; ls ..",
            Writes(&["/var/tmp/stave-hostile-workdir/below", "below"]),
        ),
        ("cve_2026_47262", "passwd-huge", "echo ran", Refused("/etc/passwd")),
        ("cve_2026_47262-fifo", "passwd-fifo", "echo ran", Refused("/etc/passwd")),
        ("cve_2026_47262-link", "passwd-link", "echo ran", Refused("/etc/passwd")),
        ("cve_2026_47262-group", "group-fifo", "echo ran", Refused("/etc/group")),
        ("cve_2026_46680", "passwd-digits", "id -u", Writes(&["1000"])),
    ] {
        let mut config = script(name, &hostile(&daemon, image).await, command);
        if image == "links" {
            links(&mut config);
        }
        rows.push((config, fate));
    }
    let mut wrong = Vec::new();
    for (config, fate) in rows {
        let name = config.metadata.as_ref().unwrap().name.clone();
        let before = Host::now();
        let refused = match daemon.create(&pod, &config).await {
            Err(error) => Err(error),
            Ok(id) => daemon.cri.start(&id).await.map(|()| id),
        };
        let came = match refused {
            Err(error) => format!("refused: {}", error.message()),
            Ok(id) => {
                let log = read_log(daemon.cri.exited(&id).await.log_path);
                format!("{:?}", log.iter().map(|line| line.text.trim_end_matches('\r')).collect::<Vec<_>>())
            }
        };
        let as_wanted = match fate {
            Writes(wanted) => came == format!("{wanted:?}"),
            Refused(why) => came.starts_with("refused: ") && came.contains(why),
        };
        if !as_wanted {
            wrong.push(format!("{name}: {came}"));
        }
        if Host::now() != before {
            wrong.push(format!("{name}: on the host {:?}", Host::now()));
        }
    }
    // All of them, as they have nothing to do with one another.
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for outside in outside {
        assert_eq!(outside.listing(), ["secret"], "{}", outside.0.display());
    }
    for path in ["/stave-hostile-up", "/stave-hostile-up2"] {
        assert!(!Path::new(path).exists(), "{path} on the host");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2025_52881() {
    let (daemon, pod) = daemon_with_user_namespace().await;
    let (proc, victim) = (daemon.directory().join("proc"), daemon.directory().join("victim"));
    fs::write(&victim, "untouched").expect("victim");
    for directory in ["self/attr/apparmor", "thread-self/attr", "1"] {
        fs::create_dir_all(proc.join(directory)).expect("directory");
    }
    for file in [
        "self/oom_score_adj",
        "self/attr/exec",
        "self/attr/apparmor/exec",
        "thread-self/attr/exec",
        "1/oom_score_adj",
    ] {
        symlink("/victim", proc.join(file)).expect("link");
    }
    let config = inside(sleeper("main")).with(|config| {
        config.mounts = vec![volume(&proc, "/proc"), volume(&victim, "/victim")];
        config.linux.as_mut().unwrap().resources.as_mut().unwrap().oom_score_adj = 321;
    });
    let id = match daemon.run(&pod, &config).await {
        Ok(id) => id,
        // runc takes no volume there, which is as good.
        Err(error) if stave_e2e::oci_runtime().is_some() => {
            assert!(error.message().contains("proc-safety"), "{error:?}");
            return daemon.finish().await;
        }
        Err(error) => panic!("start: {error:?}"),
    };
    assert_eq!(daemon.cri.output(&id, &["cat", "/proc/self/oom_score_adj"]).await, "untouched");
    assert_eq!(fs::read_to_string(&victim).expect("victim"), "untouched");
    let pid = host_pid(&daemon, &id).await;
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).expect("oom_score_adj"), "321\n");
    daemon.finish().await;
}

/// The hierarchies of /proc/PID/cgroup in which a process is in the cgroup of a container, or below it.
fn charged(pid: u32, id: &str) -> BTreeSet<String> {
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let of = |line: &str| {
        let (hierarchy, path) = line.split_once(":/")?;
        path.contains(id).then(|| hierarchy.to_owned())
    };
    cgroups.lines().filter_map(of).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2025_47291() {
    let (daemon, pod) = daemon_with_user_namespace().await;
    let plain = daemon.run_pod(stave_e2e::pod("plain")).await.expect("RunPodSandbox");
    let plain = daemon.run(&plain, &sleeper("plain")).await.expect("start");
    let wanted = charged(host_pid(&daemon, &plain).await, &plain);
    assert!(!wanted.is_empty());
    let id = daemon.run(&pod, &inside(sleeper("main"))).await.expect("start");
    let waiting = daemon.create(&pod, &inside(sleeper("waiting"))).await.expect("create");
    daemon.cri.shell(&id, "sleep 3000 >/dev/null 2>&1 &").await;
    for container in [&id, &waiting] {
        let pid = host_pid(&daemon, container).await;
        assert_eq!(charged(pid, container), wanted, "the init of {container}");
    }
    // All that is in the pod's user namespace: children, and what an exec has left.
    let of = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/user")).ok();
    let namespace = of(host_pid(&daemon, &id).await).expect("user namespace");
    assert_ne!(Some(&namespace), of(std::process::id()).as_ref());
    let mut count = 0;
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if of(pid).as_ref() == Some(&namespace) {
            count += 1;
            let of_one: Vec<_> =
                [&id, &waiting].into_iter().filter(|id| charged(pid, id) == wanted).collect();
            assert_eq!(
                of_one.len(),
                1,
                "process {pid} is in {:?}",
                fs::read_to_string(format!("/proc/{pid}/cgroup"))
            );
        }
    }
    assert!(count >= 4, "two inits, a sleep of each kind: {count}");
    daemon.finish().await;
}
