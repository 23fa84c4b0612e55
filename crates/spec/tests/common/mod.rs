//! A pod, a container and a host to change in tests.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::io;
use std::path::{Path, PathBuf};

use stave_cri_proto::v1 as cri;
use stave_spec::*;
use stave_supervisor_proto::v1 as plan;

/// A host with /srv/data (shared), /srv/slave (slave), /srv/private, /dev/kvm, /dev/dri, and nothing else.
pub struct FakeHost;

pub fn device(path: &str, major: u32, minor: u32) -> HostDevice {
    let (kind, mode, uid, gid) = (plan::device::Kind::Char, 0o660, 0, 44);
    HostDevice { path: PathBuf::from(path), kind, major, minor, mode, uid, gid }
}

impl Host for FakeHost {
    fn devices(&self, path: &Path) -> io::Result<Vec<HostDevice>> {
        match path.to_str() {
            Some("/dev/kvm") => Ok(vec![device("/dev/kvm", 10, 232)]),
            Some("/dev/dri") => Ok(vec![device("/dev/dri/card0", 226, 0), device("/dev/dri/by/x", 226, 1)]),
            Some("/srv/data") => Ok(vec![]),
            Some("/etc/file") => Err(io::ErrorKind::InvalidInput.into()),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn all_devices(&self) -> io::Result<Vec<HostDevice>> {
        let mut all: Vec<_> = ["console", "ptmx", "pts/0", "shm/x", "mqueue/q"]
            .iter()
            .map(|name| device(&format!("/dev/{name}"), 5, 1))
            .collect();
        all.extend([
            device("/dev/null", 1, 3),
            device("/dev/kvm", 10, 232),
            device("/dev/dri/card0", 226, 0),
        ]);
        all.push(device("/elsewhere", 9, 9));
        Ok(all)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        if path == Path::new("/srv/denied") {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(path.starts_with("/srv") || path.starts_with("/dev"))
    }

    fn selinux_label(&self, label: &str) -> io::Result<Option<String>> {
        Ok(Some(label.to_owned()))
    }

    fn apparmor_loaded(&self, name: &str) -> io::Result<bool> {
        Ok(matches!(name, "stave-default" | "web"))
    }

    fn mount_peers(&self, path: &Path) -> io::Result<MountPeers> {
        Ok(MountPeers { shared: path.starts_with("/srv/data"), slave: path.starts_with("/srv/slave") })
    }
}

/// All that a specification is made from, to be changed before [`Case::run`].
#[derive(Clone, Debug)]
pub struct Case {
    pub pod: cri::PodSandboxConfig,
    pub config: cri::ContainerConfig,
    pub image: ImageDefaults,
    pub shm: Option<PathBuf>,
    pub v2: bool,
    pub apparmor: AppArmor,
    pub selinux: bool,
    pub image_volumes: Vec<ImageVolume>,
}

impl Default for Case {
    fn default() -> Self {
        let pod = cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: "web".into(),
                namespace: "default".into(),
                uid: "u1".into(),
                attempt: 0,
            }),
            log_directory: "/var/log/pods/web".into(),
            ..Default::default()
        };
        let config = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: "main".into(), attempt: 0 }),
            image: Some(cri::ImageSpec { image: "sha256:1".into(), ..Default::default() }),
            command: vec!["/bin/true".into()],
            log_path: "main/0.log".into(),
            ..Default::default()
        };
        let (image, shm) = (ImageDefaults::default(), Some(PathBuf::from("/run/pod/shm")));
        Self {
            pod,
            config,
            image,
            shm,
            v2: true,
            apparmor: AppArmor::Off,
            selinux: false,
            image_volumes: Vec::new(),
        }
    }
}

impl Case {
    pub fn run(&self) -> Result<ContainerSpec, SpecError> {
        let policy = stave_lsm::selinux::Policy::default();
        container(&ContainerFacts {
            id: "c1",
            pod: PodFacts {
                id: "p1",
                config: &self.pod,
                hostname: "web-0",
                resolv_conf: Path::new("/run/pod/resolv.conf"),
                hosts: Path::new("/run/pod/hosts"),
                hostname_file: Path::new("/run/pod/hostname"),
                shm: self.shm.as_deref(),
            },
            config: &self.config,
            image: &self.image,
            lower_dirs: &[PathBuf::from("/layers/2"), PathBuf::from("/layers/1")],
            upper_dir: Path::new("/c1/upper"),
            work_dir: Path::new("/c1/work"),
            image_volumes: &self.image_volumes,
            cgroup: plan::Cgroup { v2_dir: "/sys/fs/cgroup/c1".into(), ..Default::default() },
            cgroup_path: "/kubepods/c1",
            v2: self.v2,
            apparmor: &self.apparmor,
            selinux: self.selinux.then_some(SeLinux { policy: &policy, level: "s0:c3,c4" }),
            host: &FakeHost,
        })
    }

    pub fn context(&mut self) -> &mut cri::LinuxContainerSecurityContext {
        self.config.linux.get_or_insert_default().security_context.get_or_insert_default()
    }

    pub fn pod_context(&mut self) -> &mut cri::LinuxSandboxSecurityContext {
        self.pod.linux.get_or_insert_default().security_context.get_or_insert_default()
    }

    pub fn privileged(&mut self) {
        self.context().privileged = true;
        self.pod_context().privileged = true;
    }

    /// The code and the field of the error.
    pub fn error(&self) -> (Code, String) {
        let error = self.run().unwrap_err();
        (error.code, error.field)
    }
}

/// The code and the field of the error, after a change of the default case.
pub fn error_of(change: impl FnOnce(&mut Case)) -> (Code, String) {
    let mut case = Case::default();
    change(&mut case);
    case.error()
}

/// The specification after a change of the default case.
pub fn spec_of(change: impl FnOnce(&mut Case)) -> ContainerSpec {
    let mut case = Case::default();
    change(&mut case);
    case.run().unwrap()
}
