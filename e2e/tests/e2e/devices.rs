//! /dev of containers: what is always there, the terminal, devices of the request, those of the host.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, major, makedev, minor, mknod};
use stave_e2e::cri::*;
use stave_e2e::{Config, read_log};

use crate::{daemon, daemon_with_pod, sh, sleeper};

/// As runc and containerd make it, by the OCI runtime specification ("Default Devices", "Dev symbolic links").
const LINKS: [(&str, &str); 6] = [
    ("core", "/proc/kcore"),
    ("fd", "/proc/self/fd"),
    ("ptmx", "pts/ptmx"),
    ("stderr", "/proc/self/fd/2"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
];
const NODES: [(&str, &str); 6] = [
    ("full", "1:7"),
    ("null", "1:3"),
    ("random", "1:8"),
    ("tty", "5:0"),
    ("urandom", "1:9"),
    ("zero", "1:5"),
];

#[tokio::test(flavor = "multi_thread")]
async fn all_of_dev() {
    let (daemon, pod) = daemon_with_pod().await;
    let cri = &daemon.cri;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let mut wanted = BTreeMap::new();
    for (name, target) in LINKS {
        if name != "core" || Path::new(target).exists() {
            wanted.insert(name.to_owned(), format!("symbolic link 777 {target}"));
        }
    }
    for (name, number) in NODES {
        wanted.insert(name.to_owned(), format!("character special file 666 {number}"));
    }
    for (name, mode) in [("pts", "755"), ("shm", "1777"), ("mqueue", "1777")] {
        wanted.insert(name.to_owned(), format!("directory {mode} "));
    }
    let script = "cd /dev; for f in *; do if test -L $f; then d=$(readlink $f); elif test -c $f; then d=$(stat -c %t:%T $f); \
                  else d=; fi; echo \"$f=$(stat -c '%F %a' $f) $d\"; done; stat -c 'dev=%F %a' /dev";
    let shown = cri.shell(&id, script).await;
    let mut found: BTreeMap<_, _> = shown
        .lines()
        .map(|line| line.split_once('=').expect(line))
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .collect();
    assert_eq!(found.remove("dev").as_deref(), Some("directory 755"));
    assert_eq!(found, wanted);
    // Sizes and options, as the kernel tells them.
    let table = cri.output(&id, &["cat", "/proc/self/mounts"]).await;
    for (path, kind, options) in [
        ("/dev", "tmpfs", &["rw", "nosuid", "size=65536k", "mode=755"][..]),
        ("/dev/pts", "devpts", &["rw", "nosuid", "noexec", "gid=5", "mode=620", "ptmxmode=666"]),
        ("/dev/shm", "tmpfs", &["rw", "nosuid", "nodev", "noexec", "size=65536k"]),
        ("/dev/mqueue", "mqueue", &["rw", "nosuid", "nodev", "noexec"]),
        ("/proc", "proc", &["rw", "nosuid", "nodev", "noexec"]),
        ("/sys", "sysfs", &["ro", "nosuid", "nodev", "noexec"]),
    ] {
        let line = table.lines().find(|line| line.split(' ').nth(1) == Some(path)).expect(path);
        let fields: Vec<_> = line.split(' ').collect();
        assert_eq!(fields[2], kind, "{line}");
        let all: Vec<_> = fields[3].split(',').collect();
        for option in options {
            assert!(all.contains(option), "{option} in {line}");
        }
    }
    // They do what they are for.
    let script = "head -c 5 /dev/zero | wc -c; head -c 5 /dev/urandom | wc -c; echo x >/dev/null; (echo x >/dev/full) 2>/dev/null || echo full; \
                  cat </dev/null | wc -c; mknod /tmp/kmsg c 1 11 && head -c 1 /tmp/kmsg 2>&1 | sed 's/.*: //'";
    assert_eq!(cri.shell(&id, script).await, "5\n5\nfull\n0\nOperation not permitted\n");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_is_the_containers_terminal() {
    let (daemon, pod) = daemon_with_pod().await;
    let script = "tty; stat -c '%F %t:%T %a' /dev/console /dev/pts/0; grep -c ' /dev/console devpts ' /proc/mounts; echo said >/dev/console";
    let config = sh("tty", script).with(|config| config.tty = true);
    let id = daemon.run(&pod, &config).await.expect("start");
    let status = daemon.cri.exited(&id).await;
    let lines: Vec<_> = read_log(&status.log_path)
        .into_iter()
        .map(|line| line.text.trim_end_matches('\r').to_owned())
        .collect();
    let terminal = "character special file 88:0 620";
    assert_eq!(lines, ["/dev/pts/0", terminal, terminal, "1", "said"]);
    let without = daemon.run(&pod, &sh("none", "test -e /dev/console; echo $?")).await.expect("start");
    let status = daemon.cri.exited(&without).await;
    assert_eq!(read_log(&status.log_path)[0].text, "1");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_have_the_access_that_was_asked_for() {
    let (daemon, pod) = daemon_with_pod().await;
    // Of a major number for experiments, which no driver has: whoever may open it is told so, others that they may not.
    let dir = daemon.directory().join("devices");
    fs::create_dir_all(dir.join("sub")).expect("directory");
    for (name, number) in [("one", 1), ("sub/two", 2)] {
        mknod(&dir.join(name), SFlag::S_IFCHR, Mode::from_bits_truncate(0o640), makedev(240, number))
            .expect("mknod");
    }
    let device = |host: &str, path: &str, permissions: &str| Device {
        host_path: dir.join(host).display().to_string(),
        container_path: path.into(),
        permissions: permissions.into(),
    };
    let open = "for m in '<' '>'; do eval \": $m/dev/one\" 2>&1 | sed 's/.*: //'; done";
    let (yes, no) = ("No such device or address", "Operation not permitted");
    for (permissions, read, write) in
        [("r", yes, no), ("w", no, yes), ("rw", yes, yes), ("m", no, no), ("rwm", yes, yes)]
    {
        let name = format!("with-{permissions}");
        let config =
            sleeper(&name).with(|config| config.devices = vec![device("one", "/dev/one", permissions)]);
        let id = daemon.run(&pod, &config).await.expect("start");
        assert_eq!(daemon.cri.shell(&id, open).await, format!("{read}\n{write}\n"), "{permissions}");
        assert_eq!(daemon.cri.output(&id, &["stat", "-c", "%a %u", "/dev/one"]).await, "640 0\n");
    }
    // All of a directory; and elsewhere than on the host.
    let config = sleeper("all").with(|config| config.devices = vec![device("", "/opt/devices", "r")]);
    let id = daemon.run(&pod, &config).await.expect("start");
    let script = "stat -c '%n %t:%T' /opt/devices/one /opt/devices/sub/two; : </opt/devices/sub/two";
    let shown = daemon.cri.exec(&id, &["sh", "-c", script]).await.expect("ExecSync");
    assert_eq!(String::from_utf8_lossy(&shown.stdout), "/opt/devices/one f0:1\n/opt/devices/sub/two f0:2\n");
    assert!(String::from_utf8_lossy(&shown.stderr).contains(yes), "{shown:?}");
    daemon.finish().await;
}

/// Numbers and permission bits of the device nodes below a directory, without what a container has its own of.
fn nodes(dir: &Path, found: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(dir).expect("directory").flatten() {
        let path = entry.path();
        let own = ["pts", "shm", "mqueue", "console", "ptmx", "fd"].map(|name| Path::new("/dev").join(name));
        if own.contains(&path) {
            continue;
        }
        let Ok(is) = fs::symlink_metadata(&path) else { continue };
        let kind = is.file_type();
        if kind.is_dir() {
            nodes(&path, found);
        } else if kind.is_char_device() || kind.is_block_device() {
            let text = format!(
                "{}{:x}:{:x} {:o}",
                if kind.is_block_device() { 'b' } else { 'c' },
                major(is.rdev()),
                minor(is.rdev()),
                is.mode() & 0o7777
            );
            found.insert(path.display().to_string(), text);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_privileged_container_has_the_hosts_devices() {
    let daemon = daemon().await;
    let config = stave_e2e::pod("pod").with(|config| {
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    });
    let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
    let config = sleeper("main").with(|config| {
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    });
    // Devices come and go: those count that are there before and after.
    let (mut wanted, mut after) = (BTreeMap::new(), BTreeMap::new());
    nodes(Path::new("/dev"), &mut wanted);
    let all_before: Vec<String> = wanted.keys().cloned().collect();
    let id = daemon.run(&pod, &config).await.expect("start");
    nodes(Path::new("/dev"), &mut after);
    let known = |path: &String| all_before.contains(path) || after.contains_key(path);
    wanted.retain(|path, text| after.get(path) == Some(text));
    // Those that every container has are for everybody.
    for (name, _) in NODES {
        wanted.entry(format!("/dev/{name}")).and_modify(|text| text.replace_range(text.len() - 3.., "666"));
    }
    let script = "find /dev -xdev -type c -exec stat -c '%n c%t:%T %a' {} \\;; find /dev -xdev -type b -exec stat -c '%n b%t:%T %a' {} \\;";
    let shown = daemon.cri.shell(&id, script).await;
    let found: BTreeMap<_, _> = shown
        .lines()
        .map(|line| line.split_once(' ').expect(line))
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .collect();
    for (path, text) in &wanted {
        assert_eq!(found.get(path), Some(text), "{path}");
    }
    assert!(found.keys().all(known), "not of the host: {found:?}");
    // They can be opened, as far as they can on the host; the file systems of the kernel are writable.
    let disk = wanted.iter().find(|(path, text)| text.starts_with('b') && fs::File::open(path).is_ok());
    let disk = disk.expect("a block device on the host").0;
    daemon.cri.shell(&id, &format!(": <{disk}")).await;
    let table = daemon.cri.output(&id, &["cat", "/proc/self/mounts"]).await;
    for path in ["/sys", "/proc", "/sys/fs/cgroup"] {
        let line = table.lines().find(|line| line.split(' ').nth(1) == Some(path)).expect(path);
        assert!(line.split(' ').nth(3).unwrap().starts_with("rw"), "{line}");
    }
    daemon.finish().await;
}
