//! Removal of tracked connections. Numbers: `linux/netfilter/nfnetlink_conntrack.h`.

use std::io;
use std::net::IpAddr;

use crate::nft::{ACK, Attrs, REQUEST, message, request};
use crate::subnet::octets;

const SUBSYS_CTNETLINK: u16 = 1;
const DELETE: u16 = 2;
const TUPLE_REPLY: u16 = 2;
const TUPLE_IP: u16 = 1;
const FILTER: u16 = 25;
const FILTER_REPLY_FLAGS: u16 = 2;
/// The reply's source counts, and nothing else of the tuple.
const FILTER_IP_SRC: u32 = 1;

/// Removes the connections that lead to a pod's address: the source of their replies. Kernels that can't filter a
/// removal refuse the incomplete tuple, so nothing else can go.
pub(crate) fn forget(pod: IpAddr) -> io::Result<()> {
    // AF_INET and CTA_IP_V4_SRC, AF_INET6 and CTA_IP_V6_SRC.
    let (family, source) = if pod.is_ipv4() { (2, 1) } else { (10, 3) };
    let ip = Attrs::default().bytes(source, &octets(pod));
    let filter = Attrs::default().bytes(FILTER_REPLY_FLAGS, &FILTER_IP_SRC.to_ne_bytes());
    let attrs =
        Attrs::default().nest(TUPLE_REPLY, &Attrs::default().nest(TUPLE_IP, &ip)).nest(FILTER, &filter);
    let mut bytes = Vec::new();
    // Version 1: the family counts.
    message(&mut bytes, (SUBSYS_CTNETLINK << 8) | DELETE, REQUEST | ACK, 1, [family, 1], 0, &attrs);
    request(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_takes_the_filter() {
        // Documentation addresses: nothing here talks to them.
        forget("192.0.2.250".parse().unwrap()).unwrap();
        forget("2001:db8::250".parse().unwrap()).unwrap();
    }
}
