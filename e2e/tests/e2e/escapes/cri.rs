//! Holes of the layer above the executor: images' configurations, requests, sockets.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use stave_e2e::cri::*;
use stave_e2e::{Config, container};
use tonic::Code;

use super::{Outside, context, hostile, lines, of_image};
use crate::{daemon_with_pod, sh, sleeper};

#[tokio::test(flavor = "multi_thread")]
async fn cve_2026_47262() {
    let (daemon, pod) = daemon_with_pod().await;
    for (name, file) in [
        ("passwd-huge", "passwd"),
        ("passwd-fifo", "passwd"),
        ("passwd-link", "passwd"),
        ("group-fifo", "group"),
    ] {
        let image = hostile(&daemon, name).await;
        let start = std::time::Instant::now();
        let error = daemon.create(&pod, &of_image(name, &image)).await.expect_err(name);
        assert!(error.message().contains(&format!("/etc/{file}")), "{error:?}");
        assert!(start.elapsed().as_secs() < 5, "{name} took {:?}", start.elapsed());
    }
    // A file that becomes one while the container runs: the next exec fails, and nothing waits.
    let id = daemon.run(&pod, &sleeper("changed")).await.expect("start");
    daemon.cri.shell(&id, "rm /etc/passwd; mkfifo /etc/passwd").await;
    let error = daemon.cri.exec(&id, &["true"]).await.expect_err("exec with a FIFO for /etc/passwd");
    assert!(error.message().contains("/etc/passwd"), "{error:?}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2026_15809() {
    let (daemon, pod) = daemon_with_pod().await;
    let name = hostile(&daemon, "home").await;
    for (label, user) in [("root", 0), ("user", 4321)] {
        let config =
            context(of_image(label, &name), |context| context.run_as_user = Some(Int64Value { value: user }));
        // Refused, or an environment variable and nothing more.
        let Ok(id) = daemon.run(&pod, &config).await else { continue };
        let files = "cat /etc/passwd /etc/group /etc/hosts /etc/hostname /etc/resolv.conf";
        assert!(!daemon.cri.shell(&id, files).await.contains("intruder"), "{label}");
    }
    // Values of the request that become lines.
    for (field, change) in [
        ("hostname", (|config| config.hostname = "a\nb".into()) as fn(&mut PodSandboxConfig)),
        ("dns", |config| {
            let servers = vec!["10.0.0.1\nnameserver 10.6.6.6".into()];
            config.dns_config = Some(DnsConfig { servers, ..Default::default() });
        }),
        ("dns", |config| {
            let searches = vec!["example.org\nnameserver 10.6.6.6".into()];
            config.dns_config = Some(DnsConfig { searches, ..Default::default() });
        }),
    ] {
        let error = daemon.run_pod(stave_e2e::pod("bad").with(change)).await.expect_err(field);
        assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
        assert!(error.message().contains(field), "{error:?}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2026_53488() {
    let (daemon, pod) = daemon_with_pod().await;
    let name = hostile(&daemon, "labels").await;
    let config =
        of_image("main", &name).with(|config| config.labels = [("own".into(), "label".into())].into());
    let id = daemon.run(&pod, &config).await.expect("start");
    let request = ContainerStatusRequest { container_id: id.clone(), verbose: true };
    let status = daemon.cri.container_status(request).await.expect("ContainerStatus");
    assert!(!format!("{status:?}").contains("of-the-image"), "{status:?}");
    let bundle = daemon.directory().join("state/pods").join(&pod.id).join("containers").join(&id);
    for file in ["config.json", "plan.pb"] {
        let content = fs::read(bundle.join(file)).expect(file);
        assert!(!String::from_utf8_lossy(&content).contains("of-the-image"), "{file}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2022_23648() {
    let (daemon, pod) = daemon_with_pod().await;
    let name = hostile(&daemon, "volume").await;
    let outside = Outside::new("/var/tmp/stave-hostile-volume");
    let error = daemon.create(&pod, &of_image("dots", &name)).await.expect_err("a volume with ..");
    assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
    assert!(error.message().contains("stave-hostile-volume"), "{error:?}");
    let name = hostile(&daemon, "volume-link").await;
    let id = daemon.run(&pod, &of_image("main", &name)).await.expect("start");
    let shown = daemon.cri.shell(&id, "cd /var/tmp/stave-hostile-volume; ls; touch new").await;
    assert_eq!(shown, "below\n", "the volumes, and no file of the host");
    assert_eq!(outside.listing(), ["secret"]);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ghsa_q6r4_3wmg_fwcq() {
    let (daemon, pod) = daemon_with_pod().await;
    let name = hostile(&daemon, "workdir").await;
    let outside = Outside::new("/var/tmp/stave-hostile-workdir");
    let config = container("main", &name, &["/bin/sh", "-c", "pwd -P; ls .."]);
    assert_eq!(lines(&daemon, &pod, &config).await, ["/var/tmp/stave-hostile-workdir/below", "below"]);
    assert_eq!(outside.listing(), ["secret"]);
    daemon.finish().await;
}

/// Inodes of the sockets that a process has open.
fn sockets(pid: u64) -> BTreeSet<String> {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("fd")
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2020_15257() {
    let (daemon, _) = daemon_with_pod().await;
    let config =
        stave_e2e::pod("host").with(|config| config.namespaces().network = NamespaceMode::Node as i32);
    let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
    let config = sleeper("main").with(|config| config.namespaces().network = NamespaceMode::Node as i32);
    let id = daemon.run(&pod, &config).await.expect("start");
    let mut ours = sockets(daemon.pid().into());
    let mut files = vec![daemon.socket()];
    for pod in daemon.cri.pods(None).await.expect("ListPodSandbox") {
        let request = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
        let info = daemon.cri.pod_sandbox_status(request).await.expect("PodSandboxStatus").info;
        let info: serde_json::Value = serde_json::from_str(&info["info"]).expect("JSON");
        ours.extend(sockets(info["pid"].as_u64().expect("pid")));
        files.push(daemon.directory().join("state/pods").join(&pod.id).join("supervisor.sock"));
    }
    // Seen from the node's network namespace, by a container that is in it. An abstract name starts with @.
    let table = daemon.cri.output(&id, &["cat", "/proc/net/unix"]).await;
    let named: Vec<(&str, &str)> = table
        .lines()
        .filter_map(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            (fields.len() == 8 && ours.contains(fields[6])).then(|| (fields[6], fields[7]))
        })
        .collect();
    assert!(named.iter().any(|(_, name)| name.ends_with("stave.sock")), "the table is the node's: {named:?}");
    assert!(named.iter().all(|(_, name)| name.starts_with('/')), "{named:?}");
    for file in files {
        let mode = file.metadata().unwrap_or_else(|e| panic!("{}: {e}", file.display())).permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", file.display());
    }
    // Whatever becomes of the mode: who is neither root nor the daemon's user is hung up on.
    let everybody =
        |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("mode");
    everybody(daemon.directory(), 0o755);
    everybody(&daemon.socket(), 0o666);
    let socket = daemon.socket();
    let says = |user: u32| {
        let socket = socket.clone();
        // A thread's user is its own (setresuid(2)), and so are its rights.
        let thread = std::thread::spawn(move || {
            let uid = rustix::thread::Uid::from_raw(user);
            rustix::thread::set_thread_res_uid(uid, uid, uid).expect("setresuid");
            let mut stream = UnixStream::connect(&socket).expect("connect");
            stream.set_read_timeout(Some(stave_e2e::limit(5))).expect("timeout");
            // The preface of HTTP/2 with empty SETTINGS, which a server answers with its own.
            let _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0");
            let mut answer = [0; 9];
            stream.read(&mut answer).unwrap_or(0)
        });
        thread.join().expect("thread")
    };
    assert!(says(0) > 0, "root is heard");
    assert_eq!(says(65534), 0, "nobody is not");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2021_21334() {
    let (daemon, pod) = daemon_with_pod().await;
    let (shared, pod) = (&daemon, &pod);
    let run = async |number: usize| {
        let config = sh(&format!("c{number}"), "env | grep ^SECRET").with(|config| {
            config.envs = vec![KeyValue { key: format!("SECRET_{number}"), value: format!("of {number}") }];
        });
        (number, lines(shared, pod, &config).await)
    };
    let seen = tokio::join!(run(0), run(1), run(2), run(3), run(4), run(5), run(6), run(7));
    let seen: [_; 8] = seen.into();
    for (number, lines) in seen {
        assert_eq!(lines, [format!("SECRET_{number}=of {number}")]);
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2019_14891() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let request = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
    let info = daemon.cri.pod_sandbox_status(request).await.expect("PodSandboxStatus").info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).expect("JSON");
    let supervisor = info["pid"].as_u64().expect("pid of the supervisor");
    let cgroups = fs::read_to_string(format!("/proc/{supervisor}/cgroup")).expect("cgroup");
    assert!(!cgroups.contains(&id), "{cgroups}");
    let init =
        daemon.cri.container_status(ContainerStatusRequest { container_id: id.clone(), verbose: true }).await;
    let init: serde_json::Value =
        serde_json::from_str(&init.expect("ContainerStatus").info["info"]).expect("JSON");
    let cgroups = fs::read_to_string(format!("/proc/{}/cgroup", init["pid"])).expect("cgroup");
    assert!(cgroups.lines().filter(|line| line.contains(&id)).count() > 0, "{cgroups}");
    daemon.finish().await;
}
