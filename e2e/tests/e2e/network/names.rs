//! What a pod's containers find of names: hostname, /etc/hostname, /etc/hosts, /etc/resolv.conf.

use stave_e2e::cri::{DnsConfig, Mount, NamespaceMode};
use stave_e2e::{Config as _, Daemon, Pod, pod};

use crate::{daemon, daemon_with_pod, sleeper};

/// `hostname`, /etc/hostname and $HOSTNAME of a container of the pod.
async fn names(daemon: &Daemon, pod: &Pod, network: NamespaceMode) -> [String; 3] {
    let config = sleeper("main").with(|config| config.namespaces().network = network as i32);
    let id = daemon.run(pod, &config).await.expect("start");
    let said = daemon.cri.shell(&id, "hostname; cat /etc/hostname; echo $HOSTNAME").await;
    let lines: Vec<_> = said.lines().map(str::to_owned).collect();
    lines.try_into().unwrap_or_else(|lines| panic!("{lines:?}"))
}

fn node() -> String {
    nix::unistd::gethostname().expect("hostname").into_string().expect("UTF-8")
}

async fn resolv_conf(daemon: &Daemon, dns: DnsConfig) -> String {
    let config = pod("dns").with(|config| config.dns_config = Some(dns));
    let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    daemon.cri.output(&id, &["cat", "/etc/resolv.conf"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn hostname_and_dns_are_the_pods() {
    let daemon = daemon().await;
    let config = pod("named").with(|config| {
        config.hostname = "a-name".into();
        config.dns_config = Some(DnsConfig {
            servers: vec!["10.9.8.7".into(), "fd00::1".into()],
            searches: vec!["one.example".into(), "two.example".into()],
            options: vec!["ndots:5".into()],
        });
    });
    let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let cri = &daemon.cri;
    assert_eq!(cri.output(&id, &["hostname"]).await, "a-name\n");
    assert_eq!(cri.output(&id, &["cat", "/etc/hostname"]).await, "a-name\n");
    assert_eq!(cri.shell(&id, "echo $HOSTNAME").await, "a-name\n");
    let resolv = cri.output(&id, &["cat", "/etc/resolv.conf"]).await;
    let lines: Vec<_> = resolv.lines().collect();
    assert_eq!(
        lines,
        ["search one.example two.example", "nameserver 10.9.8.7", "nameserver fd00::1", "options ndots:5"]
    );
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_dns_config_the_hosts_is_copied() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let host = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    assert_eq!(daemon.cri.output(&id, &["cat", "/etc/resolv.conf"]).await, host);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_dns_config_is_none_and_a_part_of_one_is_all() {
    let daemon = daemon().await;
    let host = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    assert_eq!(resolv_conf(&daemon, DnsConfig::default()).await, host);
    let options = DnsConfig { options: vec!["ndots:2".into(), "edns0".into()], ..Default::default() };
    assert_eq!(resolv_conf(&daemon, options).await, "options ndots:2 edns0\n");
    let searches = DnsConfig { searches: vec!["one.example".into()], ..Default::default() };
    assert_eq!(resolv_conf(&daemon, searches).await, "search one.example\n");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_without_a_hostname_has_the_nodes() {
    let daemon = daemon().await;
    for network in [NamespaceMode::Pod, NamespaceMode::Node] {
        let config = pod("nameless").with(|config| {
            config.namespaces().network = network as i32;
            config.hostname.clear();
        });
        let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
        assert_eq!(names(&daemon, &pod, network).await, [node(), node(), node()], "{network:?}");
    }
    daemon.finish().await;
}

/// The node keeps its name, which such a pod shares; what is the pod's alone has the one that was asked for.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_on_the_nodes_network_does_not_rename_the_node() {
    let daemon = daemon().await;
    let before = node();
    let config = pod("guest").with(|config| {
        config.namespaces().network = NamespaceMode::Node as i32;
        config.hostname = "guest-name".into();
    });
    let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
    let names = names(&daemon, &pod, NamespaceMode::Node).await;
    assert_eq!(names, [before.as_str(), "guest-name", "guest-name"]);
    assert_eq!(node(), before);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_the_kubelet_mounts_at_etc_hosts_stays_as_it_is() {
    let (daemon, pod) = daemon_with_pod().await;
    let file = daemon.directory().join("etc-hosts");
    let content = "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n10.1.2.3\tpod-name\n";
    std::fs::write(&file, content).expect("hosts file");
    let mount = Mount {
        container_path: "/etc/hosts".into(),
        host_path: file.to_string_lossy().into_owned(),
        ..Default::default()
    };
    let one = daemon.run(&pod, &sleeper("one").with(|config| config.mounts = vec![mount.clone()])).await;
    let two = daemon.run(&pod, &sleeper("two").with(|config| config.mounts = vec![mount])).await;
    let (one, two) = (one.expect("start"), two.expect("start"));
    let hosts = async |id: &str| daemon.cri.output(id, &["cat", "/etc/hosts"]).await;
    assert_eq!([hosts(&one).await, hosts(&two).await], [content, content]);
    // It is that file, and no copy.
    daemon.cri.shell(&one, "echo 10.1.2.4 more >> /etc/hosts").await;
    let longer = format!("{content}10.1.2.4 more\n");
    assert_eq!(
        [hosts(&two).await, std::fs::read_to_string(&file).expect("hosts file")],
        [&*longer, &*longer]
    );
    // A container without such a mount has the node's.
    let three = daemon.run(&pod, &sleeper("three")).await.expect("start");
    assert_eq!(hosts(&three).await, std::fs::read_to_string("/etc/hosts").unwrap_or_default());
    daemon.finish().await;
}
