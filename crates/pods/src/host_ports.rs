//! The host ports of pods, in whatever mode the network is.

use std::collections::HashMap;
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

/// Mappings by what two must share to conflict: a pod may have thousands.
#[derive(Default)]
struct ByPort<'a>(HashMap<(Protocol, u16), Vec<&'a PortMapping>>);

impl<'a> ByPort<'a> {
    fn conflicts(&self, port: &PortMapping) -> bool {
        let same = self.0.get(&(port.protocol, port.host_port));
        same.is_some_and(|same| same.iter().any(|other| other.conflicts(port)))
    }

    fn add(&mut self, port: &'a PortMapping) {
        self.0.entry((port.protocol, port.host_port)).or_default().push(port);
    }
}

/// Fails on a pod that asks for one host port twice.
pub(crate) fn check_once(ports: &[PortMapping]) -> Result<()> {
    let mut seen = ByPort::default();
    for port in ports {
        if seen.conflicts(port) {
            let PortMapping { host_port, protocol, .. } = port;
            let message =
                format!("config.port_mappings: the pod asks for host port {host_port}/{protocol} twice");
            return Err(Error::new(Code::InvalidArgument, message));
        }
        seen.add(port);
    }
    Ok(())
}

/// An error that names the pod which has one of these host ports.
pub(crate) fn in_use<'a>(pods: impl Iterator<Item = &'a Arc<Pod>>, ports: &[PortMapping]) -> Option<Error> {
    if ports.is_empty() {
        return None;
    }
    let mut wanted = ByPort::default();
    ports.iter().for_each(|port| wanted.add(port));
    pods.into_iter().find_map(|pod| {
        pod.with(|record| {
            if record.torn_down || record.host_network() {
                return None;
            }
            let theirs = port_mappings(&record.config).ok()?;
            let PortMapping { host_port, protocol, .. } =
                theirs.iter().find(|port| wanted.conflicts(port))?;
            let metadata = record.config.metadata.clone().unwrap_or_default();
            let message = format!(
                "config.port_mappings: host port {host_port}/{protocol} is in use by pod {}/{} ({})",
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

    #[test]
    fn one_port_is_asked_for_once() {
        let port = |protocol, host_port, host_ip: &str| PortMapping {
            protocol,
            container_port: 80,
            host_port,
            host_ip: host_ip.parse().ok(),
        };
        let (tcp, udp) = (Protocol::Tcp, Protocol::Udp);
        let apart =
            [port(tcp, 1, "192.0.2.1"), port(tcp, 1, "192.0.2.2"), port(udp, 1, ""), port(tcp, 2, "")];
        check_once(&apart).unwrap();
        let error = check_once(&[&apart[..], &[port(tcp, 1, "")]].concat()).unwrap_err();
        assert!(error.code == Code::InvalidArgument && error.message.contains("1/tcp"), "{}", error.message);
    }
}
