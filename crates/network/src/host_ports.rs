//! The rules of pods' host ports, and when they come and go.

use std::io;
use std::sync::{Arc, PoisonError};

use crate::bridge::{Inner, blocking, nft_error};
use crate::leases::Lease;
use crate::nft::Batch;
use crate::{NetworkError, Protocol, conntrack, rules};

impl Inner {
    /// Adds the rules for a pod's host ports.
    pub(crate) async fn publish(self: &Arc<Self>, lease: Lease) -> Result<(), NetworkError> {
        let inner = self.clone();
        blocking(move || {
            {
                let _lock = inner.rules.lock().unwrap_or_else(PoisonError::into_inner);
                inner.leases.set_published(&lease.pod_id, true);
                let added = inner.change("add host ports", rules::more_host_ports(&inner.name, &lease));
                if added.is_err() {
                    inner.leases.set_published(&lease.pod_id, false);
                }
                added?;
            }
            for port in &lease.ports {
                for ip in &lease.ips {
                    logged(&lease, conntrack::redirect(port, *ip));
                }
            }
            Ok(())
        })
        .await
    }

    /// Makes the host port rules those of all pods but this one, and others that end now. That heals what went wrong before, too.
    pub(crate) async fn unpublish(self: &Arc<Self>, lease: Lease) -> Result<(), NetworkError> {
        let inner = self.clone();
        blocking(move || {
            inner.unpublishing.run(&lease.pod_id, |pods| {
                let _lock = inner.rules.lock().unwrap_or_else(PoisonError::into_inner);
                pods.iter().for_each(|pod| inner.leases.set_published(pod, false));
                let wanted = rules::host_ports(&inner.name, &inner.leases.published());
                inner.change("replace host ports", wanted)
            })?;
            inner.leases.free_ports(&lease.pod_id)?;
            if lease.ports.iter().any(|p| p.protocol != Protocol::Tcp) {
                for ip in &lease.ips {
                    logged(&lease, conntrack::forget(*ip));
                }
            }
            Ok(())
        })
        .await
    }

    /// Changes the table. One that somebody has just taken away is made again whole, as the leases want it.
    fn change(&self, what: &str, batch: Batch) -> Result<(), NetworkError> {
        match batch.commit() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                rules::whole(&self.name, &self.subnets, &self.leases.published()).commit()
            }
            result => result,
        }
        .map_err(|error| nft_error(&self.name, what, error))
    }
}

/// Without it only senders that go on are lost.
fn logged(lease: &Lease, removed: io::Result<()>) {
    if let Err(error) = removed {
        tracing::warn!(pod_id = lease.pod_id, %error, "tracked connections to host ports not removed");
    }
}
