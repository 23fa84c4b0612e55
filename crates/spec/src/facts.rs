//! What a specification is made from, beside the request.

use std::io;
use std::path::{Path, PathBuf};

use stave_cri_proto::v1::{ContainerConfig, PodSandboxConfig};
use stave_supervisor_proto::v1 as plan;

/// The part of an image's configuration that containers start from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageDefaults {
    /// `Entrypoint`.
    pub entrypoint: Vec<String>,
    /// `Cmd`.
    pub cmd: Vec<String>,
    /// `Env`: "NAME=value".
    pub env: Vec<String>,
    /// `User`: "", "uid", "name", each with ":gid" or ":group".
    pub user: String,
    /// `WorkingDir`.
    pub working_dir: String,
    /// The keys of `Volumes`.
    pub volumes: Vec<String>,
    /// `StopSignal`: "SIGTERM", "15"; empty: none.
    pub stop_signal: String,
}

/// The pod that a container goes into. Paths are absolute host paths.
#[derive(Clone, Copy, Debug)]
pub struct PodFacts<'a> {
    /// Id of the sandbox.
    pub id: &'a str,
    /// The pod's config, as validated by [`crate::validate_pod`].
    pub config: &'a PodSandboxConfig,
    /// The effective hostname (the node's for host network).
    pub hostname: &'a str,
    /// The pod's resolv.conf.
    pub resolv_conf: &'a Path,
    /// The pod's hosts file.
    pub hosts: &'a Path,
    /// The pod's hostname file.
    pub hostname_file: &'a Path,
    /// The pod's shared memory mount; `None`: the host's /dev/shm (host IPC).
    pub shm: Option<&'a Path>,
}

/// An image that is here, for a mount of the request that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageVolume {
    /// Index of the mount in the request.
    pub mount: usize,
    /// Layers, the top one first: absolute host directories. With a single one an empty directory below it, since they
    /// become an overlay without an upper directory.
    pub lower_dirs: Vec<PathBuf>,
}

/// A container to make, and all that is known of its surroundings.
#[derive(Clone)]
pub struct ContainerFacts<'a> {
    /// Id of the container.
    pub id: &'a str,
    /// Its pod.
    pub pod: PodFacts<'a>,
    /// The request's config.
    pub config: &'a ContainerConfig,
    /// Defaults of its image.
    pub image: &'a ImageDefaults,
    /// Layers, the top one first: absolute host directories.
    pub lower_dirs: &'a [PathBuf],
    /// The overlay's upper directory.
    pub upper_dir: &'a Path,
    /// The overlay's work directory.
    pub work_dir: &'a Path,
    /// The images that its mounts name. One that is missing is not on this node.
    pub image_volumes: &'a [ImageVolume],
    /// The container's cgroup, copied into the plan.
    pub cgroup: plan::Cgroup,
    /// OCI `linux.cgroupsPath`.
    pub cgroup_path: &'a str,
    /// Resources are controlled through cgroup v2. False: v1 or hybrid.
    pub v2: bool,
    /// AppArmor on the host.
    pub apparmor: &'a AppArmor,
    /// SELinux, where the host has it on.
    pub selinux: Option<SeLinux<'a>>,
    /// What is to be looked up on the host.
    pub host: &'a dyn Host,
}

/// SELinux on a host that has it on.
#[derive(Clone, Copy, Debug)]
pub struct SeLinux<'a> {
    /// What the policy has for containers.
    pub policy: &'a stave_lsm::selinux::Policy,
    /// The level that was found for the pod, for whatever asks for none.
    pub level: &'a str,
}

/// AppArmor on a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AppArmor {
    /// The kernel does not have it, or has it switched off.
    #[default]
    Off,
    /// It is on, and the runtime's default profile was loaded.
    On,
    /// It is on, and the runtime's default profile could not be loaded, for this reason.
    NoDefault(String),
}

/// Look-ups on the host. [`crate::LiveHost`] asks the real one.
pub trait Host {
    /// The device nodes at `path`: the one, or all below it where it is a directory.
    fn devices(&self, path: &Path) -> io::Result<Vec<HostDevice>>;
    /// All device nodes of the host, for privileged containers; without pseudo-terminals, /dev/shm and /dev/console.
    fn all_devices(&self) -> io::Result<Vec<HostDevice>>;
    /// Whether there is anything at `path`, symlinks followed.
    fn exists(&self, path: &Path) -> io::Result<bool>;
    /// Whether an AppArmor profile of this name is loaded.
    fn apparmor_loaded(&self, name: &str) -> io::Result<bool>;
    /// An SELinux label as the node's policy writes it; `None`: it has no such label.
    fn selinux_label(&self, label: &str) -> io::Result<Option<String>>;
    /// How the mount that holds `path`, symlinks followed, propagates.
    fn mount_peers(&self, path: &Path) -> io::Result<MountPeers>;
}

/// Propagation of a mount of the host (proc_pid_mountinfo(5)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MountPeers {
    /// It is in a peer group: `shared:`.
    pub shared: bool,
    /// It receives from a peer group: `master:`.
    pub slave: bool,
}

/// A device node of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostDevice {
    /// Absolute host path.
    pub path: PathBuf,
    /// Character or block device.
    pub kind: plan::device::Kind,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}
