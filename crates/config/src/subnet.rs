use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// An IP network in CIDR form, with no host bits set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Subnet {
    address: IpAddr,
    prefix: u8,
}

impl Subnet {
    /// The network's address; its host bits are 0.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// The prefix length in bits.
    pub fn prefix_len(&self) -> u8 {
        self.prefix
    }

    /// Whether `address` is in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.address.is_ipv4() == address.is_ipv4() && network(address, self.prefix) == self.address
    }

    /// A network of IPv4; host bits are cleared, a prefix over 32 counts as 32.
    pub(crate) fn v4(address: Ipv4Addr, prefix: u8) -> Subnet {
        let prefix = prefix.min(32);
        Subnet { address: network(address.into(), prefix), prefix }
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl FromStr for Subnet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, prefix) =
            text.split_once('/').ok_or("is no subnet: it lacks a prefix length, as in 10.88.0.0/16")?;
        let address: IpAddr = address.parse().map_err(|_| "is no subnet: its address is no IP address")?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        // u8::from_str takes "+8" and "08" too; a prefix length is plain digits.
        let plain = !prefix.is_empty()
            && prefix.bytes().all(|b| b.is_ascii_digit())
            && (prefix == "0" || !prefix.starts_with('0'));
        let prefix: u8 = prefix
            .parse()
            .ok()
            .filter(|prefix| plain && *prefix <= longest)
            .ok_or_else(|| format!("is no subnet: its prefix length is no number from 0 to {longest}"))?;
        let whole = network(address, prefix);
        if whole != address {
            return Err(format!("has host bits set; the subnet is {whole}/{prefix}"));
        }
        Ok(Subnet { address, prefix })
    }
}

fn network(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
            Ipv4Addr::from_bits(address.to_bits() & mask).into()
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix.min(128))).unwrap_or(0);
            Ipv6Addr::from_bits(address.to_bits() & mask).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_prints() {
        for text in ["10.88.0.0/16", "0.0.0.0/0", "192.0.2.1/32", "fd00:88::/64", "::/0", "::1/128"] {
            let subnet: Subnet = text.parse().unwrap();
            assert_eq!(subnet.to_string(), text);
            assert!(subnet.contains(subnet.address()));
        }
    }

    #[test]
    fn refuses() {
        for (text, why) in [
            ("10.88.0.0", "lacks a prefix length"),
            ("10.88.0.0/33", "0 to 32"),
            ("10.88.0.0/", "0 to 32"),
            ("10.88.0.0/+8", "0 to 32"),
            ("10.88.0.0/08", "0 to 32"),
            ("10.88/16", "no IP address"),
            ("fd00::/129", "0 to 128"),
            ("10.88.0.1/16", "the subnet is 10.88.0.0/16"),
            ("fd00::1/64", "the subnet is fd00::/64"),
        ] {
            let err = text.parse::<Subnet>().unwrap_err();
            assert!(err.contains(why), "{text}: {err}");
        }
    }

    #[test]
    fn contains_its_own_only() {
        let subnet: Subnet = "10.88.0.0/16".parse().unwrap();
        assert!(subnet.contains("10.88.255.255".parse().unwrap()));
        assert!(!subnet.contains("10.89.0.0".parse().unwrap()));
        assert!(!subnet.contains("::ffff:10.88.0.1".parse().unwrap()));
    }
}
