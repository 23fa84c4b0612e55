//! Kernel parameters of a pod.

use std::collections::{BTreeMap, HashSet};

use stave_cri_proto::v1::{NamespaceMode, PodSandboxConfig};

use crate::text::at_most;
use crate::{SpecError, user_namespace};

/// The parameters of the IPC namespace (ipc/ipc_sysctl.c of the kernel).
const IPC: &[&str] = &[
    "kernel.auto_msgmni",
    "kernel.msg_next_id",
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.sem_next_id",
    "kernel.shm_next_id",
    "kernel.shm_rmid_forced",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
];

/// Its value is in ids of groups, and the default in those of the node: it is written from outside of a pod's user
/// namespace.
const PING: &str = "net.ipv4.ping_group_range";

/// What a pod with a network namespace of its own gets unless its config names it: no port is
/// privileged, and everybody may ping.
pub const NETWORK_DEFAULTS: &[(&str, &str)] =
    &[("net.ipv4.ip_unprivileged_port_start", "0"), (PING, "0 2147483647")];

/// The sysctls to set in a pod's namespaces, dotted: those of the config, and the defaults that it
/// does not name. The config has passed [`crate::validate_pod`].
pub fn default_sysctls(config: &PodSandboxConfig) -> BTreeMap<String, String> {
    let (host_network, _) = host_namespaces(config);
    let mut all = BTreeMap::new();
    if !host_network {
        all.extend(NETWORK_DEFAULTS.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    }
    if let Some(linux) = &config.linux {
        all.extend(linux.sysctls.iter().map(|(name, value)| {
            let name = dotted(name);
            let value = match name.as_str() {
                // Validated, so there is no error.
                PING => user_namespace::ping_group_range(value, config).unwrap_or_else(|_| value.clone()),
                _ => value.clone(),
            };
            (name, value)
        }));
    }
    all
}

/// Host network, host IPC.
pub(crate) fn host_namespaces(config: &PodSandboxConfig) -> (bool, bool) {
    let options = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|context| context.namespace_options.as_ref());
    let node = NamespaceMode::Node as i32;
    options.map_or((false, false), |options| (options.network == node, options.ipc == node))
}

/// Kubernetes also writes names with slashes: where the first separator is one, the two swap roles.
fn dotted(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(i) if name.as_bytes().get(i) == Some(&b'/') => name
            .chars()
            .map(|c| match c {
                '/' => '.',
                '.' => '/',
                c => c,
            })
            .collect(),
        _ => name.to_owned(),
    }
}

/// Names and values without separators, and only parameters of the pod's own namespaces.
pub(crate) fn validate(config: &PodSandboxConfig) -> Result<(), SpecError> {
    let Some(linux) = &config.linux else { return Ok(()) };
    let (host_network, host_ipc) = host_namespaces(config);
    at_most("config.linux.sysctls", linux.sysctls.len(), 1024)?;
    let mut seen = HashSet::new();
    for (key, value) in &linux.sysctls {
        let field = format!("config.linux.sysctls[{key:?}]");
        let name = dotted(key);
        // Slashes turn into dots and back, so a path that climbs shows as an empty part.
        let climbs = name.split(['.', '/']).any(str::is_empty);
        if name.contains('/') && !climbs {
            let message = "names of interfaces with a dot are not built yet";
            return Err(SpecError::unimplemented(field, value, message));
        }
        let well_formed = name.len() <= 253
            && name.contains('.')
            && name.split('.').all(|part| {
                !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
            });
        if !well_formed {
            return Err(SpecError::invalid(field, value, "the name is not that of a sysctl"));
        }
        // The kernel takes at most a page.
        if value.len() > 4095 || value.chars().any(|c| c.is_control() && c != '\t') {
            return Err(SpecError::invalid(field, value, "must be one line of at most 4095 bytes"));
        }
        if name.starts_with("net.") {
            if host_network {
                let message = "would change the host: the pod uses the host's network";
                return Err(SpecError::invalid(field, value, message));
            }
        } else if name.starts_with("fs.mqueue.") || IPC.contains(&name.as_str()) {
            if host_ipc {
                let message = "would change the host: the pod uses the host's IPC namespace";
                return Err(SpecError::invalid(field, value, message));
            }
        } else {
            return Err(SpecError::invalid(field, value, "does not belong to a namespace of the pod"));
        }
        if name == PING {
            user_namespace::ping_group_range(value, config)?;
        }
        if !seen.insert(name) {
            return Err(SpecError::invalid(field, value, "is given twice, with dots and with slashes"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use stave_cri_proto::v1::{LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption};

    use super::*;

    fn config(sysctls: &[(&str, &str)], network: NamespaceMode, ipc: NamespaceMode) -> PodSandboxConfig {
        PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig {
                sysctls: sysctls.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(NamespaceOption {
                        network: network as i32,
                        ipc: ipc as i32,
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    const POD: NamespaceMode = NamespaceMode::Pod;
    const NODE: NamespaceMode = NamespaceMode::Node;

    #[test]
    fn defaults_only_in_a_network_of_the_pods_own() {
        let all = default_sysctls(&PodSandboxConfig::default());
        assert_eq!(all.len(), 2);
        assert_eq!(all["net.ipv4.ping_group_range"], "0 2147483647");
        let all = default_sysctls(&config(&[("net/ipv4/ip_unprivileged_port_start", "1024")], POD, POD));
        assert_eq!(all["net.ipv4.ip_unprivileged_port_start"], "1024");
        assert_eq!(all.len(), 2);
        assert!(default_sysctls(&config(&[], NODE, POD)).is_empty());
    }

    #[test]
    fn accepts_parameters_of_the_pods_namespaces() {
        let all = [
            ("net.ipv4.tcp_rmem", "4096\t87380 6291456"),
            ("net.ipv6.conf.all.accept_ra", "0"),
            ("kernel.shm_rmid_forced", "1"),
            ("kernel/sem", "1 2 3 4"),
            ("fs.mqueue.msg_max", "100"),
        ];
        validate(&config(&all, POD, POD)).unwrap();
        // Each namespace counts for itself.
        validate(&config(&all[..2], POD, NODE)).unwrap();
        validate(&config(&all[2..], NODE, POD)).unwrap();
    }

    #[test]
    fn cve_2022_0811() {
        for (name, value) in [
            ("kernel.shm_rmid_forced", "1\nkernel.core_pattern=|/x"),
            ("kernel.shm_rmid_forced", "1\0"),
            ("kernel.shm_rmid_forced+kernel.core_pattern", "1"),
            ("net.ipv4.ip_forward=1+kernel.core_pattern", "1"),
            ("net..ipv4", "1"),
            ("net.", "1"),
            ("net", "1"),
            ("", "1"),
            ("net.ipv4. ip_forward", "1"),
            ("net/../kernel/core_pattern", "1"),
            ("net.../kernel", "1"),
            ("kernel.core_pattern", "x"),
            ("kernel.shm", "1"),
            ("kernel.shmx", "1"),
            ("kernel.hostname", "x"),
            ("vm.swappiness", "1"),
            ("fs.file-max", "1"),
        ] {
            validate(&config(&[(name, value)], POD, POD)).expect_err(name);
        }
        validate(&config(&[("kernel.sem", "1"), ("kernel/sem", "2")], POD, POD)).unwrap_err();
    }

    #[test]
    fn cve_2022_0532() {
        let error = validate(&config(&[("net.ipv4.ip_forward", "1")], NODE, POD)).unwrap_err();
        assert_eq!(error.field, "config.linux.sysctls[\"net.ipv4.ip_forward\"]");
        validate(&config(&[("net/ipv4/ip_forward", "1")], NODE, POD)).unwrap_err();
        for name in ["kernel.shm_rmid_forced", "fs.mqueue.msg_max", "kernel.sem", "kernel.msgmax"] {
            validate(&config(&[(name, "1")], POD, NODE)).expect_err(name);
        }
    }
}
