//! The rules of our table.

use std::net::IpAddr;

use crate::bridge::LINK_PREFIX;
use crate::leases::Lease;
use crate::nft::{ACCEPT, Batch, DROP, Family, JUMP, Meta, Rule};
use crate::ports::PortMapping;
use crate::subnet::{Subnet, octets};

/// Hook numbers (`enum nf_inet_hooks`).
const PREROUTING: u32 = 0;
const FORWARD: u32 = 2;
const OUTPUT: u32 = 3;
const POSTROUTING: u32 = 4;

/// Offsets of source and destination in the IPv4 and IPv6 headers.
const SOURCE: [u32; 2] = [12, 8];
const DESTINATION: [u32; 2] = [16, 24];

const HOST_PORTS: &str = "host-ports";

const EGRESS: &str = "egress";
const ICMPV6: u8 = 58;
/// Query, report, done, report of version 2 (RFC 2710, RFC 3810).
const MULTICAST_LISTENER: [u8; 4] = [130, 131, 132, 143];
/// What the kernel can count with, in bits a second: it multiplies by nanoseconds. No veth is that fast.
const COUNTABLE: u64 = 80_000_000_000;
/// So many bytes may come at once, at least: packets of up to 64 KiB pass a veth whole. The kernel adds what the rate gives
/// in a second.
const LEAST_BURST: u64 = 256 << 10;

/// Name of the table of a bridge.
pub(crate) fn table(bridge: &str) -> String {
    format!("stave-{bridge}")
}

fn at(offsets: [u32; 2], v4: bool) -> u32 {
    if v4 { offsets[0] } else { offsets[1] }
}

/// NFPROTO_IPV4 or NFPROTO_IPV6.
fn family(v4: bool) -> u8 {
    if v4 { 2 } else { 10 }
}

fn of_family(v4: bool) -> Rule {
    Rule::default().meta_is(Meta::Nfproto, family(v4))
}

/// The whole table: replaces what is there in one step.
pub(crate) fn whole(bridge: &str, subnets: &[Subnet], leases: &[Lease]) -> Batch {
    let table = &table(bridge);
    let mut batch = Batch::default();
    // The first makes the removal legal where there is no table yet.
    batch.new_table(table);
    batch.delete_table(table);
    batch.new_table(table);

    // route_localnet lets pods send to 127.0.0.0/8 of the host (CVE-2020-8558): drop that before
    // address translation, when answers to forwarded connections still bear the bridge's address.
    batch.chain(table, "guard", Some(("filter", PREROUTING, -300)));
    for offset in [SOURCE[0], DESTINATION[0]] {
        let rule = of_family(true).interface(Meta::Iifname, false, bridge);
        batch.rule(
            table,
            "guard",
            rule.network_masked(offset, false, &[255, 0, 0, 0], &[127, 0, 0, 0]).verdict(DROP, None),
        );
    }

    batch.chain(table, "forward", Some(("filter", FORWARD, 0)));
    for key in [Meta::Iifname, Meta::Oifname] {
        batch.rule(table, "forward", Rule::default().interface(key, false, bridge).verdict(ACCEPT, None));
    }

    batch.chain(table, HOST_PORTS, None);
    batch.chain(table, "prerouting", Some(("nat", PREROUTING, -100)));
    batch.chain(table, "output", Some(("nat", OUTPUT, -100)));
    // What comes from outside for 127.0.0.0/8 is a martian, which the kernel drops when it is routed: not after it was sent
    // on to a pod. What this host sends there has been through the output chain.
    let martian = of_family(true).network_masked(DESTINATION[0], false, &[255, 0, 0, 0], &[127, 0, 0, 0]);
    batch.rule(table, "prerouting", martian.verdict(ACCEPT, None));
    for chain in ["prerouting", "output"] {
        batch.rule(table, chain, Rule::default().verdict(JUMP, Some(HOST_PORTS)));
    }

    batch.chain(table, "postrouting", Some(("nat", POSTROUTING, 100)));
    for subnet in subnets {
        let v4 = subnet.is_ipv4();
        let (network, mask) = (octets(subnet.network()), octets(subnet.mask()));
        let from_pods = || of_family(v4).network_masked(at(SOURCE, v4), false, &mask, &network);
        let elsewhere = from_pods().network_masked(at(DESTINATION, v4), true, &mask, &network).interface(
            Meta::Oifname,
            true,
            bridge,
        );
        batch.rule(table, "postrouting", elsewhere.masquerade());
        // A pod that reaches a pod of this bridge, or itself, through a host port: the answer must come back this way.
        let hairpin = from_pods().interface(Meta::Oifname, false, bridge).was_dnat();
        batch.rule(table, "postrouting", hairpin.masquerade());
    }
    // From 127.0.0.1 through a host port: a pod can't answer to a loopback address.
    let loopback = of_family(true).interface(Meta::Oifname, false, bridge).network_masked(
        SOURCE[0],
        false,
        &[255, 0, 0, 0],
        &[127, 0, 0, 0],
    );
    batch.rule(table, "postrouting", loopback.masquerade());

    add_host_ports(&mut batch, table, leases);
    batch
}

/// The host ports of one pod more. Only adds: a batch that removes something makes the kernel wait for
/// readers, which takes a hundred times as long.
pub(crate) fn more_host_ports(bridge: &str, lease: &Lease) -> Batch {
    let mut batch = Batch::default();
    add_host_ports(&mut batch, &table(bridge), std::slice::from_ref(lease));
    batch
}

/// The host ports of all pods: replaces them in one step.
pub(crate) fn host_ports(bridge: &str, leases: &[Lease]) -> Batch {
    let table = &table(bridge);
    let mut batch = Batch::default();
    batch.flush_chain(table, HOST_PORTS);
    add_host_ports(&mut batch, table, leases);
    batch
}

/// The rules for what pods send, where the bridge gets it. Family bridge, since packets to another pod of the bridge may
/// meet no other. Replaces the table in one step; without need of it there is none.
///
/// - How much: a pod with CAP_NET_ADMIN can take the token bucket of its own end away. An honest pod, which the bucket
///   keeps below the rate, never meets these rules.
/// - `ipv6`: no reports of multicast groups. Nobody listens, and the bridge would give them to all pods.
pub(crate) fn egress(bridge: &str, ipv6: bool, leases: &[Lease]) -> Batch {
    let table = &table(bridge);
    let mut batch = Batch::of(Family::Bridge);
    batch.new_table(table);
    batch.delete_table(table);
    if ipv6 || leases.iter().any(|lease| policed(lease).is_some()) {
        egress_chain(&mut batch, table);
    }
    if ipv6 {
        for kind in MULTICAST_LISTENER {
            let rule = Rule::default().meta_is(Meta::L4proto, ICMPV6).icmp_type(kind);
            let rule = rule.interface_prefix(Meta::Iifname, LINK_PREFIX);
            batch.rule(table, EGRESS, rule.verdict(DROP, None));
        }
    }
    add_egress(&mut batch, table, leases);
    batch
}

/// The limit of one pod more.
pub(crate) fn more_egress(bridge: &str, lease: &Lease) -> Batch {
    let mut batch = Batch::of(Family::Bridge);
    egress_chain(&mut batch, &table(bridge));
    add_egress(&mut batch, &table(bridge), std::slice::from_ref(lease));
    batch
}

/// The bytes a second that a pod may send, where there is a rule for it.
pub(crate) fn policed(lease: &Lease) -> Option<u64> {
    lease.egress.filter(|bits| *bits <= COUNTABLE).map(|bits| (bits / 8).max(1))
}

fn egress_chain(batch: &mut Batch, table: &str) {
    batch.new_table(table);
    batch.chain(table, EGRESS, Some(("filter", PREROUTING, -200)));
}

fn add_egress(batch: &mut Batch, table: &str, leases: &[Lease]) {
    for lease in leases {
        let Some(bytes) = policed(lease) else { continue };
        let burst = u32::try_from(LEAST_BURST.saturating_sub(bytes)).unwrap_or_default();
        let rule = Rule::default().interface(Meta::Iifname, false, &lease.link).exceeds(bytes, burst);
        batch.rule(table, EGRESS, rule.verdict(DROP, None));
    }
}

fn add_host_ports(batch: &mut Batch, table: &str, leases: &[Lease]) {
    for lease in leases {
        for port in &lease.ports {
            for ip in lease.ips.iter().filter(|ip| port.serves(ip.is_ipv4())) {
                batch.rule(table, HOST_PORTS, host_port(port, *ip));
            }
        }
    }
}

fn host_port(port: &PortMapping, pod: IpAddr) -> Rule {
    let v4 = pod.is_ipv4();
    let rule = of_family(v4).meta_is(Meta::L4proto, port.protocol.number()).destination_port(port.host_port);
    let rule = match port.address() {
        // Only as long as it is an address of this host: else a pod could ask for what goes to any other.
        Some(ip) => rule.network(at(DESTINATION, v4), false, &octets(ip)).destination_is_local(),
        None if v4 => rule.destination_is_local(),
        // ::1 can't be forwarded: leave it to whoever listens there.
        None => {
            rule.network(DESTINATION[1], true, &std::net::Ipv6Addr::LOCALHOST.octets()).destination_is_local()
        }
    };
    rule.dnat(family(v4), &octets(pod), port.container_port)
}
