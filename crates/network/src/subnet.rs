use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A network and its prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Subnet {
    network: IpAddr,
    prefix: u8,
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)),
        IpAddr::V6(ip) => u128::from(ip),
    }
}

impl Subnet {
    /// The network that an address with a prefix length lies in; host bits are dropped.
    pub(crate) fn of(ip: IpAddr, prefix: u8) -> Option<Self> {
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        if prefix > bits {
            return None;
        }
        let host = u32::from(bits - prefix);
        let network = number(ip).checked_shr(host).and_then(|n| n.checked_shl(host)).unwrap_or(0);
        Some(Self { network: address(network, ip.is_ipv4()), prefix })
    }

    /// Reads a subnet for pods, such as `10.88.0.0/16`. The error is the reason.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (ip, prefix) = text.split_once('/').ok_or("not of the form ADDRESS/PREFIX")?;
        let ip: IpAddr = ip.parse().map_err(|_| "not an IPv4 or IPv6 address")?;
        let prefix: u8 = prefix.parse().map_err(|_| "the prefix length is not a number")?;
        let subnet = Self::of(ip, prefix).ok_or("the prefix is longer than the address")?;
        if subnet.network != ip {
            return Err(format!("has host bits set; the network is {subnet}"));
        }
        let (low, high) = if ip.is_ipv4() { (8, 30) } else { (16, 126) };
        if !(low..=high).contains(&prefix) {
            return Err(format!("the prefix length must be between {low} and {high}"));
        }
        let special = match ip {
            IpAddr::V4(ip) => {
                ip.is_loopback() || ip.is_multicast() || ip.is_link_local() || ip.octets()[0] == 0
            }
            IpAddr::V6(ip) => {
                ip.is_loopback() || ip.is_multicast() || ip.is_unicast_link_local() || ip.is_unspecified()
            }
        };
        if special {
            return Err("not an address range for hosts".into());
        }
        Ok(subnet)
    }

    pub(crate) fn network(&self) -> IpAddr {
        self.network
    }

    pub(crate) fn prefix(&self) -> u8 {
        self.prefix
    }

    pub(crate) fn is_ipv4(&self) -> bool {
        self.network.is_ipv4()
    }

    fn host_bits(&self) -> u32 {
        let bits = if self.is_ipv4() { 32 } else { 128 };
        bits - u32::from(self.prefix)
    }

    /// The netmask, as long as the address.
    pub(crate) fn mask(&self) -> IpAddr {
        let host = self.host_bits();
        let ones = if self.is_ipv4() { u128::from(u32::MAX) } else { u128::MAX };
        let mask = ones.checked_shr(host).and_then(|n| n.checked_shl(host)).unwrap_or(0);
        address(mask, self.is_ipv4())
    }

    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        if self.is_ipv4() != other.is_ipv4() {
            return false;
        }
        let prefix = self.prefix.min(other.prefix);
        Self::of(self.network, prefix) == Self::of(other.network, prefix)
    }

    /// The first address: the bridge's own.
    pub(crate) fn gateway(&self) -> IpAddr {
        address(number(self.network) + 1, self.is_ipv4())
    }

    /// How many addresses pods can have: all but network (IPv6: the anycast address), gateway and broadcast.
    pub(crate) fn size(&self) -> u128 {
        let all = 1u128.checked_shl(self.host_bits()).unwrap_or(u128::MAX);
        all.saturating_sub(if self.is_ipv4() { 3 } else { 2 })
    }

    /// The pod address number `n`, from 0; wraps around at the end.
    pub(crate) fn pod_address(&self, n: u128) -> IpAddr {
        address(number(self.network) + 2 + n % self.size(), self.is_ipv4())
    }

    /// The number of a pod address.
    pub(crate) fn pod_number(&self, ip: IpAddr) -> Option<u128> {
        let inside = ip.is_ipv4() == self.is_ipv4() && Self::of(ip, self.prefix) == Some(*self);
        let n = number(ip).checked_sub(number(self.network) + 2).filter(|_| inside)?;
        (n < self.size()).then_some(n)
    }
}

fn address(n: u128, v4: bool) -> IpAddr {
    match u32::try_from(n) {
        Ok(n) if v4 => Ipv4Addr::from(n).into(),
        _ => Ipv6Addr::from(n).into(),
    }
}

/// Octets in network order.
pub(crate) fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_and_refuses() {
        let subnet = Subnet::parse("10.88.0.0/16").unwrap();
        assert_eq!(subnet.to_string(), "10.88.0.0/16");
        assert_eq!(subnet.gateway().to_string(), "10.88.0.1");
        assert_eq!(subnet.mask().to_string(), "255.255.0.0");
        assert_eq!(subnet.size(), 65533);
        let v6 = Subnet::parse("fd00:88::/64").unwrap();
        assert_eq!(v6.gateway().to_string(), "fd00:88::1");
        assert_eq!(v6.mask().to_string(), "ffff:ffff:ffff:ffff::");
        for bad in [
            "",
            "10.0.0.0",
            "10.0.0.1/24",
            "10.0.0.0/33",
            "10.0.0.0/31",
            "0.0.0.0/8",
            "127.0.0.0/8",
            "224.0.0.0/8",
            "fe80::/64",
            "ff00::/16",
            "::/64",
            "fd00::/127",
            "x/8",
            "10.0.0.0/x",
            "10.0.0.0/-1",
        ] {
            assert!(Subnet::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_of_pods() {
        let subnet = Subnet::parse("10.1.2.0/29").unwrap();
        let all: Vec<String> = (0..6).map(|n| subnet.pod_address(n).to_string()).collect();
        assert_eq!(all, ["10.1.2.2", "10.1.2.3", "10.1.2.4", "10.1.2.5", "10.1.2.6", "10.1.2.2"]);
        assert_eq!(subnet.pod_number("10.1.2.6".parse().unwrap()), Some(4));
        for outside in ["10.1.2.0", "10.1.2.1", "10.1.2.7", "10.1.3.2", "::2"] {
            assert_eq!(subnet.pod_number(outside.parse().unwrap()), None, "{outside}");
        }
        let v6 = Subnet::parse("fd00::/126").unwrap();
        assert_eq!((v6.size(), v6.pod_address(1).to_string()), (2, "fd00::3".into()));
    }

    #[test]
    fn overlap() {
        let of = |text: &str| {
            let (ip, prefix) = text.split_once('/').unwrap();
            Subnet::of(ip.parse().unwrap(), prefix.parse().unwrap()).unwrap()
        };
        assert!(of("10.88.0.0/16").overlaps(&of("10.88.3.7/24")));
        assert!(of("10.88.3.0/24").overlaps(&of("10.0.0.0/8")));
        assert!(!of("10.88.0.0/16").overlaps(&of("10.89.0.0/16")));
        assert!(!of("10.88.0.0/16").overlaps(&of("::/0")));
        assert!(of("fd00::/64").overlaps(&of("::/0")));
    }
}
