//! Whether pods can get on the network. Asks the kernel, and does not wait for it for ever: others may hold its locks.

use std::sync::Arc;
use std::time::Duration;

use crate::bridge::{Bridge, Inner, blocking};
use crate::nft::{self, Family};
use crate::{BridgeNetwork, NetworkError, link, rules, sysctl};

/// The kubelet asks every few seconds, and waits for the answer.
const LIMIT: Duration = Duration::from_secs(2);

async fn limited<T>(
    asked: impl Future<Output = Result<T, NetworkError>>,
    what: &str,
) -> Result<T, NetworkError> {
    tokio::time::timeout(LIMIT, asked)
        .await
        .unwrap_or_else(|_| Err(NetworkError::NotReady(format!("{what} for {LIMIT:?}"))))
}

impl BridgeNetwork {
    /// Why pods can't get on the network, if they can't. Answers within seconds.
    pub async fn status(&self) -> Result<(), NetworkError> {
        let bridge = limited(self.get(), "the node's ranges for pods have been changing").await?;
        bridge.status().await
    }
}

impl Bridge {
    /// Checks what pods need: the bridge is up and has its addresses, the host forwards, the table is there. Answers
    /// within seconds.
    pub async fn status(&self) -> Result<(), NetworkError> {
        let inner = self.inner.clone();
        let asked = async move {
            let one_at_a_time = inner.asking.clone().lock_owned().await;
            // It goes on when nobody waits any more, and so no second one is held up by the same.
            let look = tokio::spawn(async move {
                let _held = one_at_a_time;
                inner.look().await
            });
            look.await.unwrap_or_else(|e| Err(NetworkError::Worker(e.to_string())))
        };
        limited(asked, "the kernel has not answered (rtnetlink, nftables)").await
    }
}

impl Inner {
    async fn look(self: &Arc<Self>) -> Result<(), NetworkError> {
        let not_ready = |why: String| Err(NetworkError::NotReady(why));
        match link::find(&self.handle(), &self.name).await? {
            Some(found) if found.index != self.link().index => {
                return not_ready(format!("bridge {} was replaced", self.name));
            }
            Some(found) if !found.up => return not_ready(format!("bridge {} is down", self.name)),
            Some(_) => {}
            None => return not_ready(format!("bridge {} is gone", self.name)),
        }
        let addresses = link::addresses(&self.handle()).await?;
        let bridge = self.link().index;
        for subnet in &self.subnets {
            let gateway = subnet.gateway();
            if !addresses.iter().any(|(index, ip, _)| *index == bridge && *ip == gateway) {
                return not_ready(format!("bridge {} has lost its address {gateway}", self.name));
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
        let table = rules::table(&self.name);
        let looked_up = table.clone();
        let there = blocking(move || {
            nft::table_exists(Family::Inet, &looked_up).map_err(|source| NetworkError::Nft {
                table: looked_up,
                what: "look up".into(),
                source,
            })
        });
        if there.await? { Ok(()) } else { not_ready(format!("nftables table {table} is gone")) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, RwLock};
    use std::time::Instant;

    use super::*;
    use crate::BridgeConfig;
    use crate::connection::Connection;
    use crate::keeper::Keeper;
    use crate::leases::Leases;
    use crate::link::Link;

    #[tokio::test]
    async fn a_kernel_that_does_not_answer_is_told() {
        let dir = tempfile::tempdir().unwrap();
        // Nobody runs the connection: no request ever gets its answer.
        let (_connection, handle, _) = rtnetlink::new_connection().unwrap();
        let link =
            Link { index: 1, up: true, is_bridge: true, controller: None, name: "br0".into(), mtu: None };
        let bridge = Bridge {
            inner: Arc::new(Inner {
                name: "br0".into(),
                subnets: vec![],
                connection: Connection::of(handle.clone()),
                removals: Connection::of(handle),
                link: RwLock::new(link),
                uplink: RwLock::default(),
                leases: Leases::open(dir.path(), &[]).unwrap(),
                leaving: crate::leaving::Leaving::default(),
                rules: Mutex::new(()),
                unpublishing: crate::together::Together::default(),
                unpolicing: crate::together::Together::default(),
                asking: Arc::default(),
            }),
            keeper: Keeper(tokio::spawn(std::future::pending())),
        };
        let begin = Instant::now();
        let (one, two) = tokio::join!(bridge.status(), bridge.status());
        for error in [one.unwrap_err().to_string(), two.unwrap_err().to_string()] {
            assert!(error.contains("not answered"), "{error}");
        }
        assert!(begin.elapsed() < LIMIT * 3, "{:?}", begin.elapsed());
    }

    #[tokio::test]
    async fn a_change_of_ranges_that_hangs_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let config = BridgeConfig { name: "br0".into(), subnets: vec![] };
        let network = BridgeNetwork::open(config, dir.path()).await.unwrap();
        let _changing = network.hold().await;
        let error = network.status().await.unwrap_err().to_string();
        assert!(error.contains("changing"), "{error}");
    }
}
