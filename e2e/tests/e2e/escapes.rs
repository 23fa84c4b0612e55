//! Known holes of container runtimes, tried against the whole program: hostile images (`hack/images`, `hostile/*`)
//! and hostile requests. docs/security-tests.md says where the other rows are tested.

mod cri;
mod mapped;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use stave_e2e::cri::*;
use stave_e2e::{Config, Daemon, Pod, eventually, image, read_log};
use tonic::Code;

use crate::{daemon_with_pod, sh, sleeper};

/// What of the host a hole would change.
#[derive(Debug, PartialEq)]
struct Host {
    core_pattern: String,
    etc: BTreeSet<PathBuf>,
    passwd: (Vec<u8>, u32, u32, u32),
    null: (u32, u32, u32),
}

impl Host {
    fn now() -> Host {
        let of = |path: &str| fs::metadata(path).expect("metadata");
        let (passwd, null) = (of("/etc/passwd"), of("/dev/null"));
        Host {
            core_pattern: fs::read_to_string("/proc/sys/kernel/core_pattern").expect("core_pattern"),
            etc: fs::read_dir("/etc").expect("/etc").map(|entry| entry.expect("entry").path()).collect(),
            passwd: (fs::read("/etc/passwd").expect("passwd"), passwd.uid(), passwd.gid(), passwd.mode()),
            null: (null.uid(), null.gid(), null.mode()),
        }
    }
}

/// A directory of the host that links of a hostile image name, with a file in it.
struct Outside(PathBuf);

impl Outside {
    fn new(path: &str) -> Outside {
        let _ = fs::remove_dir_all(path);
        fs::create_dir(path).expect("directory of the host");
        fs::write(format!("{path}/secret"), "of the host").expect("secret");
        Outside(path.into())
    }

    fn listing(&self) -> Vec<std::ffi::OsString> {
        fs::read_dir(&self.0).expect("directory").map(|entry| entry.expect("entry").file_name()).collect()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// One of the hostile images, pulled.
async fn hostile(daemon: &Daemon, name: &str) -> String {
    let name = image(&format!("hostile/{name}"));
    daemon.cri.pull(&name).await.unwrap_or_else(|e| panic!("PullImage {name}: {e:?}"));
    name
}

/// A container that stays, of another image.
fn of_image(name: &str, image: &str) -> ContainerConfig {
    sleeper(name)
        .with(|config| config.image = Some(ImageSpec { image: image.to_owned(), ..Default::default() }))
}

fn context(
    config: ContainerConfig,
    change: impl FnOnce(&mut LinuxContainerSecurityContext),
) -> ContainerConfig {
    config.with(|config| change(config.linux.as_mut().unwrap().security_context.get_or_insert_default()))
}

fn bind(host: &Path, inside: &str) -> Mount {
    Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: inside.into(),
        ..Default::default()
    }
}

/// Runs to its end and gives what it wrote.
async fn lines(daemon: &Daemon, pod: &Pod, config: &ContainerConfig) -> Vec<String> {
    let id = daemon.run(pod, config).await.expect("start");
    let status = daemon.cri.exited(&id).await;
    read_log(status.log_path).into_iter().map(|line| line.text.trim_end_matches('\r').to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2025_31133() {
    let (daemon, pod) = daemon_with_pod().await;
    let name = hostile(&daemon, "dev-entries").await;
    let before = Host::now();
    let mask =
        |context: &mut LinuxContainerSecurityContext| context.masked_paths = vec!["/proc/timer_list".into()];
    let id = daemon.run(&pod, &context(of_image("image", &name), mask)).await.expect("start");
    let shown = daemon.cri.output(&id, &["stat", "-c", "%F %t:%T", "/dev/null", "/proc/timer_list"]).await;
    assert_eq!(shown, "character special file 1:3\n".repeat(2));
    // A /dev that others can write to: a volume.
    let dev = daemon.directory().join("dev");
    fs::create_dir(&dev).expect("dev");
    symlink("/proc/sys/kernel/core_pattern", dev.join("null")).expect("link");
    let config =
        context(of_image("volume", &name), mask).with(|config| config.mounts = vec![bind(&dev, "/dev")]);
    let id = daemon.run(&pod, &config).await.expect("start");
    let shown = daemon.cri.output(&id, &["stat", "-c", "%F %t:%T", "/proc/timer_list"]).await;
    assert_eq!(shown, "character special file 1:3\n");
    assert_eq!(Host::now(), before);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2025_52565() {
    let (daemon, pod) = daemon_with_pod().await;
    let name = hostile(&daemon, "dev-entries").await;
    let before = Host::now();
    let script = "stat -c %t:%T /dev/console; tty; echo written >/dev/console";
    let config = of_image("image", &name).with(|config| {
        config.command = ["/bin/sh", "-c", script].map(String::from).to_vec();
        config.tty = true;
    });
    assert_eq!(lines(&daemon, &pod, &config).await, ["88:0", "/dev/pts/0", "written"]);
    // Links in a volume: to a file of the host, by its path there.
    let victim = daemon.directory().join("victim");
    fs::write(&victim, "untouched").expect("victim");
    fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).expect("mode");
    let dev = daemon.directory().join("dev");
    fs::create_dir_all(dev.join("pts")).expect("dev");
    for link in ["console", "ptmx", "pts/0", "pts/ptmx"] {
        symlink(&victim, dev.join(link)).expect("link");
    }
    let config = config.with(|config| {
        config.metadata.as_mut().unwrap().name = "volume".into();
        config.mounts = vec![bind(&dev, "/dev")];
    });
    let error = daemon.create(&pod, &config).await.expect_err("a terminal of no devpts");
    assert!(error.message().contains("/dev/pts"), "{error:?}");
    let is = victim.metadata().expect("victim");
    assert_eq!(
        (fs::read_to_string(&victim).expect("victim").as_str(), is.uid(), is.mode() & 0o777),
        ("untouched", 0, 0o600)
    );
    assert_eq!(Host::now(), before);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2025_52881() {
    // A /proc that is none: what the runtime writes for a process must go to the real one.
    let (daemon, pod) = daemon_with_pod().await;
    let proc = daemon.directory().join("proc");
    let victim = daemon.directory().join("victim");
    fs::write(&victim, "untouched").expect("victim");
    for directory in ["self/attr/apparmor", "thread-self/attr", "sys/kernel", "1/attr"] {
        fs::create_dir_all(proc.join(directory)).expect("directory");
    }
    let files = [
        "self/oom_score_adj",
        "self/attr/exec",
        "self/attr/apparmor/exec",
        "thread-self/attr/exec",
        "1/oom_score_adj",
    ];
    for file in files {
        symlink("/victim", proc.join(file)).expect("link");
    }
    let config = sleeper("main").with(|config| {
        config.mounts = vec![bind(&proc, "/proc"), bind(&victim, "/victim")];
        config.linux.as_mut().unwrap().resources.as_mut().unwrap().oom_score_adj = 321;
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    daemon.cri.output(&id, &["cat", "/proc/self/oom_score_adj"]).await;
    assert_eq!(fs::read_to_string(&victim).expect("victim"), "untouched");
    let request = ContainerStatusRequest { container_id: id.clone(), verbose: true };
    let info = daemon.cri.container_status(request).await.expect("ContainerStatus").info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).expect("JSON");
    let adjusted = fs::read_to_string(format!("/proc/{}/oom_score_adj", info["pid"])).expect("oom_score_adj");
    assert_eq!(adjusted, "321\n");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2026_41579() {
    let (daemon, pod) = daemon_with_pod().await;
    let before = Host::now();
    for name in ["dev-link", "dev-link-up"] {
        let image = hostile(&daemon, name).await;
        // Mounted over the container's own /etc, or refused.
        if let Ok(id) = daemon.run(&pod, &of_image(name, &image)).await {
            assert_eq!(daemon.cri.output(&id, &["stat", "-c", "%t:%T", "/dev/null"]).await, "1:3\n");
        }
        assert_eq!(Host::now(), before, "{name}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2026_88265() {
    let (daemon, pod) = daemon_with_pod().await;
    let name = hostile(&daemon, "dev-entries").await;
    let before = Host::now();
    // A /dev of the container's making, with a link for /dev/null.
    let (dev, victim) = (daemon.directory().join("dev"), daemon.directory().join("victim"));
    fs::create_dir(&dev).expect("dev");
    fs::write(&victim, "untouched").expect("victim");
    symlink("/victim", dev.join("null")).expect("link");
    for (label, user, mounts) in [
        ("root", 0, vec![]),
        ("user", 1000, vec![]),
        ("volume", 1000, vec![bind(&dev, "/dev"), bind(&victim, "/victim")]),
    ] {
        let config =
            context(of_image(label, &name), |context| context.run_as_user = Some(Int64Value { value: user }))
                .with(|config| config.mounts = mounts);
        let id = daemon.run(&pod, &config).await.expect("start");
        for process in ["1", "self"] {
            let shown =
                daemon.cri.shell(&id, &format!("stat -L -c '%F %t:%T' /proc/{process}/fd/0; true")).await;
            assert_eq!(shown, "character special file 1:3\n", "{label}, {process}");
        }
    }
    assert_eq!(
        (fs::read_to_string(&victim).expect("victim").as_str(), victim.metadata().expect("victim").uid()),
        ("untouched", 0)
    );
    assert_eq!(Host::now(), before);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2019_5736() {
    // A container with all rights on the node opens the program of another pod's supervisor while it runs, and writes to
    // it once it does not: the copy is sealed. A daemon makes one for all its supervisors, so the attacker's own would
    // keep it busy (ETXTBSY): that one is of another daemon.
    let (mut daemon, other) = daemon_with_pod().await;
    let own =
        |daemon: &Daemon| fs::read_link(format!("/proc/{}/exe", daemon.pid())).expect("the daemon's program");
    let file = own(&daemon).with_file_name("stave-pod");
    let before = fs::read(&file).expect("stave-pod");
    daemon.kill();
    daemon.restart().await;
    let privileged = stave_e2e::pod("attacker").with(|config| {
        config.namespaces().pid = NamespaceMode::Node as i32;
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    });
    let pod = daemon.run_pod(privileged).await.expect("RunPodSandbox");
    let request = PodSandboxStatusRequest { pod_sandbox_id: other.id.clone(), verbose: true };
    let info = daemon.cri.pod_sandbox_status(request).await.expect("PodSandboxStatus").info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).expect("JSON");
    let supervisor = info["pid"].as_u64().expect("pid of the supervisor");
    let program = fs::read_link(format!("/proc/{supervisor}/exe")).expect("exe");
    assert!(program.to_string_lossy().starts_with("/memfd:"), "{}", program.display());
    let script = format!(
        "echo x >>/proc/{supervisor}/exe && echo WRITTEN; exec 9</proc/{supervisor}/exe; head -c 4 <&9 | tail -c 3; echo; \
         until test -e /tmp/go; do sleep 0.1; done; echo x >>/proc/self/fd/9 && echo WRITTEN; \
         (: >/proc/self/fd/9) && echo EMPTIED; echo end"
    );
    let config = context(sh("attacker", &script), |context| context.privileged = true)
        .with(|config| config.namespaces().pid = NamespaceMode::Node as i32);
    let id = daemon.run(&pod, &config).await.expect("start");
    crate::logs::wait_for_line(&pod, "attacker", "ELF").await;
    daemon.cri.stop_pod(&other.id).await.expect("StopPodSandbox");
    daemon.cri.remove_pod(&other.id).await.expect("RemovePodSandbox");
    eventually("the supervisor's end", async || {
        (!Path::new(&format!("/proc/{supervisor}/exe")).exists()).then_some(())
    })
    .await;
    daemon.cri.output(&id, &["touch", "/tmp/go"]).await;
    let status = daemon.cri.exited(&id).await;
    let stdout: Vec<_> = read_log(&status.log_path)
        .into_iter()
        .filter(|line| line.stream == "stdout")
        .map(|line| line.text)
        .collect();
    assert_eq!(stdout, ["ELF", "end"]);
    assert!(fs::read(&file).expect("stave-pod") == before, "{} is another", file.display());
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2019_19921() {
    let (daemon, pod) = daemon_with_pod().await;
    for name in ["proc-link", "sys-link"] {
        let image = hostile(&daemon, name).await;
        let error = daemon.create(&pod, &of_image(name, &image)).await.expect_err(name);
        assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
        assert!(error.message().contains("symbolic link"), "{error:?}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2024_45310() {
    let (daemon, pod) = daemon_with_pod().await;
    let name = hostile(&daemon, "links").await;
    let data = daemon.directory().join("data");
    fs::create_dir(&data).expect("data");
    fs::write(data.join("file"), "of the volume\n").expect("file");
    // What the link names is there on the host too.
    let outside = Outside::new("/var/tmp/stave-hostile-links");
    let config = of_image("main", &name).with(|config| {
        config.mounts = vec![
            bind(&data, "/absolute/below"),
            bind(&data.join("file"), "/up/stave-hostile-up/file"),
            bind(&data, "/absolute/../../../../stave-hostile-up2"),
        ];
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let shown = daemon.cri.shell(&id, "cat /absolute/below/file /stave-hostile-up/file").await;
    assert_eq!(shown, "of the volume\n".repeat(2));
    assert_eq!(outside.listing(), ["secret"]);
    for path in ["/stave-hostile-up", "/stave-hostile-up2"] {
        assert!(!Path::new(path).exists(), "{path} on the host");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2022_29162() {
    let (daemon, pod) = daemon_with_pod().await;
    for (label, user) in [("root", 0), ("user", 1000)] {
        let config = context(sleeper(label), |context| {
            context.run_as_user = Some(Int64Value { value: user });
            context.capabilities =
                Some(Capability { add_capabilities: vec!["NET_ADMIN".into()], ..Default::default() });
        });
        let id = daemon.run(&pod, &config).await.expect("start");
        for process in ["1", "self"] {
            let status = daemon.cri.output(&id, &["cat", &format!("/proc/{process}/status")]).await;
            // CVE-2018-1000400: nor ambient ones.
            for set in ["CapInh:\t0000000000000000\n", "CapAmb:\t0000000000000000\n"] {
                assert!(status.contains(set), "{label}, {process}: {status}");
            }
        }
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2026_30892() {
    let (daemon, pod) = daemon_with_pod().await;
    for number in 0..9 {
        let name = hostile(&daemon, &format!("user-{number}")).await;
        let user = daemon.cri.image(&name).await.expect("ImageStatus");
        let error = match daemon.create(&pod, &of_image(&format!("user-{number}"), &name)).await {
            Err(error) => error,
            Ok(id) => panic!("{user:?} ran as {:?}", daemon.cri.container(&id).await.expect("status").user),
        };
        assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
        // By the daemon, before anything is made; but for "0x0", a name, which this image does not have.
        let by = if number == 7 { "no user" } else { "image.user" };
        assert!(error.message().contains(by), "{user:?}: {error:?}");
    }
    // What only the container's own files say is refused by the process that reads them.
    let passwd = daemon.directory().join("passwd");
    let users = "big:x:2147483648:0::/:\nlast:x:4294967295:0::/:\nwrapped:x:4294967296:0::/:\n\
                 negative:x:-1:0::/:\ngroup:x:7:2147483648::/:\n";
    fs::write(&passwd, users).expect("passwd");
    for name in ["big", "last", "wrapped", "negative", "group"] {
        let config = context(sleeper(name), |context| context.run_as_username = name.into())
            .with(|config| config.mounts = vec![bind(&passwd, "/etc/passwd")]);
        let error = match daemon.create(&pod, &config).await {
            Err(error) => error,
            Ok(id) => panic!("{name} ran as {:?}", daemon.cri.container(&id).await.expect("status").user),
        };
        assert_eq!(error.code(), Code::InvalidArgument, "{name}: {error:?}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2024_40635() {
    let (daemon, pod) = daemon_with_pod().await;
    type Change = fn(&mut LinuxContainerSecurityContext, i64);
    for value in [1 << 31, (1 << 32) - 1, 1 << 32, -1, i64::MIN] {
        for (field, change) in [
            ("run_as_user", (|c, value| c.run_as_user = Some(Int64Value { value })) as Change),
            ("run_as_group", |c, value| {
                c.run_as_user = Some(Int64Value { value: 1 });
                c.run_as_group = Some(Int64Value { value });
            }),
            ("supplemental_groups", |c, value| c.supplemental_groups = vec![value]),
        ] {
            let config = context(sleeper("bad"), |context| change(context, value));
            let error = daemon.create(&pod, &config).await.expect_err(field);
            assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
            assert!(
                error.message().contains(field) && error.message().contains(&value.to_string()),
                "{error:?}"
            );
        }
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2026_46680() {
    // The image calls root "1000", and says that it runs as 1000.
    let (daemon, pod) = daemon_with_pod().await;
    let name = hostile(&daemon, "passwd-digits").await;
    let status = daemon.cri.image(&name).await.expect("ImageStatus").expect("the image");
    assert_eq!(status.uid, Some(Int64Value { value: 1000 }), "what the kubelet judges runAsNonRoot by");
    let id = daemon.run(&pod, &of_image("main", &name)).await.expect("start");
    assert_eq!(daemon.cri.output(&id, &["id", "-u"]).await, "1000\n");
    assert_eq!(daemon.cri.shell(&id, "stat -c %u /proc/1").await, "1000\n");
    let config = context(of_image("name", &name), |context| context.run_as_username = "1000".into());
    if let Ok(id) = daemon.run(&pod, &config).await {
        assert_eq!(daemon.cri.output(&id, &["id", "-u"]).await, "1000\n");
    }
    daemon.finish().await;
}
