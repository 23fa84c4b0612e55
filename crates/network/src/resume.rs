//! Pods that run on though their lease is lost.

use std::net::IpAddr;

use crate::bandwidth::Bandwidth;
use crate::bridge::{Bridge, blocking, check_pod_id, link_name};
use crate::leases::Lease;
use crate::ports::PortMapping;
use crate::{NetworkError, leaving, rules};

impl Bridge {
    /// Makes the lease of a running pod anew, with its rules, where the record is lost or can't be read: else its
    /// addresses and host ports would be another's. What another has by now stays the other's. False: it has its lease,
    /// or no interface here.
    pub async fn resume(
        &self,
        pod_id: &str,
        ips: &[IpAddr],
        ports: &[PortMapping],
        bandwidth: Bandwidth,
    ) -> Result<bool, NetworkError> {
        check_pod_id(pod_id)?;
        let inner = &self.inner;
        let link = link_name(pod_id);
        if inner.leases.get(pod_id).is_some()
            || inner.leases.is_of_another(&link, pod_id)
            || !leaving::exists(&link)
        {
            return Ok(false);
        }
        let lease = Lease {
            pod_id: pod_id.to_owned(),
            link,
            ips: ips.to_vec(),
            ports: self.checked(ports)?,
            egress: bandwidth.egress,
        };
        let of_leases = inner.clone();
        let lease = blocking(move || of_leases.leases.restore(lease)).await?;
        tracing::warn!(pod_id, ips = ?lease.ips, "the lease of a running pod was lost, and is made anew");
        if rules::policed(&lease).is_some() {
            inner.police(lease.clone()).await?;
        }
        if !lease.ports.is_empty() {
            inner.publish(lease).await?;
        }
        Ok(true)
    }
}
