use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::NetworkError;

/// Transport protocol of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// Number in the IP header (IANA protocol numbers).
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

/// A port of the host that leads to a port of the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// transport protocol
    pub protocol: Protocol,
    /// port in the pod
    pub container_port: u16,
    /// port on the host; 0 exposes nothing
    pub host_port: u16,
    /// only this address of the host; none, or the unspecified address: all of them
    pub host_ip: Option<IpAddr>,
}

impl PortMapping {
    /// The one host address that it is for; `0.0.0.0` and `::` mean all of their family.
    pub(crate) fn address(&self) -> Option<IpAddr> {
        self.host_ip.filter(|ip| !ip.is_unspecified())
    }

    /// Whether it serves a family of addresses.
    pub(crate) fn serves(&self, v4: bool) -> bool {
        self.host_ip.is_none_or(|ip| ip.is_ipv4() == v4)
    }

    /// Whether two mappings want the same port of the host.
    pub fn conflicts(&self, other: &Self) -> bool {
        let same_address = match (self.address(), other.address()) {
            (Some(a), Some(b)) => a == b,
            (Some(a), None) => other.serves(a.is_ipv4()),
            (None, Some(b)) => self.serves(b.is_ipv4()),
            (None, None) => [true, false].iter().any(|v4| self.serves(*v4) && other.serves(*v4)),
        };
        self.protocol == other.protocol && self.host_port == other.host_port && same_address
    }
}

/// Checks a pod's mappings, and leaves out those without a host port.
pub(crate) fn check(ports: &[PortMapping], v4: bool, v6: bool) -> Result<Vec<PortMapping>, NetworkError> {
    let mut checked: Vec<PortMapping> = Vec::new();
    for port in ports.iter().filter(|p| p.host_port != 0) {
        let fail = |reason: &str| NetworkError::PortMapping {
            host_port: port.host_port,
            container_port: port.container_port,
            reason: reason.to_owned(),
        };
        if port.container_port == 0 {
            return Err(fail("the container port must not be 0"));
        }
        if !((v4 && port.serves(true)) || (v6 && port.serves(false))) {
            return Err(fail("the pod network has no subnet of the host IP's family"));
        }
        if port.host_ip == Some(IpAddr::V6(std::net::Ipv6Addr::LOCALHOST)) {
            return Err(fail("a host port on ::1 can't reach a pod"));
        }
        if port.host_ip.is_some_and(|ip| ip.is_multicast()) {
            return Err(fail("the host IP is a multicast address"));
        }
        if checked.iter().any(|other| other.conflicts(port)) {
            return Err(fail("the pod asks for this host port twice"));
        }
        checked.push(port.clone());
    }
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(host_port: u16, host_ip: &str) -> PortMapping {
        PortMapping { protocol: Protocol::Tcp, container_port: 80, host_port, host_ip: host_ip.parse().ok() }
    }

    #[test]
    fn conflicts() {
        let conflict = |a: &str, b: &str| {
            let (a, b) = (port(1, a), port(1, b));
            assert_eq!(a.conflicts(&b), b.conflicts(&a));
            a.conflicts(&b)
        };
        assert!(conflict("", "") && conflict("", "1.2.3.4") && conflict("0.0.0.0", "1.2.3.4"));
        assert!(conflict("1.2.3.4", "1.2.3.4") && conflict("", "::") && conflict("", "fd00::1"));
        assert!(
            !conflict("1.2.3.4", "1.2.3.5") && !conflict("0.0.0.0", "::") && !conflict("0.0.0.0", "fd00::1")
        );
        assert!(!port(1, "").conflicts(&port(2, "")));
        let udp = PortMapping { protocol: Protocol::Udp, ..port(1, "") };
        assert!(!udp.conflicts(&port(1, "")));
    }

    #[test]
    fn checks() {
        assert_eq!(check(&[port(0, ""), port(5, "")], true, false).unwrap(), [port(5, "")]);
        assert!(check(&[port(5, ""), port(5, "1.2.3.4")], true, false).is_err());
        assert!(check(&[port(5, "fd00::1")], true, false).is_err());
        assert!(check(&[port(5, "::1")], true, true).is_err());
        assert!(check(&[PortMapping { container_port: 0, ..port(5, "") }], true, true).is_err());
    }
}
