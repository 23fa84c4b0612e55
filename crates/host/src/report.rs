//! The result of a probe: rows for people, facts for the daemon.

use serde::Serialize;

/// How much of what a row asks for is there; ordered by badness.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// All of it.
    Ok,
    /// Pods run, but something that a pod may ask for does not work.
    Degraded,
    /// Pods can't run without it.
    Missing,
}

impl Status {
    /// The word that a table shows.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Degraded => "degraded",
            Self::Missing => "missing",
        }
    }
}

/// One row of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked for.
    pub name: &'static str,
    /// How much of it is there.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What the lack costs; empty when nothing is lacking.
    pub cost: String,
}

/// Facts that the daemon and its Status and RuntimeConfig answers rest on. All false until probed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Features {
    /// All controllers are on one cgroup2 hierarchy (no cgroup v1).
    pub unified_cgroup: bool,
    /// There is a cgroup2 mount, be it beside v1 controllers.
    pub cgroup2: bool,
    /// The cpu controller can limit (v2 or v1).
    pub cpu_controller: bool,
    /// The memory controller can limit (v2 or v1).
    pub memory_controller: bool,
    /// The pids controller can limit (v2 or v1).
    pub pids_controller: bool,
    /// The cpuset controller can pin (v2 or v1).
    pub cpuset_controller: bool,
    /// The hugetlb controller can limit (v2 or v1).
    pub hugetlb_controller: bool,
    /// `cgroup.kill` (Linux 5.14) in cgroup2 directories.
    pub cgroup_kill: bool,
    /// systemd can make the pods' cgroups: it is PID 1, cgroup v2 stands alone, and there is a D-Bus.
    pub systemd_cgroup: bool,
    /// `cgroup.freeze` in cgroup2 directories.
    pub cgroup_freeze: bool,
    /// clone3 with CLONE_INTO_CGROUP starts a process in a cgroup2 directory.
    pub clone_into_cgroup: bool,
    /// pidfd_open works.
    pub pidfd: bool,
    /// Mount, PID, network, IPC, UTS and cgroup namespaces can all be made.
    pub namespaces: bool,
    /// User namespaces can be made and mapped.
    pub user_namespaces: bool,
    /// Time namespaces can be made.
    pub time_namespaces: bool,
    /// An overlay with upper and lower directories mounts on the root's file system.
    pub overlay: bool,
    /// overlayfs takes its layers one by one by fsconfig `lowerdir+` (Linux 6.7).
    pub overlay_lowerdir_plus: bool,
    /// overlayfs takes `volatile` (Linux 5.10).
    pub overlay_volatile: bool,
    /// `user.*` extended attributes work on the root's file system.
    pub user_xattrs: bool,
    /// A mount on the root's file system can be idmapped.
    pub idmapped_mounts: bool,
    /// mount_setattr with AT_RECURSIVE and MOUNT_ATTR_RDONLY (Linux 5.12).
    pub recursive_read_only: bool,
    /// seccomp filters, with the actions errno, kill_process and log.
    pub seccomp: bool,
    /// seccomp user notification.
    pub seccomp_notify: bool,
    /// AppArmor is active.
    pub apparmor: bool,
    /// SELinux is active, enforcing or not.
    pub selinux: bool,
    /// Landlock is active.
    pub landlock: bool,
    /// CAP_SYS_RESOURCE is in the effective set: hard limits can be raised, oom_score_adj lowered.
    pub cap_sys_resource: bool,
    /// Capabilities of the bounding set, `CAP_…`.
    pub bounding_set: Vec<String>,
    /// nf_tables takes a NAT table.
    pub nf_tables: bool,
    /// Bridges can be made.
    pub bridge: bool,
    /// veth pairs can be made.
    pub veth: bool,
    /// IPv6 is there and not switched off.
    pub ipv6: bool,
    /// /dev/fuse is there.
    pub fuse: bool,
    /// Pressure stall information is readable.
    pub psi: bool,
}

/// The whole result.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct HostReport {
    /// Rows for people, in the order probed.
    pub checks: Vec<Check>,
    /// Facts for the daemon.
    pub features: Features,
}

impl HostReport {
    /// The worst status of all rows.
    pub fn worst(&self) -> Status {
        self.checks.iter().map(|check| check.status).max().unwrap_or(Status::Ok)
    }

    pub(crate) fn ok(&mut self, name: &'static str, found: impl Into<String>) {
        self.add(name, Status::Ok, found, "");
    }

    /// A lack that is no fault, but worth telling.
    pub(crate) fn ok_with_cost(
        &mut self,
        name: &'static str,
        found: impl Into<String>,
        cost: impl Into<String>,
    ) {
        self.add(name, Status::Ok, found, cost);
    }

    pub(crate) fn degraded(&mut self, name: &'static str, found: impl Into<String>, cost: impl Into<String>) {
        self.add(name, Status::Degraded, found, cost);
    }

    pub(crate) fn missing(&mut self, name: &'static str, found: impl Into<String>, cost: impl Into<String>) {
        self.add(name, Status::Missing, found, cost);
    }

    pub(crate) fn add(
        &mut self,
        name: &'static str,
        status: Status,
        found: impl Into<String>,
        cost: impl Into<String>,
    ) {
        self.checks.push(Check { name, status, found: found.into(), cost: cost.into() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_row_counts() {
        let mut report = HostReport::default();
        assert_eq!(report.worst(), Status::Ok);
        report.ok("a", "");
        report.degraded("b", "", "something");
        assert_eq!(report.worst(), Status::Degraded);
        report.missing("c", "", "all");
        report.ok("d", "");
        assert_eq!(report.worst(), Status::Missing);
    }
}
