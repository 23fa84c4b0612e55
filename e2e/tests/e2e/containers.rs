use std::os::unix::fs::{PermissionsExt, symlink};

use nix::mount::MsFlags;
use stave_e2e::cri::*;
use stave_e2e::{Config, Daemon, Pod, container, image, newer_client, newer_cri, pod, read_log, translate};

use crate::container_anatomy::HostMount;
use crate::{daemon_with_pod, sh, sleeper};

/// A daemon with a pod and the image that configures everything.
async fn configured() -> (Daemon, Pod) {
    let daemon = Daemon::start().await;
    daemon.cri.pull(&image("stave/configured")).await.expect("PullImage");
    let pod = daemon.run_pod(pod("pod")).await.expect("RunPodSandbox");
    (daemon, pod)
}

/// The log of a container that runs to its end.
async fn text(daemon: &Daemon, pod: &Pod, config: &ContainerConfig) -> Vec<String> {
    let id = daemon.run(pod, config).await.expect("start");
    let status = daemon.cri.exited(&id).await;
    let lines = read_log(&status.log_path).into_iter().map(|line| line.text).collect();
    assert_eq!(status.exit_code, 0, "{lines:?}");
    lines
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn entrypoint_command_and_arguments() {
    let (daemon, pod) = configured().await;
    let name = image("stave/configured");
    // Entrypoint and Cmd of the image: /bin/sh -c "echo from the image".
    assert_eq!(text(&daemon, &pod, &container("image", &name, &[])).await, ["from the image"]);
    let config = container("args", &name, &[]).with(|config| config.args = words(&["echo replaced", "x"]));
    assert_eq!(text(&daemon, &pod, &config).await, ["replaced"]);
    let config =
        container("command", &name, &["/bin/echo", "all"]).with(|config| config.args = words(&["new"]));
    assert_eq!(text(&daemon, &pod, &config).await, ["all new"]);
    assert_eq!(text(&daemon, &pod, &container("alone", &name, &["/bin/echo"])).await, [""]);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn environment_of_image_and_request() {
    let (daemon, pod) = configured().await;
    let config = container("env", &image("stave/configured"), &["/bin/env"]).with(|config| {
        config.envs = [("REPLACED", "request"), ("EMPTY", ""), ("SPACED", " a=b c ")]
            .map(|(key, value)| KeyValue { key: key.into(), value: value.into() })
            .to_vec();
    });
    let lines = text(&daemon, &pod, &config).await;
    for wanted in
        ["PATH=/bin", "FROM_IMAGE=yes", "REPLACED=request", "EMPTY=", "SPACED= a=b c ", "HOSTNAME=pod"]
    {
        assert!(lines.iter().any(|line| line == wanted), "{wanted} in {lines:?}");
    }
    assert!(!lines.iter().any(|line| line == "REPLACED=image"));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn working_directory_and_user_of_image_and_request() {
    let (daemon, pod) = configured().await;
    let name = image("stave/configured");
    let show = ["/bin/sh", "-c", "pwd; id -u; id -g"];
    assert_eq!(text(&daemon, &pod, &container("image", &name, &show)).await, ["/work", "1000", "1000"]);
    let config = container("request", &name, &show).with(|config| {
        config.working_dir = "/made/for/it".into();
        let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        context.run_as_user = Some(Int64Value { value: 0 });
        context.run_as_group = Some(Int64Value { value: 5 });
    });
    assert_eq!(text(&daemon, &pod, &config).await, ["/made/for/it", "0", "5"]);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn directories_of_the_images_volumes_are_made() {
    let (daemon, pod) = configured().await;
    let script = "stat -c '%F %a %u' /data; echo x >/data/file && cat /data/file";
    let as_root = |name: &str, mounts: Vec<Mount>| {
        container(name, &image("stave/configured"), &["/bin/sh", "-c", script]).with(|config| {
            let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
            context.run_as_user = Some(Int64Value { value: 0 });
            config.mounts = mounts;
        })
    };
    assert_eq!(text(&daemon, &pod, &as_root("main", vec![])).await, ["directory 755 0", "x"]);
    // A mount of the request goes first.
    let data = daemon.directory().join("data");
    std::fs::create_dir(&data).expect("data");
    let mount = Mount {
        host_path: data.to_string_lossy().into_owned(),
        container_path: "/data".into(),
        ..Default::default()
    };
    assert_eq!(text(&daemon, &pod, &as_root("mounted", vec![mount])).await, ["directory 755 0", "x"]);
    assert_eq!(std::fs::read_to_string(data.join("file")).expect("file"), "x\n");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn users_and_groups() {
    let (daemon, pod) = daemon_with_pod().await;
    let name = image("k8s-staging-cri-tools/test-image-predefined-group");
    daemon.cri.pull(&name).await.expect("PullImage");
    let as_user = |label: &str, change: fn(&mut LinuxContainerSecurityContext)| {
        container(
            label,
            &name,
            &["/bin/sh", "-c", "id -u; id -g; id -G | tr ' ' '\\n' | sort -n | paste -sd ' '"],
        )
        .with(|config| change(config.linux.as_mut().unwrap().security_context.as_mut().unwrap()))
    };
    // The groups of the image's user, and those of the request.
    let merged = as_user("merged", |context| context.supplemental_groups = vec![1234]);
    assert_eq!(text(&daemon, &pod, &merged).await, ["1000", "1000", "1000 1234 50000"]);
    let named = as_user("named", |context| context.run_as_username = "www-data".into());
    assert_eq!(text(&daemon, &pod, &named).await, ["33", "33", "33"]);
    let unnamed = as_user("unnamed", |context| context.run_as_user = Some(Int64Value { value: 4321 }));
    assert_eq!(text(&daemon, &pod, &unnamed).await, ["4321", "0", "0"]);
    let strict = as_user("strict", |context| {
        context.supplemental_groups = vec![1234];
        context.supplemental_groups_policy = SupplementalGroupsPolicy::Strict as i32;
    });
    assert_eq!(text(&daemon, &pod, &strict).await, ["1000", "1000", "1000 1234"]);
    let status = daemon.run(&pod, &sleeper("status")).await.expect("start");
    let user = daemon.cri.container(&status).await.expect("ContainerStatus").user.and_then(|user| user.linux);
    assert_eq!(user, Some(LinuxContainerUser { uid: 0, gid: 0, supplemental_groups: vec![0] }));
    for (config, groups) in [(&merged, vec![1000, 1234, 50000]), (&strict, vec![1000, 1234])] {
        let config = config.clone().with(|config| config.metadata.as_mut().unwrap().attempt = 1);
        let id = daemon.create(&pod, &config).await.expect("CreateContainer");
        let user = daemon.cri.container(&id).await.expect("ContainerStatus").user.and_then(|user| user.linux);
        assert_eq!(user, Some(LinuxContainerUser { uid: 1000, gid: 1000, supplemental_groups: groups }));
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_images_stop_signal_is_used() {
    let (daemon, pod) = configured().await;
    let script = "trap 'exit 9' USR1; echo ready; while :; do sleep 0.1; done";
    let config = container("main", &image("stave/configured"), &["/bin/sh", "-c", script]);
    let id = daemon.run(&pod, &config).await.expect("start");
    crate::logs::wait_for_line(&pod, "main", "ready").await;
    daemon.cri.stop(&id, 20).await.expect("StopContainer");
    assert_eq!(daemon.cri.container(&id).await.expect("ContainerStatus").exit_code, 9);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stop_signal_of_request_image_or_none_is_told_and_sent() {
    use newer_cri::Signal;
    let (daemon, pod) = configured().await;
    daemon.cri.pull(&crate::busybox()).await.expect("PullImage");
    let mut client = newer_client(&daemon.socket()).await;
    let script = "for s in TERM USR1 USR2; do trap \"echo $s; exit 9\" $s; done; echo ready; while :; do sleep 0.1; done";
    let of_image = image("stave/configured");
    for (name, image, asked, told, sent) in [
        ("none", &crate::busybox(), Signal::RuntimeDefault, Signal::Sigterm, "TERM"),
        ("image", &of_image, Signal::RuntimeDefault, Signal::Sigusr1, "USR1"),
        ("request", &of_image, Signal::Sigusr2, Signal::Sigusr2, "USR2"),
    ] {
        let config = container(name, image, &["/bin/sh", "-c", script]);
        let mut config: newer_cri::ContainerConfig = translate(&config);
        config.stop_signal = asked.into();
        let request = newer_cri::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(translate(&pod.config)),
        };
        let id = client.create_container(request).await.expect("CreateContainer").into_inner().container_id;
        daemon.cri.start(&id).await.expect("StartContainer");
        let request = newer_cri::ContainerStatusRequest { container_id: id.clone(), verbose: false };
        let status = client.container_status(request).await.expect("ContainerStatus").into_inner().status;
        assert_eq!(status.expect("status").stop_signal(), told, "{name}");
        crate::logs::wait_for_line(&pod, name, "ready").await;
        daemon.cri.stop(&id, 20).await.expect("StopContainer");
        let status = daemon.cri.container(&id).await.expect("ContainerStatus");
        assert_eq!(status.exit_code, 9, "{name}");
        assert_eq!(read_log(&status.log_path).last().expect("a line").text, sent, "{name}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts() {
    let (daemon, pod) = daemon_with_pod().await;
    let cri = &daemon.cri;
    let data = daemon.directory().join("data");
    std::fs::create_dir_all(data.join("sub")).expect("data");
    std::fs::write(data.join("file"), "of the host\n").expect("file");
    symlink("data", daemon.directory().join("link")).expect("link");
    let path = |name: &str| daemon.directory().join(name).to_string_lossy().into_owned();
    let mount = |host: &str, inside: &str, readonly| Mount {
        host_path: path(host),
        container_path: inside.into(),
        readonly,
        ..Default::default()
    };
    let mounts = vec![
        mount("data/sub", "/mnt/deep/er/sub", false),
        mount("data", "/mnt/deep", false),
        mount("data", "/mnt/ro", true),
        mount("link", "/mnt/link", false),
        mount("data/file", "/etc/one-file", false),
    ];
    let config = sleeper("main").with(|config| config.mounts = mounts.clone());
    std::fs::create_dir_all(data.join("er/sub")).expect("mount point");
    let id = daemon.run(&pod, &config).await.expect("start");
    assert_eq!(
        cri.container(&id).await.expect("ContainerStatus").mounts,
        mounts,
        "told as they were asked for"
    );
    assert_eq!(
        cri.output(&id, &["cat", "/mnt/deep/file", "/mnt/link/file", "/etc/one-file"]).await,
        "of the host\n".repeat(3)
    );
    cri.shell(&id, "echo new >/mnt/deep/er/sub/inner").await;
    assert_eq!(
        std::fs::read_to_string(data.join("sub/inner")).expect("inner"),
        "new\n",
        "the deeper mount is on top"
    );
    let refused = cri.exec(&id, &["touch", "/mnt/ro/x"]).await.expect("ExecSync");
    assert_eq!(String::from_utf8_lossy(&refused.stderr), "touch: /mnt/ro/x: Read-only file system\n");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_that_are_read_only_at_the_top_or_all_the_way() {
    let (daemon, pod) = daemon_with_pod().await;
    let top = daemon.directory().join("top");
    let host = HostMount::new(&top, MsFlags::MS_PRIVATE);
    let below = HostMount::new(&top.join("below"), MsFlags::MS_PRIVATE);
    let mount = |inside: &str, recursive_read_only| Mount {
        host_path: top.to_string_lossy().into_owned(),
        container_path: inside.into(),
        readonly: true,
        recursive_read_only,
        ..Default::default()
    };
    let mounts = vec![mount("/ro", false), mount("/rro", true)];
    let config = sleeper("main").with(|config| config.mounts = mounts.clone());
    let id = daemon.run(&pod, &config).await.expect("start");
    let script = "for d in /ro /ro/below /rro /rro/below; do touch $d/new 2>/dev/null && echo $d; done; true";
    assert_eq!(daemon.cri.shell(&id, script).await, "/ro/below\n");
    assert!(top.join("below/new").exists());
    assert_eq!(daemon.cri.container(&id).await.expect("ContainerStatus").mounts, mounts);
    drop((below, host));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_readonly_root_and_what_stays_writable() {
    let (daemon, pod) = daemon_with_pod().await;
    let cri = &daemon.cri;
    let config = sleeper("main").with(|config| {
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().readonly_rootfs = true;
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let refused = cri.exec(&id, &["touch", "/file"]).await.expect("ExecSync");
    assert_eq!(String::from_utf8_lossy(&refused.stderr), "touch: /file: Read-only file system\n");
    cri.shell(&id, "echo x >/dev/shm/x; echo x >/dev/null").await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_usual_devices_and_mounts_are_there() {
    let (daemon, pod) = daemon_with_pod().await;
    let cri = &daemon.cri;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    for (name, device) in [
        ("null", "1:3"),
        ("zero", "1:5"),
        ("full", "1:7"),
        ("random", "1:8"),
        ("urandom", "1:9"),
        ("tty", "5:0"),
    ] {
        let shown = cri.output(&id, &["stat", "-c", "%F %t:%T %a", &format!("/dev/{name}")]).await;
        assert_eq!(shown, format!("character special file {device} 666\n"), "{name}");
    }
    assert_eq!(
        cri.shell(&id, "for l in fd stdin ptmx; do readlink /dev/$l; done").await,
        "/proc/self/fd\n/proc/self/fd/0\npts/ptmx\n"
    );
    let mounts = cri.output(&id, &["cat", "/proc/self/mounts"]).await;
    let kind = |path: &str| {
        let line = mounts.lines().find(|line| line.split(' ').nth(1) == Some(path));
        line.unwrap_or_else(|| panic!("no mount at {path} in {mounts}")).split(' ').nth(2).unwrap().to_owned()
    };
    for (path, wanted) in [
        ("/", "overlay"),
        ("/proc", "proc"),
        ("/dev", "tmpfs"),
        ("/dev/pts", "devpts"),
        ("/dev/mqueue", "mqueue"),
        ("/sys", "sysfs"),
    ] {
        assert_eq!(kind(path), wanted, "{path}");
    }
    assert_eq!(cri.shell(&id, "cat </dev/stdin | wc -c").await.trim(), "0", "no stdin means end of file");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal() {
    let (daemon, pod) = daemon_with_pod().await;
    let script = "tty >/dev/null && echo terminal; echo $TERM; echo err >&2";
    let config = sh("tty", script).with(|config| config.tty = true);
    let id = daemon.run(&pod, &config).await.expect("start");
    let status = daemon.cri.exited(&id).await;
    assert_eq!(status.exit_code, 0);
    let lines: Vec<_> = read_log(&status.log_path)
        .into_iter()
        .map(|line| (line.stream, line.text.trim_end_matches('\r').to_owned()))
        .collect();
    let stdout = |text: &str| ("stdout".to_owned(), text.to_owned());
    assert_eq!(lines, [stdout("terminal"), stdout("xterm"), stdout("err")]);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_termination_file_gets_what_the_container_says() {
    let (daemon, pod) = daemon_with_pod().await;
    let file = daemon.directory().join("termination");
    std::fs::write(&file, "").expect("file");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o666)).expect("mode");
    let config = sh("main", "echo the reason >/dev/termination-log; exit 4").with(|config| {
        config.mounts = vec![Mount {
            host_path: file.to_string_lossy().into_owned(),
            container_path: "/dev/termination-log".into(),
            ..Default::default()
        }];
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    assert_eq!(daemon.cri.exited(&id).await.exit_code, 4);
    assert_eq!(std::fs::read_to_string(&file).expect("file"), "the reason\n");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_is_in_the_same_place_as_the_container() {
    let (daemon, pod) = daemon_with_pod().await;
    let config = sleeper("main").with(|config| {
        config.working_dir = "/tmp".into();
        config.envs = vec![KeyValue { key: "MARK".into(), value: "here".into() }];
        let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        context.run_as_user = Some(Int64Value { value: 1000 });
        context.run_as_group = Some(Int64Value { value: 1001 });
        context.supplemental_groups = vec![1002];
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let shown = daemon.cri.shell(&id, "pwd; echo $MARK; id -u; id -g; id -G").await;
    assert_eq!(shown, "/tmp\nhere\n1000\n1001\n1001 1002\n");
    let own = daemon.cri.output(&id, &["cat", "/proc/self/cgroup"]).await;
    let init = daemon.cri.output(&id, &["cat", "/proc/1/cgroup"]).await;
    // Below the container's cgroup is in it too: that is how what an exec leaves behind can be ended.
    for (own, init) in own.lines().zip(init.lines()) {
        assert!(own.starts_with(init), "{own} is not in the container's cgroup {init}");
    }
    daemon.finish().await;
}
