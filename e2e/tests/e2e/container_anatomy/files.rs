//! The root file system: an overlay of its own mount namespace, entered by pivot_root.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use stave_e2e::{container, image};

use super::host_pid;
use crate::{daemon_with_pod, sleeper};

/// All below a directory: mode, size, time of the last change of the inode.
fn snapshot(top: &Path) -> BTreeMap<PathBuf, (u32, u64, i64, i64)> {
    let mut found = BTreeMap::new();
    let mut queue = vec![top.to_owned()];
    while let Some(directory) = queue.pop() {
        for entry in fs::read_dir(&directory).expect("directory") {
            let path = entry.expect("entry").path();
            let is = path.symlink_metadata().expect("metadata");
            if is.is_dir() {
                queue.push(path.clone());
            }
            found.insert(path, (is.mode(), is.size(), is.ctime(), is.ctime_nsec()));
        }
    }
    found
}

/// The directories of the overlay at / in a process's mount table: lower ones, topmost first, and the upper one.
fn overlay(mountinfo: &str) -> (Vec<PathBuf>, PathBuf) {
    let root = mountinfo.lines().find(|line| line.split(' ').nth(4) == Some("/")).expect("a mount at /");
    assert!(root.contains(" - overlay "), "{root}");
    let options = root.rsplit(' ').next().expect("options");
    let mut lower = Vec::new();
    let mut upper = None;
    for option in options.split(',') {
        match option.split_once('=') {
            // One key a layer with the new mount API, and one for all with the old one.
            Some(("lowerdir+" | "lowerdir", value)) => lower.extend(value.split(':').map(PathBuf::from)),
            Some(("upperdir", value)) => upper = Some(PathBuf::from(value)),
            _ => {}
        }
    }
    (lower, upper.expect("an upper directory"))
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_go_to_the_upper_directory_and_the_lower_one_stays() {
    let (daemon, pod) = daemon_with_pod().await;
    let cri = &daemon.cri;
    let id = daemon.run(&pod, &sleeper("one")).await.expect("start");
    let pid = host_pid(&daemon, &id).await;
    let (lower, upper) = overlay(&fs::read_to_string(format!("/proc/{pid}/mountinfo")).expect("mountinfo"));
    assert_eq!(upper, daemon.directory().join("root/containers").join(&id).join("upper"));
    assert_eq!(lower.len(), 2, "the layers of the image: {lower:?}");
    let before: Vec<_> = lower.iter().map(|layer| snapshot(layer)).collect();
    let base =
        lower.iter().find(|layer| layer.join("etc/passwd").exists()).expect("a layer with /etc/passwd");
    let passwd = fs::read_to_string(base.join("etc/passwd")).expect("passwd");

    cri.shell(&id, "echo new >/etc/new; echo '# more' >>/etc/passwd; rm /etc/group; chmod 700 /home").await;
    // Inside.
    assert_eq!(cri.output(&id, &["cat", "/etc/new"]).await, "new\n");
    assert_eq!(cri.output(&id, &["cat", "/etc/passwd"]).await, format!("{passwd}# more\n"));
    assert_eq!(cri.shell(&id, "test -e /etc/group || echo gone").await, "gone\n");
    // On the host: what is new and changed, whole, and a whiteout for what is gone.
    assert_eq!(fs::read_to_string(upper.join("etc/new")).expect("new"), "new\n");
    assert_eq!(fs::read_to_string(upper.join("etc/passwd")).expect("passwd"), format!("{passwd}# more\n"));
    let whiteout = upper.join("etc/group").symlink_metadata().expect("a whiteout");
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0, "{whiteout:?}");
    assert_eq!(upper.join("home").metadata().expect("home").mode() & 0o777, 0o700);
    let after: Vec<_> = lower.iter().map(|layer| snapshot(layer)).collect();
    assert_eq!(after, before, "a layer changed");

    // The same layers under another container, without any of it.
    let two = daemon.run(&pod, &sleeper("two")).await.expect("start");
    let two_pid = host_pid(&daemon, &two).await;
    let table = fs::read_to_string(format!("/proc/{two_pid}/mountinfo")).expect("mountinfo");
    assert_eq!(overlay(&table).0, lower);
    assert_eq!(cri.shell(&two, "ls /etc/new 2>/dev/null; cat /etc/passwd").await, passwd);
    // The upper directory ends with the container.
    cri.stop(&id, 0).await.expect("StopContainer");
    cri.remove(&id).await.expect("RemoveContainer");
    assert!(!upper.exists());
    daemon.finish().await;
}

fn mount_ids(mountinfo: &str) -> BTreeSet<u32> {
    mountinfo.lines().map(|line| line.split(' ').next().unwrap().parse().expect("mount id")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mount_table_is_the_containers_own() {
    let (daemon, pod) = daemon_with_pod().await;
    let directory = daemon.directory().to_string_lossy().into_owned();
    let host = || fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    // Other tests mount things too: those of this daemon.
    let ours = |table: &str| table.lines().filter(|line| line.contains(&directory)).count();
    let before = ours(&host());
    assert_eq!(before, 1, "the pod's shared memory");
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    assert_eq!(ours(&host()), before, "a container's mounts show on the host");

    let inside = daemon.cri.output(&id, &["cat", "/proc/1/mountinfo"]).await;
    let pid = host_pid(&daemon, &id).await;
    // Seen from the host's root, the same mounts are there; ids are the kernel's, for all.
    let from_host = fs::read_to_string(format!("/proc/{pid}/mountinfo")).expect("mountinfo");
    assert_eq!(mount_ids(&inside), mount_ids(&from_host));
    assert!(mount_ids(&inside).is_disjoint(&mount_ids(&host())), "a mount of the host");
    let points: Vec<_> = inside.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    for wanted in ["/", "/proc", "/dev", "/sys", "/dev/shm", "/etc/hostname"] {
        assert!(points.contains(&wanted), "{wanted} in {points:?}");
    }
    // The old root is gone: of all mounts in the namespace one only hangs on nothing, and that is /.
    let ids = mount_ids(&inside);
    let tops: Vec<_> = inside
        .lines()
        .filter(|line| !ids.contains(&line.split(' ').nth(1).unwrap().parse().expect("parent id")))
        .filter_map(|line| line.split(' ').nth(4))
        .collect();
    assert_eq!(tops, ["/"], "{inside}");
    assert!(!points.iter().any(|point| point.contains("stave")), "{points:?}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_root_is_pivoted_and_no_chroot() {
    let (daemon, pod) = daemon_with_pod().await;
    let name = image("stave/probe");
    daemon.cri.pull(&name).await.expect("PullImage");
    let config = container("main", &name, &["/bin/sh", "-c", "trap 'exit 0' TERM; sleep 3600 & wait"]);
    let id = daemon.run(&pod, &config).await.expect("start");
    let marker = daemon.directory().join("marker");
    fs::write(&marker, "of the host").expect("marker");
    let marker = marker.to_str().expect("UTF-8").to_owned();
    let cri = &daemon.cri;
    // The way out works where there is only a chroot...
    cri.shell(&id, "mkdir -p /jail && cp /probe /jail/ && touch /outside").await;
    assert_eq!(cri.output(&id, &["chroot", "/jail", "/probe", "look", "/outside"]).await, "not there\n");
    assert_eq!(cri.output(&id, &["chroot", "/jail", "/probe", "escape", "/outside"]).await, "there\n");
    // ...and leads nowhere from the container's own root.
    assert_eq!(cri.output(&id, &["/probe", "escape", "/outside"]).await, "there\n");
    assert_eq!(cri.output(&id, &["/probe", "escape", &marker]).await, "not there\n");
    assert_eq!(cri.shell(&id, "cd ../../../../..; pwd; ls -d ../outside").await, "/\n../outside\n");
    // From the host that root is another one: its device and inode are the overlay's.
    let pid = host_pid(&daemon, &id).await;
    let seen = fs::metadata(format!("/proc/{pid}/root/outside")).expect("the file by way of /proc");
    let own = fs::metadata("/").expect("/");
    assert_ne!(seen.dev(), own.dev());
    assert!(!Path::new(&format!("/proc/{pid}/root{marker}")).exists());
    daemon.finish().await;
}
