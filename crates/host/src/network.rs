//! What the built-in network needs, tried in a network namespace of the probe's own.

use std::fs;
use std::io;

use nix::sched::{CloneFlags, unshare};
use rustix::net::netlink;

use crate::netlink::{Message, ROUTE, attribute, nested, request};
use crate::report::HostReport;
use crate::scratch::in_thread;

// linux/rtnetlink.h, linux/if_link.h
const RTM_NEWLINK: u16 = 16;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
// linux/netfilter/nfnetlink.h, nf_tables.h
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NFTABLES: u16 = 10;
const NEWTABLE: u16 = NFTABLES << 8;
const NEWCHAIN: u16 = NFTABLES << 8 | 3;
const NEWRULE: u16 = NFTABLES << 8 | 6;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_BRIDGE: u8 = 7;

/// A base chain.
#[derive(Clone, Copy)]
struct Chain {
    kind: &'static str,
    hook: u32,
    priority: i32,
}

/// At postrouting.
const NAT: Chain = Chain { kind: "nat", hook: 4, priority: 100 };
/// At prerouting.
const FILTER: Chain = Chain { kind: "filter", hook: 0, priority: -200 };

const NO_BUILTIN: &str = "the built-in network (mode = \"bridge\") can't be used";

pub(crate) fn probe(report: &mut HostReport) {
    link(report, "bridge", "bridge");
    link(report, "veth", "veth");
    match accepts(NFPROTO_IPV4, NAT, "masq", &[]) {
        Ok(()) => {
            report.features.nf_tables = true;
            report.ok("netfilter", "nf_tables with a NAT chain and masquerade");
            more_netfilter(report);
        }
        Err(error) => report.degraded(
            "netfilter",
            format!("nf_tables: {error}"),
            "pods of the built-in network don't reach beyond the node, host ports don't work",
        ),
    }
    sysctls(report);
}

fn in_own_network<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    in_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        work()
    })
}

fn link(report: &mut HostReport, name: &'static str, kind: &str) {
    let made = in_own_network(|| {
        let message = Message::create(RTM_NEWLINK, 1, &[0; 16])
            .attribute(IFLA_IFNAME, b"stave-probe\0")
            .attribute(IFLA_LINKINFO, &attribute(IFLA_INFO_KIND, kind.as_bytes()));
        request(ROUTE, vec![message], 1)
    });
    let works = made.is_ok();
    match made {
        Ok(()) => report.ok(name, "made"),
        Err(error) => report.degraded(name, format!("making one: {error}"), NO_BUILTIN),
    }
    match name {
        "bridge" => report.features.bridge = works,
        _ => report.features.veth = works,
    }
}

/// What some pods need beyond that.
fn more_netfilter(report: &mut HostReport) {
    // Destination register, result and flags: the address type of the destination.
    let fib = [(1, 1u32), (2, 3), (3, 2)].map(|(kind, value)| attribute(kind, &value.to_be_bytes()));
    match accepts(NFPROTO_IPV4, FILTER, "fib", &fib) {
        Ok(()) => report.ok("netfilter fib", "rules for addresses of the node"),
        Err(error) => report.degraded(
            "netfilter fib",
            format!("nft_fib: {error}"),
            "pods of the built-in network with a host port on one address (hostIP) don't start",
        ),
    }
    // Rate and unit, in seconds.
    let limit = [attribute(1, &1000u64.to_be_bytes()), attribute(2, &1u64.to_be_bytes())];
    match accepts(NFPROTO_BRIDGE, FILTER, "limit", &limit) {
        Ok(()) => report.ok("netfilter of bridges", "rules with a limit"),
        Err(error) => report.ok_with_cost(
            "netfilter of bridges",
            format!("nf_tables of family bridge: {error}"),
            "pods with CAP_NET_ADMIN can lift their egress limit, and with IPv6 each pod that starts costs the others something",
        ),
    }
}

/// Whether the kernel takes a rule of one expression with these attributes, tried in a table of a network namespace of its own.
fn accepts(family: u8, chain: Chain, expression: &str, data: &[Vec<u8>]) -> io::Result<()> {
    let family = [family, 0, 0, 0];
    let name = |text: &str| [text.as_bytes(), b"\0"].concat();
    let (table, of_chain) = (name("stave-probe"), name("probe"));
    let hook =
        [attribute(1, &chain.hook.to_be_bytes()), attribute(2, &chain.priority.to_be_bytes())].concat();
    let mut parts = vec![attribute(1, &name(expression))];
    if !data.is_empty() {
        parts.push(nested(2, data));
    }
    let batch = vec![
        Message::batch(BATCH_BEGIN, &[0, 0, 0, NFTABLES as u8]),
        Message::create(NEWTABLE, 1, &family).attribute(1, &table),
        Message::create(NEWCHAIN, 2, &family)
            .attribute(1, &table)
            .attribute(3, &of_chain)
            .attribute(4 | 1 << 15, &hook)
            .attribute(7, &name(chain.kind)),
        Message::create(NEWRULE, 3, &family)
            .attribute(1, &table)
            .attribute(2, &of_chain)
            .attribute(4 | 1 << 15, &nested(1, &parts)),
        Message::batch(BATCH_END, &[0, 0, 0, NFTABLES as u8]),
    ];
    in_own_network(|| request(Some(netlink::NETFILTER), batch, 3))
}

fn sysctls(report: &mut HostReport) {
    let forward = read_sysctl("/proc/sys/net/ipv4/ip_forward");
    match forward.as_deref() {
        Some("1") => report.ok("IP forwarding", "on"),
        // Whoever makes the pods' network switches it on.
        Some(_) => report.ok_with_cost(
            "IP forwarding",
            "off",
            "until the network plugin or the built-in network switches it on, pods don't reach beyond the node",
        ),
        None => report.degraded("IP forwarding", "no such sysctl", "pods don't reach beyond the node"),
    }
    match read_sysctl("/proc/sys/net/bridge/bridge-nf-call-iptables").as_deref() {
        Some("1") => report.ok("bridge netfilter", "on"),
        found => report.ok_with_cost(
            "bridge netfilter",
            if found.is_some() { "off" } else { "not loaded" },
            "Services may not work between pods of one node, depending on the network plugin",
        ),
    }
    let off = read_sysctl("/proc/sys/net/ipv6/conf/all/disable_ipv6");
    report.features.ipv6 = off.as_deref() == Some("0");
    match off.as_deref() {
        Some("0") => report.ok("IPv6", "on"),
        found => report.ok_with_cost(
            "IPv6",
            if found.is_some() { "switched off" } else { "not in this kernel" },
            "pods get no IPv6 address",
        ),
    }
}

fn read_sysctl(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_request_is_an_error() {
        let error = in_own_network(|| {
            let message = Message::create(RTM_NEWLINK, 1, &[0; 16])
                .attribute(IFLA_IFNAME, b"stave-probe\0")
                .attribute(IFLA_LINKINFO, &attribute(IFLA_INFO_KIND, b"no-such-kind"));
            request(ROUTE, vec![message], 1)
        });
        assert!(error.is_err());
    }

    #[test]
    fn an_expression_that_the_kernel_lacks_is_an_error() {
        accepts(NFPROTO_IPV4, NAT, "masq", &[]).unwrap();
        accepts(NFPROTO_IPV4, FILTER, "no-such-expression", &[]).unwrap_err();
        accepts(NFPROTO_BRIDGE, FILTER, "masq", &[]).unwrap_err();
    }
}
