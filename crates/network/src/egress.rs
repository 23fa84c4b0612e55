//! The rules for what pods send, and when they come and go.

use std::io;
use std::sync::{Arc, PoisonError};

use nix::errno::Errno;

use crate::NetworkError;
use crate::bridge::{Inner, blocking, nft_error};
use crate::leases::Lease;
use crate::nft::{self, Batch, Family};
use crate::rules;

impl Inner {
    /// Adds the rule of a pod.
    pub(crate) async fn police(self: &Arc<Self>, lease: Lease) -> Result<(), NetworkError> {
        let inner = self.clone();
        blocking(move || {
            let _lock = inner.rules.lock().unwrap_or_else(PoisonError::into_inner);
            // Not before: whoever puts rules back meanwhile would make this one, too.
            inner.leases.set_policed(&lease.pod_id, true);
            let added = inner.commit_egress(rules::more_egress(&inner.name, &lease));
            if added.is_err() {
                inner.leases.set_policed(&lease.pod_id, false);
            }
            added
        })
        .await
    }

    /// Makes the rules those of all pods that have a lease.
    pub(crate) fn replace_egress(&self) -> Result<(), NetworkError> {
        let _lock = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        self.replace_egress_locked()
    }

    fn replace_egress_locked(&self) -> Result<(), NetworkError> {
        let wanted = rules::egress(&self.name, self.has_ipv6(), &self.leases.policed());
        if wanted.rules() == 0 {
            let table = rules::table(&self.name);
            match nft::table_exists(Family::Bridge, &table) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) if is_lack(&error) => return Ok(()),
                Err(error) => return Err(nft_error(&self.name, "look up limits", error)),
            }
        }
        self.commit_egress(wanted)
    }

    /// Puts rules back that somebody took away.
    pub(crate) fn restore_egress(&self) -> Result<(), NetworkError> {
        let _lock = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = rules::egress(&self.name, self.has_ipv6(), &self.leases.policed()).rules();
        if wanted == 0 {
            return Ok(());
        }
        match nft::count_rules(Family::Bridge, &rules::table(&self.name)) {
            Ok(there) if there == wanted => Ok(()),
            Ok(there) => {
                tracing::warn!(
                    there,
                    wanted,
                    "somebody took rules for what pods send away; they are put back"
                );
                self.replace_egress_locked()
            }
            Err(error) if is_lack(&error) => Ok(()),
            Err(error) => Err(nft_error(&self.name, "list limits", error)),
        }
    }

    pub(crate) fn commit_egress(&self, batch: Batch) -> Result<(), NetworkError> {
        match batch.commit() {
            Err(error) if is_lack(&error) => {
                tracing::warn!(
                    %error,
                    "this kernel lacks tables of bridges: pods with CAP_NET_ADMIN can lift their egress limit, and with \
                     IPv6 each pod that starts costs the others something"
                );
                Ok(())
            }
            result => result.map_err(|error| nft_error(&self.name, "limit egress", error)),
        }
    }
}

/// The kernel has no tables of the family, or not the expressions.
fn is_lack(error: &io::Error) -> bool {
    [Errno::EOPNOTSUPP, Errno::EAFNOSUPPORT, Errno::ENOENT]
        .iter()
        .any(|errno| error.raw_os_error() == Some(*errno as i32))
}
