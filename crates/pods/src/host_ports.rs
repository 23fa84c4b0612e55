//! The host ports of pods, in whatever mode the network is.

use std::net::IpAddr;
use std::sync::Arc;

use stave_cri_proto::v1 as cri;
use stave_network::{PortMapping, Protocol};

use crate::error::{Code, Error, Result};
use crate::pod::Pod;

/// The host ports that a pod asks for. Mappings without a host port only document the container.
pub(crate) fn port_mappings(config: &cri::PodSandboxConfig) -> Result<Vec<PortMapping>> {
    let mut mappings = Vec::new();
    for (index, mapping) in config.port_mappings.iter().enumerate().filter(|(_, m)| m.host_port != 0) {
        let field = |name: &str, value: &dyn std::fmt::Debug, why: &str| {
            Error::new(
                Code::InvalidArgument,
                format!("config.port_mappings[{index}].{name} {value:?}: {why}"),
            )
        };
        let port = |name: &str, value: i32| {
            u16::try_from(value)
                .ok()
                .filter(|port| *port != 0)
                .ok_or_else(|| field(name, &value, "not a port"))
        };
        mappings.push(PortMapping {
            protocol: match mapping.protocol() {
                cri::Protocol::Tcp => Protocol::Tcp,
                cri::Protocol::Udp => Protocol::Udp,
                cri::Protocol::Sctp => Protocol::Sctp,
            },
            container_port: port("container_port", mapping.container_port)?,
            host_port: port("host_port", mapping.host_port)?,
            host_ip: match mapping.host_ip.as_str() {
                "" => None,
                // ::ffff:192.0.2.1 is an address of IPv4: so packets bear it.
                ip => Some(
                    ip.parse::<IpAddr>().map_err(|_| field("host_ip", &ip, "not an address"))?.to_canonical(),
                ),
            },
        });
    }
    Ok(mappings)
}

/// Fails on a pod that asks for one host port twice.
pub(crate) fn check_once(ports: &[PortMapping]) -> Result<()> {
    let twice = ports.iter().enumerate().find(|(at, port)| ports[..*at].iter().any(|p| p.conflicts(port)));
    let Some((_, PortMapping { host_port, protocol, .. })) = twice else { return Ok(()) };
    let message = format!("config.port_mappings: the pod asks for host port {host_port}/{protocol} twice");
    Err(Error::new(Code::InvalidArgument, message))
}

/// An error that names the pod which has one of these host ports.
pub(crate) fn in_use<'a>(pods: impl Iterator<Item = &'a Arc<Pod>>, ports: &[PortMapping]) -> Option<Error> {
    if ports.is_empty() {
        return None;
    }
    pods.into_iter().find_map(|pod| {
        pod.with(|record| {
            if record.torn_down || record.host_network() {
                return None;
            }
            let theirs = port_mappings(&record.config).ok()?;
            let port = ports.iter().find(|port| theirs.iter().any(|other| other.conflicts(port)))?;
            let (port, protocol) = (port.host_port, port.protocol);
            let metadata = record.config.metadata.clone().unwrap_or_default();
            let message = format!(
                "config.port_mappings: host port {port}/{protocol} is in use by pod {}/{} ({})",
                metadata.namespace, metadata.name, record.id
            );
            Some(Error::new(Code::FailedPrecondition, message))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_host_ip_is_one_of_ipv4() {
        let with = |host_ip: &str| {
            let mapping = cri::PortMapping {
                container_port: 80,
                host_port: 8080,
                host_ip: host_ip.to_owned(),
                ..Default::default()
            };
            port_mappings(&cri::PodSandboxConfig { port_mappings: vec![mapping], ..Default::default() })
        };
        assert_eq!(with("::ffff:192.0.2.1").unwrap(), with("192.0.2.1").unwrap());
        assert_eq!(with("").unwrap()[0].host_ip, None);
        assert_eq!(with("fd00::1").unwrap()[0].host_ip, "fd00::1".parse().ok());
        assert!(with("::1%lo").is_err());
    }
}
