//! Single features and limits of the kernel.

use std::fs;

use rustix::process::{Resource, getrlimit};

use crate::report::HostReport;

/// A sysctl below which nodes are known to run dry.
struct Limit {
    row: &'static str,
    path: &'static str,
    at_least: u64,
    cost: &'static str,
}

const LIMITS: &[Limit] = &[
    Limit {
        row: "inotify instances",
        path: "/proc/sys/fs/inotify/max_user_instances",
        at_least: 512,
        cost: "programs that watch files fail with \"too many open files\" on a full node",
    },
    Limit {
        row: "inotify watches",
        path: "/proc/sys/fs/inotify/max_user_watches",
        at_least: 65536,
        cost: "programs that watch files fail with \"no space left on device\" on a full node",
    },
    Limit {
        row: "process ids",
        path: "/proc/sys/kernel/pid_max",
        at_least: 32768,
        cost: "a full node runs out of process ids",
    },
];

pub(crate) fn probe(report: &mut HostReport) {
    match fs::File::options().read(true).write(true).open("/dev/fuse") {
        Ok(_) => {
            report.features.fuse = true;
            report.ok("fuse", "/dev/fuse");
        }
        Err(error) => report.degraded(
            "fuse",
            format!("/dev/fuse: {error}"),
            "volumes and containers that use FUSE file systems don't work",
        ),
    }
    match fs::read_to_string("/proc/pressure/memory") {
        Ok(_) => {
            report.features.psi = true;
            report.ok("PSI", "/proc/pressure");
        }
        Err(error) => report.degraded(
            "PSI",
            format!("/proc/pressure: {error}"),
            "no pressure figures of pods in stats and metrics",
        ),
    }
    for limit in LIMITS {
        let value = fs::read_to_string(limit.path).ok().and_then(|text| text.trim().parse::<u64>().ok());
        match value {
            Some(value) if value >= limit.at_least => report.ok(limit.row, value.to_string()),
            Some(value) => {
                let found = format!("{value}, less than {}", limit.at_least);
                report.degraded(limit.row, found, limit.cost);
            }
            None => report.degraded(limit.row, format!("{} unreadable", limit.path), limit.cost),
        }
    }
    match getrlimit(Resource::Nofile).maximum {
        Some(maximum) if maximum < 65536 => report.degraded(
            "open files",
            format!("hard limit {maximum}, less than 65536"),
            "the daemon runs out of descriptors on a full node; containers inherit the limit",
        ),
        maximum => report.ok(
            "open files",
            format!("hard limit {}", maximum.map_or("none".to_owned(), |limit| limit.to_string())),
        ),
    }
}
