//! One container: request to specification to plan.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use stave_cri_proto::v1::{self as cri, LinuxContainerSecurityContext};
use stave_supervisor_proto::v1::{PidNamespace, Plan, RootFs, mount};

use crate::oci::Parts;
use crate::{
    Class, ContainerFacts, Resources, Seccomp, SpecError, apparmor, capabilities, classes, devices, log_path,
    lower, mounts, oci, pod, process, resources, security, selinux, signal, sysctl, text, time_offsets, user,
    user_namespace,
};

/// The field that most of a container's privileges are in.
const AT: &str = "config.linux.security_context";

/// All that is needed to make one container.
#[derive(Clone, Debug)]
pub struct ContainerSpec {
    /// For people, and for OCI runtimes.
    pub oci: Spec,
    /// For the executor.
    pub plan: Plan,
    /// Limits to write into the container's cgroup.
    pub resources: Resources,
    /// The class of block I/O that it asks for; its limits are the node's configuration's to know.
    pub block_io: Option<Class>,
    /// The filter that the process gets. Neither `oci` nor `plan` has it yet.
    pub seccomp: Seccomp,
    /// Host paths of the request's mounts that are to get the container's file label before it is made.
    pub relabel: Vec<Relabel>,
    /// Signal number that asks the container to stop: config, else image, else SIGTERM.
    pub stop_signal: i32,
    /// The same for ContainerStatus.
    pub stop_signal_cri: cri::Signal,
    /// stdio is a pseudo-terminal.
    pub tty: bool,
    /// Keep stdin open for attach.
    pub stdin: bool,
    /// Close stdin when the first attach ends.
    pub stdin_once: bool,
    /// The log file; `None`: no log.
    pub log_path: Option<PathBuf>,
}

/// A host path, and the label for it and for all below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relabel {
    /// The field of the request that names it.
    pub field: String,
    /// Absolute.
    pub path: PathBuf,
    /// An SELinux label.
    pub label: String,
}

/// Where SELinux is off there is nothing to do.
fn relabel(config: &cri::ContainerConfig, label: Option<&str>) -> Vec<Relabel> {
    let Some(label) = label else { return Vec::new() };
    let wanted = config.mounts.iter().enumerate().filter(|(_, m)| m.selinux_relabel && m.image.is_none());
    wanted
        .map(|(i, mount)| Relabel {
            field: format!("config.mounts[{i}].host_path"),
            path: PathBuf::from(&mount.host_path),
            label: label.to_owned(),
        })
        .collect()
}

/// Builds the specification and the plan. Errors name the field of the request, as `config.…`, or of
/// the image, as `image.…`.
pub fn container(f: &ContainerFacts<'_>) -> Result<ContainerSpec, SpecError> {
    let config = f.config;
    let metadata =
        config.metadata.as_ref().ok_or_else(|| SpecError::invalid("config.metadata", "", "is required"))?;
    pod::name("config.metadata.name", &metadata.name)?;
    pod::map("config.labels", &config.labels)?;
    pod::map("config.annotations", &config.annotations)?;
    let log_path = log_path(&f.pod.config.log_directory, &config.log_path)?;

    let linux = config.linux.clone().unwrap_or_default();
    let context = linux.security_context.unwrap_or_default();
    let pod_context = f.pod.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let privileged = context.privileged;
    if privileged && !pod_context.is_some_and(|pod| pod.privileged) {
        let message = "needs a privileged pod";
        return Err(SpecError::precondition(format!("{AT}.privileged"), true, message));
    }
    let (seccomp, apparmor_profile) = profiles(f, &context)?;
    let (host_network, host_ipc) = sysctl::host_namespaces(f.pod.config);
    let pid = namespaces(&context, f.pod.config, host_network, host_ipc)?;
    let field = format!("{AT}.selinux_options");
    let free = privileged || host_ipc || pid == PidNamespace::Node;
    let own = context.selinux_options.as_ref();
    let labels = selinux::of_container(&field, own, pod_context, free, f.selinux, f.host)?;
    let target_id = context.namespace_options.as_ref().map(|o| o.target_id.clone()).unwrap_or_default();
    let resources = limits(f, linux.resources.as_ref())?;
    let block_io = classes::block_io(f.pod.config, config)?;

    let readonly_rootfs = context.readonly_rootfs;
    let mounts = mounts::mounts(f, privileged, readonly_rootfs)?;
    let devices = devices::devices(f, privileged, &mounts.requested)?;
    let directories = mounts::directories(&f.image.volumes, &mounts)?;
    let (stop_signal, stop_signal_cri) = signal::stop_signal(config.stop_signal, &f.image.stop_signal)?;
    let user = user::user(&context, &f.image.user)?;
    user_namespace::check_ids(AT, &context, &user, f.pod.config)?;
    let user_namespace = user_namespace::user_namespace(f.pod.config);
    let parts = Parts {
        args: process::args(config, f.image)?,
        env: process::env(config, f.image, f.pod.hostname)?,
        cwd: process::cwd(config, f.image)?,
        tty: config.tty,
        user,
        capabilities: capabilities::capabilities(context.capabilities.as_ref(), privileged)?,
        no_new_privileges: context.no_new_privs,
        apparmor_profile,
        process_label: labels.as_ref().map(|labels| labels.process.clone()),
        mount_label: labels.as_ref().map(|labels| labels.mount.clone()),
        readonly_rootfs,
        masked_paths: paths("masked_paths", &context.masked_paths, privileged)?,
        readonly_paths: paths("readonly_paths", &context.readonly_paths, privileged)?,
        mounts,
        devices: devices.nodes,
        device_rules: devices.rules,
        pid,
        host_network,
        host_ipc,
        // A privileged container sees the host's hierarchy, as it always could; root of a user namespace has no
        // rights there.
        cgroup_namespace: !privileged || user_namespace.is_some(),
        user_namespace,
        time_namespace: time_offsets::time_namespace(f.pod.config)?,
        resources,
    };
    let oci = oci::spec(f, &parts);
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let extras = lower::Extras {
        container_id: f.id.to_owned(),
        root: RootFs {
            lower_dirs: f.lower_dirs.iter().map(|dir| text(dir)).collect(),
            upper_dir: text(f.upper_dir),
            work_dir: text(f.work_dir),
            read_only: readonly_rootfs,
            options: lower::context(parts.mount_label.as_deref()).into_iter().collect(),
        },
        user: parts.user,
        cgroup: f.cgroup.clone(),
        directories,
    };
    let mut plan = lower::lower(&oci, extras);
    for (index, lower_dirs, sub_path) in &parts.mounts.images {
        if let Some(mount) = plan.mounts.get_mut(*index) {
            mount.set_kind(mount::Kind::Image);
            (mount.source, mount.fs_type) = (String::new(), String::new());
            mount.options = lower::context(parts.mount_label.as_deref()).into_iter().collect();
            (mount.lower_dirs, mount.sub_path) = (lower_dirs.clone(), sub_path.clone());
            let at = mount.destination.clone();
            plan.devices.retain(|device| !text::is_at_or_below(&device.path, &at));
        }
    }
    if parts.pid == PidNamespace::Target {
        plan.set_pid_namespace(PidNamespace::Target);
        plan.pid_target = target_id;
    }
    Ok(ContainerSpec {
        oci,
        plan,
        resources: parts.resources,
        block_io,
        seccomp,
        relabel: relabel(config, parts.mount_label.as_deref()),
        stop_signal,
        stop_signal_cri,
        tty: config.tty,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        log_path,
    })
}

/// Seccomp filter, AppArmor profile. What can't be applied is refused.
fn profiles(
    f: &ContainerFacts<'_>,
    context: &LinuxContainerSecurityContext,
) -> Result<(Seccomp, Option<String>), SpecError> {
    #[allow(deprecated)] // Older clients use nothing else.
    let seccomp = security::seccomp(AT, context.seccomp.as_ref(), &context.seccomp_profile_path)?;
    let seccomp = security::seccomp_of_container(AT, &seccomp, context.seccomp.is_some(), context.privileged);
    #[allow(deprecated)]
    let (new, old) = (context.apparmor.as_ref(), &context.apparmor_profile);
    let apparmor = apparmor::of_container(AT, new, old, context.privileged, f.apparmor, f.host)?;
    Ok((seccomp, apparmor))
}

/// The PID namespace. Network and IPC are the pod's; asking for the node's is an error in any other pod.
fn namespaces(
    context: &LinuxContainerSecurityContext,
    pod_config: &cri::PodSandboxConfig,
    host_network: bool,
    host_ipc: bool,
) -> Result<PidNamespace, SpecError> {
    let Some(options) = &context.namespace_options else { return Ok(PidNamespace::Pod) };
    let field = format!("{AT}.namespace_options");
    pod::namespace_options(&field, options, false)?;
    user_namespace::same_as_pod(&field, options.userns_options.as_ref(), pod_config)?;
    let user_namespace = user_namespace::requested(pod_config).is_some();
    if user_namespace && options.pid() == cri::NamespaceMode::Node {
        let message = "the node's namespace does not go with a user namespace of the pod";
        return Err(SpecError::invalid(format!("{field}.pid"), "NODE", message));
    }
    let node = cri::NamespaceMode::Node as i32;
    for (name, mode, host) in [("network", options.network, host_network), ("ipc", options.ipc, host_ipc)] {
        if mode == node && !host {
            let message = "the pod has a namespace of its own";
            return Err(SpecError::precondition(format!("{field}.{name}"), "NODE", message));
        }
    }
    Ok(match options.pid() {
        cri::NamespaceMode::Container => PidNamespace::Container,
        cri::NamespaceMode::Node => PidNamespace::Node,
        cri::NamespaceMode::Pod => PidNamespace::Pod,
        cri::NamespaceMode::Target => PidNamespace::Target,
    })
}

/// Limits that hold for a new container, where none has been set before.
fn limits(
    f: &ContainerFacts<'_>,
    request: Option<&cri::LinuxContainerResources>,
) -> Result<Resources, SpecError> {
    let field = "config.linux.resources";
    let resources = resources(field, request)?;
    if let (Some(swap @ 1..), None) = (resources.memory_swap_limit, resources.memory_limit) {
        let message = "needs memory_limit_in_bytes";
        return Err(SpecError::invalid(format!("{field}.memory_swap_limit_in_bytes"), swap, message));
    }
    if let Some((key, value)) = resources.unified.first_key_value()
        && !f.v2
    {
        let message = "needs cgroup v2, which does not control resources on this host";
        return Err(SpecError::precondition(format!("{field}.unified[{key:?}]"), value, message));
    }
    Ok(resources)
}

/// Masked or read-only paths, cleaned; a privileged container has none.
fn paths(name: &str, paths: &[String], privileged: bool) -> Result<Vec<String>, SpecError> {
    let field = format!("{AT}.{name}");
    text::at_most(&field, paths.len(), 1024)?;
    let mut all = Vec::with_capacity(paths.len());
    for (i, path) in paths.iter().enumerate() {
        let field = format!("{field}[{i}]");
        text::absolute_without_dotdot(&field, path)?;
        let path = text::clean(path);
        if path == "/" {
            return Err(SpecError::invalid(field, path, "would cover everything"));
        }
        all.push(path);
    }
    Ok(if privileged { Vec::new() } else { all })
}
