mod families;
mod names;
pub(crate) mod packets;
mod ranges;

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use stave_e2e::cri::{NamespaceMode, PortMapping, Protocol};
use stave_e2e::{Config, Daemon, Options, Pod, image, pod};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{daemon, daemon_with_pod, sleeper};

async fn address(daemon: &Daemon, pod: &Pod) -> Ipv4Addr {
    let status = daemon.cri.pod(&pod.id).await.expect("PodSandboxStatus");
    status.network.expect("network").ip.parse().expect("an IPv4 address")
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_reach_each_other_and_the_host() {
    let daemon = daemon().await;
    let one = daemon.run_pod(pod("one")).await.expect("RunPodSandbox");
    let two = daemon.run_pod(pod("two")).await.expect("RunPodSandbox");
    let (first, second) = (address(&daemon, &one).await, address(&daemon, &two).await);
    assert_ne!(first, second);
    let prefix = daemon.subnet().split_once(".0/").map(|(prefix, _)| format!("{prefix}.")).expect("a /24");
    assert!(first.to_string().starts_with(&prefix), "{first} in {}", daemon.subnet());

    let server = crate::sh("server", "while :; do echo from the pod | nc -l -p 8080; done");
    daemon.run(&one, &server).await.expect("start");
    let client = daemon.run(&two, &sleeper("client")).await.expect("start");
    let cri = &daemon.cri;
    // The server needs a moment to listen.
    let script = format!(
        "for i in 1 2 3 4 5 6 7 8 9; do nc -w 2 {first} 8080 </dev/null 2>/dev/null && exit; sleep 0.2; done; exit 1"
    );
    assert_eq!(cri.shell(&client, &script).await, "from the pod\n");

    // From the host to the pod.
    let answer = stave_e2e::eventually("an answer of the pod", async || {
        let mut stream = tokio::net::TcpStream::connect((first, 8080)).await.ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.ok()?;
        Some(text)
    })
    .await;
    assert_eq!(answer, "from the pod\n");

    // From the pod to the host: the bridge's own address is the pod's gateway.
    let gateway = cri.shell(&client, "ip route | sed -n 's/^default via \\([0-9.]*\\).*/\\1/p'").await;
    let gateway: Ipv4Addr = gateway.trim().parse().expect("a default route");
    let listener = tokio::net::TcpListener::bind((gateway, 0)).await.expect("a port at the bridge's address");
    let port = listener.local_addr().expect("address").port();
    let serve = tokio::spawn(async move {
        let (mut stream, peer) = listener.accept().await.expect("a connection");
        stream.write_all(b"from the host\n").await.expect("write");
        peer.ip()
    });
    assert_eq!(cri.shell(&client, &format!("nc -w 2 {gateway} {port} </dev/null")).await, "from the host\n");
    assert_eq!(
        serve.await.expect("server"),
        std::net::IpAddr::V4(second),
        "no translation on the way to the host"
    );

    let devices = cri.shell(&client, "ls /sys/class/net").await;
    assert_eq!(devices.split_whitespace().collect::<Vec<_>>(), ["eth0", "lo"]);
    assert!(cri.shell(&client, "ip addr show lo").await.contains("127.0.0.1/8"), "lo is up");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_of_a_pod_share_its_network() {
    let (daemon, pod) = daemon_with_pod().await;
    daemon
        .run(&pod, &crate::sh("server", "while :; do echo shared | nc -l -p 99; done"))
        .await
        .expect("start");
    let client = daemon.run(&pod, &sleeper("client")).await.expect("start");
    let script = "for i in 1 2 3 4 5 6 7 8 9; do nc -w 2 127.0.0.1 99 </dev/null 2>/dev/null && exit; sleep 0.2; done; exit 1";
    assert_eq!(daemon.cri.shell(&client, script).await, "shared\n");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn host_network_is_the_nodes() {
    let daemon = daemon().await;
    let host = |config: &mut stave_e2e::cri::PodSandboxConfig| {
        config.namespaces().network = NamespaceMode::Node as i32;
        config.hostname.clear();
    };
    let pod = daemon.run_pod(pod("host").with(host)).await.expect("RunPodSandbox");
    let status = daemon.cri.pod(&pod.id).await.expect("PodSandboxStatus");
    assert_eq!(
        status.network.map(|network| network.ip).unwrap_or_default(),
        "",
        "the kubelet fills in the node's"
    );
    let config = sleeper("main").with(|config| config.namespaces().network = NamespaceMode::Node as i32);
    let id = daemon.run(&pod, &config).await.expect("start");
    let devices = daemon.cri.shell(&id, "ls /sys/class/net").await;
    assert!(
        devices.contains(&daemon.bridge()) || !devices.contains("eth0\nlo\n"),
        "the node's devices: {devices}"
    );
    let namespace = daemon.cri.output(&id, &["readlink", "/proc/self/ns/net"]).await;
    assert_eq!(namespace.trim(), std::fs::read_link("/proc/self/ns/net").expect("ns").to_string_lossy());
    let node = nix::unistd::gethostname().expect("hostname").into_string().expect("UTF-8");
    assert_eq!(daemon.cri.output(&id, &["hostname"]).await.trim(), node);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_port_leads_to_the_pod() {
    let daemon = daemon().await;
    daemon.cri.pull(&image("e2e-test-images/httpd:2.4.39-4")).await.expect("PullImage");
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.local_addr().expect("address").port()
    };
    let config = pod("web").with(|config| {
        config.port_mappings =
            vec![PortMapping { container_port: 80, host_port: i32::from(port), ..Default::default() }];
    });
    let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
    let server = stave_e2e::container("web", &image("e2e-test-images/httpd:2.4.39-4"), &[]);
    daemon.run(&pod, &server).await.expect("start");
    let get = async || {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.ok()?;
        text.contains("It works!").then_some(())
    };
    stave_e2e::eventually("an answer at the host port", get).await;
    daemon.cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
    assert!(tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err(), "the port goes with the pod");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_port_of_another_pod_is_refused_with_its_name() {
    refuses_host_ports_of_others(daemon().await).await;
}

pub(crate) async fn refuses_host_ports_of_others(daemon: Daemon) {
    let port = packets::free_port();
    let config = |name: &str, protocol: Protocol, count: usize| {
        pod(name).with(|config| {
            let mapping = PortMapping {
                protocol: protocol.into(),
                container_port: 80,
                host_port: i32::from(port),
                ..Default::default()
            };
            config.port_mappings = vec![mapping; count];
        })
    };
    let first = daemon.run_pod(config("first", Protocol::Tcp, 1)).await.expect("RunPodSandbox");
    let error = daemon.run_pod(config("second", Protocol::Tcp, 1)).await.expect_err("it is taken");
    assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error:?}");
    for word in [first.id.as_str(), "/first (", &format!("{port}/tcp"), "config.port_mappings"] {
        assert!(error.message().contains(word), "{word}: {error:?}");
    }
    // One address of all that the first has.
    let mut one = config("third", Protocol::Tcp, 1);
    one.port_mappings[0].host_ip = "127.0.0.1".into();
    let error = daemon.run_pod(one).await.expect_err("it is taken");
    assert!(error.message().contains("/first ("), "{error:?}");
    // Twice in one pod.
    let error = daemon.run_pod(config("twice", Protocol::Udp, 2)).await.expect_err("two of one");
    assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error:?}");
    assert_eq!(daemon.cri.pods(None).await.expect("ListPodSandbox").len(), 1, "nothing half-made is left");
    let other = daemon.run_pod(config("other", Protocol::Udp, 1)).await.expect("another protocol's");
    // It is free as soon as its pod is stopped.
    daemon.cri.stop_pod(&first.id).await.expect("StopPodSandbox");
    let second = daemon.run_pod(config("second", Protocol::Tcp, 1)).await.expect("RunPodSandbox");
    for id in [first.id, other.id, second.id] {
        daemon.cri.remove_pod(&id).await.expect("RemovePodSandbox");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_are_given_back() {
    // A /29 has five addresses for pods: more pods than that, one after the other, need them again.
    let daemon = Daemon::with(Options { prefix: Some(29), ..Default::default() }).await;
    for round in 0..12 {
        let pod = daemon.run_pod(pod("again")).await.unwrap_or_else(|e| panic!("round {round}: {e:?}"));
        daemon.cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
        let status = daemon.cri.pod(&pod.id).await.expect("PodSandboxStatus");
        assert_eq!(
            status.network.map(|network| network.ip).unwrap_or_default(),
            "",
            "a stopped pod has no address"
        );
        daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exhausted_subnet_is_told_and_leaves_nothing() {
    // A /30 has one address for a pod.
    let daemon = Daemon::with(Options { prefix: Some(30), ..Default::default() }).await;
    let first = daemon.run_pod(pod("first")).await.expect("RunPodSandbox");
    let error = daemon.run_pod(pod("second")).await.expect_err("no address is left");
    assert_eq!(error.code(), tonic::Code::ResourceExhausted, "{error:?}");
    assert!(error.message().contains(".0/30"), "{error:?}");
    assert_eq!(daemon.cri.pods(None).await.expect("ListPodSandbox").len(), 1);
    assert_eq!(std::fs::read_dir(daemon.directory().join("root/network")).expect("leases").count(), 1);
    daemon.cri.remove_pod(&first.id).await.expect("RemovePodSandbox");
    daemon.run_pod(pod("second")).await.expect("the address is free again");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bandwidth_annotations_limit_a_pod() {
    let daemon = daemon().await;
    let with = |name: &str, ingress: &str, egress: &str| {
        pod(name).with(|config| {
            config.annotations.insert("kubernetes.io/ingress-bandwidth".into(), ingress.into());
            config.annotations.insert("kubernetes.io/egress-bandwidth".into(), egress.into());
        })
    };
    for (ingress, egress, field) in
        [("fast", "1M", "ingress"), ("999", "1M", "ingress"), ("1M", "2P", "egress"), ("1M", "-1", "egress")]
    {
        let error = daemon.run_pod(with("bad", ingress, egress)).await.expect_err("no quantity");
        assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error:?}");
        assert!(error.message().contains(&format!("kubernetes.io/{field}-bandwidth")), "{error:?}");
    }
    assert!(daemon.cri.pods(None).await.expect("ListPodSandbox").is_empty());
    // What the limits do, the tests of the bridge measure.
    let pod = daemon.run_pod(with("limited", "8M", "16Mi")).await.expect("RunPodSandbox");
    let link = format!("stv{}", &pod.id[..11]);
    let output = std::process::Command::new("tc").args(["qdisc", "show", "dev", &link]).output().expect("tc");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("tbf") && text.contains("rate 8Mbit"), "{text}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_program_is_executed() {
    // Where nothing can be found, nothing is run: no ip, nft, iptables, tc, sysctl or conntrack.
    let environment = vec![("PATH".to_owned(), "/nowhere".to_owned())];
    let daemon = Daemon::with(Options { dual_stack: true, environment, ..Default::default() }).await;
    let config = pod("all").with(|config| {
        config.port_mappings =
            vec![PortMapping { container_port: 80, host_port: 39_001, ..Default::default() }];
        for way in ["ingress", "egress"] {
            config.annotations.insert(format!("kubernetes.io/{way}-bandwidth"), "10M".into());
        }
    });
    let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
    daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
    daemon.finish().await;
}

/// `STAVE_E2E_SANDBOXES` says how many.
#[tokio::test(flavor = "multi_thread")]
async fn many_sandboxes_in_a_row_leave_nothing() {
    let count = std::env::var("STAVE_E2E_SANDBOXES").ok().and_then(|text| text.parse().ok()).unwrap_or(40u32);
    let daemon = daemon().await;
    // All of them, and those that are network namespaces.
    let descriptors = || {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("fd");
        let targets: Vec<_> = entries.flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok()).collect();
        let namespaces = targets.iter().filter(|target| target.to_string_lossy().starts_with("net:["));
        (targets.len(), namespaces.count())
    };
    let table = |family: &str| {
        let name = format!("stave-{}", daemon.bridge());
        let output = std::process::Command::new("nft").args(["list", "table", family, &name]).output();
        String::from_utf8(output.expect("nft").stdout).expect("UTF-8")
    };
    let leases = daemon.directory().join("root/network");
    let mut namespaces = BTreeSet::new();
    let mut before = None;
    for number in 0..count {
        let config = pod(&format!("one-{number}")).with(|config| {
            if number % 4 == 0 {
                config.port_mappings =
                    vec![PortMapping { container_port: 80, host_port: 39_000, ..Default::default() }];
            }
            if number % 3 == 0 {
                config.annotations.insert("kubernetes.io/egress-bandwidth".into(), "10M".into());
            }
        });
        let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
        if number == 0 {
            // Else nothing would be seen to go.
            let link = format!("stv{}", &pod.id[..11]);
            assert!(
                table("inet").contains("39000") && table("bridge").contains(&link),
                "{}",
                table("bridge")
            );
        }
        namespaces.extend(stave_e2e::namespaces_behind(&daemon.bridge()));
        daemon.cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
        daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
        assert_eq!(std::fs::read_dir(&leases).expect("leases").count(), 0, "a removed pod has no lease");
        // After some, the daemon has all the threads and connections that it will have.
        if number == 10 {
            // A ready supervisor has descriptors here, and is made when nothing starts.
            crate::ready::full(&daemon, 2).await;
            before = Some((descriptors(), ["inet", "bridge"].map(table)));
        }
    }
    let ((all, held), tables) = before.expect("more than ten");
    assert_eq!(["inet", "bridge"].map(table), tables);
    crate::ready::full(&daemon, 2).await;
    let now = descriptors();
    assert!(now.0 <= all + 8, "{all} descriptors after 10 sandboxes, {} after {count}", now.0);
    assert_eq!(now.1, held, "descriptors of network namespaces");
    // Whoever holds them.
    assert!(!namespaces.is_empty());
    stave_e2e::eventually("the end of all network namespaces of pods", async || {
        namespaces.is_disjoint(&stave_e2e::namespaces_without_link()).then_some(())
    })
    .await;
    daemon.finish().await;
}

/// The kernel runs modprobe(8) for the name of an interface that it does not find, by some ways of asking.
#[tokio::test(flavor = "multi_thread")]
async fn no_module_is_asked_for_when_a_pod_ends() {
    let daemon = daemon().await;
    let tracing = daemon.directory().join("tracing");
    std::fs::create_dir(&tracing).expect("mount point");
    let (none, no_data) = (nix::mount::MsFlags::empty(), None::<&str>);
    let mounted = nix::mount::mount(Some("tracefs"), &tracing, Some("tracefs"), none, no_data).is_ok();
    if mounted && tracing.join("events/module/module_request").exists() {
        let instance = tracing.join("instances").join(daemon.bridge());
        std::fs::create_dir(&instance).expect("an instance of tracefs");
        let enable = instance.join("events/module/module_request/enable");
        std::fs::write(&enable, "1").expect("module_request");
        let pod = daemon.run_pod(pod("pod")).await.expect("RunPodSandbox");
        daemon.cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
        daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
        let trace = std::fs::read_to_string(instance.join("trace"));
        std::fs::write(&enable, "0").expect("module_request");
        std::fs::remove_dir(&instance).expect("the instance");
        let link = format!("stv{}", &pod.id[..11]);
        let asked: Vec<_> =
            trace.iter().flat_map(|trace| trace.lines()).filter(|line| line.contains(&link)).collect();
        assert!(trace.is_ok() && asked.is_empty(), "{trace:?}");
    } else {
        eprintln!("SKIPPED: requests for modules: needs a kernel with modules, which `hack/vm-tests` has");
    }
    if mounted {
        nix::mount::umount(&tracing).expect("umount");
    }
    daemon.finish().await;
}
