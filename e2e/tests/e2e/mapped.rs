//! User namespaces together with what else a pod and a container can have.

use std::fs;
use std::os::unix::fs::MetadataExt;

use nix::mount::MsFlags;
use nix::sys::stat::{Mode, SFlag, makedev};
use stave_e2e::cri::*;
use stave_e2e::{Config, Daemon, Options, Pod, image, read_log};

use crate::container_anatomy::user::{self, COUNT, FIRST, inside, mapping};
use crate::container_anatomy::{HostMount, host_pid, status_line};
use crate::resources::cgroup;
use crate::{busybox, daemon, sh, sleeper};

async fn daemon_with_pod() -> (Daemon, Pod) {
    let daemon = daemon().await;
    let pod = daemon.run_pod(user::pod("pod")).await.expect("RunPodSandbox");
    (daemon, pod)
}

fn volume(host_path: &std::path::Path, container_path: &str) -> Mount {
    Mount {
        host_path: host_path.display().to_string(),
        container_path: container_path.to_owned(),
        uid_mappings: mapping(),
        gid_mappings: mapping(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn image_volumes_of_one_layer_and_of_many() {
    let (daemon, pod) = daemon_with_pod().await;
    // One layer, three layers.
    let names = ["stave/busybox", "stave/layers"].map(image);
    for name in &names {
        daemon.cri.pull(name).await.expect("PullImage");
    }
    let of = |name: &str, path: &str, mapped: bool| Mount {
        container_path: path.to_owned(),
        readonly: true,
        image: Some(ImageSpec { image: name.to_owned(), ..Default::default() }),
        uid_mappings: if mapped { mapping() } else { Vec::new() },
        gid_mappings: if mapped { mapping() } else { Vec::new() },
        ..Default::default()
    };
    let mounts =
        vec![of(&names[0], "/one", true), of(&names[1], "/three", false), of(&busybox(), "/own", true)];
    let config = inside(sleeper("main")).with(|config| config.mounts = mounts);
    let id = daemon.run(&pod, &config).await.expect("start");
    let script = "for v in one three own; do stat -c %u:%g /$v /$v/bin/busybox; touch /$v/new 2>/dev/null || echo read-only; done; \
                  /one/bin/busybox echo ran; cat /three/changed";
    let owners = "0:0\n0:0\nread-only\n".repeat(3);
    assert_eq!(daemon.cri.shell(&id, script).await, format!("{owners}ran\nupper\n"));
    // All of them, the image's own layers among them, are seen through mounts of their own: an overlay each.
    let table = daemon.cri.output(&id, &["cat", "/proc/self/mountinfo"]).await;
    for path in ["/", "/one", "/three", "/own"] {
        let lines: Vec<_> = table.lines().filter(|line| line.split(' ').nth(4) == Some(path)).collect();
        assert!(lines.len() == 1 && lines[0].contains(" - overlay "), "{path}: {lines:?}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ephemeral_container_joins_its_target() {
    let (daemon, pod) = daemon_with_pod().await;
    let target = daemon.run(&pod, &inside(sleeper("target"))).await.expect("start");
    let debug = inside(sleeper("debug")).with(|config| {
        config.namespaces().pid = NamespaceMode::Target as i32;
        config.namespaces().target_id = target.clone();
        let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        let add_capabilities = vec!["SYS_PTRACE".to_owned()];
        context.capabilities = Some(Capability { add_capabilities, ..Default::default() });
    });
    let debug = daemon.run(&pod, &debug).await.expect("ephemeral container");
    let cri = &daemon.cri;
    cri.shell(&target, "echo here >/tmp/of-the-target").await;
    assert_eq!(cri.output(&debug, &["cat", "/proc/1/root/tmp/of-the-target"]).await, "here\n");
    let namespace =
        async |id: &str, name: &str| cri.output(id, &["readlink", &format!("/proc/self/ns/{name}")]).await;
    for name in ["pid", "user", "net"] {
        assert_eq!(namespace(&debug, name).await, namespace(&target, name).await, "{name}");
    }
    assert_ne!(namespace(&debug, "mnt").await, namespace(&target, "mnt").await);
    assert_eq!(
        status_line(host_pid(&daemon, &debug).await, "Uid").split('\t').next(),
        Some(FIRST.to_string().as_str())
    );
    cri.stop(&debug, 0).await.expect("StopContainer");
    assert_eq!(cri.container(&target).await.unwrap().state(), ContainerState::ContainerRunning);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_with_propagation() {
    let daemon = daemon().await;
    let top = daemon.directory().join("peer");
    let host = HostMount::new(&top, MsFlags::MS_SHARED);
    for name in ["later", "in-private", "in-slave", "in-shared"] {
        fs::create_dir(top.join(name)).expect("mount point");
    }
    let config = user::pod("pod").with(|config| {
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    });
    let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
    let with = |path: &str, propagation: MountPropagation| Mount {
        propagation: propagation as i32,
        ..volume(&top, path)
    };
    let config = inside(sleeper("main")).with(|config| {
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
        config.mounts = vec![
            with("/private", MountPropagation::PropagationPrivate),
            with("/slave", MountPropagation::PropagationHostToContainer),
            with("/shared", MountPropagation::PropagationBidirectional),
        ];
    });
    if stave_e2e::oci_runtime().is_some() {
        // In a user namespace the kernel makes slaves of a runtime's shared mounts.
        let error = daemon.create(&pod, &config).await.expect_err("bidirectional");
        assert!(error.message().contains("config.mounts[2].propagation"), "{error:?}");
        drop(host);
        return daemon.finish().await;
    }
    let id = daemon.run(&pod, &config).await.expect("start");
    let cri = &daemon.cri;
    let later = HostMount::new(&top.join("later"), MsFlags::MS_SHARED);
    fs::write(top.join("later/file"), "").expect("file");
    let script = "for d in private slave shared; do test -e /$d/later/file && echo $d; done; true";
    assert_eq!(cri.shell(&id, script).await, "slave\nshared\n");
    drop(later);
    assert_eq!(cri.shell(&id, script).await, "");
    // Mounts of the container.
    let script = "for d in private slave shared; do mount -t tmpfs none /$d/in-$d && touch /$d/in-$d/file; ls /$d/in-$d; done";
    assert_eq!(cri.shell(&id, script).await, "file\nfile\nfile\n");
    let seen: Vec<_> = ["private", "slave", "shared"]
        .into_iter()
        .filter(|name| top.join(format!("in-{name}/file")).exists())
        .collect();
    assert_eq!(seen, ["shared"], "on the host");
    // Root of the container is nobody there, and what it mounted has no rights on the node.
    assert_eq!(fs::metadata(top.join("in-shared/file")).expect("file").uid(), FIRST);
    cri.shell(&id, "umount /shared/in-shared").await;
    assert!(!top.join("in-shared/file").exists(), "unmounted on the host as well");
    drop(host);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_that_are_read_only_all_the_way() {
    let (daemon, pod) = daemon_with_pod().await;
    let top = daemon.directory().join("top");
    let host = HostMount::new(&top, MsFlags::MS_PRIVATE);
    let below = HostMount::new(&top.join("below"), MsFlags::MS_PRIVATE);
    fs::write(top.join("below/file"), "below\n").expect("file");
    let read_only =
        |path: &str, recursive_read_only| Mount { readonly: true, recursive_read_only, ..volume(&top, path) };
    let file = daemon.directory().join("file");
    fs::write(&file, "one\n").expect("file");
    let config = inside(sleeper("main")).with(|config| {
        config.mounts = vec![read_only("/ro", false), read_only("/rro", true), volume(&file, "/file")]
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let script = "for d in ro rro; do for f in $d $d/below; do touch /$f/new 2>/dev/null && echo $f; done; done; \
                  stat -c %u /ro/below/file /rro/below/file /file; echo two >>/file";
    assert_eq!(daemon.cri.shell(&id, script).await, "ro/below\n0\n0\n0\n");
    assert_eq!(fs::metadata(top.join("below/new")).expect("new").uid(), 0, "what is below is mapped too");
    assert_eq!(fs::read_to_string(&file).expect("file"), "one\ntwo\n");
    drop((below, host));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_updated_and_devices_are_filtered() {
    let (daemon, pod) = daemon_with_pod().await;
    // Root's alone, and of a number that no driver has: whoever may open it is told that.
    let own = daemon.directory().join("own");
    nix::sys::stat::mknod(&own, SFlag::S_IFCHR, Mode::from_bits_truncate(0o600), makedev(240, 1))
        .expect("mknod");
    let own = own.display().to_string();
    let config = inside(sleeper("main")).with(|config| {
        let resources = config.linux.as_mut().unwrap().resources.as_mut().unwrap();
        (resources.memory_limit_in_bytes, resources.cpu_shares) = (64 << 20, 512);
        let device = |host: &str, path: &str| Device {
            host_path: host.into(),
            container_path: path.into(),
            permissions: "rw".into(),
        };
        config.devices = vec![device(&own, "/dev/own"), device("/dev/zero", "/opt/dev/zero")];
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let limit = || {
        let (directory, is_v1) = cgroup(&daemon, &id, "memory");
        let file = if is_v1 { "memory.limit_in_bytes" } else { "memory.max" };
        fs::read_to_string(directory.join(file)).expect("limit").trim().to_owned()
    };
    assert_eq!(limit(), (64 << 20).to_string());
    let request = UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(LinuxContainerResources { memory_limit_in_bytes: 96 << 20, ..Default::default() }),
        ..Default::default()
    };
    daemon.cri.runtime.clone().update_container_resources(request).await.expect("UpdateContainerResources");
    assert_eq!(limit(), (96 << 20).to_string());
    // Outside of /dev a device works as well; what is root's alone on the node is not for root of the container.
    let script = "stat -c '%F %t:%T %a' /dev/own /opt/dev/zero; head -c 3 /opt/dev/zero | wc -c; \
                  head -c 1 /dev/own 2>&1 | sed 's/.*: //'";
    let shown = daemon.cri.shell(&id, script).await;
    let device = "character special file";
    assert_eq!(shown, format!("{device} f0:1 600\n{device} 1:5 666\n3\nPermission denied\n"));
    // On the disk there is no device that a user of the node could open.
    let upper = daemon.directory().join("root/containers").join(&id).join("upper/opt/dev/zero");
    assert!(fs::symlink_metadata(upper).expect("upper").is_file());
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn terminals_users_and_volumes_of_the_image() {
    let daemon = daemon().await;
    let name = image("stave/configured");
    daemon.cri.pull(&name).await.expect("PullImage");
    let pod = daemon.run_pod(user::pod("pod")).await.expect("RunPodSandbox");
    // With a terminal, as the image's user 1000, whose working directory and VOLUMEs are made.
    let script = "tty; stat -c '%F %u' /dev/console /dev/pts/0; id -u; pwd; echo err >&2";
    let config = inside(sh("tty", script)).with(|config| {
        config.image.as_mut().unwrap().image = name.clone();
        config.tty = true;
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let status = daemon.cri.exited(&id).await;
    let lines: Vec<_> = read_log(&status.log_path)
        .into_iter()
        .map(|line| line.text.trim_end_matches('\r').to_owned())
        .collect();
    let device = "character special file 1000";
    assert_eq!(lines, ["/dev/pts/0", device, device, "1000", "/work", "err"]);
    let user = status.user.and_then(|user| user.linux).expect("user");
    assert_eq!((user.uid, user.gid), (1000, 1000));
    // A read-only root, masks, groups.
    let config = inside(sleeper("restricted")).with(|config| {
        let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        context.readonly_rootfs = true;
        context.no_new_privs = true;
        context.run_as_user = Some(Int64Value { value: 1000 });
        context.run_as_group = Some(Int64Value { value: 2000 });
        context.supplemental_groups = vec![3000];
        context.masked_paths = vec!["/proc/keys".into(), "/sys/firmware".into()];
        context.readonly_paths = vec!["/proc/sys".into()];
        context.seccomp = Some(SecurityProfile::default());
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let script = "id -u; id -g; id -G; touch /x 2>/dev/null || echo read-only; wc -c </proc/keys; ls /sys/firmware; echo x >/dev/shm/x && cat /dev/shm/x";
    assert_eq!(daemon.cri.shell(&id, script).await, "1000\n2000\n2000 3000\nread-only\n0\nx\n");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mapping_of_a_single_id() {
    let daemon = daemon().await;
    let maps = vec![IdMapping { container_id: 0, host_id: FIRST, length: 1 }];
    let options = Some(UserNamespace { mode: NamespaceMode::Pod.into(), uids: maps.clone(), gids: maps });
    let config = stave_e2e::pod("pod").with(|config| config.namespaces().userns_options = options.clone());
    let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
    // There is no group of terminals.
    let config = sleeper("main").with(|config| {
        config.namespaces().userns_options = options;
        config.tty = true;
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let shown =
        daemon.cri.shell(&id, "id -u; stat -c %u:%g /etc/passwd /dev/pts; cat /proc/self/uid_map").await;
    assert_eq!(
        shown.split_whitespace().collect::<Vec<_>>(),
        ["0", "0:0", "0:0", "0", &FIRST.to_string(), "1"]
    );
    daemon.finish().await;
}

/// Ready supervisors are in namespaces that the node's user namespace owns: such a pod gets none of them.
#[tokio::test(flavor = "multi_thread")]
async fn beside_ready_supervisors() {
    let config = "\n[pods]\nready = 2\n".to_owned();
    let daemon = Daemon::with(Options { config, ..Default::default() }).await;
    daemon.cri.pull(&busybox()).await.expect("PullImage");
    for name in ["one", "two", "three"] {
        let mapped = daemon.run_pod(user::pod(name)).await.expect("RunPodSandbox");
        let plain = daemon.run_pod(stave_e2e::pod(&format!("{name}-plain"))).await.expect("RunPodSandbox");
        let id = daemon.run(&mapped, &inside(sleeper("main"))).await.expect("start");
        let other = daemon.run(&plain, &sleeper("main")).await.expect("start");
        assert_eq!(
            daemon.cri.shell(&id, "awk '{print $2, $3}' /proc/self/uid_map").await,
            format!("{FIRST} {COUNT}\n")
        );
        assert_eq!(status_line(host_pid(&daemon, &other).await, "Uid"), "0\t0\t0\t0");
        // The pod's own network, whose owner is its user namespace.
        assert!(daemon.cri.output(&id, &["ip", "addr", "show", "eth0"]).await.contains("inet "));
    }
    daemon.finish().await;
}
