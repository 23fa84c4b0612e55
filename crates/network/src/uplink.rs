//! The MTU of the bridge follows that of the interfaces with the default route.

use std::sync::PoisonError;

use futures::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage};
use rtnetlink::Handle;

use crate::NetworkError;
use crate::bridge::Inner;
use crate::link::{self, Link};

/// The interfaces with the IPv4 or IPv6 default route, of which there are several where it has several next hops, and
/// the least of their MTUs: pods must not send larger packets.
pub(crate) async fn uplink(handle: &Handle) -> Result<Option<(Vec<u32>, u32)>, NetworkError> {
    let links = link::all(handle).await?;
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut query = RouteMessage::default();
        query.header.address_family = family;
        let mut routes = std::pin::pin!(handle.route().get(query).execute());
        while let Some(route) =
            routes.try_next().await.map_err(|e| NetworkError::netlink("list routes", e))?
        {
            if route.header.destination_prefix_length != 0 || route.header.table != RouteHeader::RT_TABLE_MAIN
            {
                continue;
            }
            let mut interfaces = Vec::new();
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Oif(index) => interfaces.push(*index),
                    RouteAttribute::MultiPath(hops) => {
                        interfaces.extend(hops.iter().map(|hop| hop.interface_index));
                    }
                    _ => {}
                }
            }
            let mtus =
                links.iter().filter(|link| interfaces.contains(&link.index)).filter_map(|link| link.mtu);
            if let Some(mtu) = mtus.filter(|mtu| (1280..=65535).contains(mtu)).min() {
                return Ok(Some((interfaces, mtu)));
            }
        }
    }
    Ok(None)
}

impl Inner {
    /// Takes the uplink's MTU over, for the bridge and for pods to come. Running pods keep theirs: where it is larger,
    /// the kernel tells them (path MTU discovery). Without a default route nothing changes.
    pub(crate) async fn follow_uplink(&self) -> Result<(), NetworkError> {
        let found = uplink(&self.handle()).await?;
        let interfaces = found.as_ref().map(|(interfaces, _)| interfaces.clone()).unwrap_or_default();
        *self.uplink.write().unwrap_or_else(PoisonError::into_inner) = interfaces.clone();
        let Some((_, mtu)) = found else { return Ok(()) };
        let bridge = self.link();
        if bridge.mtu == Some(mtu) || interfaces.contains(&bridge.index) {
            return Ok(());
        }
        tracing::info!(bridge = self.name, from = bridge.mtu, to = mtu, "the MTU follows that of the uplink");
        link::set_mtu(&self.handle(), bridge.index, &self.name, mtu).await?;
        self.set_link(Link { mtu: Some(mtu), ..bridge });
        Ok(())
    }
}
