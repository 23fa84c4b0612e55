use stave_e2e::cri::*;
use stave_e2e::{Config, Daemon, Pod, container, eventually, image, pod};
use tonic::Code;

use crate::{busybox, daemon, daemon_with_pod, sh};

const UNKNOWN: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// A call must fail with this code, and its message must have all these words.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, tonic::Status>, code: Code, words: &[&str]) {
    let error = result.expect_err("bad input was taken");
    assert_eq!(error.code(), code, "{error:?}");
    for word in words {
        assert!(error.message().contains(word), "no {word:?} in the message {:?}", error.message());
    }
}

/// RunPodSandbox must refuse it, and leave nothing.
async fn bad_pod(daemon: &Daemon, config: PodSandboxConfig, words: &[&str]) {
    let config = daemon.with_log_directory(config);
    refused(daemon.cri.run_pod(&config).await, Code::InvalidArgument, words);
    assert!(daemon.cri.pods(None).await.expect("ListPodSandbox").is_empty());
    daemon.assert_clean().await;
}

/// CreateContainer must refuse it, and leave nothing.
async fn bad_container(daemon: &Daemon, pod: &Pod, config: ContainerConfig, code: Code, words: &[&str]) {
    let before = daemon.left();
    refused(daemon.create(pod, &config).await, code, words);
    assert!(daemon.cri.containers(None).await.expect("ListContainers").is_empty());
    // A process that was to be the container's ends a moment later.
    let what = format!("nothing left of a refused container that was not there before: {before:?}");
    eventually(&what, async || daemon.left().iter().all(|left| before.contains(left)).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_ids_are_not_found() {
    let daemon = daemon().await;
    let cri = &daemon.cri;
    refused(cri.pod(UNKNOWN).await, Code::NotFound, &[UNKNOWN]);
    refused(cri.container(UNKNOWN).await, Code::NotFound, &[UNKNOWN]);
    refused(cri.start(UNKNOWN).await, Code::NotFound, &[UNKNOWN]);
    refused(cri.exec(UNKNOWN, &["true"]).await, Code::NotFound, &[UNKNOWN]);
    let config = daemon.with_log_directory(pod("lost"));
    refused(cri.create(UNKNOWN, &sh("main", "exit 0"), &config).await, Code::NotFound, &[UNKNOWN]);
    let request = ReopenContainerLogRequest { container_id: UNKNOWN.into() };
    refused(cri.reopen_container_log(request).await, Code::NotFound, &[UNKNOWN]);
    assert_eq!(cri.image(&image("stave/never-pulled")).await.expect("ImageStatus"), None);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_without_what_a_pod_needs() {
    let daemon = daemon().await;
    let request = RunPodSandboxRequest::default();
    refused(daemon.cri.run_pod_sandbox(request).await, Code::InvalidArgument, &["config"]);
    bad_pod(&daemon, pod("x").with(|config| config.metadata = None), &["metadata"]).await;
    let without = |change: fn(&mut PodSandboxMetadata)| {
        pod("x").with(|config| change(config.metadata.as_mut().unwrap()))
    };
    bad_pod(&daemon, without(|metadata| metadata.name.clear()), &["metadata.name"]).await;
    bad_pod(&daemon, without(|metadata| metadata.namespace.clear()), &["metadata.namespace"]).await;
    bad_pod(&daemon, without(|metadata| metadata.uid.clear()), &["metadata.uid"]).await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_with_bad_values() {
    let daemon = daemon().await;
    let with = |change: fn(&mut PodSandboxConfig)| pod("x").with(change);
    bad_pod(&daemon, with(|config| config.hostname = "a/b".into()), &["hostname", "a/b"]).await;
    bad_pod(&daemon, with(|config| config.hostname = "x".repeat(65)), &["hostname"]).await;
    bad_pod(
        &daemon,
        with(|config| config.log_directory = "relative/logs".into()),
        &["log_directory", "relative/logs"],
    )
    .await;
    bad_pod(
        &daemon,
        with(|config| {
            config.dns_config =
                Some(DnsConfig { servers: vec!["1.2.3.4\nsearch evil".into()], ..Default::default() });
        }),
        &["dns_config"],
    )
    .await;
    bad_pod(
        &daemon,
        with(|config| {
            config.linux.as_mut().unwrap().sysctls = [("kernel.hostname".into(), "stolen".into())].into();
        }),
        &["sysctls", "kernel.hostname"],
    )
    .await;
    bad_pod(
        &daemon,
        with(|config| {
            config.linux.as_mut().unwrap().sysctls = [("net.ipv4/../../vm/x".into(), "1".into())].into();
        }),
        &["sysctls"],
    )
    .await;
    bad_pod(&daemon, with(|config| config.namespaces().pid = 77), &["pid", "77"]).await;
    bad_pod(
        &daemon,
        with(|config| {
            config.port_mappings =
                vec![PortMapping { container_port: 80, host_port: 99999, ..Default::default() }];
        }),
        &["host_port", "99999"],
    )
    .await;
    bad_pod(
        &daemon,
        with(|config| config.linux.as_mut().unwrap().cgroup_parent = "/a/../../b".into()),
        &["cgroup_parent"],
    )
    .await;
    let request = RunPodSandboxRequest { config: Some(pod("x")), runtime_handler: "no-such-handler".into() };
    let error = daemon.cri.run_pod_sandbox(request).await.expect_err("an unknown runtime handler");
    assert!(error.message().contains("no-such-handler"), "{error:?}");
    assert!(daemon.cri.pods(None).await.expect("ListPodSandbox").is_empty());
    daemon.assert_clean().await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_without_what_a_container_needs() {
    let (daemon, pod) = daemon_with_pod().await;
    let request = CreateContainerRequest { pod_sandbox_id: pod.id.clone(), ..Default::default() };
    refused(daemon.cri.create_container(request).await, Code::InvalidArgument, &["config"]);
    let with = |change: fn(&mut ContainerConfig)| sh("x", "exit 0").with(change);
    let invalid = Code::InvalidArgument;
    bad_container(&daemon, &pod, with(|config| config.metadata = None), invalid, &["metadata"]).await;
    bad_container(
        &daemon,
        &pod,
        with(|c| c.metadata.as_mut().unwrap().name.clear()),
        invalid,
        &["metadata.name"],
    )
    .await;
    bad_container(&daemon, &pod, with(|config| config.image = None), invalid, &["image"]).await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_are_not_there_and_references_that_are_none() {
    let (daemon, pod) = daemon_with_pod().await;
    let missing = image("stave/never-pulled");
    bad_container(&daemon, &pod, container("x", &missing, &["true"]), Code::NotFound, &[&missing]).await;
    for bad in ["name/UPPER", "a b", "name@sha256:123", "name:tag:tag", ":tag"] {
        let error = daemon.cri.pull(bad).await.expect_err("a bad reference");
        assert_eq!(error.code(), Code::InvalidArgument, "{bad}: {error:?}");
        assert!(error.message().contains(bad), "{error:?}");
    }
    let request = PullImageRequest::default();
    refused(daemon.cri.pull_image(request).await, Code::InvalidArgument, &["image"]);
    refused(daemon.cri.pull(&image("stave/no-such-image")).await, Code::NotFound, &["stave/no-such-image"]);
    refused(daemon.cri.pull(&image("stave/busybox:no-such-tag")).await, Code::NotFound, &["no-such-tag"]);
    // An image for other machines only.
    let error = daemon.cri.pull(&image("stave/foreign")).await.expect_err("an image of another platform");
    assert!(error.message().contains("linux/"), "the message names the platform: {error:?}");
    assert_eq!(daemon.cri.list_images(Default::default()).await.expect("ListImages").images.len(), 1);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn log_paths_outside_of_the_pods_directory() {
    let (daemon, pod) = daemon_with_pod().await;
    for bad in ["../escaped.log", "a/../../escaped.log", "/tmp/absolute-escape.log"] {
        let config = sh("x", "echo x").with(|config| config.log_path = bad.into());
        bad_container(&daemon, &pod, config, Code::InvalidArgument, &["log_path", bad]).await;
    }
    assert!(!daemon.directory().join("logs/escaped.log").exists());
    assert!(!std::path::Path::new("/tmp/absolute-escape.log").exists());
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts_whose_source_is_missing_or_bad() {
    let (daemon, pod) = daemon_with_pod().await;
    let mount = |host: &str, inside: &str| {
        let mount = Mount { host_path: host.into(), container_path: inside.into(), ..Default::default() };
        sh("x", "exit 0").with(|config| config.mounts = vec![mount])
    };
    let missing = daemon.directory().join("no/such/path");
    let missing = missing.to_str().expect("UTF-8");
    let error = daemon.create(&pod, &mount(missing, "/mnt")).await.expect_err("a missing source");
    assert!(
        matches!(error.code(), Code::InvalidArgument | Code::NotFound | Code::FailedPrecondition),
        "{error:?}"
    );
    assert!(error.message().contains(missing), "{error:?}");
    assert!(!std::path::Path::new(missing).exists(), "it was not made");
    bad_container(
        &daemon,
        &pod,
        mount("relative", "/mnt"),
        Code::InvalidArgument,
        &["host_path", "relative"],
    )
    .await;
    bad_container(&daemon, &pod, mount("/tmp", ""), Code::InvalidArgument, &["container_path"]).await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_users_commands_and_capabilities() {
    let (daemon, pod) = daemon_with_pod().await;
    let context = |change: fn(&mut LinuxContainerSecurityContext)| {
        sh("x", "exit 0").with(|c| change(c.linux.as_mut().unwrap().security_context.as_mut().unwrap()))
    };
    let invalid = Code::InvalidArgument;
    bad_container(
        &daemon,
        &pod,
        context(|c| c.run_as_group = Some(Int64Value { value: 5 })),
        invalid,
        &["run_as_group"],
    )
    .await;
    for user in [-1, 1 << 31, 1 << 32] {
        let config = sh("x", "exit 0").with(|c| {
            let context = c.linux.as_mut().unwrap().security_context.as_mut().unwrap();
            context.run_as_user = Some(Int64Value { value: user });
        });
        bad_container(&daemon, &pod, config, invalid, &["run_as_user", &user.to_string()]).await;
    }
    let unknown = |c: &mut LinuxContainerSecurityContext| c.run_as_username = "no-such-user".into();
    let error =
        daemon.create(&pod, &context(unknown)).await.expect_err("a user that the image does not have");
    assert!(error.message().contains("no-such-user"), "{error:?}");
    let capability = |c: &mut LinuxContainerSecurityContext| {
        c.capabilities =
            Some(Capability { add_capabilities: vec!["NO_SUCH_CAP".into()], ..Default::default() });
    };
    bad_container(&daemon, &pod, context(capability), invalid, &["add_capabilities", "NO_SUCH_CAP"]).await;
    // An image without a command, and none given.
    daemon.cri.pull(&image("stave/none")).await.expect("PullImage");
    bad_container(&daemon, &pod, container("x", &image("stave/none"), &[]), invalid, &["command"]).await;
    let device = sh("x", "exit 0").with(|config| {
        config.devices = vec![Device {
            host_path: "/dev/no-such-device".into(),
            container_path: "/dev/x".into(),
            permissions: "rwm".into(),
        }];
    });
    let error = daemon.create(&pod, &device).await.expect_err("a missing device");
    assert!(error.message().contains("/dev/no-such-device"), "{error:?}");
    let env = sh("x", "exit 0").with(|config| {
        config.envs = vec![KeyValue { key: "A=B".into(), value: "x".into() }];
    });
    bad_container(&daemon, &pod, env, invalid, &["envs", "A=B"]).await;
    assert!(daemon.cri.containers(None).await.expect("ListContainers").is_empty());
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_with_other_content() {
    let daemon = daemon().await;
    let first = daemon.run_pod(pod("taken")).await.expect("RunPodSandbox");
    let other = first.config.clone().with(|config| config.hostname = "other".into());
    refused(daemon.cri.run_pod(&other).await, Code::AlreadyExists, &["taken"]);
    assert_eq!(daemon.cri.pods(None).await.expect("ListPodSandbox").len(), 1);
    daemon.create(&first, &sh("x", "exit 0")).await.expect("CreateContainer");
    let other = container("x", &busybox(), &["/bin/false"]);
    refused(daemon.cri.create(&first.id, &other, &first.config).await, Code::AlreadyExists, &["x"]);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rpcs_that_are_not_built_say_so() {
    let daemon = daemon().await;
    let error =
        daemon.cri.runtime.clone().list_metric_descriptors(ListMetricDescriptorsRequest::default()).await;
    let error = error.expect_err("metrics are not built yet");
    assert_eq!(error.code(), Code::Unimplemented);
    assert!(error.message().contains("ListMetricDescriptors"), "{error:?}");
    daemon.finish().await;
}
