//! UpdateContainerResources and UpdatePodSandboxResources.
//!
//! The cgroup takes all of an update or nothing. What was asked for is in the record before the cgroup is written, and
//! the new values with the end of it: a daemon that finds an update under way carries it out again, since nobody knows
//! how far it came and nobody was told. `config.json` stays as it was created. `oom_score_adj` belongs to processes, not to the cgroup, and those that run have copied it from
//! the init long ago: like other runtimes, an update checks it and leaves it, and the status goes on
//! showing the one in force.

use std::io;
use std::sync::Arc;

use stave_cgroup::CgroupError;
use stave_cri_proto::v1::{HugepageLimit, LinuxContainerResources};

use crate::create::cgroup_resources;
use crate::error::{Code, Error, Result};
use crate::lifecycle::wrong_state;
use crate::pod::Container;
use crate::pods::{Inner, Pods, blocking};
use crate::record::{ContainerRecord, ContainerState, PodState};
use crate::stop::detached;

impl Pods {
    /// Changes limits of a container that is created or runs: all of them, or none. What is zero or empty
    /// in `request` stays as it is.
    pub async fn update_container(&self, id: &str, request: LinuxContainerResources) -> Result<()> {
        let container = self.0.container(id).ok_or_else(|| Error::container_not_found(id))?;
        let inner = Arc::clone(&self.0);
        // A client that goes away does not stop it half-way.
        detached(async move { inner.update_container(&container, request).await }).await
    }

    /// Records what a pod needs in all, for people and plugins. Its cgroup is the kubelet's, and is not
    /// written.
    pub fn update_pod(
        &self,
        id: &str,
        overhead: Option<LinuxContainerResources>,
        resources: Option<LinuxContainerResources>,
    ) -> Result<()> {
        let pod = self
            .0
            .pod(id)
            .filter(|pod| pod.state() != PodState::Creating)
            .ok_or_else(|| Error::pod_not_found(id))?;
        self.0.save_pod_then(&pod, |record| {
            if overhead.is_some() {
                record.overhead.clone_from(&overhead);
            }
            if resources.is_some() {
                record.resources.clone_from(&resources);
            }
        })
    }
}

impl Inner {
    async fn update_container(
        self: &Arc<Self>,
        container: &Arc<Container>,
        request: LinuxContainerResources,
    ) -> Result<()> {
        let _guard = container.lifecycle.lock().await;
        let record = container.record();
        if record.state == ContainerState::Exited {
            return Err(wrong_state(&record.id, record.state, "created or running"));
        }
        stave_spec::resources(FIELD, Some(&request))?;
        if let Some((key, value)) = request.unified.iter().next()
            && !self.settings.unified_cgroup
        {
            let message = "needs cgroup v2, which does not control resources on this host";
            return Err(Error::new(
                Code::FailedPrecondition,
                format!("{FIELD}.unified[{key:?}]: value {value:?}: {message}"),
            ));
        }
        let merged = merge(&record.resources.clone().unwrap_or_default(), &request);
        let written = to_write(&request, &merged);
        // Again for what an old and a new value are together.
        stave_spec::resources(FIELD, Some(&written))?;
        // Record first: where that can't be written nothing is changed, while a change of the cgroup could
        // not always be taken back.
        self.save_container_as(container, |record| record.update = Some(request.clone()))?;
        if let Err(error) = self.write_limits(&record, &written).await {
            if let Err(more) = self.save_container(container) {
                tracing::error!(container = record.id, error = %more, "recording that an update failed");
            }
            return Err(error);
        }
        self.save_container_then(container, |record| record.resources = Some(merged.clone()))?;
        tracing::info!(container = record.id, "limits of the container are changed");
        Ok(())
    }

    async fn write_limits(
        self: &Arc<Self>,
        record: &ContainerRecord,
        written: &LinuxContainerResources,
    ) -> Result<()> {
        let limits = cgroup_resources(&stave_spec::resources(FIELD, Some(written))?);
        let pod = self.pod(&record.pod_id).ok_or_else(|| Error::pod_not_found(&record.pod_id))?;
        let (inner, cgroup, id) = (Arc::clone(self), pod.with(|pod| pod.cgroup.clone()), record.id.clone());
        blocking(move || {
            inner
                .settings
                .cgroups
                .update_container(&cgroup, &id, &limits)
                .map_err(|e| cgroup_error(FIELD, &e))
        })
        .await
    }

    /// Carries out an update that a daemon was killed in, once more from the start. Where the kernel refuses it, the
    /// values from before are written, and stay.
    pub(crate) async fn finish_update(self: &Arc<Self>, container: &Arc<Container>) {
        let _guard = container.lifecycle.lock().await;
        let record = container.record();
        let Some(request) = record.update.clone() else { return };
        let old = record.resources.clone().unwrap_or_default();
        let mut now = old.clone();
        if record.state != ContainerState::Exited {
            let merged = merge(&old, &request);
            match self.write_limits(&record, &to_write(&request, &merged)).await {
                Ok(()) => now = merged,
                Err(error) => {
                    tracing::warn!(container = record.id, %error, "an update that was cut short is taken back");
                    if let Err(error) = self.write_limits(&record, &before(&request, &old)).await {
                        tracing::error!(container = record.id, %error, "taking an update back");
                    }
                }
            }
        }
        let saved = self.save_container_then(container, |record| {
            record.resources = Some(now.clone());
            record.update = None;
        });
        if let Err(error) = saved {
            tracing::error!(container = record.id, %error, "recording the end of an update");
        }
    }
}

/// Where the limits are in the request.
const FIELD: &str = "linux";

/// The values in force after `request`, but for `oom_score_adj`, which stays.
fn merge(old: &LinuxContainerResources, request: &LinuxContainerResources) -> LinuxContainerResources {
    let number = |new: i64, old: i64| if new == 0 { old } else { new };
    let text = |new: &String, old: &String| if new.is_empty() { old.clone() } else { new.clone() };
    let mut merged = LinuxContainerResources {
        cpu_period: number(request.cpu_period, old.cpu_period),
        cpu_quota: number(request.cpu_quota, old.cpu_quota),
        cpu_shares: number(request.cpu_shares, old.cpu_shares),
        memory_limit_in_bytes: number(request.memory_limit_in_bytes, old.memory_limit_in_bytes),
        oom_score_adj: old.oom_score_adj,
        cpuset_cpus: text(&request.cpuset_cpus, &old.cpuset_cpus),
        cpuset_mems: text(&request.cpuset_mems, &old.cpuset_mems),
        hugepage_limits: old.hugepage_limits.clone(),
        unified: old.unified.clone(),
        memory_swap_limit_in_bytes: number(
            request.memory_swap_limit_in_bytes,
            old.memory_swap_limit_in_bytes,
        ),
    };
    for limit in &request.hugepage_limits {
        match merged.hugepage_limits.iter_mut().find(|known| known.page_size == limit.page_size) {
            Some(known) => known.limit = limit.limit,
            None => merged.hugepage_limits.push(limit.clone()),
        }
    }
    merged.unified.extend(request.unified.clone());
    merged
}

/// What an update found, as far as it may have changed it: the values in force, and where there was none what a new cgroup
/// has. Not so for CPU and memory lists and for files of `unified`, whose first value nobody wrote down.
fn before(request: &LinuxContainerResources, old: &LinuxContainerResources) -> LinuxContainerResources {
    let number = |asked: i64, old: i64, none: i64| if asked != 0 && old == 0 { none } else { old };
    let mut before = old.clone();
    before.cpu_period = number(request.cpu_period, old.cpu_period, 100_000);
    before.cpu_quota = number(request.cpu_quota, old.cpu_quota, -1);
    before.cpu_shares = number(request.cpu_shares, old.cpu_shares, 1024);
    before.memory_limit_in_bytes = number(request.memory_limit_in_bytes, old.memory_limit_in_bytes, -1);
    // Beside a limit on memory, none on swap means that there is no swap.
    if old.memory_limit_in_bytes == 0 {
        before.memory_swap_limit_in_bytes =
            number(request.memory_swap_limit_in_bytes, old.memory_swap_limit_in_bytes, -1);
    }
    for limit in &request.hugepage_limits {
        if !before.hugepage_limits.iter().any(|known| known.page_size == limit.page_size) {
            let page_size = limit.page_size.clone();
            before.hugepage_limits.push(HugepageLimit { page_size, limit: i64::MAX.unsigned_abs() });
        }
    }
    before
}

/// What an update writes: the request, and values that share a file with one of its own, or are derived
/// from one. Files named in `unified` win over all other fields, so they are written again.
fn to_write(request: &LinuxContainerResources, merged: &LinuxContainerResources) -> LinuxContainerResources {
    let mut written = request.clone();
    if *request == (LinuxContainerResources { oom_score_adj: request.oom_score_adj, ..Default::default() }) {
        return written;
    }
    // cpu.max holds both.
    if request.cpu_quota != 0 || request.cpu_period != 0 {
        (written.cpu_quota, written.cpu_period) = (merged.cpu_quota, merged.cpu_period);
    }
    // memory.swap.max is the difference of both.
    if request.memory_limit_in_bytes != 0 || request.memory_swap_limit_in_bytes != 0 {
        written.memory_limit_in_bytes = merged.memory_limit_in_bytes;
        written.memory_swap_limit_in_bytes = merged.memory_swap_limit_in_bytes;
    }
    written.unified.clone_from(&merged.unified);
    written
}

/// A limit that could not be written: whose fault it is. The message has file, value and the kernel's words.
pub(crate) fn cgroup_error(field: &str, error: &CgroupError) -> Error {
    let code = match error {
        CgroupError::InvalidValue { .. } | CgroupError::Unified { .. } => Code::InvalidArgument,
        CgroupError::NoController { .. } | CgroupError::NotDelegated { .. } | CgroupError::InUse { .. } => {
            Code::FailedPrecondition
        }
        CgroupError::Write { source, .. } => match source.kind() {
            // More memory, or more processes, than the new limit allows.
            io::ErrorKind::ResourceBusy => Code::FailedPrecondition,
            io::ErrorKind::InvalidInput | io::ErrorKind::PermissionDenied => Code::InvalidArgument,
            _ if source.raw_os_error() == Some(rustix::io::Errno::RANGE.raw_os_error()) => {
                Code::InvalidArgument
            }
            _ => Code::Internal,
        },
        // EAGAIN: the limits on a cgroup's children; EOPNOTSUPP: those of threads.
        CgroupError::Io { source, .. } => match source.kind() {
            io::ErrorKind::PermissionDenied
            | io::ErrorKind::ReadOnlyFilesystem
            | io::ErrorKind::WouldBlock
            | io::ErrorKind::Unsupported => Code::FailedPrecondition,
            _ => Code::Internal,
        },
        _ => Code::Internal,
    };
    Error::new(code, format!("{field}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn old() -> LinuxContainerResources {
        LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 64,
            oom_score_adj: 500,
            cpuset_cpus: "0".into(),
            hugepage_limits: vec![HugepageLimit { page_size: "2MB".into(), limit: 1 }],
            unified: HashMap::from([("memory.high".into(), "60".into())]),
            ..Default::default()
        }
    }

    #[test]
    fn zero_and_empty_leave_alone() {
        assert_eq!(merge(&old(), &LinuxContainerResources::default()), old());
        let nothing = LinuxContainerResources { oom_score_adj: 7, ..Default::default() };
        assert_eq!(merge(&old(), &nothing), old());
        assert_eq!(to_write(&nothing, &old()), nothing);
    }

    #[test]
    fn what_is_given_wins() {
        let huge = |size: &str, limit| HugepageLimit { page_size: size.into(), limit };
        let request = LinuxContainerResources {
            cpu_quota: -1,
            memory_limit_in_bytes: 128,
            cpuset_cpus: "1".into(),
            hugepage_limits: vec![huge("1GB", 3), huge("2MB", 2)],
            unified: HashMap::from([("memory.high".into(), "120".into()), ("pids.max".into(), "9".into())]),
            ..Default::default()
        };
        let merged = merge(&old(), &request);
        assert_eq!((merged.cpu_quota, merged.cpu_period, merged.cpu_shares), (-1, 100_000, 512));
        assert_eq!((merged.memory_limit_in_bytes, merged.cpuset_cpus.as_str()), (128, "1"));
        assert_eq!(merged.hugepage_limits, [huge("2MB", 2), huge("1GB", 3)]);
        assert_eq!(merged.unified["memory.high"], "120");
        assert_eq!((merged.unified["pids.max"].as_str(), merged.oom_score_adj), ("9", 500));
    }

    #[test]
    fn what_was_not_limited_is_not_limited_again() {
        let request = LinuxContainerResources {
            cpu_quota: 20_000,
            cpu_shares: 7,
            memory_swap_limit_in_bytes: 1 << 30,
            hugepage_limits: vec![HugepageLimit { page_size: "1GB".into(), limit: 1 }],
            ..Default::default()
        };
        let none = before(&request, &LinuxContainerResources::default());
        assert_eq!((none.cpu_quota, none.cpu_shares, none.memory_swap_limit_in_bytes), (-1, 1024, -1));
        assert_eq!((none.cpu_period, none.memory_limit_in_bytes), (0, 0));
        assert_eq!(none.hugepage_limits[0].limit, 9_223_372_036_854_775_807);
        let some = before(&request, &old());
        assert_eq!((some.cpu_quota, some.cpu_shares, some.memory_limit_in_bytes), (50_000, 512, 64));
        assert_eq!((some.hugepage_limits[0].limit, some.hugepage_limits.len()), (1, 2));
        assert_eq!(some.memory_swap_limit_in_bytes, 0, "64 bytes, and no swap");
    }

    #[test]
    fn values_of_one_file_go_together() {
        let quota = LinuxContainerResources { cpu_quota: 20_000, ..Default::default() };
        let written = to_write(&quota, &merge(&old(), &quota));
        assert_eq!((written.cpu_quota, written.cpu_period), (20_000, 100_000));
        assert_eq!((written.cpu_shares, written.memory_limit_in_bytes), (0, 0));
        // A file that was set by name keeps its value, whatever else writes to it.
        assert_eq!(written.unified["memory.high"], "60");
        let swap = LinuxContainerResources { memory_swap_limit_in_bytes: 70, ..Default::default() };
        let written = to_write(&swap, &merge(&old(), &swap));
        assert_eq!((written.memory_limit_in_bytes, written.memory_swap_limit_in_bytes), (64, 70));
        let too_little = LinuxContainerResources { memory_swap_limit_in_bytes: 63, ..Default::default() };
        let written = to_write(&too_little, &merge(&old(), &too_little));
        assert!(stave_spec::resources(FIELD, Some(&written)).is_err());
    }

    #[test]
    fn the_kernels_answer_becomes_a_code() {
        let write = |errno| CgroupError::Write {
            path: "/cg/memory.limit_in_bytes".into(),
            value: "4096".into(),
            source: io::Error::from_raw_os_error(errno),
        };
        let mkdir = |errno| CgroupError::Io {
            call: "mkdir",
            path: "/cg/pod1".into(),
            source: io::Error::from_raw_os_error(errno),
        };
        for (errno, code) in [
            (rustix::io::Errno::AGAIN, Code::FailedPrecondition),
            (rustix::io::Errno::ACCESS, Code::FailedPrecondition),
            (rustix::io::Errno::IO, Code::Internal),
        ] {
            let error = cgroup_error("cgroup_parent \"/x\"", &mkdir(errno.raw_os_error()));
            assert_eq!(error.code, code, "{error}");
            assert!(error.message.contains("\"/x\": mkdir /cg/pod1"), "{error}");
        }
        for (errno, code) in [
            (rustix::io::Errno::BUSY, Code::FailedPrecondition),
            (rustix::io::Errno::INVAL, Code::InvalidArgument),
            (rustix::io::Errno::RANGE, Code::InvalidArgument),
            (rustix::io::Errno::IO, Code::Internal),
        ] {
            let error = cgroup_error("linux", &write(errno.raw_os_error()));
            assert_eq!(error.code, code, "{error}");
            assert!(error.message.contains("4096") && error.message.contains("/cg/"), "{error}");
        }
    }
}
