//! The MTU of the bridge follows that of the interface with the default route.

use std::sync::atomic::Ordering;

use crate::NetworkError;
use crate::bridge::Inner;
use crate::link::{self, Link};

impl Inner {
    /// Takes the uplink's MTU over, for the bridge and for pods to come. Running pods keep theirs: where it is larger,
    /// the kernel tells them (path MTU discovery). Without a default route nothing changes.
    pub(crate) async fn follow_uplink(&self) -> Result<(), NetworkError> {
        let Some((index, mtu)) = link::uplink(&self.handle).await? else {
            self.uplink.store(0, Ordering::Relaxed);
            return Ok(());
        };
        self.uplink.store(index, Ordering::Relaxed);
        let bridge = self.link();
        if bridge.mtu == Some(mtu) || bridge.index == index {
            return Ok(());
        }
        tracing::info!(bridge = self.name, from = bridge.mtu, to = mtu, "the MTU follows that of the uplink");
        link::set_mtu(&self.handle, bridge.index, &self.name, mtu).await?;
        self.set_link(Link { mtu: Some(mtu), ..bridge });
        Ok(())
    }
}
