//! Interfaces, addresses and routes by rtnetlink.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use futures::TryStreamExt;
use netlink_packet_route::address::{AddressAttribute, AddressFlags};
use netlink_packet_route::link::{
    InfoBridge, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage};
use nix::errno::Errno;
use rtnetlink::{
    Handle, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
};

use crate::error::errno;
use crate::subnet::{Subnet, octets};
use crate::{NetworkError, POD_INTERFACE, sysctl};

/// The facts of an interface that count here.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) up: bool,
    pub(crate) is_bridge: bool,
    /// index of the bridge that it is a port of
    pub(crate) controller: Option<u32>,
    pub(crate) name: String,
    pub(crate) mtu: Option<u32>,
}

fn link_of(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        up: message.header.flags.contains(LinkFlags::Up),
        is_bridge: false,
        controller: None,
        name: String::new(),
        mtu: None,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Controller(index) => link.controller = Some(index),
            LinkAttribute::Mtu(mtu) => link.mtu = Some(mtu),
            LinkAttribute::LinkInfo(infos) => {
                link.is_bridge = infos.iter().any(|i| matches!(i, LinkInfo::Kind(InfoKind::Bridge)));
            }
            _ => {}
        }
    }
    link
}

/// An interface by name; none if there is none.
pub(crate) async fn find(handle: &Handle, name: &str) -> Result<Option<Link>, NetworkError> {
    match handle.link().get().match_name(name).execute().try_next().await {
        Ok(found) => Ok(found.map(link_of)),
        Err(error) if errno(&error) == Some(Errno::ENODEV as i32) => Ok(None),
        Err(error) => Err(NetworkError::netlink(format!("look up interface {name}"), error)),
    }
}

/// All interfaces.
pub(crate) async fn all(handle: &Handle) -> Result<Vec<Link>, NetworkError> {
    let messages: Vec<LinkMessage> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(|e| NetworkError::netlink("list interfaces", e))?;
    Ok(messages.into_iter().map(link_of).collect())
}

/// Removes an interface; absent is success.
pub(crate) async fn delete(handle: &Handle, index: u32, name: &str) -> Result<(), NetworkError> {
    match handle.link().del(index).execute().await {
        Err(error) if errno(&error) != Some(Errno::ENODEV as i32) => {
            Err(NetworkError::netlink(format!("delete interface {name}"), error))
        }
        _ => Ok(()),
    }
}

/// Makes the bridge, or takes the one of that name.
pub(crate) async fn bridge(handle: &Handle, name: &str, mtu: Option<u32>) -> Result<Link, NetworkError> {
    if find(handle, name).await?.is_none() {
        // A fixed address: else the bridge takes that of its lowest port, and changes it under way.
        let mut builder = LinkMessageBuilder::<LinkBridge>::new(name).address(bridge_mac(name));
        if let Some(mtu) = mtu {
            builder = builder.mtu(mtu);
        }
        match handle.link().add(builder.build()).execute().await {
            Err(error) if errno(&error) != Some(Errno::EEXIST as i32) => {
                return Err(NetworkError::netlink(format!("make bridge {name}"), error));
            }
            _ => {}
        }
    }
    let link = find(handle, name).await?;
    match link {
        Some(link) if link.is_bridge => Ok(link),
        Some(_) => Err(NetworkError::NotABridge { name: name.to_owned() }),
        None => Err(NetworkError::NotReady(format!("bridge {name} vanished while it was set up"))),
    }
}

/// Makes a bridge forward multicast to all ports, as one without a querier does anyway. Else it has timers for each port and
/// starts those of all whenever one comes or goes.
pub(crate) async fn no_snooping(handle: &Handle, bridge: &Link) -> Result<(), NetworkError> {
    let builder = LinkMessageBuilder::<LinkBridge>::new(&bridge.name)
        .set_info_data(InfoData::Bridge(vec![InfoBridge::MulticastSnooping(false)]));
    let result = handle.link().change(builder.build()).execute().await;
    result.map_err(|e| NetworkError::netlink(format!("set up bridge {}", bridge.name), e))
}

/// A locally administered address from the name (FNV-1a): the same after each restart.
fn bridge_mac(name: &str) -> Vec<u8> {
    let hash =
        name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let mut mac = vec![0x02];
    mac.extend_from_slice(&hash.to_be_bytes()[..5]);
    mac
}

/// The pod's address as a hardware address: a pod that gets an address again is not confused with the last by ARP caches.
pub(crate) fn pod_mac(ip: IpAddr) -> [u8; 6] {
    let octets = octets(ip);
    let mut mac = [0x0a, 0x58, 0, 0, 0, 0];
    for (to, from) in mac.iter_mut().skip(2).zip(&octets[octets.len() - 4..]) {
        *to = *from;
    }
    mac
}

pub(crate) async fn up(handle: &Handle, index: u32, name: &str) -> Result<(), NetworkError> {
    let message = LinkUnspec::new_with_index(index).up().build();
    let result = handle.link().change(message).execute().await;
    result.map_err(|e| NetworkError::netlink(format!("bring up interface {name}"), e))
}

/// Takes an interface down; absent is success.
pub(crate) async fn down(handle: &Handle, index: u32, name: &str) -> Result<(), NetworkError> {
    let message = LinkUnspec::new_with_index(index).down().build();
    match handle.link().change(message).execute().await {
        Err(error) if errno(&error) != Some(Errno::ENODEV as i32) => {
            Err(NetworkError::netlink(format!("take down interface {name}"), error))
        }
        _ => Ok(()),
    }
}

/// Adds an address, without duplicate address detection; one that is there is fine.
pub(crate) async fn add_address(
    handle: &Handle,
    index: u32,
    ip: IpAddr,
    prefix: u8,
) -> Result<(), NetworkError> {
    let mut request = handle.address().add(index, ip, prefix);
    if ip.is_ipv6() {
        request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    match request.execute().await {
        Err(error) if errno(&error) != Some(Errno::EEXIST as i32) => {
            Err(NetworkError::netlink(format!("add address {ip}/{prefix}"), error))
        }
        _ => Ok(()),
    }
}

/// Takes an address away; absent is success.
pub(crate) async fn remove_address(
    handle: &Handle,
    index: u32,
    ip: IpAddr,
    prefix: u8,
) -> Result<(), NetworkError> {
    let message = handle.address().add(index, ip, prefix).message_mut().clone();
    match handle.address().del(message).execute().await {
        Err(error) if errno(&error) != Some(Errno::EADDRNOTAVAIL as i32) => {
            Err(NetworkError::netlink(format!("remove address {ip}/{prefix}"), error))
        }
        _ => Ok(()),
    }
}

/// All addresses of this network namespace: interface index and network.
pub(crate) async fn addresses(handle: &Handle) -> Result<Vec<(u32, IpAddr, u8)>, NetworkError> {
    let messages: Vec<_> = handle
        .address()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(|e| NetworkError::netlink("list addresses", e))?;
    let mut found = Vec::new();
    for message in messages {
        // On point-to-point links `Address` is the peer and `Local` our own.
        for attribute in &message.attributes {
            if let AddressAttribute::Address(ip) | AddressAttribute::Local(ip) = attribute {
                found.push((message.header.index, *ip, message.header.prefix_len));
            }
        }
    }
    Ok(found)
}

/// What on this host is in the way of a subnet, if anything: an address or a route of another interface.
pub(crate) async fn collision(
    handle: &Handle,
    subnet: &Subnet,
    bridge: Option<u32>,
) -> Result<Option<String>, NetworkError> {
    let links = all(handle).await?;
    let name = |index: u32| {
        links.iter().find(|l| l.index == index).map_or_else(|| index.to_string(), |l| l.name.clone())
    };
    for (index, ip, prefix) in addresses(handle).await? {
        let other = Subnet::of(ip, prefix);
        if Some(index) != bridge && other.is_some_and(|other| other.overlaps(subnet)) {
            return Ok(Some(format!("address {ip}/{prefix} of interface {}", name(index))));
        }
    }
    let query = if subnet.is_ipv4() {
        RouteMessageBuilder::<Ipv4Addr>::new().build()
    } else {
        RouteMessageBuilder::<Ipv6Addr>::new().build()
    };
    let routes: Vec<RouteMessage> = handle
        .route()
        .get(query)
        .execute()
        .try_collect()
        .await
        .map_err(|e| NetworkError::netlink("list routes", e))?;
    for route in routes {
        let mut destination = None;
        let mut interface = None;
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Destination(RouteAddress::Inet(ip)) => destination = Some(IpAddr::V4(*ip)),
                RouteAttribute::Destination(RouteAddress::Inet6(ip)) => destination = Some(IpAddr::V6(*ip)),
                RouteAttribute::Oif(index) => interface = Some(*index),
                _ => {}
            }
        }
        let prefix = route.header.destination_prefix_length;
        // A default route leads everywhere, as do the two halves that VPNs lay over it; the local table repeats the addresses.
        let (Some(ip), true) = (destination, prefix > 1 && route.header.table == RouteHeader::RT_TABLE_MAIN)
        else {
            continue;
        };
        let ours = interface.is_some() && interface == bridge;
        if !ours && Subnet::of(ip, prefix).is_some_and(|other| other.overlaps(subnet)) {
            let via = interface.map(|i| format!(" through interface {}", name(i))).unwrap_or_default();
            return Ok(Some(format!("route {ip}/{prefix}{via}")));
        }
    }
    Ok(None)
}

/// Makes the veth pair in one request: the pod's end in its namespace, the host's end in the bridge. Both are down.
pub(crate) async fn veth(
    handle: &Handle,
    name: &str,
    bridge: &Link,
    netns: &OwnedFd,
) -> Result<(), NetworkError> {
    let mut peer = LinkMessageBuilder::<LinkUnspec>::new().name(POD_INTERFACE).setns_by_fd(netns.as_raw_fd());
    let mut builder = LinkVeth::new(name, POD_INTERFACE).controller(bridge.index);
    if let Some(mtu) = bridge.mtu {
        peer = peer.mtu(mtu);
        builder = builder.mtu(mtu);
    }
    let message = builder.set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build()))).build();
    handle.link().add(message).execute().await.map_err(|error| {
        // BR_MAX_PORTS, less port 0 (net/bridge/br_private.h).
        let full = errno(&error) == Some(Errno::EXFULL as i32);
        let more = if full {
            format!(": bridge {} has the 1023 ports that it can have", bridge.name)
        } else {
            String::new()
        };
        let what = format!("make veth {name} with {POD_INTERFACE} in the pod's network namespace{more}");
        NetworkError::netlink(what, error)
    })
}

/// Gives the host's end of a new pair its settings. Gives its index.
pub(crate) async fn settle(handle: &Handle, name: &str) -> Result<u32, NetworkError> {
    // The bridge takes all that comes: addresses, routes and groups of this end would only be a burden on the host.
    sysctl::write_ipv6(name, &[("disable_ipv6", "1")])?;
    let index = nix::net::if_::if_nametoindex(name).map_err(|errno| NetworkError::Netlink {
        what: format!("find interface {name}, the other end of {POD_INTERFACE}"),
        source: errno.into(),
    })?;
    hairpin(handle, index, name).await?;
    Ok(index)
}

/// A pod reaches itself through its host port: the frame leaves by the port that it came from.
async fn hairpin(handle: &Handle, index: u32, name: &str) -> Result<(), NetworkError> {
    let hairpin = LinkMessageBuilder::<LinkBridgePort>::default()
        .index(index)
        .set_port_kind(netlink_packet_route::link::InfoPortKind::Bridge)
        .hairpin(true)
        .build();
    let result = handle.link().change(hairpin).execute().await;
    result.map_err(|e| NetworkError::netlink(format!("set hairpin mode of {name}"), e))
}

/// Puts a pod's interface into a bridge.
pub(crate) async fn join(handle: &Handle, port: &Link, bridge: u32) -> Result<(), NetworkError> {
    let message = LinkUnspec::new_with_index(port.index).controller(bridge).build();
    let result = handle.link().change(message).execute().await;
    result.map_err(|e| NetworkError::netlink(format!("put interface {} into the bridge", port.name), e))?;
    // By its index: a pod that starts gives its interface another name meanwhile.
    hairpin(handle, port.index, &port.name).await
}

/// Changes the MTU of an interface.
pub(crate) async fn set_mtu(handle: &Handle, index: u32, name: &str, mtu: u32) -> Result<(), NetworkError> {
    let message = LinkUnspec::new_with_index(index).mtu(mtu).build();
    let result = handle.link().change(message).execute().await;
    result.map_err(|e| NetworkError::netlink(format!("set the MTU of interface {name} to {mtu}"), e))
}

/// Gives an interface a name, and brings it up in the bridge, perhaps with another MTU. It may have the name, and be in the
/// bridge, already.
pub(crate) async fn name_and_up(
    handle: &Handle,
    index: u32,
    name: &str,
    bridge: u32,
    mtu: Option<u32>,
) -> Result<(), NetworkError> {
    let mut message = LinkUnspec::new_with_index(index).name(name.to_owned()).controller(bridge).up();
    if let Some(mtu) = mtu {
        message = message.mtu(mtu);
    }
    let result = handle.link().change(message.build()).execute().await;
    result.map_err(|e| NetworkError::netlink(format!("name interface {index} {name} and bring it up"), e))
}

/// Gives the pod's interface its hardware address, and brings it up, perhaps with another MTU.
pub(crate) async fn address_and_up(
    handle: &Handle,
    index: u32,
    mac: [u8; 6],
    mtu: Option<u32>,
) -> Result<(), NetworkError> {
    let mut message = LinkUnspec::new_with_index(index).address(mac.to_vec()).up();
    if let Some(mtu) = mtu {
        message = message.mtu(mtu);
    }
    let result = handle.link().change(message.build()).execute().await;
    result.map_err(|e| NetworkError::netlink(format!("bring up interface {POD_INTERFACE}"), e))
}

/// A netlink connection into a pod's network namespace.
#[derive(Debug)]
pub(crate) struct Inside {
    pub(crate) handle: Handle,
    /// index of the pod's interface
    pub(crate) index: u32,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Inside {
    /// The socket holds the namespace: it must not outlive the work in it.
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Opens a connection into a pod's network namespace. The settings that must be there before the interface comes up are written on the way.
/// `ipv6`: it gets an IPv6 address.
pub(crate) async fn enter(netns: OwnedFd, ipv6: bool) -> Result<Inside, NetworkError> {
    let runtime = tokio::runtime::Handle::current();
    let (send, receive) = tokio::sync::oneshot::channel();
    // A thread of its own that ends here: its network namespace is not that of the process.
    std::thread::Builder::new()
        .name("pod-netns".into())
        .spawn(move || {
            let _entered = runtime.enter();
            // The receiver is gone if the caller was cancelled.
            let _ = send.send(enter_here(&netns, ipv6));
        })
        .map_err(|e| NetworkError::Worker(e.to_string()))?;
    let (connection, handle, index) = receive
        .await
        .map_err(|_| NetworkError::Worker("the thread in the pod's network namespace died".into()))??;
    Ok(Inside { handle, index, task: tokio::spawn(connection) })
}

type Connection = rtnetlink::proto::Connection<rtnetlink::packet_route::RouteNetlinkMessage>;

fn enter_here(netns: &OwnedFd, ipv6: bool) -> Result<(Connection, Handle, u32), NetworkError> {
    let io = |what: &str, e: std::io::Error| NetworkError::Netlink { what: what.to_owned(), source: e };
    nix::sched::setns(netns.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET)
        .map_err(|e| io("enter the pod's network namespace", e.into()))?;
    // A neighbour's router advertisement must not give the pod routes (CVE-2020-10749). Duplicate address
    // detection would only delay: the addresses are leased, and in hairpin mode it hears its own probe.
    let mut settings = vec![("accept_ra", "0"), ("accept_dad", "0"), ("disable_ipv6", "0")];
    if !ipv6 {
        // Without a link-local address (1: none) it joins no groups, whose reports the bridge would give to all pods.
        settings.push(("addr_gen_mode", "1"));
    }
    sysctl::write_ipv6(POD_INTERFACE, &settings)?;
    let index = nix::net::if_::if_nametoindex(POD_INTERFACE)
        .map_err(|e| io("find eth0 in the pod's network namespace", e.into()))?;
    let (connection, handle, _) = rtnetlink::new_connection()
        .map_err(|e| io("open a netlink socket in the pod's network namespace", e))?;
    Ok((connection, handle, index))
}

/// The default route of a family.
pub(crate) async fn default_route(handle: &Handle, index: u32, gateway: IpAddr) -> Result<(), NetworkError> {
    let message = match gateway {
        IpAddr::V4(ip) => RouteMessageBuilder::<Ipv4Addr>::new().gateway(ip).output_interface(index).build(),
        IpAddr::V6(ip) => RouteMessageBuilder::<Ipv6Addr>::new().gateway(ip).output_interface(index).build(),
    };
    let result = handle.route().add(message).execute().await;
    result.map_err(|e| NetworkError::netlink(format!("add default route via {gateway}"), e))
}
