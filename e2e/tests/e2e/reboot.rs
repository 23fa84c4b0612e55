//! The node loses its power with pods running, and comes up on the same disk.
//!
//! Two tests, one for each boot: `hack/vm-tests --reboot` runs them in a VM with a disk that stays. Nothing else may run
//! them, as the first one resets the machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};
use stave_e2e::cri::{ContainerState, PodSandboxConfig, PodSandboxState, PortMapping};
use stave_e2e::{Config, Cri, Leftovers, Pod, Registry, container, image, limit, pod};

use crate::{busybox, sh, sleeper};

const DISK: &str = "/var/lib/stave-reboot";
/// On a tmpfs, as on every node.
const STATE: &str = "/run/stave-reboot";
const BRIDGE: &str = "stave-reboot";
const CGROUP: &str = "/stave-reboot";
/// A second daemon's, whose network are plugins: root, and the leases of Debian's host-local, on the disk.
const CNI_DISK: &str = "/var/lib/stave-cni-reboot";
const CNI_STATE: &str = "/run/stave-cni-reboot";

struct Node {
    cri: Cri,
    daemon: Daemon,
}

struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        if std::thread::panicking() {
            for disk in [DISK, CNI_DISK] {
                eprintln!("{}", fs::read_to_string(format!("{disk}/stave.log")).unwrap_or_default());
            }
        }
    }
}

/// A daemon with root on the disk and state on the tmpfs, and the built-in bridge.
async fn node(registry: &str) -> Node {
    let network =
        format!("mode = \"bridge\"\n[network.bridge]\nname = \"{BRIDGE}\"\nsubnets = [\"10.251.7.0/24\"]\n");
    serve(registry, DISK, STATE, CGROUP, &network).await
}

/// The same with Debian's plugins.
async fn node_with_plugins(registry: &str) -> Node {
    let conf_dir = format!("{CNI_DISK}/net.d");
    fs::create_dir_all(&conf_dir).unwrap();
    let ipam =
        json!({ "type": "host-local", "dataDir": format!("{CNI_DISK}/leases"), "subnet": "10.251.8.0/24" });
    let plugin = json!({ "type": "bridge", "bridge": "stave-rb-cni", "isGateway": true, "ipam": ipam });
    let list = json!({ "cniVersion": "1.0.0", "name": "reboot", "plugins": [plugin] });
    fs::write(format!("{conf_dir}/10-reboot.conflist"), list.to_string()).unwrap();
    let network = format!(
        "mode = \"cni\"\n[network.cni]\nconf_dir = \"{conf_dir}\"\nbin_dirs = [\"/usr/lib/cni\"]\n\
         netns_dir = \"{CNI_STATE}/netns\"\ntimeout = {}\n",
        limit(5).as_secs()
    );
    serve(registry, CNI_DISK, CNI_STATE, "/stave-cni-reboot", &network).await
}

async fn serve(registry: &str, disk: &str, state: &str, cgroup: &str, network: &str) -> Node {
    assert_eq!(
        std::env::var("STAVE_E2E_REBOOT").as_deref(),
        Ok("1"),
        "this test resets the machine; only `hack/vm-tests --reboot` may run it"
    );
    let hosts = format!("{disk}/certs.d/registry.test");
    fs::create_dir_all(&hosts).unwrap();
    fs::create_dir_all(state).unwrap();
    let host = format!("http://{registry}");
    let hosts_toml =
        format!("server = \"{host}\"\n[host.\"{host}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
    fs::write(format!("{hosts}/hosts.toml"), hosts_toml).unwrap();
    let config = format!(
        "[cgroup]\ndriver = \"cgroupfs\"\nparent = \"{cgroup}\"\n[network]\n{network}[registries]\nconfig_dir = \
         \"{disk}/certs.d\"\n[streaming]\naddress = \"127.0.0.1\"\nport = 0\n"
    );
    fs::write(format!("{disk}/config.toml"), config).unwrap();
    let log = fs::File::options().create(true).append(true).open(format!("{disk}/stave.log")).unwrap();
    let socket = Path::new(state).join("stave.sock");
    let programs = PathBuf::from(std::env::var("STAVE_BIN_DIR").expect("STAVE_BIN_DIR"));
    let daemon = Command::new(programs.join("stave"))
        .args(["serve", "--config", &format!("{disk}/config.toml"), "--root", &format!("{disk}/root")])
        .args(["--state", &format!("{state}/state"), "--log-level", "debug"])
        .arg("--listen")
        .arg(&socket)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .map(Daemon)
        .expect("stave");
    let end = Instant::now() + limit(20);
    loop {
        if let Ok(cri) = Cri::connect(&socket, limit(60)).await
            && cri.version(Default::default()).await.is_ok()
        {
            return Node { cri, daemon };
        }
        assert!(Instant::now() < end, "no answer from the daemon");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

/// The addresses that Debian's host-local has given out.
fn leases() -> Vec<String> {
    let names = fs::read_dir(format!("{CNI_DISK}/leases/reboot")).into_iter().flatten().flatten();
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.parse::<std::net::IpAddr>().is_ok()).collect()
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().to_owned()
}

/// The kubelet's request: the same pod in each boot, but for the attempt.
fn config(name: &str, attempt: u32) -> PodSandboxConfig {
    pod(name).with(|config| {
        let metadata = config.metadata.as_mut().unwrap();
        metadata.uid = format!("uid-of-{name}");
        metadata.attempt = attempt;
        config.log_directory = format!("{DISK}/logs/{name}");
        if name == "web" {
            let (container_port, host_port) = (80, 12_180);
            config.port_mappings = vec![PortMapping { container_port, host_port, ..Default::default() }];
        }
    })
}

async fn start(node: &Node, name: &str, attempt: u32) -> (Pod, String, String) {
    let config = config(name, attempt);
    let id = node.cri.run_pod(&config).await.expect("RunPodSandbox");
    let ip = node.cri.pod(&id).await.expect("PodSandboxStatus").network.expect("network").ip;
    let pod = Pod { config, id };
    let id = node.cri.create(&pod.id, &sleeper("main"), &pod.config).await.expect("CreateContainer");
    node.cri.start(&id).await.expect("StartContainer");
    node.cri.shell(&id, "echo written >/in-the-writable-layer").await;
    (pod, id, ip)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "resets the machine: hack/vm-tests --reboot"]
async fn first_boot_ends_without_a_warning() {
    let storage = PathBuf::from(std::env::var("STAVE_E2E_REGISTRY").expect("STAVE_E2E_REGISTRY"));
    let registry = tokio::task::spawn_blocking(move || Registry::start(&storage)).await.unwrap();
    let node = node(&registry.address().to_string()).await;
    node.cri.pull(&busybox()).await.expect("PullImage");
    let mut known = Vec::new();
    for name in ["plain", "web"] {
        let (pod, id, ip) = start(&node, name, 0).await;
        let ended = node.cri.create(&pod.id, &sh("ended", "exit 3"), &pod.config).await.expect("create");
        node.cri.start(&ended).await.expect("StartContainer");
        assert_eq!(node.cri.exited(&ended).await.exit_code, 3);
        let created = node.cri.create(&pod.id, &sh("created", "exit 4"), &pod.config).await.expect("create");
        known.push(json!({
            "pod": pod.id, "name": name, "ip": ip, "running": id, "ended": ended, "created": created,
        }));
    }
    let plugins = node_with_plugins(&registry.address().to_string()).await;
    plugins.cri.pull(&busybox()).await.expect("PullImage");
    let (pod, _, ip) = start(&plugins, "plain", 0).await;
    assert_eq!(leases(), [ip.as_str()]);
    let known = json!({ "boot": boot_id(), "pods": known, "of_plugins": pod.id });
    fs::write(format!("{DISK}/known.json"), known.to_string()).unwrap();
    nix::unistd::sync();
    // What is on its way to the disk when the power goes.
    start(&node, "late", 0).await;
    fs::write("/proc/sysrq-trigger", "b").expect("reset");
    unreachable!("the machine is reset");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the second boot: hack/vm-tests --reboot"]
async fn second_boot_finds_dead_pods_and_runs_new_ones() {
    let text = fs::read_to_string(format!("{DISK}/known.json")).expect("the first boot's notes");
    let known: Value = serde_json::from_str(&text).expect("JSON");
    assert_ne!(known["boot"], boot_id().as_str());
    // No registry: the images are on the disk.
    let node = node("127.0.0.1:1").await;
    let text = |value: &Value| value.as_str().expect("a string").to_owned();
    let leftovers = Leftovers::of(Path::new(DISK), CGROUP, BRIDGE);

    let pods = node.cri.pods(None).await.expect("ListPodSandbox");
    assert!(pods.iter().all(|pod| pod.state() == PodSandboxState::SandboxNotready), "{pods:?}");
    let containers = node.cri.containers(None).await.expect("ListContainers");
    assert!(containers.iter().all(|c| c.state() == ContainerState::ContainerExited), "{containers:?}");
    for old in known["pods"].as_array().expect("pods") {
        assert!(pods.iter().any(|pod| old["pod"] == pod.id.as_str()), "{old} in {pods:?}");
        let running = node.cri.container(&text(&old["running"])).await.expect("ContainerStatus");
        assert_eq!((running.exit_code, running.reason.as_str()), (255, "Unknown"), "{running:?}");
        assert!(running.started_at > 0 && running.finished_at > running.started_at, "{running:?}");
        let ended = node.cri.container(&text(&old["ended"])).await.expect("ContainerStatus");
        assert_eq!((ended.exit_code, ended.reason.as_str()), (3, "Error"), "{ended:?}");
        let created = node.cri.container(&text(&old["created"])).await.expect("ContainerStatus");
        assert_eq!((created.exit_code, created.started_at), (255, 0), "{created:?}");
        let error = node.cri.exec(&text(&old["running"]), &["true"]).await.expect_err("no such process");
        assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error:?}");
    }
    // DEL without a network namespace, before the kubelet says anything.
    let plugins = node_with_plugins("127.0.0.1:1").await;
    let dead = plugins.cri.pods(None).await.expect("ListPodSandbox");
    assert_eq!(dead.into_iter().map(|pod| pod.id).collect::<Vec<_>>(), [text(&known["of_plugins"])]);
    stave_e2e::eventually("no lease of before", async || leases().is_empty().then_some(())).await;
    let (_, _, ip) = start(&plugins, "plain", 1).await;
    assert_eq!(leases(), [ip.as_str()]);
    plugins.cri.remove_all().await.expect("removal of all pods");
    assert_eq!(leases(), [""; 0]);
    for dir in [format!("{CNI_DISK}/root/network/cni"), format!("{CNI_STATE}/netns")] {
        let left: Vec<_> =
            fs::read_dir(&dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }

    // Before the kubelet says anything: addresses and host ports are free again, and no cgroup, mount or process is left.
    let ips: Vec<_> = known["pods"].as_array().unwrap().iter().map(|old| text(&old["ip"])).collect();
    let found = leftovers.find(&ips, Some(node.daemon.0.id()));
    assert!(found.is_empty(), "{found:?}");

    // What the kubelet does: a new sandbox with the next attempt, containers in it, and away with the old ones.
    let (mut started, mut old_ids) = (Vec::new(), Vec::new());
    for old in known["pods"].as_array().unwrap() {
        started.push(start(&node, &text(&old["name"]), 1).await);
        for key in ["pod", "running", "ended", "created"] {
            old_ids.push(text(&old[key]));
        }
    }
    for pod in &pods {
        node.cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
        node.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
        old_ids.push(pod.id.clone());
    }
    let found = leftovers.find(&old_ids, Some(node.daemon.0.id()));
    let named: Vec<_> = found.iter().filter(|line| old_ids.iter().any(|id| line.contains(id))).collect();
    assert!(named.is_empty(), "{named:?}");
    for (pod, id, _) in &started {
        assert_eq!(node.cri.pod(&pod.id).await.expect("status").state(), PodSandboxState::SandboxReady);
        assert_eq!(node.cri.shell(id, "cat /in-the-writable-layer").await, "written\n");
    }
    // The very requests of the first boot, too.
    let (pod, _, _) = start(&node, "late", 0).await;
    node.cri.remove_all().await.expect("removal of all pods");
    let pause = container("none", &image("none"), &[]);
    assert!(node.cri.create(&pod.id, &pause, &pod.config).await.is_err(), "the pod is gone");
    let end = Instant::now() + limit(3);
    loop {
        let found = leftovers.find(std::slice::from_ref(&pod.id), Some(node.daemon.0.id()));
        if found.is_empty() {
            break;
        }
        assert!(Instant::now() < end, "{found:?}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let left: Vec<_> = fs::read_dir(format!("{DISK}/root/containers")).unwrap().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
}
