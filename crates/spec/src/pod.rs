//! Validation of a pod's config.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use stave_cri_proto::v1::{
    LinuxPodSandboxConfig, NamespaceMode, NamespaceOption, PodSandboxConfig, PortMapping, Protocol,
};

use crate::text::{absolute_without_dotdot, at_most, no_control, no_nul};
use crate::{
    SpecError, apparmor, dns, log_path, security, selinux, sysctl, time_offsets, user, user_namespace,
};

/// Longest hostname of the kernel (`__NEW_UTS_LEN`).
const HOSTNAME_MAX: usize = 64;

/// Bytes of all labels, and of all annotations. Kubernetes allows 256 KiB of annotations.
const MAP_MAX: usize = 1 << 20;

/// Checks everything in a pod's config that Stave acts on. Resources and overhead of a pod are
/// information only (its cgroup is the kubelet's), so they are not looked at.
pub fn validate_pod(config: &PodSandboxConfig) -> Result<(), SpecError> {
    let metadata =
        config.metadata.as_ref().ok_or_else(|| SpecError::invalid("config.metadata", "", "is required"))?;
    name("config.metadata.name", &metadata.name)?;
    name("config.metadata.namespace", &metadata.namespace)?;
    name("config.metadata.uid", &metadata.uid)?;
    hostname(&config.hostname)?;
    log_path::validate_log_directory(&config.log_directory)?;
    if let Some(dns) = &config.dns_config {
        dns::validate(dns)?;
    }
    port_mappings(&config.port_mappings)?;
    map("config.labels", &config.labels)?;
    map("config.annotations", &config.annotations)?;
    time_offsets::time_namespace(config)?;
    if let Some(linux) = &config.linux {
        validate_linux(linux)?;
    }
    sysctl::validate(config)
}

fn validate_linux(linux: &LinuxPodSandboxConfig) -> Result<(), SpecError> {
    if !linux.cgroup_parent.is_empty() {
        let field = "config.linux.cgroup_parent";
        no_control(field, &linux.cgroup_parent)?;
        // The systemd driver also gets the bare name of a slice.
        let path = format!("/{}", linux.cgroup_parent);
        absolute_without_dotdot(field, &path)
            .map_err(|e| SpecError::invalid(field, &linux.cgroup_parent, e.message))?;
    }
    let Some(context) = &linux.security_context else { return Ok(()) };
    let at = "config.linux.security_context";
    if let Some(options) = &context.namespace_options {
        namespace_options(&format!("{at}.namespace_options"), options, true)?;
    }
    // The kubelet sends a group without a user for pods; only containers need both.
    user::id(&format!("{at}.run_as_user"), context.run_as_user.as_ref())?;
    user::id(&format!("{at}.run_as_group"), context.run_as_group.as_ref())?;
    user::groups(&format!("{at}.supplemental_groups"), &context.supplemental_groups)?;
    user::policy(&format!("{at}.supplemental_groups_policy"), context.supplemental_groups_policy)?;
    // No program of an image runs in the sandbox itself, so its profiles are checked, not used.
    #[allow(deprecated)] // Older clients use nothing else.
    security::seccomp(at, context.seccomp.as_ref(), &context.seccomp_profile_path)?;
    apparmor::validate(at, context.apparmor.as_ref())?;
    if let Some(options) = &context.selinux_options {
        selinux::validate(&format!("{at}.selinux_options"), options)?;
    }
    Ok(())
}

/// Modes that the CRI allows. A pod has no target, and PID CONTAINER means the same as POD for it.
pub(crate) fn namespace_options(field: &str, options: &NamespaceOption, pod: bool) -> Result<(), SpecError> {
    for (name, value) in [("network", options.network), ("ipc", options.ipc), ("pid", options.pid)] {
        let field = format!("{field}.{name}");
        let mode = NamespaceMode::try_from(value)
            .map_err(|_| SpecError::invalid(&field, value, "is not a namespace mode"))?;
        match mode {
            NamespaceMode::Pod | NamespaceMode::Node => {}
            NamespaceMode::Container if name == "pid" => {}
            NamespaceMode::Target if name == "pid" && !pod => {}
            mode => {
                return Err(SpecError::invalid(field, mode.as_str_name(), "is not a mode of this namespace"));
            }
        }
    }
    let needs = match (options.pid() == NamespaceMode::Target, options.target_id.is_empty()) {
        (true, true) => Some("is required with pid TARGET"),
        (false, false) => Some("only goes with pid TARGET"),
        _ => None,
    };
    if let Some(message) = needs {
        return Err(SpecError::invalid(format!("{field}.target_id"), &options.target_id, message));
    }
    user_namespace::validate(field, options)
}

/// A name of metadata: becomes part of log lines and of paths.
pub(crate) fn name(field: &str, value: &str) -> Result<(), SpecError> {
    if value.is_empty() {
        return Err(SpecError::invalid(field, value, "is required"));
    }
    no_control(field, value)?;
    if value.len() > 253 || value.contains('/') || value == "." || value == ".." {
        let message = "must be a name of at most 253 bytes without \"/\"";
        return Err(SpecError::invalid(field, value, message));
    }
    Ok(())
}

/// Empty, or a DNS name: labels of letters, digits and inner hyphens.
fn hostname(value: &str) -> Result<(), SpecError> {
    let field = "config.hostname";
    if value.is_empty() {
        return Ok(());
    }
    if value.len() > HOSTNAME_MAX {
        return Err(SpecError::invalid(field, value, format!("is longer than {HOSTNAME_MAX} bytes")));
    }
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if !value.split('.').all(label) {
        return Err(SpecError::invalid(field, value, "is not a DNS name"));
    }
    Ok(())
}

fn port_mappings(mappings: &[PortMapping]) -> Result<(), SpecError> {
    at_most("config.port_mappings", mappings.len(), 65536)?;
    let mut host_ports = HashSet::new();
    for (i, mapping) in mappings.iter().enumerate() {
        let field = |name: &str| format!("config.port_mappings[{i}].{name}");
        if Protocol::try_from(mapping.protocol).is_err() {
            return Err(SpecError::invalid(
                field("protocol"),
                mapping.protocol,
                "is not a protocol of the CRI",
            ));
        }
        if !(1..=65535).contains(&mapping.container_port) {
            return Err(SpecError::invalid(
                field("container_port"),
                mapping.container_port,
                "must be between 1 and 65535",
            ));
        }
        if !(0..=65535).contains(&mapping.host_port) {
            return Err(SpecError::invalid(
                field("host_port"),
                mapping.host_port,
                "must be between 0 (none) and 65535",
            ));
        }
        if !mapping.host_ip.is_empty() && mapping.host_ip.parse::<IpAddr>().is_err() {
            return Err(SpecError::invalid(field("host_ip"), &mapping.host_ip, "must be an IP address"));
        }
        if mapping.host_port != 0
            && !host_ports.insert((mapping.protocol, mapping.host_ip.as_str(), mapping.host_port))
        {
            return Err(SpecError::invalid(field("host_port"), mapping.host_port, "is mapped twice"));
        }
    }
    Ok(())
}

/// Labels or annotations: they come back unaltered, so only what no one can mean is refused.
pub(crate) fn map(field: &str, map: &HashMap<String, String>) -> Result<(), SpecError> {
    let mut bytes = 0;
    for (key, value) in map {
        if key.is_empty() {
            return Err(SpecError::invalid(field, value, "has an empty key"));
        }
        no_control(&format!("{field} key"), key)?;
        no_nul(&format!("{field}[{key:?}]"), value)?;
        bytes += key.len() + value.len();
    }
    if bytes > MAP_MAX {
        return Err(SpecError::invalid(
            field,
            format!("{bytes} bytes"),
            format!("is larger than {MAP_MAX} bytes"),
        ));
    }
    Ok(())
}
