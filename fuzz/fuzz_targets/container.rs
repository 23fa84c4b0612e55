//! Any configuration of a container and of its pod: a specification or an error that names the field.
#![no_main]

use std::io;
use std::path::{Path, PathBuf};

use libfuzzer_sys::fuzz_target;
use prost::Message as _;
use stave_cri_proto::v1 as cri;
use stave_spec::{AppArmor, ContainerFacts, Host, HostDevice, ImageDefaults, MountPeers, PodFacts};
use stave_supervisor_proto::v1 as proto;

/// All paths exist, and none is a device.
struct AnyHost;

impl Host for AnyHost {
    fn devices(&self, _: &Path) -> io::Result<Vec<HostDevice>> {
        Ok(Vec::new())
    }

    fn all_devices(&self) -> io::Result<Vec<HostDevice>> {
        Ok(Vec::new())
    }

    fn exists(&self, _: &Path) -> io::Result<bool> {
        Ok(true)
    }

    fn selinux_label(&self, label: &str) -> io::Result<Option<String>> {
        Ok(Some(label.to_owned()))
    }

    fn apparmor_loaded(&self, name: &str) -> io::Result<bool> {
        Ok(name != "absent")
    }

    fn mount_peers(&self, _: &Path) -> io::Result<MountPeers> {
        Ok(MountPeers { shared: true, slave: true })
    }
}

fuzz_target!(|data: (&[u8], &[u8], bool)| {
    let (config, pod, v2) = data;
    let Ok(config) = cri::ContainerConfig::decode(config) else { return };
    let Ok(pod) = cri::PodSandboxConfig::decode(pod) else { return };
    let valid = stave_spec::validate_pod(&pod);
    let _ = stave_spec::default_sysctls(&pod);
    let _ = stave_spec::resolv_conf(pod.dns_config.as_ref(), "nameserver 192.0.2.1\n");
    let apparmor = if v2 { AppArmor::On } else { AppArmor::Off };
    let policy = stave_lsm::selinux::Policy::default();
    let image = ImageDefaults { entrypoint: vec!["/bin/true".into()], ..Default::default() };
    let result = stave_spec::container(&ContainerFacts {
        id: "c1",
        pod: PodFacts {
            id: "p1",
            config: &pod,
            hostname: "web-0",
            resolv_conf: Path::new("/run/pod/resolv.conf"),
            hosts: Path::new("/run/pod/hosts"),
            hostname_file: Path::new("/run/pod/hostname"),
            shm: Some(Path::new("/run/pod/shm")),
        },
        config: &config,
        image: &image,
        lower_dirs: &[PathBuf::from("/layers/1")],
        upper_dir: Path::new("/c1/upper"),
        work_dir: Path::new("/c1/work"),
        image_volumes: &[],
        cgroup: proto::Cgroup::default(),
        cgroup_path: "/kubepods/c1",
        v2,
        apparmor: &apparmor,
        selinux: v2.then_some(stave_spec::SeLinux { policy: &policy, level: "s0:c1,c2" }),
        host: &AnyHost,
    });
    match result {
        Ok(spec) if valid.is_ok() => {
            let process = spec.plan.process.as_ref().expect("a process");
            assert!(!process.args.is_empty());
            assert!(!process.apparmor_profile.chars().any(char::is_control));
            assert!(!process.selinux_label.chars().any(|c| c.is_control() || c == '"'));
            assert!(process.args.iter().chain(&process.env).all(|text| !text.contains('\0')));
            let log = spec.log_path.as_deref().unwrap_or(Path::new("/"));
            assert!(log.is_absolute() && log.components().all(|part| part.as_os_str() != ".."));
        }
        Ok(_) => {}
        Err(error) => assert!(!error.field.is_empty(), "{error}"),
    }
});
