//! Removal of tracked connections that lead to where nobody answers any more. Rules count for new connections only, and
//! a UDP or SCTP sender that goes on keeps its old one for ever. Numbers: `linux/netfilter/nfnetlink_conntrack.h`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use crate::Protocol;
use crate::nft::{ACK, Attrs, DUMP, REQUEST, attributes, dump, message, request};
use crate::ports::PortMapping;
use crate::subnet::octets;

const SUBSYS_CTNETLINK: u16 = 1;
const GET: u16 = 1;
const DELETE: u16 = 2;

const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const FILTER: u16 = 25;

const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const PROTO_NUMBER: u16 = 1;
const PROTO_DESTINATION_PORT: u16 = 3;

const FILTER_ORIG_FLAGS: u16 = 1;
const FILTER_REPLY_FLAGS: u16 = 2;
/// What of a tuple counts: the source; protocol and destination port.
const BY_SOURCE: u32 = 1;
const BY_PORT: u32 = 1 << 3 | 1 << 5;

/// Removes the connections that lead to a pod's address: the source of their replies.
pub(crate) fn forget(pod: IpAddr) -> io::Result<()> {
    // CTA_IP_V4_SRC, CTA_IP_V6_SRC.
    let ip = Attrs::default().bytes(if pod.is_ipv4() { 1 } else { 3 }, &octets(pod));
    let tuple = Attrs::default().nest(TUPLE_IP, &ip);
    let filter = Attrs::default().bytes(FILTER_REPLY_FLAGS, &BY_SOURCE.to_ne_bytes());
    let attrs = Attrs::default().nest(TUPLE_REPLY, &tuple).nest(FILTER, &filter);
    remove(pod.is_ipv4(), &attrs, |connection| connection.reply_source == Some(pod))
}

/// Removes the connections to a host port of this node that lead elsewhere than to the pod that has it now, but those of TCP: those
/// of senders that went on while no pod had it end at the node itself.
pub(crate) fn redirect(port: &PortMapping, pod: IpAddr) -> io::Result<()> {
    if port.protocol == Protocol::Tcp || !port.serves(pod.is_ipv4()) {
        return Ok(());
    }
    let proto = Attrs::default()
        .bytes(PROTO_NUMBER, &[port.protocol.number()])
        .bytes(PROTO_DESTINATION_PORT, &port.host_port.to_be_bytes());
    let tuple = Attrs::default().nest(TUPLE_PROTO, &proto);
    let filter = Attrs::default().bytes(FILTER_ORIG_FLAGS, &BY_PORT.to_ne_bytes());
    let attrs = Attrs::default().nest(TUPLE_ORIG, &tuple).nest(FILTER, &filter);
    remove(pod.is_ipv4(), &attrs, |connection| {
        connection.protocol == Some(port.protocol.number())
            && connection.port == Some(port.host_port)
            && connection.reply_source != Some(pod)
            && connection
                .destination
                .is_some_and(|ip| port.address().map_or_else(|| is_local(ip), |a| a == ip))
    })
}

/// Only the node's own addresses can be bound to.
fn is_local(ip: IpAddr) -> bool {
    UdpSocket::bind((ip, 0)).is_ok()
}

/// The facts of a tracked connection that count here.
#[derive(Debug, Default, PartialEq, Eq)]
struct Connection {
    protocol: Option<u8>,
    /// as the sender knows them
    destination: Option<IpAddr>,
    port: Option<u16>,
    reply_source: Option<IpAddr>,
}

/// Lists the connections that the attributes ask for, and removes those that are meant, one by one. Kernels filter a
/// list since 5.8 (before, they give all), but a removal only since 6.12.
fn remove(v4: bool, attrs: &Attrs, meant: impl Fn(&Connection) -> bool) -> io::Result<()> {
    // AF_INET, AF_INET6; version 1: the family counts.
    let family = [if v4 { 2 } else { 10 }, 1];
    let mut list = Vec::new();
    message(&mut list, (SUBSYS_CTNETLINK << 8) | GET, REQUEST | DUMP, 1, family, 0, attrs);
    let mut found = Vec::new();
    dump(&list, |_, connection| {
        if meant(&connection_of(connection)) {
            found.push(identity(connection));
        }
    })?;
    for identity in found {
        let mut bytes = Vec::new();
        message(&mut bytes, (SUBSYS_CTNETLINK << 8) | DELETE, REQUEST | ACK, 1, family, 0, &identity);
        match request(&bytes) {
            // It has ended meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result?,
        }
    }
    Ok(())
}

fn connection_of(bytes: &[u8]) -> Connection {
    let mut connection = Connection::default();
    for (kind, tuple) in attributes(bytes) {
        match kind {
            TUPLE_ORIG => {
                (_, connection.destination) = addresses(tuple);
                for (kind, value) in nested(tuple, TUPLE_PROTO).into_iter().flat_map(attributes) {
                    match kind {
                        PROTO_NUMBER => connection.protocol = value.first().copied(),
                        PROTO_DESTINATION_PORT => {
                            connection.port = value.try_into().ok().map(u16::from_be_bytes);
                        }
                        _ => {}
                    }
                }
            }
            TUPLE_REPLY => (connection.reply_source, _) = addresses(tuple),
            _ => {}
        }
    }
    connection
}

/// Source and destination of a tuple.
fn addresses(tuple: &[u8]) -> (Option<IpAddr>, Option<IpAddr>) {
    let (mut source, mut destination) = (None, None);
    for (kind, value) in nested(tuple, TUPLE_IP).into_iter().flat_map(attributes) {
        let v4 = <[u8; 4]>::try_from(value).ok().map(|octets| IpAddr::from(Ipv4Addr::from(octets)));
        let v6 = <[u8; 16]>::try_from(value).ok().map(|octets| IpAddr::from(Ipv6Addr::from(octets)));
        match kind {
            1 | 3 => source = v4.or(v6),
            2 | 4 => destination = v4.or(v6),
            _ => {}
        }
    }
    (source, destination)
}

/// What a removal takes to mean just this connection.
fn identity(bytes: &[u8]) -> Attrs {
    attributes(bytes).filter(|(kind, _)| matches!(*kind, TUPLE_ORIG | ID | ZONE)).fold(
        Attrs::default(),
        |attrs, (kind, value)| {
            if kind == TUPLE_ORIG { attrs.nested_bytes(kind, value) } else { attrs.bytes(kind, value) }
        },
    )
}

fn nested(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_takes_the_filters() {
        // Documentation addresses, and a port that nobody has: nothing here talks to them.
        let (v4, v6) = ("192.0.2.250".parse().unwrap(), "2001:db8::250".parse().unwrap());
        for pod in [v4, v6] {
            forget(pod).unwrap();
            let port =
                PortMapping { protocol: Protocol::Udp, container_port: 1, host_port: 1, host_ip: Some(pod) };
            redirect(&port, pod).unwrap();
        }
    }

    #[test]
    fn rubbish_is_read_safely() {
        for len in 0..64 {
            for byte in [0x00, 0x04, 0x08, 0x10, 0xff] {
                let bytes = vec![byte; len];
                assert_eq!(connection_of(&bytes), Connection::default());
                let _ = identity(&bytes);
            }
        }
    }
}
