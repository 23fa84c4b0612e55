//! The systemd cgroup driver's part: the scope that holds a pod sandbox.
//!
//! systemd is asked for one scope a sandbox, and never for a container: a scope lives as long as it has processes,
//! so a container's would be gone, and its OOM counter with it, before its supervisor has read that; and below a
//! delegated scope all is ours, out of reach of `daemon-reload`. The supervisor keeps the scope alive.

use stave_cgroup::{CgroupError, Cgroups};
use stave_sys::Placeholder;
use stave_systemd::{Scope, SystemdError};

use crate::error::{Code, Error, Result};
use crate::pods::{Inner, blocking};
use crate::record::PodRecord;
use crate::update::cgroup_error;

impl Inner {
    /// Starts the pod's scope, with a process that is to be dropped once the supervisor is in; none with the
    /// cgroupfs driver.
    pub(crate) async fn start_scope(&self, record: &PodRecord) -> Result<Option<Placeholder>> {
        let Some(scope) = Cgroups::scope(&record.cgroup) else { return Ok(None) };
        let (cgroups, cgroup) = (self.settings.cgroups.clone(), record.cgroup.clone());
        let (placeholder, slice_exists) = blocking(move || {
            let placeholder =
                Placeholder::start().map_err(|e| Error::internal("a process for the scope", e))?;
            Ok((placeholder, cgroups.slice_exists(&cgroup)))
        })
        .await?;
        let scope = Scope {
            name: scope.name,
            slice: scope.slice,
            transient_slice: !slice_exists,
            description: &self.scope_description(record),
            pid: placeholder.pid(),
        };
        self.settings.systemd.start_scope(&scope).await.map_err(|e| systemd_error(&e))?;
        Ok(Some(placeholder))
    }

    /// Makes what is left to make of a pod's cgroup once its supervisor is in: for containers. Of a scope, the process
    /// that it was started with is dropped.
    pub(crate) async fn complete_cgroup(
        &self,
        record: &PodRecord,
        placeholder: Option<Placeholder>,
    ) -> Result<()> {
        let (cgroups, cgroup) = (self.settings.cgroups.clone(), record.cgroup.clone());
        let parent = record.cgroup_parent().to_owned();
        blocking(move || match placeholder {
            Some(placeholder) => {
                drop(placeholder);
                cgroups.delegate(&cgroup);
                Ok(())
            }
            None => cgroups.create_pod(&cgroup).map(drop).map_err(|e| pod_cgroup_error(&parent, &e)),
        })
        .await
    }

    /// Stops the pod's scope, whose processes are dead. systemd has mostly done so by itself; then it isn't asked.
    pub(crate) async fn stop_scope(&self, cgroup: &str) -> Result<()> {
        match Cgroups::scope(cgroup) {
            Some(scope) if self.settings.cgroups.exists(cgroup) => {
                self.settings.systemd.stop(scope.name).await.map_err(|e| systemd_error(&e))
            }
            _ => Ok(()),
        }
    }

    /// Ends scopes of ours that no pod accounts for.
    pub(crate) async fn remove_unknown_scopes(&self) {
        if !self.settings.cgroups.uses_systemd() {
            return;
        }
        let units = match self.settings.systemd.list("stave-*.scope").await {
            Ok(units) => units,
            Err(error) => {
                tracing::error!(%error, "looking for scopes that are left over");
                return;
            }
        };
        let ours = self.scope_owner();
        for unit in units.iter().filter(|unit| unit.description.ends_with(&ours)) {
            let pod = unit.name.strip_prefix("stave-").and_then(|name| name.strip_suffix(".scope"));
            // Asked after the list: what was listed and is of a pod, has its pod by now.
            if !pod.is_some_and(|pod| self.is_unknown(pod)) {
                continue;
            }
            tracing::warn!(scope = unit.name, "ending a scope that belongs to no pod");
            let systemd = &self.settings.systemd;
            for result in [systemd.kill(&unit.name).await, systemd.stop(&unit.name).await] {
                if let Err(error) = result {
                    tracing::error!(scope = unit.name, %error, "ending a scope that belongs to no pod");
                }
            }
        }
    }

    fn scope_description(&self, record: &PodRecord) -> String {
        let metadata = record.config.metadata.clone().unwrap_or_default();
        description(&metadata.namespace, &metadata.name, &self.scope_owner())
    }

    /// The end of the description of this daemon's scopes: a daemon with another root must leave them alone.
    fn scope_owner(&self) -> String {
        format!(" of Stave at {}", self.settings.root.display())
    }
}

/// A pod's cgroup that could not be made: by whose fault, and of which parent.
pub(crate) fn pod_cgroup_error(parent: &str, error: &CgroupError) -> Error {
    cgroup_error(&format!("config.linux.cgroup_parent {parent:?}"), error)
}

/// What `systemctl status` shows of a pod's scope, and all of a request that systemd gets to see but the name of the
/// slice: so it is cut to what Kubernetes allows in names.
fn description(namespace: &str, name: &str, owner: &str) -> String {
    let plain = |name: &str| -> String {
        let good = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
        name.chars().filter(good).take(253).collect()
    };
    format!("Pod {}/{}{owner}", plain(namespace), plain(name))
}

fn systemd_error(error: &SystemdError) -> Error {
    let code = if error.is_unavailable() { Code::Unavailable } else { Code::Internal };
    Error::new(code, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_is_one_plain_line() {
        let owner = " of Stave at /var/lib/stave";
        assert_eq!(
            description("kube-system", "dns.1", owner),
            "Pod kube-system/dns.1 of Stave at /var/lib/stave"
        );
        let hostile = description("a\n[Scope]\nPIDs=1", "%n \"x\" of Stave at /other", owner);
        assert_eq!(hostile, "Pod aScopePIDs1/nxofStaveatother of Stave at /var/lib/stave");
        assert!(description(&"n".repeat(9999), "", owner).len() < 600);
    }

    #[test]
    fn an_absent_systemd_is_unavailable() {
        let error =
            SystemdError::Deadline { stage: "starting".into(), deadline: std::time::Duration::from_secs(1) };
        assert_eq!(systemd_error(&error).code, Code::Unavailable);
        let error = SystemdError::Job { stage: "starting".into(), unit: "u".into(), result: "failed".into() };
        assert_eq!(systemd_error(&error).code, Code::Internal);
    }
}
