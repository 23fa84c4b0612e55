//! From an OCI runtime specification to the executor's plan: names become numbers.

use std::collections::HashMap;

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceType, LinuxNamespaceType, Mount, Process, Spec};
use stave_supervisor_proto::v1::{self as plan, PidNamespace, Plan, Propagation, mount};

use crate::capabilities;
use crate::text::is_at_or_below;

/// MOUNT_ATTR_* of mount_setattr(2).
const ATTRIBUTES: &[(&str, u64)] = &[
    ("ro", 0x1),
    ("rro", 0x1),
    ("nosuid", 0x2),
    ("nodev", 0x4),
    ("noexec", 0x8),
    ("noatime", 0x10),
    ("strictatime", 0x20),
    ("nodiratime", 0x80),
    ("nosymfollow", 0x20_0000),
];

/// Options that say what a mount is without them, too.
const NO_ATTRIBUTE: &[&str] = &["rw", "suid", "dev", "exec", "relatime", "diratime", "bind"];

/// Devices of every container, mode 0666.
const DEVICES: &[(&str, u32, u32)] = &[
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// What a plan has and a specification has no words for.
pub(crate) struct Extras {
    pub(crate) container_id: String,
    /// Layers; `read_only` is taken from the specification.
    pub(crate) root: plan::RootFs,
    /// The user, perhaps by name.
    pub(crate) user: plan::User,
    pub(crate) cgroup: plan::Cgroup,
    pub(crate) directories: Vec<String>,
}

/// The plan of a specification.
pub(crate) fn lower(spec: &Spec, extras: Extras) -> Plan {
    let linux = spec.linux().as_ref();
    let label = linux.and_then(|linux| linux.mount_label().as_deref());
    let namespaces = || linux.and_then(|l| l.namespaces().as_ref()).into_iter().flatten();
    let own_ipc = namespaces().any(|ns| ns.typ() == LinuxNamespaceType::Ipc);
    // The node's message queues are not for a container to relabel.
    let label_of = |mount: &Mount| label.filter(|_| own_ipc || mount.typ().as_deref() != Some("mqueue"));
    let mounts: Vec<plan::Mount> =
        spec.mounts().iter().flatten().map(|mount| lower_mount(mount, label_of(mount))).collect();
    let pid_namespace = match namespaces().find(|ns| ns.typ() == LinuxNamespaceType::Pid) {
        None => PidNamespace::Node,
        Some(ns) if ns.path().is_some() => PidNamespace::Pod,
        Some(_) => PidNamespace::Container,
    };
    let read_only = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
    let paths =
        |get: fn(&Linux) -> &Option<Vec<String>>| linux.and_then(|l| get(l).clone()).unwrap_or_default();
    Plan {
        container_id: extras.container_id,
        root: Some(plan::RootFs { read_only, ..extras.root }),
        devices: devices(linux, &mounts),
        mounts,
        masked_paths: paths(Linux::masked_paths),
        readonly_paths: paths(Linux::readonly_paths),
        pid_namespace: pid_namespace as i32,
        cgroup_namespace: namespaces().any(|ns| ns.typ() == LinuxNamespaceType::Cgroup),
        process: spec.process().as_ref().map(|process| lower_process(process, extras.user)),
        cgroup: Some(extras.cgroup),
        root_propagation: propagation(linux.and_then(|l| l.rootfs_propagation().as_deref()).unwrap_or(""))
            as i32,
        directories: extras.directories,
        pid_target: String::new(),
    }
}

fn lower_process(process: &Process, user: plan::User) -> plan::Process {
    let sets = process.capabilities().as_ref();
    let set = |get: fn(&oci_spec::runtime::LinuxCapabilities) -> &Option<oci_spec::runtime::Capabilities>| {
        capabilities::from_oci(sets.and_then(|sets| get(sets).as_ref()))
    };
    use oci_spec::runtime::LinuxCapabilities as Sets;
    plan::Process {
        args: process.args().clone().unwrap_or_default(),
        env: process.env().clone().unwrap_or_default(),
        cwd: process.cwd().to_string_lossy().into_owned(),
        user: Some(user),
        capabilities: Some(plan::Capabilities {
            bounding: set(Sets::bounding),
            effective: set(Sets::effective),
            permitted: set(Sets::permitted),
            inheritable: set(Sets::inheritable),
            ambient: set(Sets::ambient),
        }),
        rlimits: Vec::new(),
        oom_score_adj: process.oom_score_adj(),
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        terminal: process.terminal().unwrap_or(false),
        seccomp_filter: Vec::new(),
        seccomp_flags: 0,
        umask: process.user().umask(),
        apparmor_profile: process.apparmor_profile().clone().unwrap_or_default(),
        selinux_label: process.selinux_label().clone().unwrap_or_default(),
    }
}

/// The option that gives all files of a new file system one SELinux label.
pub(crate) fn context(label: Option<&str>) -> Option<String> {
    label.map(|label| format!("context={label}"))
}

/// File systems with files of the container's own; those of the kernel have labels of the policy.
const LABELLED: &[&str] = &["tmpfs", "devpts", "mqueue", "ramfs", "overlay"];

fn lower_mount(mount: &Mount, label: Option<&str>) -> plan::Mount {
    let options = mount.options().as_deref().unwrap_or_default();
    let has = |option: &str| options.iter().any(|o| o == option);
    let kind = match mount.typ().as_deref().unwrap_or_default() {
        "cgroup" | "cgroup2" => mount::Kind::Cgroup,
        "bind" => mount::Kind::Bind,
        _ if has("bind") || has("rbind") => mount::Kind::Bind,
        _ => mount::Kind::FileSystem,
    };
    let mut attributes = 0;
    let mut spread = Propagation::Private;
    let mut parameters = Vec::new();
    for option in options {
        if let Some((_, bit)) = ATTRIBUTES.iter().find(|(name, _)| name == option) {
            attributes |= bit;
        } else if let Some(found) = propagation_option(option) {
            spread = found;
        } else if option != "rbind" && !NO_ATTRIBUTE.contains(&option.as_str()) {
            parameters.push(option.clone());
        }
    }
    let file_system = kind == mount::Kind::FileSystem;
    if mount.typ().as_deref().is_some_and(|kind| LABELLED.contains(&kind)) {
        parameters.extend(context(label));
    }
    plan::Mount {
        kind: kind as i32,
        source: mount.source().as_ref().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
        destination: crate::mounts::destination(mount),
        fs_type: mount.typ().clone().filter(|_| file_system).unwrap_or_default(),
        options: if file_system { parameters } else { Vec::new() },
        attributes,
        recursive: has("rbind"),
        recursive_attributes: has("rro"),
        propagation: spread as i32,
        lower_dirs: Vec::new(),
        sub_path: String::new(),
        idmap: mount.uid_mappings().is_some(),
    }
}

fn propagation_option(option: &str) -> Option<Propagation> {
    match option {
        "private" | "rprivate" => Some(Propagation::Private),
        "slave" | "rslave" => Some(Propagation::Slave),
        "shared" | "rshared" => Some(Propagation::Shared),
        _ => None,
    }
}

fn propagation(option: &str) -> Propagation {
    propagation_option(option).unwrap_or(Propagation::Private)
}

/// The default devices and the specification's, which replace them, without those that a mount covers: they
/// would be made in a directory of the host.
fn devices(linux: Option<&Linux>, mounts: &[plan::Mount]) -> Vec<plan::Device> {
    let mut all: Vec<plan::Device> = DEVICES
        .iter()
        .map(|(path, major, minor)| plan::Device {
            kind: plan::device::Kind::Char as i32,
            path: (*path).to_owned(),
            major: *major,
            minor: *minor,
            mode: 0o666,
            uid: 0,
            gid: 0,
        })
        .collect();
    let mut index: HashMap<String, usize> =
        all.iter().enumerate().map(|(i, d)| (d.path.clone(), i)).collect();
    for device in linux.and_then(|l| l.devices().as_ref()).into_iter().flatten().filter_map(lower_device) {
        match index.get(&device.path).and_then(|i| all.get_mut(*i)) {
            // A default device keeps its mode: the host may have made its own stricter.
            Some(old) if (old.kind, old.major, old.minor) == (device.kind, device.major, device.minor) => {}
            Some(old) => *old = device,
            None => {
                index.insert(device.path.clone(), all.len());
                all.push(device);
            }
        }
    }
    let bind = mount::Kind::Bind as i32;
    all.retain(|device| {
        !mounts.iter().any(|m| m.kind == bind && is_at_or_below(&device.path, &m.destination))
    });
    all
}

fn lower_device(device: &LinuxDevice) -> Option<plan::Device> {
    let kind = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => plan::device::Kind::Char,
        LinuxDeviceType::B => plan::device::Kind::Block,
        LinuxDeviceType::P => plan::device::Kind::Fifo,
        LinuxDeviceType::A => return None,
    };
    Some(plan::Device {
        kind: kind as i32,
        path: device.path().to_string_lossy().into_owned(),
        major: u32::try_from(device.major()).ok()?,
        minor: u32::try_from(device.minor()).ok()?,
        mode: device.file_mode().unwrap_or(0o666),
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}
