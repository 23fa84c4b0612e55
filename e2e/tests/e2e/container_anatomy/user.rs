//! User namespaces: root inside is nobody outside.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::PathBuf;

use stave_e2e::cri::*;
use stave_e2e::{Config, Daemon, Pod, image};
use tonic::Code;

use super::{host_pid, status_line};
use crate::{daemon, sh, sleeper};

/// The node's id of root in the pods here, and how many ids there are.
pub(crate) const FIRST: u32 = 262_144;
pub(crate) const COUNT: u32 = 65_536;

pub(crate) fn mapping() -> Vec<IdMapping> {
    vec![IdMapping { container_id: 0, host_id: FIRST, length: COUNT }]
}

pub(crate) fn options() -> Option<UserNamespace> {
    Some(UserNamespace { mode: NamespaceMode::Pod.into(), uids: mapping(), gids: mapping() })
}

/// A pod's configuration with a user namespace, as the kubelet makes one for `hostUsers: false`.
pub(crate) fn pod(name: &str) -> PodSandboxConfig {
    stave_e2e::pod(name).with(|config| config.namespaces().userns_options = options())
}

/// The same container in such a pod.
pub(crate) fn inside(config: ContainerConfig) -> ContainerConfig {
    config.with(|config| config.namespaces().userns_options = options())
}

/// Without the default AppArmor profile, where the host has it, as that denies mounts.
fn unconfined(config: ContainerConfig) -> ContainerConfig {
    let profile = SecurityProfile {
        profile_type: security_profile::ProfileType::Unconfined.into(),
        ..Default::default()
    };
    config.with(|config| {
        config.linux.get_or_insert_default().security_context.get_or_insert_default().apparmor =
            Some(profile);
    })
}

pub(crate) async fn daemon_with_user_namespace() -> (Daemon, Pod) {
    let daemon = daemon().await;
    let status = daemon.cri.status(StatusRequest::default()).await.expect("Status");
    assert!(!status.runtime_handlers.is_empty());
    for handler in &status.runtime_handlers {
        let features = handler.features.as_ref().expect("features");
        assert!(features.user_namespaces, "this host lacks user namespaces or idmapped mounts: {handler:?}");
    }
    let pod = daemon.run_pod(pod("pod")).await.expect("RunPodSandbox");
    (daemon, pod)
}

pub(crate) fn capabilities(config: &mut ContainerConfig, add: &[&str]) {
    let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    let add_capabilities = add.iter().map(|&name| name.to_owned()).collect();
    context.capabilities = Some(Capability { add_capabilities, ..Default::default() });
}

fn upper(daemon: &Daemon, id: &str) -> PathBuf {
    daemon.directory().join("root/containers").join(id).join("upper")
}

#[tokio::test(flavor = "multi_thread")]
async fn root_inside_is_nobody_outside() {
    let (daemon, pod) = daemon_with_user_namespace().await;
    let id = daemon.run(&pod, &inside(sleeper("main"))).await.expect("start");
    let pid = host_pid(&daemon, &id).await;
    let words = |text: String| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let line = ["0".to_owned(), FIRST.to_string(), COUNT.to_string()];
    for map in ["uid_map", "gid_map"] {
        assert_eq!(
            words(daemon.cri.output(&id, &["cat", &format!("/proc/1/{map}")]).await),
            line,
            "{map} inside"
        );
        assert_eq!(
            words(fs::read_to_string(format!("/proc/{pid}/{map}")).expect(map)),
            line,
            "{map} outside"
        );
    }
    assert_eq!(daemon.cri.output(&id, &["id", "-u"]).await, "0\n");
    for kind in ["Uid", "Gid"] {
        assert_eq!(status_line(pid, kind), [FIRST.to_string().as_str(); 4].join("\t"), "{kind} outside");
    }
    // What it may do, it may do in its own namespace: all of these inodes of the host are nobody's.
    let refused =
        daemon.cri.exec(&id, &["sh", "-c", "cd /proc/sys/kernel; cat panic >panic"]).await.expect("ExecSync");
    assert_ne!(refused.exit_code, 0);
    // Another pod has ids of its own.
    let maps = vec![IdMapping { container_id: 0, host_id: FIRST + COUNT, length: COUNT }];
    let userns = UserNamespace { mode: NamespaceMode::Pod.into(), uids: maps.clone(), gids: maps };
    let other =
        stave_e2e::pod("other").with(|config| config.namespaces().userns_options = Some(userns.clone()));
    let other = daemon.run_pod(other).await.expect("RunPodSandbox");
    let config = sleeper("other").with(|config| config.namespaces().userns_options = Some(userns));
    let other = daemon.run(&other, &config).await.expect("start");
    assert_eq!(status_line(host_pid(&daemon, &other).await, "Uid").split('\t').next(), Some("327680"));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_keep_their_owners() {
    let (daemon, pod) = daemon_with_user_namespace().await;
    let volume = daemon.directory().join("volume");
    fs::create_dir(&volume).expect("volume");
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o777)).expect("mode");
    fs::write(volume.join("beyond"), "x").expect("file");
    chown(volume.join("beyond"), Some(COUNT + 7), Some(COUNT + 7)).expect("chown");
    let mount = |path: &str, maps: Vec<IdMapping>| Mount {
        container_path: path.into(),
        host_path: volume.to_str().unwrap().into(),
        uid_mappings: maps.clone(),
        gid_mappings: maps,
        ..Default::default()
    };
    let config = inside(sleeper("main"))
        .with(|config| config.mounts = vec![mount("/mapped", mapping()), mount("/plain", Vec::new())]);
    let id = daemon.run(&pod, &config).await.expect("start");
    let cri = &daemon.cri;
    // Of the image, of the pod's own files, and of what is new: all root's.
    cri.shell(
        &id,
        "touch /new /dev/shm/new /tmp/new /mapped/new /plain/other; echo '# mine' >>/etc/resolv.conf",
    )
    .await;
    let files = "/ /bin/sh /etc/passwd /etc/hosts /etc/resolv.conf /etc/hostname /dev/shm /new /dev/shm/new /mapped/new \
                 /dev/pts /dev/stdout";
    let owners = cri.shell(&id, &format!("stat -L -c %u:%g {files}")).await;
    assert_eq!(owners.lines().collect::<BTreeSet<_>>(), BTreeSet::from(["0:0"]), "{owners}");
    // The overflow ids: beyond the map, and without a map.
    assert_eq!(
        cri.shell(&id, "stat -c %u:%g /mapped/beyond /plain/beyond").await,
        "65534:65534\n65534:65534\n"
    );
    // From the host: the image's files as they were, those of the container nobody's, those of the volume root's.
    let owner =
        |path: PathBuf| fs::metadata(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).uid();
    assert_eq!(owner(upper(&daemon, &id).join("new")), FIRST);
    assert_eq!(owner(upper(&daemon, &id)), FIRST);
    assert_eq!(owner(volume.join("other")), FIRST, "by way of /plain");
    assert_eq!(owner(volume.join("new")), 0, "by way of /mapped");
    for layer in fs::read_dir(daemon.directory().join("root/layers")).expect("layers").flatten() {
        let shell = layer.path().join("fs/bin/sh");
        if shell.exists() {
            assert_eq!(fs::symlink_metadata(&shell).expect("metadata").uid(), 0, "{}", shell.display());
        }
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn root_of_it_has_its_rights_inside() {
    let (daemon, pod) = daemon_with_user_namespace().await;
    let config = unconfined(inside(sleeper("main")))
        .with(|config| capabilities(config, &["SYS_ADMIN", "NET_ADMIN", "NET_RAW"]));
    let id = daemon.run(&pod, &config).await.expect("start");
    let plain = daemon.run(&pod, &inside(sleeper("plain"))).await.expect("start");
    let cri = &daemon.cri;
    let outside = nix::unistd::gethostname().expect("gethostname");
    assert_eq!(cri.shell(&id, "hostname inside; hostname").await, "inside\n");
    assert_eq!(nix::unistd::gethostname().expect("gethostname"), outside);
    let refused = cri.exec(&plain, &["hostname", "again"]).await.expect("ExecSync");
    assert_ne!(refused.exit_code, 0, "not without CAP_SYS_ADMIN");
    let script = "mkdir /m; mount -t tmpfs none /m; touch /m/x; ls /m; umount /m; mount -t proc none /m; umount /m; \
                  ip link add name br9 type bridge; ip link show br9 | wc -l; ipcs -q | wc -l; ls -d /dev/mqueue";
    let output = cri.shell(&id, script).await;
    assert!(output.starts_with("x\n2\n"), "{output}");
    // No disk, no module, no clock of the host, not with all capabilities that there are. Each try leaves the host as it is
    // if it succeeds after all.
    let all = unconfined(inside(sleeper("all"))).with(|config| capabilities(config, &["ALL"]));
    let all = daemon.run(&pod, &all).await.expect("start");
    let script = "mknod /d b 8 0 2>/dev/null && echo mknod; mount -r -t ext4 /dev/vda /m 2>/dev/null && echo ext4; \
                  date -s @$(date +%s) 2>&1 | grep -q \"can't set\" || echo clock; (: >/proc/sysrq-trigger) 2>/dev/null && echo sysrq; \
                  cd /proc/sys/kernel; (cat core_pattern >core_pattern) 2>/dev/null && echo core; true";
    assert_eq!(cri.shell(&all, script).await, "");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_network_works() {
    let (daemon, pod) = daemon_with_user_namespace().await;
    let id = daemon.run(&pod, &inside(sleeper("main"))).await.expect("start");
    let cri = &daemon.cri;
    let gateway = cri.shell(&id, "ip route | sed -n 's/^default via \\([0-9.]*\\).*/\\1/p'").await;
    let answer = cri.output(&id, &["ping", "-c", "1", "-W", "5", gateway.trim()]).await;
    assert!(answer.contains("bytes from"), "{answer}");
    // As anyone, and on any port: the sysctls of the pod.
    let user = inside(sh(
        "user",
        "ping -c 1 -W 5 127.0.0.1 >/dev/null && echo pinged; nc -l -p 80 & sleep 0.2; kill $! && echo low",
    ))
    .with(|config| {
        let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        context.run_as_user = Some(Int64Value { value: 1000 });
        // So that it needs no CAP_NET_RAW.
        let drop_capabilities = vec!["ALL".into()];
        context.capabilities = Some(Capability { drop_capabilities, ..Default::default() });
    });
    let user = daemon.run(&pod, &user).await.expect("start");
    cri.exited(&user).await;
    let log = stave_e2e::read_log(&cri.container(&user).await.expect("ContainerStatus").log_path);
    let text: String = log.iter().map(|line| format!("{}\n", line.text)).collect();
    assert!(text.contains("low"), "{text}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_survives_the_daemon() {
    let (mut daemon, pod) = daemon_with_user_namespace().await;
    let id = daemon.run(&pod, &inside(sleeper("main"))).await.expect("start");
    let created =
        daemon.create(&pod, &inside(sh("created", "cat /proc/self/uid_map; exit 3"))).await.expect("create");
    daemon.kill();
    daemon.restart().await;
    let cri = &daemon.cri;
    assert_eq!(cri.shell(&id, "id -u; touch /by-exec; stat -c %u /by-exec").await, "0\n0\n");
    assert_eq!(fs::metadata(upper(&daemon, &id).join("by-exec")).expect("file").uid(), FIRST);
    cri.start(&created).await.expect("start");
    assert_eq!(cri.exited(&created).await.exit_code, 3);
    let later = daemon.run(&pod, &inside(sleeper("later"))).await.expect("start");
    let same = |pid| fs::read_link(format!("/proc/{pid}/ns/user")).expect("user namespace");
    assert_eq!(same(host_pid(&daemon, &later).await), same(host_pid(&daemon, &id).await));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_pid_namespace_and_a_privileged_container() {
    let daemon = daemon().await;
    let config = pod("pod").with(|config| {
        config.namespaces().pid = NamespaceMode::Pod.into();
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    });
    let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
    let shared = |config: ContainerConfig| {
        inside(config).with(|config| config.namespaces().pid = NamespaceMode::Pod.into())
    };
    let one = daemon.run(&pod, &shared(sleeper("one"))).await.expect("start");
    let two = daemon.run(&pod, &shared(sleeper("two"))).await.expect("start");
    // Two shells with that in their script, and what they start.
    stave_e2e::eventually("the processes of both containers", async || {
        let seen = daemon.cri.output(&two, &["ps", "-o", "args"]).await;
        (seen.matches("sleep 3600").count() == 4).then_some(())
    })
    .await;
    let privileged = inside(sleeper("privileged")).with(|config| {
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    });
    let id = daemon.run(&pod, &privileged).await.expect("start");
    let cri = &daemon.cri;
    assert!(status_line(host_pid(&daemon, &id).await, "CapEff").ends_with("ffffffff"));
    // All devices of the host are there, and none that is not everybody's can be opened.
    let disk = fs::read_dir("/dev").expect("/dev").flatten().map(|entry| entry.path()).find(|path| {
        use std::os::unix::fs::FileTypeExt;
        fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
    });
    let disk = disk.expect("a block device on this host");
    let disk = disk.to_str().unwrap();
    assert_eq!(
        cri.shell(&id, &format!("test -b {disk} && ! head -c 1 {disk} 2>/dev/null && echo refused")).await,
        "refused\n"
    );
    // The cgroup is its own, as far as the kernel delegates (cgroup v2).
    let script = "cd /sys/fs/cgroup; test -d unified && cd unified; mkdir sub && stat -c %u sub && rmdir sub";
    assert_eq!(cri.shell(&id, script).await, "0\n");
    let _ = one;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_is_refused() {
    let (daemon, pod_with) = daemon_with_user_namespace().await;
    let refused = async |change: &dyn Fn(&mut NamespaceOption), field: &str| {
        let config = pod("bad").with(|config| change(config.namespaces()));
        let error = daemon.run_pod(config).await.expect_err(field);
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.message().contains(field), "{error}");
    };
    refused(&|o| o.network = NamespaceMode::Node.into(), "namespace_options.network").await;
    refused(&|o| o.pid = NamespaceMode::Node.into(), "namespace_options.pid").await;
    refused(&|o| o.ipc = NamespaceMode::Node.into(), "namespace_options.ipc").await;
    refused(&|o| o.userns_options.as_mut().unwrap().gids.clear(), "userns_options.gids").await;
    refused(&|o| o.userns_options.as_mut().unwrap().gids[0].length = 1, "userns_options.gids[0].length")
        .await;
    refused(&|o| o.userns_options.as_mut().unwrap().mode = 1, "userns_options.mode").await;
    refused(&|o| o.userns_options.as_mut().unwrap().uids[0].host_id = 0, "userns_options.uids[0].host_id")
        .await;
    // Of a container.
    let other = sleeper("other").with(|config| {
        let mut userns = options().unwrap();
        userns.uids[0].host_id += 1;
        config.namespaces().userns_options = Some(userns);
    });
    let error = daemon.create(&pod_with, &other).await.expect_err("another mapping");
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("userns_options"), "{error}");
    // A volume whose file system can't be mapped is named.
    let config = inside(sleeper("proc")).with(|config| {
        config.mounts = vec![Mount {
            container_path: "/host-proc".into(),
            host_path: "/proc/sys".into(),
            uid_mappings: mapping(),
            gid_mappings: mapping(),
            readonly: true,
            ..Default::default()
        }];
    });
    let error = daemon.create(&pod_with, &config).await.expect_err("procfs can't be idmapped");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("\"/host-proc\": source \"/proc/sys\""), "{error}");
    // An id that the namespace does not have.
    let config = inside(sleeper("high")).with(|config| {
        let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        context.run_as_user = Some(Int64Value { value: COUNT.into() });
    });
    let error = daemon.create(&pod_with, &config).await.expect_err("beyond the map");
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("run_as_user"), "{error}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_images_get_no_further_inside() {
    let (daemon, pod) = daemon_with_user_namespace().await;
    let before = fs::read_to_string("/proc/sys/kernel/core_pattern").expect("core_pattern");
    let etc = fs::read_dir("/etc").expect("/etc").count();
    for name in ["hostile/dev-entries", "hostile/dev-link"] {
        let image = image(name);
        if daemon.cri.pull(&image).await.is_err() {
            panic!("hack/images has no {name}");
        }
        let config = inside(sleeper(&name.replace('/', "-"))).with(|config| {
            config.image.as_mut().unwrap().image = image.clone();
        });
        // Refused, or started harmlessly: what counts is the host.
        if let Ok(id) = daemon.create(&pod, &config).await {
            let _ = daemon.cri.start(&id).await;
        }
    }
    assert_eq!(fs::read_to_string("/proc/sys/kernel/core_pattern").expect("core_pattern"), before);
    assert_eq!(fs::read_dir("/etc").expect("/etc").count(), etc);
    daemon.finish().await;
}
