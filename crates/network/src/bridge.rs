use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rtnetlink::Handle;

use crate::bandwidth::{self, Bandwidth};
use crate::connection::Connection;
use crate::keeper::{Keeper, Watch};
use crate::leases::{Lease, Leases};
use crate::leaving::Leaving;
use crate::link::Link;
use crate::nft::Batch;
use crate::ports::{self, PortMapping};
use crate::prepared::{self, PreparedLink};
use crate::subnet::Subnet;
use crate::together::Together;
use crate::{NetworkError, link, rules, sysctl, uplink};

/// Name of the interface in a pod.
pub const POD_INTERFACE: &str = "eth0";

/// Settings of the bridge network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeConfig {
    /// name of the bridge interface, up to 15 characters
    pub name: String,
    /// `10.88.0.0/16`, `fd00:88::/64`: one a family
    pub subnets: Vec<String>,
}

/// What a pod got.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Attachment {
    /// interface in the pod
    pub interface: String,
    /// addresses, in the order of the subnets: the first is the pod's primary one
    pub ips: Vec<IpAddr>,
    /// the bridge's address in each subnet
    pub gateways: Vec<IpAddr>,
    /// hardware address, such as `0a:58:0a:58:00:02`
    pub mac: String,
}

/// The bridge network of one daemon.
#[derive(Debug)]
pub struct Bridge {
    pub(crate) inner: Arc<Inner>,
    pub(crate) keeper: Keeper,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) name: String,
    pub(crate) subnets: Vec<Subnet>,
    pub(crate) connection: Connection,
    /// for removals: who makes an interface must not wait for one that goes
    pub(crate) removals: Connection,
    /// another one, when it was deleted and made again
    pub(crate) link: RwLock<Link>,
    /// indices of the interfaces that the MTU is from
    pub(crate) uplink: RwLock<Vec<u32>>,
    pub(crate) leases: Leases,
    pub(crate) leaving: Leaving,
    /// held while the rules of all host ports are replaced; pods without host ports never take it
    pub(crate) rules: Mutex<()>,
    /// removals of host ports, and of egress limits
    pub(crate) unpublishing: Together,
    pub(crate) unpolicing: Together,
    /// held by whoever asks the kernel how the network is
    pub(crate) asking: Arc<tokio::sync::Mutex<()>>,
}

impl Inner {
    pub(crate) fn link(&self) -> Link {
        self.link.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn handle(&self) -> Handle {
        self.connection.handle()
    }

    /// Pods get an IPv6 address.
    pub(crate) fn has_ipv6(&self) -> bool {
        self.subnets.iter().any(|subnet| !subnet.is_ipv4())
    }

    pub(crate) fn set_link(&self, link: Link) {
        *self.link.write().unwrap_or_else(PoisonError::into_inner) = link;
    }

    /// The bridge is the one that was found or made. Asks by ioctl(2), which is cheap.
    pub(crate) fn is_there(&self) -> bool {
        nix::net::if_::if_nametoindex(self.name.as_str()).is_ok_and(|index| index == self.link().index)
    }
}

impl Bridge {
    /// Makes the bridge, its addresses and the nftables table, or takes what an earlier daemon left: pods that
    /// are attached stay so. Must run in the network namespace of the host, on a tokio runtime.
    pub async fn open(config: &BridgeConfig, leases_dir: &Path) -> Result<Self, NetworkError> {
        let subnets = check_config(config)?;
        let name = config.name.as_str();
        let connection = Connection::open().await?;
        let handle = connection.handle();
        let there = link::find(&handle, name).await?;
        for subnet in &subnets {
            if let Some(with) = link::collision(&handle, subnet, there.as_ref().map(|l| l.index)).await? {
                return Err(NetworkError::Collision {
                    subnet: subnet.to_string(),
                    bridge: name.to_owned(),
                    with,
                });
            }
        }
        let uplink = uplink::uplink(&handle).await?;
        let bridge = link::bridge(&handle, name, uplink.map(|(_, mtu)| mtu)).await?;
        let setup = set_up(&handle, &bridge, &subnets, leases_dir).await;
        let leases = match setup {
            Ok(leases) => leases,
            Err(error) => {
                // One that we did not find is ours to take away again.
                if there.is_none() {
                    let results = [remove_table(name), link::delete(&handle, bridge.index, name).await];
                    for error in results.into_iter().filter_map(Result::err) {
                        tracing::warn!(%error, "left behind");
                    }
                }
                return Err(error);
            }
        };
        let inner = Inner {
            name: name.to_owned(),
            subnets,
            connection,
            removals: Connection::open().await?,
            link: RwLock::new(bridge),
            uplink: RwLock::default(),
            leases,
            leaving: Leaving::default(),
            rules: Mutex::new(()),
            unpublishing: Together::default(),
            unpolicing: Together::default(),
            asking: Arc::default(),
        };
        let inner = Arc::new(inner);
        // It listens first: what changes from here on is heard. Which uplink it is for is known then.
        let watch = Watch::open()?;
        inner.follow_uplink().await?;
        let limits = inner.clone();
        blocking(move || limits.replace_egress()).await?;
        let keeper = watch.keep(&inner);
        Ok(Self { inner, keeper })
    }

    /// Gives a pod an interface with addresses, a default route and its host ports, and brings up `lo`. On an
    /// error nothing is left.
    pub async fn attach(
        &self,
        pod_id: &str,
        netns: OwnedFd,
        ports: &[PortMapping],
        bandwidth: Bandwidth,
    ) -> Result<Attachment, NetworkError> {
        let lease = self.lease(pod_id, ports, bandwidth.egress).await?;
        let result = self.connect(&lease, netns, bandwidth).await;
        self.undo_unless(pod_id, result).await
    }

    /// Makes the interface of a pod to come, in its network namespace; it goes with the namespace.
    pub async fn prepare(&self, netns: OwnedFd) -> Result<PreparedLink, NetworkError> {
        let inner = &self.inner;
        prepared::make(&inner.handle(), &inner.link(), &prepared::new_name()?, netns, inner.has_ipv6()).await
    }

    /// Like `attach`, with an interface that was made in advance.
    pub async fn attach_prepared(
        &self,
        pod_id: &str,
        link: PreparedLink,
        ports: &[PortMapping],
        bandwidth: Bandwidth,
    ) -> Result<Attachment, NetworkError> {
        let lease = self.lease(pod_id, ports, bandwidth.egress).await?;
        let result = self.configure(&lease, link, bandwidth).await;
        self.undo_unless(pod_id, result).await
    }

    /// Fails on host ports that no pod can have here. Whether another pod has them shows when a pod is attached.
    pub fn check_ports(&self, ports: &[PortMapping]) -> Result<(), NetworkError> {
        self.checked(ports).map(|_| ())
    }

    pub(crate) fn checked(&self, ports: &[PortMapping]) -> Result<Vec<PortMapping>, NetworkError> {
        let has = |v4| self.inner.subnets.iter().any(|s| s.is_ipv4() == v4);
        ports::check(ports, has(true), has(false))
    }

    async fn lease(
        &self,
        pod_id: &str,
        ports: &[PortMapping],
        egress: Option<u64>,
    ) -> Result<Lease, NetworkError> {
        check_pod_id(pod_id)?;
        let ports = self.checked(ports)?;
        let inner = self.inner.clone();
        let id = pod_id.to_owned();
        blocking(move || inner.leases.reserve(&id, &link_name(&id), ports, egress)).await
    }

    async fn undo_unless(
        &self,
        pod_id: &str,
        result: Result<Attachment, NetworkError>,
    ) -> Result<Attachment, NetworkError> {
        if result.is_err()
            && let Err(error) = self.detach(pod_id).await
        {
            tracing::warn!(pod_id, %error, "network of a pod that failed to start was not removed");
        }
        result
    }

    async fn connect(
        &self,
        lease: &Lease,
        netns: OwnedFd,
        bandwidth: Bandwidth,
    ) -> Result<Attachment, NetworkError> {
        let inner = &self.inner;
        let link =
            prepared::make(&inner.handle(), &inner.link(), &lease.link, netns, inner.has_ipv6()).await?;
        self.configure(lease, link, bandwidth).await
    }

    /// Makes an interface that of a lease.
    async fn configure(
        &self,
        lease: &Lease,
        link: PreparedLink,
        bandwidth: Bandwidth,
    ) -> Result<Attachment, NetworkError> {
        let inner = &self.inner;
        let Some(primary) = lease.ips.first() else {
            return Err(NetworkError::NotReady("the bridge has no subnet".into()));
        };
        // An interface that was made before may have lost its bridge since.
        if !inner.is_there() {
            return Err(NetworkError::NotReady(format!("bridge {} is gone", inner.name)));
        }
        let mtu = inner.link().mtu;
        // The uplink's may have changed since the interface was made.
        let other_mtu = mtu.filter(|mtu| link.mtu != Some(*mtu));
        let mac = link::pod_mac(*primary);
        let (pod, index) = (&link.inside.handle, link.inside.index);
        let mut gateways = Vec::new();
        let inside = async {
            // lo is the first interface of every network namespace.
            link::up(pod, 1, "lo").await?;
            if let Some(bits) = bandwidth.egress {
                bandwidth::limit(pod, index, POD_INTERFACE, bits, mtu).await?;
            }
            link::address_and_up(pod, index, mac, other_mtu).await?;
            for (ip, subnet) in lease.ips.iter().zip(&inner.subnets) {
                link::add_address(pod, index, *ip, subnet.prefix()).await?;
                link::default_route(pod, index, subnet.gateway()).await?;
                gateways.push(subnet.gateway());
            }
            Ok::<_, NetworkError>(())
        };
        let outside = async {
            if let Some(bits) = bandwidth.ingress {
                bandwidth::limit(&inner.handle(), link.index, &lease.link, bits, mtu).await?;
            }
            link::name_and_up(&inner.handle(), link.index, &lease.link, inner.link().index, other_mtu).await
        };
        // Each works in a network namespace of its own, with a socket of its own.
        let (outside, inside) = tokio::join!(outside, inside);
        outside.and(inside)?;
        if rules::policed(lease).is_some() {
            inner.police(lease.clone()).await?;
        }
        if !lease.ports.is_empty() {
            inner.publish(lease.clone()).await?;
        }
        Ok(Attachment {
            interface: POD_INTERFACE.to_owned(),
            ips: lease.ips.clone(),
            gateways,
            mac: mac.map(|b| format!("{b:02x}")).join(":"),
        })
    }

    /// Pods that have a lease, sorted: after a restart, those that no longer exist are to be detached.
    pub async fn attached(&self) -> Vec<String> {
        self.inner.leases.all().into_iter().map(|l| l.pod_id).collect()
    }

    /// Takes the bridge's addresses away, for a bridge with others to follow. No pod is attached; the bridge stays.
    pub(crate) async fn close(self) -> Result<(), NetworkError> {
        self.keeper.stop();
        let (inner, bridge) = (&self.inner, self.inner.link());
        for subnet in &inner.subnets {
            link::remove_address(&inner.handle(), bridge.index, subnet.gateway(), subnet.prefix()).await?;
        }
        Ok(())
    }

    /// Takes everything away: pods' interfaces and leases, the table, the bridge. For uninstalling. `ip_forward` stays on.
    /// Goes on past errors and returns the first.
    pub async fn remove_all(self) -> Result<(), NetworkError> {
        // Nobody puts back what goes now.
        self.keeper.stop();
        let mut results = Vec::new();
        for pod_id in self.attached().await {
            results.push(self.detach(&pod_id).await);
        }
        results.push(remove_table(&self.inner.name));
        results.push(self.inner.commit_egress(rules::egress(&self.inner.name, false, &[])));
        results.push(link::delete(&self.inner.handle(), self.inner.link().index, &self.inner.name).await);
        results.into_iter().collect()
    }
}

async fn set_up(
    handle: &Handle,
    bridge: &Link,
    subnets: &[Subnet],
    leases_dir: &Path,
) -> Result<Leases, NetworkError> {
    let name = bridge.name.as_str();
    let dir = leases_dir.to_path_buf();
    let of_leases = subnets.to_vec();
    let leases = blocking(move || Leases::open(&dir, &of_leases)).await?;
    // The table first: the guard must be there before the first packet.
    commit(name, "install", rules::whole(name, subnets, &leases.published()))?;
    set_up_bridge(handle, bridge, subnets).await?;
    Ok(leases)
}

/// Gives the bridge its settings and addresses, and brings it up.
pub(crate) async fn set_up_bridge(
    handle: &Handle,
    bridge: &Link,
    subnets: &[Subnet],
) -> Result<(), NetworkError> {
    let name = bridge.name.as_str();
    // Before it is up: no router advertisement of a pod may reach the host (CVE-2020-10749).
    let mut settings = vec![("accept_ra", "0"), ("accept_dad", "0")];
    // A node may want none for its own interfaces.
    if subnets.iter().any(|subnet| !subnet.is_ipv4()) {
        settings.push(("disable_ipv6", "0"));
    }
    sysctl::write_ipv6(name, &settings)?;
    // Host ports on 127.0.0.1; the table's guard chain keeps pods from using it.
    sysctl::write(&format!("ipv4/conf/{name}/route_localnet"), "1")?;
    link::no_snooping(handle, bridge).await?;
    for subnet in subnets {
        link::add_address(handle, bridge.index, subnet.gateway(), subnet.prefix()).await?;
    }
    link::up(handle, bridge.index, name).await?;
    for subnet in subnets {
        if subnet.is_ipv4() {
            sysctl::write("ipv4/ip_forward", "1")?;
        } else {
            sysctl::forward_ipv6()?;
        }
    }
    Ok(())
}

fn remove_table(bridge: &str) -> Result<(), NetworkError> {
    let mut batch = Batch::default();
    let table = rules::table(bridge);
    batch.new_table(&table);
    batch.delete_table(&table);
    commit(bridge, "remove", batch)
}

pub(crate) fn commit(bridge: &str, what: &str, batch: Batch) -> Result<(), NetworkError> {
    batch.commit().map_err(|source| nft_error(bridge, what, source))
}

pub(crate) fn nft_error(bridge: &str, what: &str, source: io::Error) -> NetworkError {
    NetworkError::Nft { table: rules::table(bridge), what: what.to_owned(), source }
}

/// Runs what blocks on the disk or on the netfilter lock off the async threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    tokio::task::spawn_blocking(work).await.map_err(|e| NetworkError::Worker(e.to_string()))?
}

pub(crate) fn check_config(config: &BridgeConfig) -> Result<Vec<Subnet>, NetworkError> {
    let name = &config.name;
    let fail =
        |field, value: &str, reason: String| NetworkError::Config { field, value: value.to_owned(), reason };
    let good = !name.is_empty()
        && name.len() <= 15
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    if !good {
        let reason = "1 to 15 letters, digits, '-' and '_', the first a letter";
        return Err(fail("name", name, reason.to_owned()));
    }
    let mut subnets: Vec<Subnet> = Vec::new();
    for text in &config.subnets {
        let subnet = Subnet::parse(text).map_err(|reason| fail("subnets", text, reason))?;
        if subnets.iter().any(|s| s.is_ipv4() == subnet.is_ipv4()) {
            return Err(fail("subnets", text, "a second subnet of the same family".into()));
        }
        if !subnet.is_ipv4() && !sysctl::has_ipv6() {
            return Err(fail("subnets", text, "this kernel has no IPv6".into()));
        }
        subnets.push(subnet);
    }
    if subnets.is_empty() {
        return Err(fail("subnets", "[]", "at least one subnet is needed".into()));
    }
    Ok(subnets)
}

pub(crate) fn check_pod_id(pod_id: &str) -> Result<(), NetworkError> {
    let good = (1..=128).contains(&pod_id.len())
        && pod_id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    if good { Ok(()) } else { Err(NetworkError::PodId { pod_id: pod_id.chars().take(200).collect() }) }
}

/// What the names of the host's ends begin with.
pub(crate) const LINK_PREFIX: &str = "stv";

/// The host's end of a pod's veth: `stv` and the start of the id, 15 bytes at most. Leases refuse a second pod with it.
pub(crate) fn link_name(pod_id: &str) -> String {
    format!("{LINK_PREFIX}{}", pod_id.get(..11).unwrap_or(pod_id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_ids() {
        assert_eq!(link_name("0123456789abcdef"), "stv0123456789a");
        assert_eq!(link_name("x"), "stvx");
        for bad in ["", "a/b", "..", "ä", &"a".repeat(129)] {
            assert!(check_pod_id(bad).is_err(), "{bad}");
        }
        let config = |name: &str, subnets: &[&str]| BridgeConfig {
            name: name.into(),
            subnets: subnets.iter().map(|s| (*s).to_owned()).collect(),
        };
        assert!(check_config(&config("stave0", &["10.88.0.0/16"])).is_ok());
        for (name, subnets) in [
            ("", &["10.88.0.0/16"][..]),
            ("a/b", &["10.88.0.0/16"]),
            ("sixteen-letters-", &["10.88.0.0/16"]),
            ("stave0", &[]),
            ("stave0", &["10.88.0.0/16", "10.89.0.0/16"]),
            ("stave0", &["10.88.0.1/16"]),
        ] {
            assert!(check_config(&config(name, subnets)).is_err(), "{name} {subnets:?}");
        }
    }
}
