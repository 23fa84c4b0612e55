use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rtnetlink::Handle;

use crate::leases::{Lease, Leases};
use crate::leaving::{self, Leaving};
use crate::link::Link;
use crate::nft::{self, Batch};
use crate::ports::{self, PortMapping};
use crate::prepared::{self, PreparedLink};
use crate::subnet::Subnet;
use crate::{NetworkError, Protocol, conntrack, link, rules, sysctl};

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
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    subnets: Vec<Subnet>,
    handle: Handle,
    /// for removals: who makes an interface must not wait for one that goes
    removals: Handle,
    link: Link,
    leases: Leases,
    leaving: Leaving,
    /// held while the rules of all host ports are replaced; pods without host ports never take it
    rules: Mutex<()>,
}

impl Bridge {
    /// Makes the bridge, its addresses and the nftables table, or takes what an earlier daemon left: pods that
    /// are attached stay so. Must run in the network namespace of the host, on a tokio runtime.
    pub async fn open(config: &BridgeConfig, leases_dir: &Path) -> Result<Self, NetworkError> {
        let subnets = check_config(config)?;
        let name = config.name.as_str();
        let handle = link::connect().await?;
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
        let mtu = link::uplink_mtu(&handle).await?;
        let bridge = link::bridge(&handle, name, mtu).await?;
        let setup = set_up(&handle, &bridge, &subnets, leases_dir).await;
        let leases = match setup {
            Ok(leases) => leases,
            Err(error) => {
                // One that we did not find is ours to take away again.
                if there.is_none()
                    && let Err(error) = link::delete(&handle, bridge.index, name).await
                {
                    tracing::warn!(%error, "bridge left behind");
                }
                return Err(error);
            }
        };
        let inner = Inner {
            name: name.to_owned(),
            subnets,
            handle,
            removals: link::connect().await?,
            link: bridge,
            leases,
            leaving: Leaving::default(),
            rules: Mutex::new(()),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Gives a pod an interface with addresses, a default route and its host ports, and brings up `lo`. On an
    /// error nothing is left.
    pub async fn attach(
        &self,
        pod_id: &str,
        netns: OwnedFd,
        ports: &[PortMapping],
    ) -> Result<Attachment, NetworkError> {
        let lease = self.lease(pod_id, ports).await?;
        let result = self.connect(&lease, netns).await;
        self.undo_unless(pod_id, result).await
    }

    /// Makes the interface of a pod to come, in its network namespace; it goes with the namespace.
    pub async fn prepare(&self, netns: OwnedFd) -> Result<PreparedLink, NetworkError> {
        prepared::make(&self.inner.handle, &self.inner.link, &prepared::new_name()?, netns).await
    }

    /// Like `attach`, with an interface that was made in advance.
    pub async fn attach_prepared(
        &self,
        pod_id: &str,
        link: PreparedLink,
        ports: &[PortMapping],
    ) -> Result<Attachment, NetworkError> {
        let lease = self.lease(pod_id, ports).await?;
        let result = self.configure(&lease, link).await;
        self.undo_unless(pod_id, result).await
    }

    async fn lease(&self, pod_id: &str, ports: &[PortMapping]) -> Result<Lease, NetworkError> {
        check_pod_id(pod_id)?;
        let has = |v4| self.inner.subnets.iter().any(|s| s.is_ipv4() == v4);
        let ports = ports::check(ports, has(true), has(false))?;
        let inner = self.inner.clone();
        let id = pod_id.to_owned();
        blocking(move || inner.leases.reserve(&id, &link_name(&id), ports)).await
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

    async fn connect(&self, lease: &Lease, netns: OwnedFd) -> Result<Attachment, NetworkError> {
        let inner = &self.inner;
        let link = prepared::make(&inner.handle, &inner.link, &lease.link, netns).await?;
        self.configure(lease, link).await
    }

    /// Makes an interface that of a lease.
    async fn configure(&self, lease: &Lease, link: PreparedLink) -> Result<Attachment, NetworkError> {
        let inner = &self.inner;
        let Some(primary) = lease.ips.first() else {
            return Err(NetworkError::NotReady("the bridge has no subnet".into()));
        };
        // An interface that was made before may have lost its bridge since.
        if !matches!(nix::net::if_::if_nametoindex(inner.name.as_str()), Ok(index) if index == inner.link.index)
        {
            return Err(NetworkError::NotReady(format!("bridge {} is gone", inner.name)));
        }
        let mac = link::pod_mac(*primary);
        let (pod, index) = (&link.inside.handle, link.inside.index);
        let mut gateways = Vec::new();
        let inside = async {
            // lo is the first interface of every network namespace.
            link::up(pod, 1, "lo").await?;
            link::address_and_up(pod, index, mac).await?;
            for (ip, subnet) in lease.ips.iter().zip(&inner.subnets) {
                link::add_address(pod, index, *ip, subnet.prefix()).await?;
                link::default_route(pod, index, subnet.gateway()).await?;
                gateways.push(subnet.gateway());
            }
            Ok::<_, NetworkError>(())
        };
        // Each works in a network namespace of its own, with a socket of its own.
        let (outside, inside) =
            tokio::join!(link::name_and_up(&inner.handle, link.index, &lease.link), inside);
        outside.and(inside)?;
        if !lease.ports.is_empty() {
            self.publish(lease.clone()).await?;
        }
        Ok(Attachment {
            interface: POD_INTERFACE.to_owned(),
            ips: lease.ips.clone(),
            gateways,
            mac: mac.map(|b| format!("{b:02x}")).join(":"),
        })
    }

    /// Adds the rules for a pod's host ports.
    async fn publish(&self, lease: Lease) -> Result<(), NetworkError> {
        let inner = self.inner.clone();
        blocking(move || {
            let _lock = inner.rules.lock().unwrap_or_else(PoisonError::into_inner);
            commit(&inner.name, "add host ports", rules::more_host_ports(&inner.name, &lease))?;
            inner.leases.set_published(&lease.pod_id, true);
            Ok(())
        })
        .await
    }

    /// Makes the host port rules those of all pods but one. That heals what went wrong before, too.
    async fn unpublish(&self, lease: Lease) -> Result<(), NetworkError> {
        let inner = self.inner.clone();
        blocking(move || {
            let _lock = inner.rules.lock().unwrap_or_else(PoisonError::into_inner);
            inner.leases.set_published(&lease.pod_id, false);
            commit(
                &inner.name,
                "replace host ports",
                rules::host_ports(&inner.name, &inner.leases.published()),
            )?;
            inner.leases.free_ports(&lease.pod_id)?;
            // Rules count for new connections only, and a UDP sender that goes on keeps its old one for ever.
            if lease.ports.iter().any(|p| p.protocol == Protocol::Udp) {
                for ip in &lease.ips {
                    if let Err(error) = conntrack::forget(*ip) {
                        tracing::debug!(%ip, %error, "tracked connections of a pod not removed");
                    }
                }
            }
            Ok(())
        })
        .await
    }

    /// Takes away what `attach` made: host ports, interface, lease. Goes on past errors and returns the first. The
    /// pod's namespace may be gone; a pod that was never attached is success. All is gone when it returns.
    pub async fn detach(&self, pod_id: &str) -> Result<(), NetworkError> {
        check_pod_id(pod_id)?;
        self.inner.leaving.wait(pod_id).await;
        let ports = self.withdraw(pod_id).await;
        self.inner.remove_link(pod_id).await?;
        self.inner.release(pod_id).await?;
        ports
    }

    /// Cuts a pod off whose processes have ended: its host ports are gone and nothing reaches its addresses when it
    /// returns. The interface is left to the kernel, which removes it with the pod's namespace, and the lease ends with
    /// it, in the background; `detach` waits for that. What a daemon that dies leaves undone, its next one finds in
    /// `attached`.
    pub async fn retire(&self, pod_id: &str) -> Result<(), NetworkError> {
        check_pod_id(pod_id)?;
        let Some(ticket) = self.inner.leaving.begin(pod_id) else { return Ok(()) };
        let result = self.cut_off(pod_id).await;
        let inner = self.inner.clone();
        let id = pod_id.to_owned();
        match result {
            Ok(true) => {
                let released = inner.release(&id).await;
                inner.leaving.end(&id, ticket);
                released
            }
            Ok(false) => {
                tokio::spawn(async move {
                    inner.see_off(&id).await;
                    inner.leaving.end(&id, ticket);
                });
                Ok(())
            }
            Err(error) => {
                inner.leaving.end(&id, ticket);
                Err(error)
            }
        }
    }

    /// True: the pod's interface is gone already.
    async fn cut_off(&self, pod_id: &str) -> Result<bool, NetworkError> {
        let ports = self.withdraw(pod_id).await;
        let found = self.inner.own_link(pod_id).await?;
        if let Some(found) = &found {
            link::down(&self.inner.removals, found.index, &found.name).await?;
        }
        let gone = found.is_none();
        // Its lease stays as long as its rules.
        ports.map(|()| gone)
    }

    /// Takes a pod's host ports away.
    async fn withdraw(&self, pod_id: &str) -> Result<(), NetworkError> {
        match self.inner.leases.get(pod_id).filter(|lease| !lease.ports.is_empty()) {
            Some(lease) => self.unpublish(lease).await,
            None => Ok(()),
        }
    }

    /// Waits until all interfaces that `retire` left to the kernel are gone, at most `limit`. False: some are still
    /// there.
    pub async fn drain(&self, limit: Duration) -> bool {
        let all = async {
            for pod_id in self.inner.leaving.all() {
                self.inner.leaving.wait(&pod_id).await;
            }
        };
        tokio::time::timeout(limit, all).await.is_ok()
    }

    /// Pods that have a lease, sorted: after a restart, those that no longer exist are to be detached.
    pub async fn attached(&self) -> Vec<String> {
        self.inner.leases.all().into_iter().map(|l| l.pod_id).collect()
    }

    /// Checks what pods need: the bridge is up and has its addresses, the host forwards, the table is there.
    pub async fn status(&self) -> Result<(), NetworkError> {
        let inner = &self.inner;
        let not_ready = |why: String| Err(NetworkError::NotReady(why));
        match link::find(&inner.handle, &inner.name).await? {
            Some(found) if found.index != inner.link.index => {
                return not_ready(format!("bridge {} was replaced", inner.name));
            }
            Some(found) if !found.up => return not_ready(format!("bridge {} is down", inner.name)),
            Some(_) => {}
            None => return not_ready(format!("bridge {} is gone", inner.name)),
        }
        let addresses = link::addresses(&inner.handle).await?;
        for subnet in &inner.subnets {
            let gateway = subnet.gateway();
            if !addresses.iter().any(|(index, ip, _)| *index == inner.link.index && *ip == gateway) {
                return not_ready(format!("bridge {} has lost its address {gateway}", inner.name));
            }
            let file = if subnet.is_ipv4() { "ipv4/ip_forward" } else { "ipv6/conf/all/forwarding" };
            let value = sysctl::read(file)?;
            if value.as_deref() != Some("1") {
                return not_ready(format!(
                    "/proc/sys/net/{file} is {}",
                    value.as_deref().unwrap_or("missing")
                ));
            }
        }
        let table = rules::table(&inner.name);
        match nft::table_exists(&table) {
            Ok(true) => Ok(()),
            Ok(false) => not_ready(format!("nftables table {table} is gone")),
            Err(source) => Err(NetworkError::Nft { table, what: "look up".into(), source }),
        }
    }

    /// Takes everything away: pods' interfaces and leases, the table, the bridge. For uninstalling. `ip_forward` stays on.
    /// Goes on past errors and returns the first.
    pub async fn remove_all(self) -> Result<(), NetworkError> {
        let mut results = Vec::new();
        for pod_id in self.attached().await {
            results.push(self.detach(&pod_id).await);
        }
        let mut batch = Batch::default();
        let table = rules::table(&self.inner.name);
        batch.new_table(&table);
        batch.delete_table(&table);
        results.push(commit(&self.inner.name, "remove", batch));
        results.push(link::delete(&self.inner.handle, self.inner.link.index, &self.inner.name).await);
        results.into_iter().collect()
    }
}

impl Inner {
    /// The pod's interface on the host. A veth of that name in another bridge is not ours.
    async fn own_link(&self, pod_id: &str) -> Result<Option<Link>, NetworkError> {
        let name = self.leases.get(pod_id).map_or_else(|| link_name(pod_id), |l| l.link);
        // Asks without the lock that the kernel holds while it takes other namespaces apart.
        if !leaving::exists(&name) {
            return Ok(None);
        }
        // Without a lease the name may be that of another pod with the same start of its id.
        if self.leases.all().iter().any(|l| l.link == name && l.pod_id != pod_id) {
            return Ok(None);
        }
        let found = link::find(&self.removals, &name).await?;
        Ok(found.filter(|found| found.controller.is_none_or(|c| c == self.link.index)))
    }

    async fn remove_link(&self, pod_id: &str) -> Result<(), NetworkError> {
        match self.own_link(pod_id).await? {
            Some(found) => link::delete(&self.removals, found.index, &found.name).await,
            None => Ok(()),
        }
    }

    async fn release(self: &Arc<Self>, pod_id: &str) -> Result<(), NetworkError> {
        let inner = self.clone();
        let id = pod_id.to_owned();
        blocking(move || inner.leases.release(&id)).await
    }

    /// Waits for the end of a pod's interface, or brings it about, and frees the lease.
    async fn see_off(self: &Arc<Self>, pod_id: &str) {
        let name = self.leases.get(pod_id).map_or_else(|| link_name(pod_id), |l| l.link);
        let by_itself = leaving::gone(&name, leaving::BY_ITSELF).await;
        let mut pauses = leaving::AGAIN.into_iter();
        loop {
            let removed = if by_itself { Ok(()) } else { self.remove_link(pod_id).await };
            let done = match removed {
                Ok(()) => self.release(pod_id).await,
                Err(error) => Err(error),
            };
            let Err(error) = done else { return };
            let Some(pause) = pauses.next() else {
                tracing::error!(pod_id, %error, "the network of a stopped pod was not removed; its removal tries again");
                return;
            };
            tracing::warn!(pod_id, %error, "removing the network of a stopped pod");
            tokio::time::sleep(pause).await;
        }
    }
}

async fn set_up(
    handle: &Handle,
    bridge: &Link,
    subnets: &[Subnet],
    leases_dir: &Path,
) -> Result<Leases, NetworkError> {
    let name = bridge.name.as_str();
    // Before it is up: no router advertisement of a pod may reach the host (CVE-2020-10749).
    sysctl::write_ipv6(&format!("ipv6/conf/{name}/accept_ra"), "0")?;
    sysctl::write_ipv6(&format!("ipv6/conf/{name}/accept_dad"), "0")?;
    // Host ports on 127.0.0.1; the table's guard chain keeps pods from using it.
    sysctl::write(&format!("ipv4/conf/{name}/route_localnet"), "1")?;
    let dir = leases_dir.to_path_buf();
    let of_leases = subnets.to_vec();
    let leases = blocking(move || Leases::open(&dir, &of_leases)).await?;
    // The table first: the guard must be there before the first packet.
    commit(name, "install", rules::whole(name, subnets, &leases.published()))?;
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
    Ok(leases)
}

fn commit(bridge: &str, what: &str, batch: Batch) -> Result<(), NetworkError> {
    batch.commit().map_err(|source| NetworkError::Nft {
        table: rules::table(bridge),
        what: what.to_owned(),
        source,
    })
}

/// Runs what blocks on the disk or on the netfilter lock off the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    tokio::task::spawn_blocking(work).await.map_err(|e| NetworkError::Worker(e.to_string()))?
}

fn check_config(config: &BridgeConfig) -> Result<Vec<Subnet>, NetworkError> {
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

fn check_pod_id(pod_id: &str) -> Result<(), NetworkError> {
    let good = (1..=128).contains(&pod_id.len())
        && pod_id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    if good { Ok(()) } else { Err(NetworkError::PodId { pod_id: pod_id.chars().take(200).collect() }) }
}

/// The host's end of a pod's veth: `stv` and the start of the id, 15 bytes at most. Leases refuse a second pod with it.
fn link_name(pod_id: &str) -> String {
    format!("stv{}", pod_id.get(..11).unwrap_or(pod_id))
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
