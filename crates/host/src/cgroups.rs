//! Control groups: the layout, the controllers, and what cgroup2 directories can do.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::child;
use crate::report::HostReport;
use crate::scratch::ScratchCgroup;

/// What is mounted, from mountinfo (proc_pid_mountinfo(5)).
#[derive(Debug, Default, PartialEq, Eq)]
struct Mounts {
    v2: Option<PathBuf>,
    /// v1 controller to its mount point.
    v1: BTreeMap<String, PathBuf>,
}

fn parse_mountinfo(text: &str) -> Mounts {
    let mut mounts = Mounts::default();
    for line in text.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let (Some(point), mut right) = (left.split(' ').nth(4), right.split(' ')) else { continue };
        let (kind, options) = (right.next(), right.nth(1).unwrap_or_default());
        match kind {
            Some("cgroup2") if mounts.v2.is_none() => mounts.v2 = Some(PathBuf::from(point)),
            Some("cgroup") => {
                for option in options.split(',').filter(|option| V1_CONTROLLERS.contains(option)) {
                    mounts.v1.entry(option.to_owned()).or_insert_with(|| PathBuf::from(point));
                }
            }
            _ => {}
        }
    }
    mounts
}

const V1_CONTROLLERS: &[&str] = &[
    "cpu",
    "cpuacct",
    "cpuset",
    "memory",
    "devices",
    "freezer",
    "blkio",
    "pids",
    "hugetlb",
    "net_cls",
    "net_prio",
    "perf_event",
    "rdma",
    "misc",
];

/// A controller as a row: its name in v2, its name in v1 with a file that must appear in a new
/// cgroup, and what its lack costs.
struct Controller {
    row: &'static str,
    v2: &'static str,
    v1: &'static str,
    v1_file: &'static str,
    cost: &'static str,
}

const CONTROLLERS: &[Controller] = &[
    Controller {
        row: "cpu controller",
        v2: "cpu",
        v1: "cpu",
        v1_file: "cpu.cfs_quota_us",
        cost: "CPU requests and limits of pods are refused",
    },
    Controller {
        row: "memory controller",
        v2: "memory",
        v1: "memory",
        v1_file: "memory.limit_in_bytes",
        cost: "memory limits of pods are refused, OOM kills are not seen",
    },
    Controller {
        row: "pids controller",
        v2: "pids",
        v1: "pids",
        v1_file: "pids.max",
        cost: "a pod can use up all process ids of the node",
    },
    Controller {
        row: "cpuset controller",
        v2: "cpuset",
        v1: "cpuset",
        v1_file: "cpuset.cpus",
        cost: "pods can't be pinned to CPUs or memory nodes",
    },
    Controller {
        row: "hugetlb controller",
        v2: "hugetlb",
        v1: "hugetlb",
        v1_file: "hugetlb.2MB.limit_in_bytes",
        cost: "huge page limits of pods are refused",
    },
    Controller {
        row: "io controller",
        v2: "io",
        v1: "",
        v1_file: "",
        cost: "io.max, io.weight and the like are refused; classes of block I/O go through v1's blkio, where that is mounted",
    },
];

pub(crate) fn probe(report: &mut HostReport) {
    let mounts = match fs::read("/proc/self/mountinfo") {
        // Names of mounts need not be UTF-8.
        Ok(content) => parse_mountinfo(&String::from_utf8_lossy(&content)),
        Err(error) => {
            report.missing("cgroup layout", format!("/proc/self/mountinfo: {error}"), NO_CGROUPS);
            return;
        }
    };
    layout(report, &mounts);
    let v2_controllers = mounts
        .v2
        .as_deref()
        .and_then(|mount| fs::read_to_string(mount.join("cgroup.controllers")).ok())
        .unwrap_or_default();
    let v2_controllers: Vec<&str> = v2_controllers.split_ascii_whitespace().collect();
    for controller in CONTROLLERS {
        let found = has_controller(&mounts, &v2_controllers, controller);
        let works = found.is_ok();
        match found {
            Ok(found) => report.ok(controller.row, found),
            Err(found) => report.degraded(controller.row, found, controller.cost),
        }
        let features = &mut report.features;
        match controller.v2 {
            "cpu" => features.cpu_controller = works,
            "memory" => features.memory_controller = works,
            "pids" => features.pids_controller = works,
            "cpuset" => features.cpuset_controller = works,
            "hugetlb" => features.hugetlb_controller = works,
            _ => {}
        }
    }
    if let Some(mount) = &mounts.v2 {
        directories(report, mount);
    }
}

const NO_CGROUPS: &str =
    "the processes of a container can't be held together, limited and killed: no pod starts";

fn layout(report: &mut HostReport, mounts: &Mounts) {
    const NAME: &str = "cgroup layout";
    let v1: Vec<&str> = mounts.v1.keys().map(String::as_str).collect();
    report.features.cgroup2 = mounts.v2.is_some();
    report.features.unified_cgroup = mounts.v2.is_some() && v1.is_empty();
    match &mounts.v2 {
        Some(mount) if v1.is_empty() => report.ok(NAME, format!("unified, at {}", mount.display())),
        Some(mount) => report.degraded(
            NAME,
            format!("hybrid: cgroup2 at {}, v1 for {}", mount.display(), v1.join(", ")),
            "limits go through cgroup v1: what a pod asks of v2 by name (memory.high, memory.min, memory.oom.group, cpu.idle, \
             io.max) is refused, starts are slower; a kernel with \
             systemd.unified_cgroup_hierarchy=1 has all of it",
        ),
        None if v1.is_empty() => report.missing(NAME, "nothing mounted", NO_CGROUPS),
        None => report.degraded(
            NAME,
            format!("v1 only: {}", v1.join(", ")),
            "containers are killed process by process, which a fork bomb can outrun; limits go through cgroup v1",
        ),
    }
}

fn has_controller(mounts: &Mounts, v2: &[&str], controller: &Controller) -> Result<String, String> {
    if v2.contains(&controller.v2) {
        return Ok("cgroup2".into());
    }
    if controller.v1.is_empty() {
        return Err("not in cgroup2".into());
    }
    let Some(mount) = mounts.v1.get(controller.v1) else {
        return Err("neither in cgroup2 nor mounted as v1".into());
    };
    let cgroup =
        ScratchCgroup::new(mount).map_err(|error| format!("mkdir in {}: {error}", mount.display()))?;
    // Without huge pages of 2 MiB the file has another size in its name: the directory is enough.
    if controller.v1 != "hugetlb" && !cgroup.path().join(controller.v1_file).exists() {
        return Err(format!("v1 at {}, without {}", mount.display(), controller.v1_file));
    }
    Ok(format!("v1, at {}", mount.display()))
}

/// What a cgroup2 directory can do, tried in one.
fn directories(report: &mut HostReport, mount: &Path) {
    const NAME: &str = "cgroup2 directories";
    let cgroup = match ScratchCgroup::new(mount) {
        Ok(cgroup) => cgroup,
        Err(error) => {
            report.missing(NAME, format!("mkdir in {}: {error}", mount.display()), NO_CGROUPS);
            return;
        }
    };
    let kill = cgroup.path().join("cgroup.kill").exists();
    let freeze = cgroup.path().join("cgroup.freeze").exists();
    report.features.cgroup_kill = kill;
    report.features.cgroup_freeze = freeze;
    match (kill, freeze) {
        (true, true) => report.ok(NAME, "cgroup.kill, cgroup.freeze"),
        (false, _) => report.degraded(
            NAME,
            "no cgroup.kill (Linux 5.14)",
            "containers are killed process by process, which a fork bomb can outrun",
        ),
        (true, false) => report.degraded(NAME, "no cgroup.freeze", "containers can't be paused"),
    }
    const INTO: &str = "start in a cgroup";
    match child::start_in_cgroup(cgroup.path()) {
        Ok(()) => {
            report.features.clone_into_cgroup = true;
            report.ok(INTO, "clone3 with CLONE_INTO_CGROUP");
        }
        Err(error) => {
            report.degraded(
                INTO,
                format!("CLONE_INTO_CGROUP: {error} (Linux 5.7)"),
                "processes move into their cgroups, which takes some milliseconds each",
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_unified_and_hybrid_layouts() {
        let unified = parse_mountinfo(
            "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
        );
        assert_eq!(unified.v2.as_deref(), Some(Path::new("/sys/fs/cgroup")));
        assert!(unified.v1.is_empty());

        let hybrid = parse_mountinfo(
            "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
             32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
             40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
             41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        );
        assert_eq!(hybrid.v2.as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));
        assert_eq!(hybrid.v1.keys().collect::<Vec<_>>(), ["cpu", "cpuacct"]);
        assert_eq!(parse_mountinfo("rubbish\n\n - - - \n"), Mounts::default());
    }

    #[test]
    fn layouts_have_their_status() {
        use crate::report::Status;
        for (v2, v1, status) in [
            (true, false, Status::Ok),
            (true, true, Status::Degraded),
            (false, true, Status::Degraded),
            (false, false, Status::Missing),
        ] {
            let mounts = Mounts {
                v2: v2.then(|| PathBuf::from("/two")),
                v1: v1.then(|| ("cpu".to_owned(), PathBuf::from("/one"))).into_iter().collect(),
            };
            let mut report = HostReport::default();
            layout(&mut report, &mounts);
            assert_eq!(report.worst(), status);
            assert_eq!(report.features.unified_cgroup, status == Status::Ok);
        }
    }
}
