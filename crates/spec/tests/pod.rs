//! Validation of pods.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::Case;
use stave_cri_proto::v1 as cri;
use stave_spec::{Code, validate_pod};

fn field_of(change: impl FnOnce(&mut Case)) -> Option<String> {
    let mut case = Case::default();
    change(&mut case);
    validate_pod(&case.pod).err().map(|error| {
        assert!(matches!(error.code, Code::InvalidArgument | Code::Unimplemented), "{error}");
        error.field
    })
}

fn metadata(case: &mut Case) -> &mut cri::PodSandboxMetadata {
    case.pod.metadata.as_mut().unwrap()
}

#[test]
fn metadata_is_required() {
    assert_eq!(field_of(|_| {}), None);
    assert_eq!(field_of(|c| c.pod.metadata = None).as_deref(), Some("config.metadata"));
    for bad in ["", "a/b", "..", "a\n", &"x".repeat(254)] {
        assert_eq!(field_of(|c| metadata(c).name = bad.into()).as_deref(), Some("config.metadata.name"));
        assert_eq!(
            field_of(|c| metadata(c).namespace = bad.into()).as_deref(),
            Some("config.metadata.namespace")
        );
        assert_eq!(field_of(|c| metadata(c).uid = bad.into()).as_deref(), Some("config.metadata.uid"));
    }
}

#[test]
fn hostnames() {
    let long = format!("{}.{}", "a".repeat(32), "b".repeat(32));
    for good in ["", "web", "web-0", "Web", "web-0.svc.cluster.local", "9"] {
        assert_eq!(field_of(|c| c.pod.hostname = good.into()), None, "{good}");
    }
    for bad in ["-web", "web-", "web_0", "a..b", ".a", "a.", "a b", "a\n", "ü", &"a".repeat(64), &long] {
        assert_eq!(field_of(|c| c.pod.hostname = bad.into()).as_deref(), Some("config.hostname"), "{bad}");
    }
}

#[test]
fn paths() {
    for bad in ["logs", "/logs/../etc", "/a\nb"] {
        assert_eq!(field_of(|c| c.pod.log_directory = bad.into()).as_deref(), Some("config.log_directory"));
    }
    let parent =
        |parent: &str| field_of(|c| c.pod.linux.get_or_insert_default().cgroup_parent = parent.into());
    for good in ["", "/kubepods/pod1", "kubepods.slice", "/a.slice/b.slice"] {
        assert_eq!(parent(good), None, "{good}");
    }
    for bad in ["/kubepods/../..", "..", "/a\nb", "/\0"] {
        assert_eq!(parent(bad).as_deref(), Some("config.linux.cgroup_parent"), "{bad:?}");
    }
}

#[test]
fn port_mappings() {
    let port = |protocol, container_port, host_port, ip: &str| cri::PortMapping {
        protocol,
        container_port,
        host_port,
        host_ip: ip.into(),
    };
    let check = |mappings: Vec<cri::PortMapping>| field_of(|c| c.pod.port_mappings = mappings);
    assert_eq!(
        check(vec![port(0, 80, 0, ""), port(0, 80, 0, ""), port(0, 80, 8080, ""), port(1, 80, 8080, "")]),
        None
    );
    assert_eq!(check(vec![port(2, 65535, 65535, "::1"), port(2, 1, 65535, "127.0.0.1")]), None);
    for (bad, name) in [
        (port(3, 80, 1, ""), "protocol"),
        (port(0, 0, 1, ""), "container_port"),
        (port(0, -1, 1, ""), "container_port"),
        (port(0, 65536, 1, ""), "container_port"),
        (port(0, 80, -1, ""), "host_port"),
        (port(0, 80, 65536, ""), "host_port"),
        (port(0, 80, 1, "localhost"), "host_ip"),
        (port(0, 81, 8080, ""), "host_port"),
    ] {
        let got = check(vec![port(0, 80, 8080, ""), bad]);
        assert_eq!(got, Some(format!("config.port_mappings[1].{name}")));
    }
}

#[test]
fn labels_and_annotations() {
    let label = |key: &str, value: &str| field_of(|c| drop(c.pod.labels.insert(key.into(), value.into())));
    assert_eq!(label("a/b", "any\nvalue ü"), None);
    assert_eq!(label("", "x").as_deref(), Some("config.labels"));
    assert_eq!(label("a\n", "x").as_deref(), Some("config.labels key"));
    assert_eq!(label("a", "\0").as_deref(), Some("config.labels[\"a\"]"));
    let big = "x".repeat(1 << 20);
    let got = field_of(|c| drop(c.pod.annotations.insert("a".into(), big)));
    assert_eq!(got.as_deref(), Some("config.annotations"));
}

#[test]
fn security_context() {
    const AT: &str = "config.linux.security_context";
    let id = |value| Some(cri::Int64Value { value });
    // The kubelet sends these for every pod.
    let kubelet = field_of(|c| {
        c.pod_context().seccomp = Some(cri::SecurityProfile::default());
        c.pod_context().run_as_group = id(1000);
        c.pod_context().namespace_options = Some(cri::NamespaceOption { pid: 1, ..Default::default() });
    });
    assert_eq!(kubelet, None);
    assert_eq!(field_of(|c| c.pod_context().run_as_user = id(-1)), Some(format!("{AT}.run_as_user")));
    assert_eq!(field_of(|c| c.pod_context().run_as_group = id(1 << 31)), Some(format!("{AT}.run_as_group")));
    let groups = field_of(|c| c.pod_context().supplemental_groups = vec![0, -1]);
    assert_eq!(groups, Some(format!("{AT}.supplemental_groups[1]")));
    let policy = field_of(|c| c.pod_context().supplemental_groups_policy = 7);
    assert_eq!(policy, Some(format!("{AT}.supplemental_groups_policy")));
    let level = cri::SeLinuxOption { level: "x".into(), ..Default::default() };
    let level = field_of(|c| c.pod_context().selinux_options = Some(level));
    assert_eq!(level, Some(format!("{AT}.selinux_options.level")));
    for (options, field) in [
        (cri::NamespaceOption { pid: 3, ..Default::default() }, "pid"),
        (cri::NamespaceOption { network: 1, ..Default::default() }, "network"),
        (cri::NamespaceOption { ipc: 3, ..Default::default() }, "ipc"),
        (
            cri::NamespaceOption { userns_options: Some(Default::default()), ..Default::default() },
            "userns_options.uids",
        ),
    ] {
        let got = field_of(|c| c.pod_context().namespace_options = Some(options));
        assert_eq!(got, Some(format!("{AT}.namespace_options.{field}")));
    }
    let dns = cri::DnsConfig { servers: vec!["x".into()], ..Default::default() };
    assert_eq!(field_of(|c| c.pod.dns_config = Some(dns)).as_deref(), Some("config.dns_config.servers[0]"));
}
