//! What can't be asked for together, or at all: refused with the field's name before anything is made.

use stave_e2e::cri::*;
use stave_e2e::{Config, Daemon, Pod};
use tonic::{Code, Status};

use crate::{busybox, daemon, daemon_with_pod, sh};

/// What refuses it says these words, and is the check of the request, not a step of making something.
#[track_caller]
fn check(error: &Status, words: &[&str]) {
    assert!(matches!(error.code(), Code::InvalidArgument | Code::FailedPrecondition), "{error:?}");
    for word in words {
        assert!(error.message().contains(word), "no {word:?} in {error:?}");
    }
    for made in ["making", "setting", "starting", "attaching", "recording"] {
        assert!(!error.message().starts_with(made), "refused too late: {error:?}");
    }
}

async fn no_pod(daemon: &Daemon, config: PodSandboxConfig, words: &[&str]) {
    let error = daemon.run_pod(config).await.expect_err("a pod that can't be");
    check(&error, words);
    assert!(daemon.cri.pods(None).await.expect("ListPodSandbox").is_empty());
    daemon.assert_clean().await;
}

/// Directories and cgroups of containers, and processes.
fn made(daemon: &Daemon) -> Vec<String> {
    // Supervisors that wait for pods come and go on their own, first as a fork of the daemon.
    let waits = |left: &String| left.contains("stave-pod --ready") || left.contains("stave serve ");
    let mut all: Vec<_> = daemon.left().into_iter().filter(|left| !waits(left)).collect();
    for dir in ["root/containers", "root/records/containers"] {
        let entries = std::fs::read_dir(daemon.directory().join(dir)).into_iter().flatten().flatten();
        all.extend(entries.map(|entry| entry.path().display().to_string()));
    }
    all.sort();
    all
}

async fn no_container(daemon: &Daemon, pod: &Pod, config: &ContainerConfig, words: &[&str]) {
    let before = made(daemon);
    let error = daemon.create(pod, config).await.expect_err("a container that can't be");
    check(&error, words);
    assert!(daemon.cri.containers(None).await.expect("ListContainers").is_empty());
    assert_eq!(made(daemon), before, "something is left of a refused container");
}

fn plain() -> ContainerConfig {
    sh("x", "exit 0")
}

fn context(change: impl FnOnce(&mut LinuxContainerSecurityContext)) -> ContainerConfig {
    plain().with(|config| change(config.linux.as_mut().unwrap().security_context.as_mut().unwrap()))
}

#[tokio::test(flavor = "multi_thread")]
async fn host_network_with_net_sysctls() {
    let daemon = daemon().await;
    for name in ["net.ipv4.ip_local_port_range", "net/ipv4/ip_forward"] {
        let config = stave_e2e::pod("x").with(|config| {
            config.namespaces().network = NamespaceMode::Node as i32;
            config.linux.as_mut().unwrap().sysctls = [(name.to_owned(), "1".to_owned())].into();
        });
        no_pod(&daemon, config, &["config.linux.sysctls", name]).await;
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_volume_that_is_not_readonly() {
    let (daemon, pod) = daemon_with_pod().await;
    let image = Some(ImageSpec { image: busybox(), ..Default::default() });
    let volume = Mount { container_path: "/volume".into(), image, readonly: false, ..Default::default() };
    let config = plain().with(|config| config.mounts = vec![volume.clone()]);
    no_container(&daemon, &pod, &config, &["ImageVolumeMountFailed", "config.mounts[0].readonly", "false"])
        .await;
    let propagated =
        Mount { readonly: true, propagation: MountPropagation::PropagationBidirectional as i32, ..volume };
    let config = plain().with(|config| config.mounts = vec![propagated]);
    no_container(&daemon, &pod, &config, &["config.mounts[0].propagation"]).await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn recursive_read_only_with_propagation_or_without_read_only() {
    let (daemon, pod) = daemon_with_pod().await;
    let host_path = daemon.directory().join("volume");
    std::fs::create_dir(&host_path).expect("volume");
    let mount = |readonly, propagation: MountPropagation| Mount {
        container_path: "/volume".into(),
        host_path: host_path.display().to_string(),
        readonly,
        recursive_read_only: true,
        propagation: propagation as i32,
        ..Default::default()
    };
    for (bad, word) in [
        (mount(true, MountPropagation::PropagationBidirectional), "PROPAGATION_PRIVATE"),
        (mount(true, MountPropagation::PropagationHostToContainer), "PROPAGATION_PRIVATE"),
        (mount(false, MountPropagation::PropagationPrivate), "readonly"),
    ] {
        let config = plain().with(|config| config.mounts = vec![bad]);
        no_container(&daemon, &pod, &config, &["config.mounts[0].recursive_read_only", word]).await;
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn run_as_group_without_run_as_user() {
    let (daemon, pod) = daemon_with_pod().await;
    let config = context(|context| context.run_as_group = Some(Int64Value { value: 5 }));
    no_container(&daemon, &pod, &config, &["security_context.run_as_group", "5", "run_as_user"]).await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_over_two_to_the_31() {
    let (daemon, pod) = daemon_with_pod().await;
    for id in [-1, 1 << 31, u32::MAX.into(), 1 << 32] {
        let value = Some(Int64Value { value: id });
        let user = context(|context| context.run_as_user = value);
        no_container(&daemon, &pod, &user, &["security_context.run_as_user", &id.to_string()]).await;
        let group = context(|context| {
            context.run_as_user = Some(Int64Value { value: 1 });
            context.run_as_group = value;
        });
        no_container(&daemon, &pod, &group, &["security_context.run_as_group", &id.to_string()]).await;
        let groups = context(|context| context.supplemental_groups = vec![7, id]);
        no_container(&daemon, &pod, &groups, &["supplemental_groups[1]", &id.to_string()]).await;
    }
    let named = context(|context| context.run_as_username = "2147483648".into());
    no_container(&daemon, &pod, &named, &["run_as_username", "2147483648"]).await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_capabilities() {
    let (daemon, pod) = daemon_with_pod().await;
    let list = || vec!["NET_ADMIN".to_owned(), "NO_SUCH_CAP".to_owned()];
    for (field, capabilities) in [
        ("add_capabilities", Capability { add_capabilities: list(), ..Default::default() }),
        ("drop_capabilities", Capability { drop_capabilities: list(), ..Default::default() }),
        ("add_ambient_capabilities", Capability { add_ambient_capabilities: list(), ..Default::default() }),
    ] {
        let config = context(|context| context.capabilities = Some(capabilities));
        no_container(&daemon, &pod, &config, &[field, "NO_SUCH_CAP"]).await;
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_seccomp_json_with_its_line() {
    let (daemon, pod) = daemon_with_pod().await;
    let path = daemon.directory().join("profile.json");
    let file = path.to_str().expect("UTF-8").to_owned();
    let config = context(|context| {
        context.seccomp = Some(SecurityProfile { profile_type: 2, localhost_ref: file.clone() });
    });
    let at = "config.linux.security_context.seccomp.localhost_ref";
    no_container(&daemon, &pod, &config, &[at, &file, "No such file"]).await;
    for (text, place) in [
        ("{\n\"defaultAction\": \"SCMP_ACT_ALLOW\",\n\"syscalls\": [}\n", "line 3"),
        ("{\n\"defaultAction\": \"SCMP_ACT_WISH\"}", "line 2"),
        (
            "{\"defaultAction\": \"SCMP_ACT_ALLOW\",\n\n\n\"syscalls\": [{\"names\": [\"mkdir\"],\n\"action\": 7}]}",
            "line 5",
        ),
        ("", "line 1"),
    ] {
        std::fs::write(&path, text).expect("profile");
        no_container(&daemon, &pod, &config, &[at, &file, place]).await;
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_apparmor_profile_that_is_not_loaded() {
    let (daemon, pod) = daemon_with_pod().await;
    let config = context(|context| {
        let localhost_ref = "no-such-profile".to_owned();
        context.apparmor = Some(SecurityProfile { profile_type: 2, localhost_ref });
    });
    // On a host without AppArmor no profile is.
    no_container(&daemon, &pod, &config, &["security_context.apparmor", "no-such-profile"]).await;
    #[allow(deprecated)] // Older clients use nothing else.
    let config = context(|context| context.apparmor_profile = "localhost/no-such-profile".into());
    no_container(&daemon, &pod, &config, &["security_context.apparmor_profile", "no-such-profile"]).await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_not_there() {
    let (daemon, pod) = daemon_with_pod().await;
    let device = |host_path: &str, permissions: &str| {
        plain().with(|config| {
            config.devices = vec![Device {
                host_path: host_path.into(),
                container_path: "/dev/x".into(),
                permissions: permissions.into(),
            }];
        })
    };
    let at = "config.devices[0].host_path";
    no_container(&daemon, &pod, &device("/dev/no-such-device", "rwm"), &[at, "/dev/no-such-device"]).await;
    no_container(&daemon, &pod, &device("/etc/hostname", "rwm"), &[at, "/etc/hostname"]).await;
    no_container(&daemon, &pod, &device("/dev/null", "rwx"), &["config.devices[0].permissions", "rwx"]).await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn modes_that_contradict_the_pod() {
    let (daemon, pod) = daemon_with_pod().await;
    let privileged = context(|context| context.privileged = true);
    no_container(&daemon, &pod, &privileged, &["security_context.privileged"]).await;
    for (field, change) in [
        (
            "namespace_options.network",
            (|o| o.network = NamespaceMode::Node as i32) as fn(&mut NamespaceOption),
        ),
        ("namespace_options.ipc", |o| o.ipc = NamespaceMode::Node as i32),
        ("namespace_options.target_id", |o| o.pid = NamespaceMode::Target as i32),
        ("namespace_options.target_id", |o| o.target_id = "0123".into()),
        ("userns_options", |o| o.userns_options = crate::container_anatomy::user::options()),
    ] {
        let config = plain().with(|config| change(config.namespaces()));
        no_container(&daemon, &pod, &config, &[field]).await;
    }
    let policy = context(|context| context.supplemental_groups_policy = 7);
    no_container(&daemon, &pod, &policy, &["supplemental_groups_policy", "7"]).await;
    daemon.finish().await;
}

/// Classes are a matter of the node's configuration: one that it does not have is no class.
#[tokio::test(flavor = "multi_thread")]
async fn classes_that_the_node_does_not_have() {
    let daemon = daemon().await;
    let pod = |key: &str| {
        stave_e2e::pod("x").with(|config| {
            config.annotations.insert(key.to_owned(), "gold".to_owned());
        })
    };
    for key in [
        "rdt.resources.beta.kubernetes.io/pod",
        "rdt.resources.beta.kubernetes.io/container.x",
        "blockio.resources.beta.kubernetes.io/pod",
        "blockio.resources.beta.kubernetes.io/container.x",
    ] {
        let pod = daemon.run_pod(pod(key)).await.expect("RunPodSandbox");
        no_container(&daemon, &pod, &plain(), &[key, "gold"]).await;
        daemon.cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
        daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
    }
    daemon.finish().await;
}
