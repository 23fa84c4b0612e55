//! Namespaces and pidfds: each kind is made on a thread of its own, which takes it along.

use std::fs;
use std::io;

use nix::sched::{CloneFlags, unshare};

use crate::child::UserNamespace;
use crate::report::HostReport;
use crate::scratch::in_thread;

/// CLONE_NEWTIME of linux/sched.h: in the bits of the exit signal, so only for unshare and clone3.
const CLONE_NEWTIME: CloneFlags = CloneFlags::from_bits_retain(0x80);

const ESSENTIAL: &[(&str, CloneFlags)] = &[
    ("mount", CloneFlags::CLONE_NEWNS),
    ("pid", CloneFlags::CLONE_NEWPID),
    ("net", CloneFlags::CLONE_NEWNET),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("uts", CloneFlags::CLONE_NEWUTS),
    ("cgroup", CloneFlags::CLONE_NEWCGROUP),
];

fn try_unshare(flags: CloneFlags) -> io::Result<()> {
    in_thread(move || unshare(flags).map_err(io::Error::from))
}

pub(crate) fn probe(report: &mut HostReport) {
    let mut there = Vec::new();
    let mut lacking = Vec::new();
    for (name, flags) in ESSENTIAL {
        match try_unshare(*flags) {
            Ok(()) => there.push(*name),
            Err(error) => lacking.push(format!("{name}: {error}")),
        }
    }
    report.features.namespaces = lacking.is_empty();
    if lacking.is_empty() {
        report.ok("namespaces", there.join(", "));
    } else {
        report.missing("namespaces", lacking.join("; "), "containers can't be isolated: no pod starts");
    }

    match UserNamespace::new() {
        Ok(_) => {
            report.features.user_namespaces = true;
            let limit = fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap_or_default();
            report.ok("user namespaces", format!("made and mapped; at most {}", limit.trim()));
        }
        Err(error) => {
            report.degraded("user namespaces", error.to_string(), "pods with hostUsers: false are refused")
        }
    }

    match try_unshare(CLONE_NEWTIME) {
        Ok(()) => {
            report.features.time_namespaces = true;
            report.ok("time namespaces", "made");
        }
        Err(error) => report.degraded(
            "time namespaces",
            error.to_string(),
            "a restored container sees the node's uptime",
        ),
    }

    match rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty()) {
        Ok(_) => {
            report.features.pidfd = true;
            report.ok("pidfd", "pidfd_open");
        }
        Err(error) => report.missing(
            "pidfd",
            format!("pidfd_open: {error}"),
            "processes can't be watched and signalled safely: no pod starts",
        ),
    }
}
