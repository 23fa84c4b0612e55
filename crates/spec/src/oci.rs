//! The OCI runtime specification of a container.

use std::collections::HashMap;
use std::path::PathBuf;

use oci_spec::runtime::{
    Linux, LinuxCapabilities, LinuxDevice, LinuxDeviceCgroup, LinuxNamespace, LinuxNamespaceType,
    LinuxTimeOffset, Process, Root, Spec, User,
};
use stave_supervisor_proto::v1 as plan;

use crate::mounts::Mounts;
use crate::{ContainerFacts, Resources, capabilities, user_namespace};

/// The version of the specification that ours are written for.
const VERSION: &str = "1.2.0";

/// All parts of a specification, validated.
pub(crate) struct Parts {
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) cwd: String,
    pub(crate) tty: bool,
    pub(crate) user: plan::User,
    pub(crate) capabilities: plan::Capabilities,
    pub(crate) no_new_privileges: bool,
    pub(crate) apparmor_profile: Option<String>,
    /// SELinux labels.
    pub(crate) process_label: Option<String>,
    pub(crate) mount_label: Option<String>,
    pub(crate) readonly_rootfs: bool,
    pub(crate) masked_paths: Vec<String>,
    pub(crate) readonly_paths: Vec<String>,
    pub(crate) mounts: Mounts,
    pub(crate) devices: Vec<LinuxDevice>,
    pub(crate) device_rules: Vec<LinuxDeviceCgroup>,
    pub(crate) pid: plan::PidNamespace,
    pub(crate) host_network: bool,
    pub(crate) host_ipc: bool,
    pub(crate) cgroup_namespace: bool,
    pub(crate) user_namespace: Option<plan::UserNamespace>,
    pub(crate) time_namespace: Option<plan::TimeNamespace>,
    pub(crate) resources: Resources,
}

/// Writes the specification. Everything is set, so that no default of the library slips in.
///
/// Namespaces of the pod have the path `/proc/self/ns/…`: those of whoever starts the container, which
/// is the pod's supervisor, in the pod's namespaces. Namespaces of the host have no entry, as the
/// specification says.
pub(crate) fn spec(f: &ContainerFacts<'_>, parts: &Parts) -> Spec {
    let mut root = Root::default();
    root.set_path(PathBuf::from("rootfs")).set_readonly(Some(parts.readonly_rootfs));
    let mut spec = Spec::default();
    spec.set_version(VERSION.to_owned())
        .set_root(Some(root))
        .set_hostname(None)
        .set_mounts(Some(parts.mounts.list.clone()))
        .set_process(Some(process(parts)))
        .set_linux(Some(linux(f, parts)))
        .set_annotations(Some(annotations(f)));
    spec
}

fn process(parts: &Parts) -> Process {
    let user = &parts.user;
    let groups = user.supplemental_groups.clone();
    let mut oci_user = User::default();
    oci_user
        .set_uid(user.uid)
        .set_gid(user.gid.unwrap_or(0))
        .set_additional_gids((!groups.is_empty()).then_some(groups))
        // For people: who the process will be once the container's passwd file can be read.
        .set_username((!user.name.is_empty()).then(|| user.name.clone()));
    let sets = &parts.capabilities;
    let mut caps = LinuxCapabilities::default();
    caps.set_bounding(Some(capabilities::to_oci(sets.bounding)))
        .set_effective(Some(capabilities::to_oci(sets.effective)))
        .set_permitted(Some(capabilities::to_oci(sets.permitted)))
        .set_inheritable(Some(capabilities::to_oci(sets.inheritable)))
        .set_ambient(Some(capabilities::to_oci(sets.ambient)));
    let mut process = Process::default();
    process
        .set_terminal(Some(parts.tty))
        .set_user(oci_user)
        .set_args(Some(parts.args.clone()))
        .set_env(Some(parts.env.clone()))
        .set_cwd(PathBuf::from(&parts.cwd))
        .set_capabilities(Some(caps))
        .set_rlimits(None)
        .set_no_new_privileges(Some(parts.no_new_privileges))
        .set_apparmor_profile(parts.apparmor_profile.clone())
        .set_selinux_label(parts.process_label.clone())
        // Always set: the supervisor's own is not for containers to inherit.
        .set_oom_score_adj(Some(parts.resources.oom_score_adj.unwrap_or(0)));
    process
}

fn linux(f: &ContainerFacts<'_>, parts: &Parts) -> Linux {
    use LinuxNamespaceType as Type;
    let mut namespaces = vec![namespace(Type::Mount, None)];
    match parts.pid {
        plan::PidNamespace::Container => namespaces.push(namespace(Type::Pid, None)),
        plan::PidNamespace::Pod | plan::PidNamespace::Target => {
            namespaces.push(namespace(Type::Pid, Some("/proc/self/ns/pid_for_children")))
        }
        plan::PidNamespace::Node => {}
    }
    if !parts.host_ipc {
        namespaces.push(namespace(Type::Ipc, Some("/proc/self/ns/ipc")));
    }
    if !parts.host_network {
        namespaces.push(namespace(Type::Uts, Some("/proc/self/ns/uts")));
        namespaces.push(namespace(Type::Network, Some("/proc/self/ns/net")));
    }
    if parts.cgroup_namespace {
        namespaces.push(namespace(Type::Cgroup, None));
    }
    if parts.user_namespace.is_some() {
        namespaces.push(namespace(Type::User, Some("/proc/self/ns/user")));
    }
    if parts.time_namespace.is_some() {
        namespaces.push(namespace(Type::Time, Some("/proc/self/ns/time")));
    }
    let user = parts.user_namespace.as_ref();
    let some = |paths: &[String]| (!paths.is_empty()).then(|| paths.to_vec());
    let propagation = parts.mounts.root_propagation;
    let mut linux = Linux::default();
    linux
        .set_namespaces(Some(namespaces))
        .set_devices((!parts.devices.is_empty()).then(|| parts.devices.clone()))
        .set_resources(Some(parts.resources.to_oci(parts.device_rules.clone())))
        .set_cgroups_path((!f.cgroup_path.is_empty()).then(|| PathBuf::from(f.cgroup_path)))
        .set_rootfs_propagation((!propagation.is_empty()).then(|| propagation.to_owned()))
        .set_masked_paths(some(&parts.masked_paths))
        .set_readonly_paths(some(&parts.readonly_paths))
        .set_uid_mappings(user.map(|user| user_namespace::to_oci(&user.uids)))
        .set_gid_mappings(user.map(|user| user_namespace::to_oci(&user.gids)))
        .set_time_offsets(parts.time_namespace.as_ref().map(time_offsets))
        .set_mount_label(parts.mount_label.clone())
        .set_seccomp(None);
    linux
}

/// Whole seconds and the nanoseconds after them.
fn time_offsets(time: &plan::TimeNamespace) -> HashMap<String, LinuxTimeOffset> {
    let offset = |ns: i64| {
        let mut offset = LinuxTimeOffset::default();
        let nanos = u32::try_from(ns.rem_euclid(1_000_000_000)).unwrap_or_default();
        offset.set_secs(Some(ns.div_euclid(1_000_000_000))).set_nanosecs(Some(nanos));
        offset
    };
    [("boottime", time.boottime), ("monotonic", time.monotonic)]
        .into_iter()
        .map(|(clock, ns)| (clock.to_owned(), offset(ns)))
        .collect()
}

fn namespace(kind: LinuxNamespaceType, path: Option<&str>) -> LinuxNamespace {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(kind).set_path(path.map(PathBuf::from));
    namespace
}

/// What tools find a container's pod by. Only values of the CRI's own: no annotation or label of a pod or
/// an image gets in here (CVE-2026-53488).
fn annotations(f: &ContainerFacts<'_>) -> HashMap<String, String> {
    let mut all = HashMap::new();
    let mut set = |key: &str, value: &str| {
        all.insert(format!("io.kubernetes.cri.{key}"), value.to_owned());
    };
    set("container-type", "container");
    set("sandbox-id", f.pod.id);
    if let Some(metadata) = &f.pod.config.metadata {
        set("sandbox-name", &metadata.name);
        set("sandbox-namespace", &metadata.namespace);
        set("sandbox-uid", &metadata.uid);
    }
    if let Some(metadata) = &f.config.metadata {
        set("container-name", &metadata.name);
    }
    if let Some(image) = &f.config.image {
        let name = match image.user_specified_image.as_str() {
            "" => &image.image,
            name => name,
        };
        set("image-name", name);
    }
    all
}
