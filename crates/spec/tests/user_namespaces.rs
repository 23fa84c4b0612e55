//! Pods with a user or time namespace.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{Case, spec_of};
use stave_cri_proto::v1 as cri;
use stave_spec::*;
use stave_supervisor_proto::v1 as plan;

const AT: &str = "config.linux.security_context";

fn map(container_id: u32, host_id: u32, length: u32) -> cri::IdMapping {
    cri::IdMapping { container_id, host_id, length }
}

fn options(
    mode: cri::NamespaceMode,
    uids: &[cri::IdMapping],
    gids: &[cri::IdMapping],
) -> cri::NamespaceOption {
    let userns = cri::UserNamespace { mode: mode.into(), uids: uids.to_vec(), gids: gids.to_vec() };
    cri::NamespaceOption { userns_options: Some(userns), ..Default::default() }
}

fn usual() -> cri::NamespaceOption {
    options(cri::NamespaceMode::Pod, &[map(0, 65536, 65536)], &[map(0, 131_072, 65536)])
}

/// In a pod with a user namespace, which the container's config names too.
fn inside(case: &mut Case) {
    case.pod_context().namespace_options = Some(usual());
    case.context().namespace_options = Some(usual());
}

fn error_inside(change: impl FnOnce(&mut Case)) -> (Code, String) {
    let mut case = Case::default();
    inside(&mut case);
    change(&mut case);
    case.error()
}

#[test]
fn mappings_of_a_pod() {
    use cri::NamespaceMode::{Container, Node, Pod, Target};
    let one = map(0, 65536, 65536);
    let field_of = |options: cri::NamespaceOption| {
        let mut case = Case::default();
        case.pod_context().namespace_options = Some(options);
        let error = validate_pod(&case.pod).err()?;
        assert_eq!(error.code, Code::InvalidArgument, "{error}");
        Some(error.field.strip_prefix(&format!("{AT}.namespace_options.")).unwrap().to_owned())
    };
    assert_eq!(field_of(usual()), None);
    assert_eq!(field_of(options(Node, &[], &[])), None);
    let edge = map(0, u32::MAX - 65536, 65536);
    assert_eq!(field_of(options(Pod, &[edge], &[edge])), None, "the last id but one is an id");
    for (bad, field) in [
        (options(Container, &[], &[]), "userns_options.mode"),
        (options(Target, &[], &[]), "userns_options.mode"),
        (options(Node, &[one], &[]), "userns_options"),
        (options(Pod, &[], &[one]), "userns_options.uids"),
        (options(Pod, &[one], &[]), "userns_options.gids"),
        (options(Pod, &[one, map(65536, 200_000, 5)], &[one]), "userns_options.uids"),
        (options(Pod, &[one], &[one, one]), "userns_options.gids"),
        (options(Pod, &[map(1, 65536, 65536)], &[one]), "userns_options.uids[0].container_id"),
        (options(Pod, &[map(0, 65536, 0)], &[one]), "userns_options.uids[0].length"),
        (options(Pod, &[map(0, 0, 65536)], &[one]), "userns_options.uids[0].host_id"),
        (options(Pod, &[one], &[map(0, u32::MAX - 65535, 65536)]), "userns_options.gids[0].host_id"),
        (options(Pod, &[one], &[map(0, 65536, 65535)]), "userns_options.gids[0].length"),
        (cri::NamespaceOption { network: 2, ..usual() }, "network"),
        (cri::NamespaceOption { pid: 2, ..usual() }, "pid"),
        (cri::NamespaceOption { ipc: 2, ..usual() }, "ipc"),
    ] {
        assert_eq!(field_of(bad.clone()).as_deref(), Some(field), "{bad:?}");
    }
}

#[test]
fn a_container_is_in_its_pods() {
    let field = format!("{AT}.namespace_options.userns_options");
    let other = options(cri::NamespaceMode::Pod, &[map(0, 65536, 65536)], &[map(0, 65536, 65536)]);
    let node = options(cri::NamespaceMode::Node, &[], &[]);
    for bad in [other, node.clone()] {
        let got = error_inside(|c| c.context().namespace_options = Some(bad));
        assert_eq!(got, (Code::InvalidArgument, field.clone()));
    }
    // What says nothing is in it, too.
    for options in [None, Some(cri::NamespaceOption::default())] {
        let mut case = Case::default();
        inside(&mut case);
        case.context().namespace_options = options;
        assert!(case.run().unwrap().oci.linux().as_ref().unwrap().uid_mappings().is_some());
    }
    spec_of(|c| c.context().namespace_options = Some(node));
    let pid = error_inside(|c| {
        c.context().namespace_options = Some(cri::NamespaceOption { pid: 2, ..Default::default() });
    });
    assert_eq!(pid, (Code::InvalidArgument, format!("{AT}.namespace_options.pid")));
}

#[test]
fn what_the_specification_says() {
    use oci_spec::runtime::LinuxNamespaceType as Type;
    let mut case = Case::default();
    inside(&mut case);
    case.pod.annotations.insert(TIME_OFFSETS.into(), "boottime=1d,monotonic=-1ns".into());
    case.privileged();
    let spec = case.run().unwrap();
    let linux = spec.oci.linux().as_ref().unwrap();
    let kinds: Vec<Type> = linux.namespaces().iter().flatten().map(|ns| ns.typ()).collect();
    for kind in [Type::User, Type::Time, Type::Cgroup] {
        assert!(kinds.contains(&kind), "{kinds:?}");
    }
    let gids = &linux.gid_mappings().as_ref().unwrap()[0];
    assert_eq!((gids.container_id(), gids.host_id(), gids.size()), (0, 131_072, 65536));
    let offsets = linux.time_offsets().as_ref().unwrap();
    assert_eq!(offsets["boottime"].secs(), Some(86_400));
    assert_eq!((offsets["monotonic"].secs(), offsets["monotonic"].nanosecs()), (Some(-1), Some(999_999_999)));
    assert!(spec.plan.cgroup_namespace, "privileged, but not on the node");
    let user = user_namespace(&case.pod).unwrap();
    assert_eq!(user.uids, [plan::IdMapping { container_id: 0, host_id: 65536, length: 65536 }]);
    assert_eq!(user_namespace(&Case::default().pod), None);
}

#[test]
fn idmapped_mounts() {
    let mount = |uids: &[cri::IdMapping], gids: &[cri::IdMapping]| cri::Mount {
        container_path: "/v".into(),
        host_path: "/srv/data".into(),
        uid_mappings: uids.to_vec(),
        gid_mappings: gids.to_vec(),
        ..Default::default()
    };
    let (uids, gids) = ([map(0, 65536, 65536)], [map(0, 131_072, 65536)]);
    let mut case = Case::default();
    inside(&mut case);
    case.config.mounts =
        vec![mount(&uids, &gids), cri::Mount { container_path: "/w".into(), ..mount(&[], &[]) }];
    let spec = case.run().unwrap();
    let idmap = |path: &str| spec.plan.mounts.iter().find(|m| m.destination == path).unwrap().idmap;
    assert!(idmap("/v") && !idmap("/w") && !idmap("/etc/hosts"));
    for (bad, field) in [
        (mount(&gids, &gids), "uidMappings"),
        (mount(&uids, &uids), "gidMappings"),
        (mount(&uids, &[]), "gidMappings"),
    ] {
        let got = error_inside(|c| c.config.mounts = vec![bad]);
        assert_eq!(got, (Code::InvalidArgument, format!("config.mounts[0].{field}")));
    }
}

#[test]
fn ids_beyond_the_map() {
    let id = |value| Some(cri::Int64Value { value });
    type Change<'a> = &'a dyn Fn(&mut Case);
    let table: [(Change<'_>, &str); 4] = [
        (&|c| c.context().run_as_user = id(65536), "config.linux.security_context.run_as_user"),
        (
            &|c| {
                c.context().run_as_user = id(1);
                c.context().run_as_group = id(70_000);
            },
            "config.linux.security_context.run_as_group",
        ),
        (
            &|c| c.context().supplemental_groups = vec![1, 65536],
            "config.linux.security_context.supplemental_groups[1]",
        ),
        (&|c| c.image.user = "100000".into(), "image.user"),
    ];
    for (change, field) in table {
        assert_eq!(error_inside(change), (Code::InvalidArgument, field.to_owned()));
        // Without a user namespace all of them exist.
        spec_of(change);
    }
}

#[test]
fn ping_is_for_groups_of_the_pod() {
    let mut case = Case::default();
    inside(&mut case);
    let mut with = |value: &str| {
        let sysctls = [("net.ipv4.ping_group_range".to_owned(), value.to_owned())].into();
        case.pod.linux.as_mut().unwrap().sysctls = sysctls;
        validate_pod(&case.pod).map(|()| default_sysctls(&case.pod)["net.ipv4.ping_group_range"].clone())
    };
    assert_eq!(with("0 1000").unwrap(), "131072 132072");
    assert_eq!(with("1 0").unwrap(), "1 0", "nobody");
    for bad in ["0 65536", "0", "0 x", "0 1 2", ""] {
        let error = with(bad).unwrap_err();
        assert_eq!(error.field, "config.linux.sysctls[\"net.ipv4.ping_group_range\"]", "{bad}");
    }
}
