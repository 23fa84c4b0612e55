//! Mounts, volumes and devices of containers.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::*;
use stave_cri_proto::v1 as cri;
use stave_spec::{Code, ContainerSpec, ImageVolume};
use stave_supervisor_proto::v1::{self as plan, Propagation, mount};

fn mount(container_path: &str, host_path: &str) -> cri::Mount {
    cri::Mount { container_path: container_path.into(), host_path: host_path.into(), ..Default::default() }
}

fn destinations(spec: &ContainerSpec) -> Vec<&str> {
    spec.plan.mounts.iter().map(|m| m.destination.as_str()).collect()
}

fn find<'a>(spec: &'a ContainerSpec, destination: &str) -> &'a plan::Mount {
    spec.plan.mounts.iter().find(|m| m.destination == destination).unwrap()
}

fn device_paths(spec: &ContainerSpec) -> Vec<&str> {
    spec.plan.devices.iter().map(|d| d.path.as_str()).collect()
}

#[test]
fn defaults() {
    let spec = spec_of(|_| {});
    assert_eq!(
        destinations(&spec),
        [
            "/proc",
            "/dev",
            "/dev/pts",
            "/dev/mqueue",
            "/sys",
            "/sys/fs/cgroup",
            "/etc/hostname",
            "/etc/hosts",
            "/etc/resolv.conf",
            "/dev/shm"
        ]
    );
    let dev = find(&spec, "/dev");
    assert_eq!((dev.fs_type.as_str(), dev.attributes), ("tmpfs", 0x2 | 0x20));
    assert_eq!(dev.options, ["mode=755", "size=65536k"]);
    let pts = find(&spec, "/dev/pts");
    assert_eq!(pts.options, ["newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]);
    let cgroup = find(&spec, "/sys/fs/cgroup");
    assert_eq!((cgroup.kind, cgroup.attributes), (mount::Kind::Cgroup as i32, 0xf));
    assert_eq!(find(&spec, "/sys").attributes, 0xf);
    let shm = find(&spec, "/dev/shm");
    assert_eq!((shm.source.as_str(), shm.attributes, shm.recursive), ("/run/pod/shm", 0xe, true));
    let hosts = find(&spec, "/etc/hosts");
    assert_eq!((hosts.kind, hosts.source.as_str(), hosts.attributes), (0, "/run/pod/hosts", 0));
    let host_ipc = spec_of(|c| c.shm = None);
    assert_eq!(find(&host_ipc, "/dev/shm").source, "/dev/shm");
    // Read-only exactly with a read-only root.
    let readonly = spec_of(|c| c.context().readonly_rootfs = true);
    for path in ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"] {
        assert_eq!(find(&readonly, path).attributes, 1, "{path}");
    }
    assert_eq!(find(&readonly, "/dev/shm").attributes & 1, 0);
    assert!(readonly.plan.root.unwrap().read_only);
}

#[test]
fn requests_replace_defaults_and_are_sorted() {
    let spec = spec_of(|c| {
        c.config.mounts = vec![
            mount("/a/b/c", "/srv/1"),
            mount("/a", "/srv/2"),
            mount("/etc/hosts", "/srv/hosts"),
            mount("/x//y/../z/", "/srv/3"),
            mount("/sys/", "/srv/sys"),
            mount("/a", "/srv/4"),
        ];
    });
    let mut want = vec!["/proc", "/dev", "/dev/pts", "/dev/mqueue", "/sys/fs/cgroup"];
    want.extend([
        "/a",
        "/sys",
        "/a",
        "/etc/hostname",
        "/etc/resolv.conf",
        "/dev/shm",
        "/etc/hosts",
        "/x/z",
        "/a/b/c",
    ]);
    assert_eq!(destinations(&spec), want);
    let sources: Vec<_> =
        spec.plan.mounts.iter().filter(|m| m.destination == "/a").map(|m| &m.source).collect();
    assert_eq!(sources, ["/srv/2", "/srv/4"]);
    assert_eq!(find(&spec, "/etc/hosts").source, "/srv/hosts");
}

#[test]
fn dev_of_the_host_gets_no_nodes() {
    let spec = spec_of(|c| {
        c.privileged();
        c.config.mounts = vec![mount("/dev/", "/dev")];
        c.config.devices = vec![cri::Device {
            container_path: "/dev/kvm".into(),
            host_path: "/dev/kvm".into(),
            permissions: "rw".into(),
        }];
    });
    assert!(spec.plan.devices.is_empty());
    assert!(!destinations(&spec).iter().any(|d| ["/dev/pts", "/dev/mqueue"].contains(d)));
    assert_eq!(find(&spec, "/dev").kind, mount::Kind::Bind as i32);
}

#[test]
fn propagation_and_read_only() {
    use cri::MountPropagation as P;
    for (path, propagation, readonly, recursive, want) in [
        (
            "/srv/private",
            P::PropagationPrivate,
            false,
            false,
            Ok((Propagation::Private, 0, Propagation::Private)),
        ),
        (
            "/srv/private",
            P::PropagationPrivate,
            true,
            false,
            Ok((Propagation::Private, 1, Propagation::Private)),
        ),
        (
            "/srv/private",
            P::PropagationPrivate,
            true,
            true,
            Ok((Propagation::Private, 1, Propagation::Private)),
        ),
        (
            "/srv/data",
            P::PropagationHostToContainer,
            false,
            false,
            Ok((Propagation::Slave, 0, Propagation::Slave)),
        ),
        (
            "/srv/slave",
            P::PropagationHostToContainer,
            true,
            false,
            Ok((Propagation::Slave, 1, Propagation::Slave)),
        ),
        (
            "/srv/data",
            P::PropagationBidirectional,
            false,
            false,
            Ok((Propagation::Shared, 0, Propagation::Shared)),
        ),
        (
            "/srv/private",
            P::PropagationHostToContainer,
            false,
            false,
            Err((Code::FailedPrecondition, "host_path")),
        ),
        (
            "/srv/slave",
            P::PropagationBidirectional,
            false,
            false,
            Err((Code::FailedPrecondition, "host_path")),
        ),
        (
            "/srv/data",
            P::PropagationPrivate,
            false,
            true,
            Err((Code::InvalidArgument, "recursive_read_only")),
        ),
        (
            "/srv/data",
            P::PropagationHostToContainer,
            true,
            true,
            Err((Code::InvalidArgument, "recursive_read_only")),
        ),
    ] {
        let mut case = Case::default();
        case.config.mounts = vec![cri::Mount {
            propagation: propagation as i32,
            readonly,
            recursive_read_only: recursive,
            selinux_relabel: true,
            ..mount("/m", path)
        }];
        match (case.run(), want) {
            (Ok(spec), Ok((spread, attributes, root))) => {
                let m = find(&spec, "/m");
                assert_eq!(
                    (m.propagation(), m.attributes, m.recursive),
                    (spread, attributes, true),
                    "{path}"
                );
                assert_eq!(m.recursive_attributes, recursive);
                assert_eq!(spec.plan.root_propagation(), root);
            }
            (Err(error), Err((code, field))) => {
                assert_eq!((error.code, error.field), (code, format!("config.mounts[0].{field}")));
            }
            (got, want) => panic!("{path}: {got:?}, not {want:?}"),
        }
    }
    // The widest wins, whatever the order.
    for order in [[2, 1], [1, 2]] {
        let spec = spec_of(|c| {
            c.config.mounts = order
                .iter()
                .enumerate()
                .map(|(i, p)| cri::Mount { propagation: *p, ..mount(&format!("/m{i}"), "/srv/data") })
                .collect();
        });
        assert_eq!(spec.plan.root_propagation(), Propagation::Shared);
        assert_eq!(spec.oci.linux().as_ref().unwrap().rootfs_propagation().as_deref(), Some("rshared"));
    }
}

#[test]
fn bad_mounts() {
    let image = Some(cri::ImageSpec { image: "data".into(), ..Default::default() });
    let map = vec![cri::IdMapping { host_id: 1, container_id: 0, length: 1 }];
    let table: Vec<(cri::Mount, Code, &str)> = vec![
        (mount("", "/srv"), Code::InvalidArgument, "container_path"),
        (mount("a", "/srv"), Code::InvalidArgument, "container_path"),
        (mount("/", "/srv"), Code::InvalidArgument, "container_path"),
        (mount("/a/..", "/srv"), Code::InvalidArgument, "container_path"),
        (mount("/a\0", "/srv"), Code::InvalidArgument, "container_path"),
        (mount("/a", ""), Code::InvalidArgument, "host_path"),
        (mount("/a", "srv"), Code::InvalidArgument, "host_path"),
        (mount("/a", "/srv\0"), Code::InvalidArgument, "host_path"),
        (mount("/a", "/missing"), Code::InvalidArgument, "host_path"),
        (mount("/a", "/srv/denied"), Code::FailedPrecondition, "host_path"),
        (cri::Mount { image: image.clone(), ..mount("/a", "/srv") }, Code::InvalidArgument, "host_path"),
        (cri::Mount { image: image.clone(), ..mount("/a", "") }, Code::InvalidArgument, "readonly"),
        (cri::Mount { image, readonly: true, ..mount("/a", "") }, Code::NotFound, "image.image"),
        (
            cri::Mount { image_sub_path: "x".into(), ..mount("/a", "/srv") },
            Code::InvalidArgument,
            "image_sub_path",
        ),
        (
            cri::Mount { uid_mappings: map.clone(), ..mount("/a", "/srv") },
            Code::InvalidArgument,
            "uidMappings",
        ),
        (cri::Mount { gid_mappings: map, ..mount("/a", "/srv") }, Code::InvalidArgument, "gidMappings"),
        (cri::Mount { propagation: 3, ..mount("/a", "/srv") }, Code::InvalidArgument, "propagation"),
    ];
    for (bad, code, field) in table {
        let got = error_of(|c| c.config.mounts = vec![mount("/ok", "/srv"), bad.clone()]);
        assert_eq!(got, (code, format!("config.mounts[1].{field}")), "{bad:?}");
    }
    assert_eq!(error_of(|c| c.config.mounts = vec![mount("/a", "/srv"); 4097]).1, "config.mounts");
}

#[test]
fn images() {
    let image = |path: &str, sub_path: &str| cri::Mount {
        image: Some(cri::ImageSpec { image: "data".into(), ..Default::default() }),
        readonly: true,
        image_sub_path: sub_path.into(),
        ..mount(path, "")
    };
    let with = |mounts: Vec<cri::Mount>| {
        let mut case = Case { ..Default::default() };
        let layers = |names: &[&str]| names.iter().map(std::path::PathBuf::from).collect();
        case.image_volumes = vec![
            ImageVolume { mount: 0, lower_dirs: layers(&["/layers/9", "/layers/8"]) },
            ImageVolume { mount: 2, lower_dirs: layers(&["/layers/7", "/layers/empty"]) },
        ];
        case.config.mounts = mounts;
        case
    };
    let spec = with(vec![image("/a/b/c", "sub/path"), mount("/b", "/srv/data"), image("/dev/fd", "")])
        .run()
        .unwrap();
    let first = find(&spec, "/a/b/c");
    assert_eq!((first.kind(), first.attributes), (plan::mount::Kind::Image, 1 | 4));
    assert_eq!(
        (first.lower_dirs.as_slice(), first.sub_path.as_str()),
        (["/layers/9", "/layers/8"].map(String::from).as_slice(), "sub/path")
    );
    assert_eq!(find(&spec, "/b").kind(), plan::mount::Kind::Bind);
    let second = find(&spec, "/dev/fd");
    assert_eq!(
        (second.kind(), second.lower_dirs.as_slice()),
        (plan::mount::Kind::Image, ["/layers/7", "/layers/empty"].map(String::from).as_slice())
    );
    assert!(first.options.is_empty() && second.options.is_empty());
    // With SELinux all of them have the container's label.
    let labelled =
        Case { selinux: true, ..with(vec![image("/a", ""), mount("/b", "/srv"), image("/c", "")]) };
    let spec = labelled.run().unwrap();
    let label = format!("context={}", spec.oci.linux().as_ref().unwrap().mount_label().as_ref().unwrap());
    for path in ["/a", "/c"] {
        assert_eq!(find(&spec, path).options, std::slice::from_ref(&label));
    }
    let spec = with(vec![image("/a/b/c", ""), mount("/b", "/srv/data"), image("/dev/fd", "")]).run().unwrap();
    // For people, and other runtimes.
    let oci = |path: &str| {
        let mounts = spec.oci.mounts().as_ref().unwrap();
        mounts.iter().find(|m| m.destination() == std::path::Path::new(path)).unwrap().clone()
    };
    assert_eq!(oci("/a/b/c").typ().as_deref(), Some("overlay"));
    assert!(oci("/a/b/c").options().as_ref().unwrap().contains(&"lowerdir=/layers/9:/layers/8".to_owned()));
    assert_eq!(oci("/dev/fd").typ().as_deref(), Some("overlay"));

    for (bad, field) in [
        (cri::Mount { readonly: false, ..image("/a", "") }, "readonly"),
        (cri::Mount { propagation: 2, ..image("/a", "") }, "propagation"),
        (image("/a", "../x"), "image_sub_path"),
        (image("/a", "x/../../y"), "image_sub_path"),
        (image("/a", "/x"), "image_sub_path"),
        (image("/a", "x\0"), "image_sub_path"),
        (image("/", ""), "container_path"),
    ] {
        let got = with(vec![bad.clone()]).error();
        assert_eq!(got, (Code::InvalidArgument, format!("config.mounts[0].{field}")), "{bad:?}");
    }
}

#[test]
fn cve_2022_23648() {
    let volumes = |list: &[&str]| list.iter().map(|v| (*v).to_owned()).collect::<Vec<_>>();
    for bad in ["/../etc", "/data/../../etc", "..", "a/../b", "/a\0"] {
        let got = error_of(|c| c.image.volumes = volumes(&["/ok", bad]));
        assert_eq!(got, (Code::InvalidArgument, "image.volumes".into()), "{bad}");
    }
    let spec = spec_of(|c| {
        c.image.volumes =
            volumes(&["/var//lib/db/", "data", "/", "/var/lib/db", "/mnt/x", "/proc/1", "/mntx", "/dev/shm"]);
        c.config.mounts = vec![mount("/mnt", "/srv")];
    });
    assert_eq!(spec.plan.directories, ["/data", "/mntx", "/var/lib/db"]);
}

fn dev(container_path: &str, host_path: &str, permissions: &str) -> cri::Device {
    let (container_path, host_path) = (container_path.into(), host_path.into());
    cri::Device { container_path, host_path, permissions: permissions.into() }
}

#[test]
fn default_devices() {
    let spec = spec_of(|_| {});
    let want = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"];
    assert_eq!(device_paths(&spec), want);
    assert!(spec.plan.devices.iter().all(|d| d.mode == 0o666 && d.kind == 0));
    let rules = spec.oci.linux().as_ref().unwrap().resources().as_ref().unwrap().devices().clone().unwrap();
    assert_eq!((rules.len(), rules[0].allow()), (1, false));
}

#[test]
fn requested_devices() {
    let spec = spec_of(|c| {
        c.config.devices = vec![
            dev("/dev/xkvm", "/dev/kvm", "rw"),
            dev("", "/dev/kvm", "mrw"),
            dev("/dev/gpu", "/dev/dri", "r"),
            dev("/dev/null", "/dev/kvm", "rwm"),
            // The container has its own terminals and memory.
            dev("/dev/pts", "/dev/dri", "rwm"),
        ];
    });
    assert_eq!(device_paths(&spec)[6..], ["/dev/xkvm", "/dev/kvm", "/dev/gpu/card0", "/dev/gpu/by/x"],);
    let xkvm = spec.plan.devices.iter().find(|d| d.path == "/dev/xkvm").unwrap();
    assert_eq!((xkvm.major, xkvm.minor, xkvm.mode, xkvm.gid), (10, 232, 0o660, 44));
    // A request wins over a default of the same path.
    let null = spec.plan.devices.iter().find(|d| d.path == "/dev/null").unwrap();
    assert_eq!((null.major, null.minor), (10, 232));
    let rules = spec.oci.linux().as_ref().unwrap().resources().as_ref().unwrap().devices().clone().unwrap();
    let rules: Vec<_> = rules.iter().map(ToString::to_string).collect();
    assert_eq!(rules[..3], ["a *:* rwm", "c 10:232 rw", "c 10:232 mrw"]);
}

#[test]
fn bad_devices() {
    for (bad, code, field) in [
        (dev("/dev/a", "/dev/missing", "rwm"), Code::InvalidArgument, "host_path"),
        (dev("/dev/a", "/etc/file", "rwm"), Code::InvalidArgument, "host_path"),
        (dev("/dev/a", "/srv/data", "rwm"), Code::InvalidArgument, "host_path"),
        (dev("/dev/a", "dev/kvm", "rwm"), Code::InvalidArgument, "host_path"),
        (dev("/dev/a", "", "rwm"), Code::InvalidArgument, "host_path"),
        (dev("dev/a", "/dev/kvm", "rwm"), Code::InvalidArgument, "container_path"),
        (dev("/dev/../etc/a", "/dev/kvm", "rwm"), Code::InvalidArgument, "container_path"),
        (dev("/", "/dev/kvm", "rwm"), Code::InvalidArgument, "container_path"),
        (dev("/dev", "/dev/kvm", "rwm"), Code::InvalidArgument, "container_path"),
        (dev("/dev/a", "/dev/kvm", ""), Code::InvalidArgument, "permissions"),
        (dev("/dev/a", "/dev/kvm", "rwx"), Code::InvalidArgument, "permissions"),
        (dev("/dev/a", "/dev/kvm", "rr"), Code::InvalidArgument, "permissions"),
        // A node in a volume would stay on the host.
        (dev("/vol/a", "/dev/kvm", "rw"), Code::InvalidArgument, "container_path"),
    ] {
        let got = error_of(|c| {
            c.config.mounts = vec![mount("/vol", "/srv")];
            c.config.devices = vec![bad.clone()];
        });
        assert_eq!(got, (code, format!("config.devices[0].{field}")), "{bad:?}");
    }
    let got = error_of(|c| c.config.cdi_devices = vec![cri::CdiDevice { name: "v/c=d".into() }]);
    assert_eq!(got, (Code::Unimplemented, "config.CDI_devices[0].name".into()));
}

#[test]
fn privileged_gets_the_hosts_devices() {
    let spec = spec_of(|c| {
        c.privileged();
        c.config.mounts = vec![mount("/dev/dri", "/dev/dri")];
    });
    // Neither the pod's own terminals and memory, nor nodes inside a mount from the host.
    assert_eq!(device_paths(&spec)[6..], ["/dev/kvm"]);
    let null = spec.plan.devices.iter().find(|d| d.path == "/dev/null").unwrap();
    assert_eq!(null.mode, 0o666);
    for path in ["/sys", "/sys/fs/cgroup"] {
        assert_eq!(find(&spec, path).attributes & 1, 0, "{path}");
    }
    let rules = spec.oci.linux().as_ref().unwrap().resources().as_ref().unwrap().devices().clone().unwrap();
    assert_eq!((rules.len(), rules[0].allow()), (1, true));
}

/// Those of the node are not for a container to relabel; its processes have the type that may use them.
#[test]
fn message_queues_of_the_pod_are_labelled() {
    let mut case = Case { selinux: true, ..Case::default() };
    let spec = case.run().unwrap();
    let label = "context=system_u:object_r:container_file_t:s0:c3,c4";
    assert!(find(&spec, "/dev/mqueue").options.contains(&label.to_owned()));
    let node = || Some(cri::NamespaceOption { ipc: cri::NamespaceMode::Node as i32, ..Default::default() });
    case.context().namespace_options = node();
    case.pod_context().namespace_options = node();
    case.shm = None;
    let spec = case.run().unwrap();
    assert!(find(&spec, "/dev/mqueue").options.is_empty());
    assert!(find(&spec, "/dev").options.contains(&label.to_owned()));
    assert_eq!(spec.plan.process.unwrap().selinux_label, "system_u:system_r:spc_t:s0");
}
