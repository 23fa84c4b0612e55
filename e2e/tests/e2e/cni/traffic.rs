//! Debian's plugins: whether packets get where they should, and nothing stays.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::process::Command;

use stave_e2e::cri::PortMapping;
use stave_e2e::{Config as _, pod};

use super::*;
use crate::network::packets::{
    SERVER, a_user_namespace_and_a_network, answers, answers_in, free_port, there_and_back, udp_in,
};
use crate::network::refuses_host_ports_of_others;
use crate::sleeper;

fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().expect("ip");
    assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The number that the daemon's names have: its own on the whole machine.
fn number(daemon: &Daemon) -> u32 {
    daemon.bridge().trim_start_matches("stave-e2e").parse().expect("a number")
}

fn ranges(daemon: &Daemon) -> Value {
    json!({
        "type": "host-local",
        "dataDir": daemon.directory().join("leases"),
        "ranges": [[{ "subnet": daemon.subnet() }], [{ "subnet": daemon.subnet6() }]],
        "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
    })
}

fn bridge(daemon: &Daemon) -> Value {
    let mut network = list(
        "1.0.0",
        &[
            json!({
                "type": "bridge", "bridge": daemon.bridge(), "isGateway": true, "ipMasq": true, "hairpinMode": true,
                "capabilities": { "mac": true }, "ipam": ranges(daemon),
            }),
            json!({ "type": "portmap", "capabilities": { "portMappings": true } }),
            json!({ "type": "bandwidth", "capabilities": { "bandwidth": true } }),
            json!({ "type": "tuning", "sysctl": { "net.ipv4.conf.eth0.arp_announce": "2" } }),
            json!({ "type": "loopback" }),
        ],
    );
    // Rules of a test that fails are found by it.
    network["name"] = daemon.bridge().into();
    network
}

fn leases(daemon: &Daemon) -> Vec<String> {
    let mut found = Vec::new();
    for network in fs::read_dir(daemon.directory().join("leases")).into_iter().flatten().flatten() {
        for lease in fs::read_dir(network.path()).into_iter().flatten().flatten() {
            let name = lease.file_name().to_string_lossy().into_owned();
            if name.parse::<IpAddr>().is_ok() {
                found.push(name);
            }
        }
    }
    found
}

/// What the plugins put into the node's own tables, taken away at the end: rules of a network whose test failed, and what
/// the portmap plugin keeps when its last port is gone, if it came with a test.
struct Rules {
    network: String,
    before: bool,
    _alone: tokio::sync::MutexGuard<'static, ()>,
}

/// The portmap plugin makes its chains where it has seen none, and fails when another one was quicker.
static PORTMAP: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

impl Rules {
    async fn of(daemon: &Daemon) -> Self {
        let _alone = PORTMAP.lock().await;
        let before = Self::all("iptables").iter().any(|line| line.contains("CNI-HOSTPORT"));
        Self { network: format!("name: \\\"{}\\\"", daemon.bridge()), before, _alone }
    }

    fn all(program: &str) -> Vec<String> {
        let output = Command::new(format!("{program}-save")).args(["-t", "nat"]).output();
        let text =
            output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// The chains that the network's rules lead to.
    fn chains(&self) -> BTreeSet<String> {
        let rules = ["iptables", "ip6tables"].into_iter().flat_map(Self::all);
        let own = rules.filter(|rule| rule.contains(&self.network));
        own.filter_map(|rule| Some(rule.rsplit_once(" -j CNI-")?.1.split(' ').next()?.to_owned()))
            .map(|name| format!("CNI-{name}"))
            .collect()
    }

    fn delete(program: &str, rules: &[String]) {
        for rule in rules {
            let command = format!("{program} -t nat {}", rule.replacen("-A", "-D", 1));
            let _ = Command::new("sh").arg("-c").arg(command).output();
        }
    }

    fn remove(program: &str, chains: &[String]) {
        for option in ["-F", "-X"] {
            for chain in chains {
                let _ = Command::new(program).args(["-t", "nat", option, chain]).output();
            }
        }
    }
}

impl Drop for Rules {
    fn drop(&mut self) {
        for program in ["iptables", "ip6tables"] {
            let rules = Self::all(program).into_iter().filter(|line| line.contains(&self.network));
            let entries: Vec<_> = rules.filter(|line| line.contains(" -j CNI-")).collect();
            Self::delete(program, &entries);
            let chains: Vec<_> =
                entries.iter().filter_map(|rule| rule.rsplit(' ').next()).map(str::to_owned).collect();
            Self::remove(program, &chains);
            let lines = Self::all(program);
            if self.before || lines.iter().any(|line| line.starts_with(":CNI-DN-")) {
                continue;
            }
            let entries =
                lines.iter().filter(|line| line.starts_with("-A") && line.contains(" -j CNI-HOSTPORT"));
            Self::delete(program, &entries.cloned().collect::<Vec<_>>());
            let chains = lines.iter().filter_map(|line| line.strip_prefix(':')?.split(' ').next());
            let chains = chains.filter(|chain| chain.starts_with("CNI-HOSTPORT")).map(str::to_owned);
            Self::remove(program, &chains.collect::<Vec<_>>());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bridge_with_both_families_host_ports_and_limits() {
    let daemon = start().await;
    let _rules = Rules::of(&daemon).await;
    configure(&daemon, "10-bridge.conflist", &bridge(&daemon).to_string());
    ready(&daemon).await;
    let port = free_port();
    let config = pod("web").with(|config| {
        config.port_mappings =
            vec![PortMapping { container_port: 8080, host_port: i32::from(port), ..Default::default() }];
        config.annotations = [
            ("kubernetes.io/ingress-bandwidth", "100M"),
            ("kubernetes.io/egress-bandwidth", "50M"),
            ("cni.stave/mac", "0a:58:00:00:00:07"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
    });
    let web = daemon.run_pod(config).await.expect("RunPodSandbox");
    let other = daemon.run_pod(pod("other")).await.expect("RunPodSandbox");
    let ips = addresses(&daemon, &web).await;
    let [four, six] = [&ips[0], &ips[1]].map(|ip| ip.parse::<IpAddr>().expect("an address"));
    assert!(four.is_ipv4() && six.is_ipv6() && ips.len() == 2, "{ips:?}");
    daemon.remember([ips[1].clone()]);
    let server = daemon.run(&web, &crate::sh("server", SERVER)).await.expect("start");
    let client = daemon.run(&other, &sleeper("client")).await.expect("start");
    let cri = &daemon.cri;

    // From the host, in both families, and from another pod.
    for ip in [four, six] {
        answers((ip, 8080)).await;
        answers_in(&daemon, &client, ip, 8080).await;
    }
    // UDP, there and back.
    let gateway = daemon.subnet().replace(".0/24", ".1");
    let socket = tokio::net::UdpSocket::bind((gateway.as_str(), 0)).await.expect("a UDP port at the gateway");
    let to = socket.local_addr().expect("address");
    let inside = udp_in(daemon.directory().join(format!("netns/stave-{}", other.id)), "0.0.0.0:0");
    let from = there_and_back(&inside, to, &socket).await;
    assert_eq!(from.to_string(), addresses(&daemon, &other).await[0]);

    // The host port: from loopback, and from the node's own address.
    for host in ["127.0.0.1", &gateway] {
        answers((host.parse::<IpAddr>().expect("an address"), port)).await;
    }
    // What the other plugins were asked for.
    assert_eq!(cri.shell(&server, "cat /sys/class/net/eth0/address").await, "0a:58:00:00:00:07\n");
    assert_eq!(cri.shell(&server, "cat /proc/sys/net/ipv4/conf/eth0/arp_announce").await, "2\n");
    assert!(cri.shell(&server, "ip addr show lo").await.contains("127.0.0.1/8"), "lo is up");
    let result = cri.pod_sandbox_status(stave_e2e::cri::PodSandboxStatusRequest {
        pod_sandbox_id: web.id.clone(),
        verbose: true,
    });
    let info: Value =
        serde_json::from_str(&result.await.expect("PodSandboxStatus").info["info"]).expect("JSON");
    let interfaces = info["cniResult"]["interfaces"].as_array().expect("interfaces");
    let host_end =
        interfaces.iter().map(|i| i["name"].as_str().unwrap_or_default()).find(|n| n.starts_with("veth"));
    let limits =
        Command::new("tc").args(["qdisc", "show", "dev", host_end.expect("a veth")]).output().expect("tc");
    let limits = String::from_utf8_lossy(&limits.stdout).into_owned();
    assert!(limits.contains("tbf") && limits.contains("rate 100Mbit"), "{limits}");
    // `ip netns` and others find the namespace.
    let netns = daemon.directory().join("netns").join(format!("stave-{}", web.id));
    assert!(netns.exists());

    cri.stop_pod(&web.id).await.expect("StopPodSandbox");
    assert!(tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err(), "the port goes with the pod");
    assert!(!netns.exists() && leases(&daemon).len() == 2, "{:?}", leases(&daemon));
    cri.remove_all().await.expect("removal of all pods");
    assert_eq!(leases(&daemon), [""; 0]);
    assert_nothing_kept(&daemon);
    let rules = Command::new("iptables-save").output().expect("iptables-save");
    let rules = String::from_utf8_lossy(&rules.stdout).into_owned();
    for word in [&web.id, &other.id, &ips[0]] {
        assert!(!rules.contains(word.as_str()), "{word} in:\n{rules}");
    }
    daemon.finish().await;
}

/// The interfaces that plugins made on the node for a pod, by their result: veth, and ifb where it is limited.
async fn host_ends(daemon: &Daemon, pod: &Pod) -> Vec<String> {
    let request = stave_e2e::cri::PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
    let status = daemon.cri.pod_sandbox_status(request).await.expect("PodSandboxStatus");
    let info: Value = serde_json::from_str(&status.info["info"]).expect("JSON");
    let interfaces = info["cniResult"]["interfaces"].as_array().expect("interfaces").iter();
    let on_the_node = interfaces.filter(|one| one["sandbox"].as_str().unwrap_or_default().is_empty());
    let names = on_the_node.filter_map(|one| one["name"].as_str().map(str::to_owned));
    names.filter(|name| *name != daemon.bridge()).collect()
}

/// `STAVE_E2E_SANDBOXES` says how many.
#[tokio::test(flavor = "multi_thread")]
async fn many_sandboxes_in_a_row_leave_nothing() {
    let count = std::env::var("STAVE_E2E_SANDBOXES").ok().and_then(|text| text.parse().ok()).unwrap_or(15u32);
    let daemon = start().await;
    let rules = Rules::of(&daemon).await;
    configure(&daemon, "10-bridge.conflist", &bridge(&daemon).to_string());
    ready(&daemon).await;
    let port = i32::from(free_port());
    let (mut links, mut chains, mut namespaces) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
    for number in 0..count {
        let config = pod(&format!("one-{number}")).with(|config| {
            if number % 2 == 0 {
                config.port_mappings =
                    vec![PortMapping { container_port: 8080, host_port: port, ..Default::default() }];
            }
            if number % 3 == 0 {
                config.annotations.insert("kubernetes.io/egress-bandwidth".into(), "10M".into());
            }
        });
        let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
        daemon.remember(addresses(&daemon, &pod).await);
        let ends = host_ends(&daemon, &pod).await;
        let own = rules.chains();
        if number == 0 {
            // Else nothing would be seen to go.
            assert!(
                ends.len() == 2 && own.iter().any(|chain| chain.starts_with("CNI-DN-")),
                "{ends:?} {own:?}"
            );
        }
        links.extend(ends);
        chains.extend(own);
        namespaces.extend(stave_e2e::namespaces_behind(&daemon.bridge()));
        daemon.cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
        assert_eq!(leases(&daemon), [""; 0], "a stopped pod has no lease");
        daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
        assert_nothing_kept(&daemon);
        assert_eq!(rules.chains(), BTreeSet::new(), "rules that lead to a removed pod");
    }
    assert!(!namespaces.is_empty());
    for program in ["iptables", "ip6tables"] {
        let lines = Rules::all(program);
        let left: Vec<_> =
            lines.iter().filter(|line| chains.iter().any(|chain| line.contains(chain.as_str()))).collect();
        assert!(left.is_empty(), "{program}: {left:?}");
    }
    links.retain(|link| Path::new("/sys/class/net").join(link).exists());
    assert_eq!(links, [""; 0]);
    stave_e2e::eventually("the end of all network namespaces of pods", async || {
        namespaces.is_disjoint(&stave_e2e::namespaces_without_link()).then_some(())
    })
    .await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_when_the_daemon_is_killed_with_plugins_at_work() {
    let daemon = start().await;
    let rules = Rules::of(&daemon).await;
    configure(&daemon, "10-bridge.conflist", &bridge(&daemon).to_string());
    ready(&daemon).await;
    let check = |daemon: &Daemon| {
        assert_eq!(leases(daemon), [""; 0]);
        assert_nothing_kept(daemon);
        for program in ["iptables", "ip6tables"] {
            let left: Vec<_> =
                Rules::all(program).into_iter().filter(|line| line.contains(&rules.network)).collect();
            assert!(left.is_empty(), "{program}: {left:?}");
        }
        assert_eq!(on_the_bridge(daemon), "", "interfaces on the bridge");
    };
    let drill = crate::crash::kill_daemons(daemon, crate::crash::seconds() / 4, check);
    tokio::task::LocalSet::new().run_until(drill).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_port_of_another_pod_is_refused_with_its_name() {
    let daemon = start().await;
    let _rules = Rules::of(&daemon).await;
    configure(&daemon, "10-bridge.conflist", &bridge(&daemon).to_string());
    ready(&daemon).await;
    refuses_host_ports_of_others(daemon).await;
}

/// Pods on sub-interfaces of a network card of the node.
async fn on_an_interface_of_the_node(plugin: &str, mode: &str) {
    let daemon = start().await;
    let number = number(&daemon);
    // The node's end and its peer take the place of a network card and the net beyond it.
    let (card, beyond) = (format!("stmv{number}a"), format!("stmv{number}b"));
    let gateway = daemon.subnet().replace(".0/24", ".1");
    struct Link(String);
    impl Drop for Link {
        fn drop(&mut self) {
            let _ = Command::new("ip").args(["link", "delete", &self.0]).output();
        }
    }
    let _ = Command::new("ip").args(["link", "delete", &card]).output();
    ip(&["link", "add", &card, "type", "veth", "peer", "name", &beyond]);
    let _link = Link(card.clone());
    ip(&["addr", "add", &format!("{gateway}/24"), "dev", &beyond]);
    ip(&["addr", "add", &daemon.subnet6().replace("::/64", "::1/64"), "dev", &beyond, "nodad"]);
    ip(&["link", "set", &card, "up"]);
    ip(&["link", "set", &beyond, "up"]);
    let network = json!({
        "cniVersion": "0.4.0", "name": format!("{plugin}-net"), "type": plugin, "master": card, "mode": mode, "ipam": ranges(&daemon),
    });
    configure(&daemon, "10-net.conf", &network.to_string());
    ready(&daemon).await;
    let one = daemon.run_pod(pod("one")).await.expect("RunPodSandbox");
    let two = daemon.run_pod(pod("two")).await.expect("RunPodSandbox");
    let ips = addresses(&daemon, &one).await;
    assert_eq!(ips.len(), 2, "{ips:?}");
    daemon.run(&one, &crate::sh("server", SERVER)).await.expect("start");
    let client = daemon.run(&two, &sleeper("client")).await.expect("start");
    for ip in &ips {
        let ip: IpAddr = ip.parse().expect("an address");
        answers((ip, 8080)).await;
        answers_in(&daemon, &client, ip, 8080).await;
    }
    // UDP, from the pod to what is beyond the card.
    let socket = tokio::net::UdpSocket::bind((gateway.as_str(), 0)).await.expect("a UDP port beyond");
    let inside = udp_in(daemon.directory().join(format!("netns/stave-{}", one.id)), "0.0.0.0:0");
    let from = there_and_back(&inside, socket.local_addr().expect("address"), &socket).await;
    assert_eq!(from.to_string(), ips[0]);
    let kind = Command::new("ip").args(["-d", "link", "show", "type", plugin]).output().expect("ip");
    assert!(!String::from_utf8_lossy(&kind.stdout).contains(&card), "they are in the pods");
    daemon.cri.remove_all().await.expect("removal of all pods");
    assert_eq!(leases(&daemon), [""; 0]);
    assert_nothing_kept(&daemon);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn macvlan_on_an_interface_of_the_node() {
    on_an_interface_of_the_node("macvlan", "bridge").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ipvlan_on_an_interface_of_the_node() {
    let probe = format!("stiv{}", std::process::id());
    let made = Command::new("ip").args(["link", "add", &probe, "link", "lo", "type", "ipvlan"]).output();
    let _ = Command::new("ip").args(["link", "delete", &probe]).output();
    let said = String::from_utf8_lossy(&made.expect("ip").stderr).into_owned();
    if said.contains("Unknown device type") || said.contains("not supported") {
        eprintln!(
            "SKIPPED: ipvlan: this kernel has none; `hack/vm-tests cni::traffic` runs this in a VM that has"
        );
        return;
    }
    on_an_interface_of_the_node("ipvlan", "l2").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_with_a_user_namespace() {
    let daemon = start().await;
    let _rules = Rules::of(&daemon).await;
    configure(&daemon, "10-bridge.conflist", &bridge(&daemon).to_string());
    ready(&daemon).await;
    let gateways = [daemon.subnet().replace(".0/24", ".1"), daemon.subnet6().replace("::/64", "::1")];
    a_user_namespace_and_a_network(&daemon, gateways.map(|ip| ip.parse().expect("an address"))).await;
    assert_eq!(leases(&daemon), [""; 0]);
    assert_nothing_kept(&daemon);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exhausted_ranges_are_told_and_leave_nothing() {
    let daemon = start().await;
    let subnet = daemon.subnet().replace("/24", "/30");
    let network = list(
        "0.3.1",
        &[json!({ "type": "bridge", "bridge": daemon.bridge(), "isGateway": true,
            "ipam": { "type": "host-local", "dataDir": daemon.directory().join("leases"), "subnet": subnet } })],
    );
    configure(&daemon, "10-small.conflist", &network.to_string());
    ready(&daemon).await;
    let first = daemon.run_pod(pod("first")).await.expect("RunPodSandbox");
    let error = daemon.run_pod(pod("second")).await.expect_err("no address is left");
    assert!(error.message().contains("no IP addresses available"), "{error:?}");
    assert_eq!(daemon.cri.pods(None).await.expect("ListPodSandbox").len(), 1);
    assert_eq!(leases(&daemon).len(), 1);
    daemon.cri.remove_pod(&first.id).await.expect("RemovePodSandbox");
    let second = daemon.run_pod(pod("second")).await.expect("the address is free again");
    daemon.cri.remove_pod(&second.id).await.expect("RemovePodSandbox");
    assert_nothing_kept(&daemon);
    daemon.finish().await;
}

/// A pod's chains in the node's tables: they have a hash for a name.
fn chains() -> Vec<String> {
    let lines = ["iptables", "ip6tables"].map(Rules::all).concat();
    let mut chains: Vec<_> = lines
        .iter()
        .filter_map(|line| line.strip_prefix(':')?.split(' ').next())
        .filter(|chain| chain.starts_with("CNI-") && !chain.starts_with("CNI-HOSTPORT"))
        .map(str::to_owned)
        .collect();
    chains.sort();
    chains
}

fn on_the_bridge(daemon: &Daemon) -> String {
    let links = Command::new("ip").args(["-br", "link", "show", "master", &daemon.bridge()]).output();
    String::from_utf8_lossy(&links.expect("ip").stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_plugins_have_made_goes_when_the_last_one_fails() {
    let daemon = start().await;
    let rules = Rules::of(&daemon).await;
    let before = chains();
    let seen = daemon.directory().join("seen");
    // What is there when its turn comes.
    let look = format!(
        "case $CNI_COMMAND in\n\
         VERSION) echo '{{\"supportedVersions\": [\"1.0.0\"]}}'; exit ;;\n\
         ADD) {{ iptables-save -t nat | grep -o '^:CNI-DN-'; ip -br link show master {}; ls {}/*; }} >{} ;;\n\
         esac\n",
        daemon.bridge(),
        daemon.directory().join("leases").display(),
        seen.display()
    );
    for (name, script, words) in [
        ("fails", "[ $CNI_COMMAND = DEL ] || { echo no luck >&2; exit 1; }", "no luck"),
        ("rubbish", "echo Segmentation fault; echo because >&2", "standard error: because"),
        ("empty", "[ $CNI_COMMAND = DEL ] || echo '{}'", "no address"),
        ("never", "echo no; exit 1", "failed (ADD)"),
        ("killed", "kill -9 $$", "signal: 9"),
    ] {
        plugin(&daemon, name, &format!("{look}{script}"));
        let mut network = bridge(&daemon);
        let plugins = network["plugins"].as_array_mut().expect("plugins");
        plugins.truncate(2);
        plugins.push(json!({ "type": name }));
        configure(&daemon, "10-bridge.conflist", &network.to_string());
        stave_e2e::eventually("the configuration", async || {
            let request = stave_e2e::cri::StatusRequest { verbose: true };
            let info = daemon.cri.status(request).await.expect("Status").info;
            info["cniconfig"].contains(&format!("\"{name}\"")).then_some(())
        })
        .await;
        let config = pod(name).with(|config| {
            let host_port = i32::from(free_port());
            config.port_mappings =
                vec![PortMapping { container_port: 8080, host_port, ..Default::default() }];
        });
        let error = daemon.run_pod(config).await.expect_err("the last plugin fails");
        assert!(error.message().contains(words), "{name}: {error:?}");
        let saw = fs::read_to_string(&seen).expect("what the last one saw");
        let prefix = daemon.subnet().replace("0/24", "");
        for made in [":CNI-DN-", "veth", &prefix] {
            assert!(saw.contains(made), "{name}: no {made} in {saw}");
        }
        fs::remove_file(&seen).expect("removal");
        assert_eq!((leases(&daemon), on_the_bridge(&daemon)), (vec![], String::new()), "{name}");
        assert_eq!(chains(), before, "{name}");
        for program in ["iptables", "ip6tables"] {
            let left = Rules::all(program).into_iter().filter(|line| line.contains(&rules.network));
            assert_eq!(left.collect::<Vec<_>>(), [""; 0], "{name}: {program}");
        }
        assert_nothing_kept(&daemon);
        assert!(daemon.cri.pods(None).await.expect("ListPodSandbox").is_empty(), "{name}: a pod is left");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_gets_the_addresses_that_it_asks_for() {
    let daemon = start().await;
    let mut network = bridge(&daemon);
    let plugins = network["plugins"].as_array_mut().expect("plugins");
    plugins.truncate(1);
    plugins[0]["capabilities"] = json!({ "ips": true });
    plugins[0]["ipMasq"] = false.into();
    configure(&daemon, "10-bridge.conflist", &network.to_string());
    ready(&daemon).await;
    let wanted = [daemon.subnet().replace(".0/24", ".77"), daemon.subnet6().replace("::/64", "::4d")];
    let asking = |name: &str| {
        pod(name).with(|config| {
            let ips = format!("{}/24, {}/64", wanted[0], wanted[1]);
            config.annotations.insert("cni.stave/ips".into(), ips);
        })
    };
    let one = daemon.run_pod(asking("one")).await.expect("RunPodSandbox");
    assert_eq!(addresses(&daemon, &one).await, wanted);
    let error = daemon.run_pod(asking("two")).await.expect_err("they are taken");
    assert!(error.message().contains(&wanted[0]), "{error:?}");
    let mut kept = leases(&daemon);
    kept.sort();
    assert_eq!(kept, wanted);
    daemon.cri.remove_pod(&one.id).await.expect("RemovePodSandbox");
    let two = daemon.run_pod(asking("two")).await.expect("they are free again");
    assert_eq!(addresses(&daemon, &two).await, wanted);
    daemon.cri.remove_pod(&two.id).await.expect("RemovePodSandbox");
    assert_eq!(leases(&daemon), [""; 0]);
    assert_nothing_kept(&daemon);
    daemon.finish().await;
}
