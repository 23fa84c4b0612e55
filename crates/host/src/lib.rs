//! What the host's kernel and userland offer, probed once by doing: each probe makes the thing it
//! asks about in a namespace or scratch directory of its own and takes it away again.
//!
//! A program that calls [`probe`] must call [`run_child_if_asked`] as the first thing in `main`:
//! a user namespace can only be made by a process with one thread, so the program starts itself
//! once more for that probe.
#![forbid(unsafe_code)]

mod capabilities;
mod cgroups;
mod child;
mod filesystems;
mod kernel;
mod namespaces;
mod netlink;
mod network;
mod report;
mod scratch;
mod security;
mod systemd;

use std::path::PathBuf;

pub use child::run_child_if_asked;
pub use report::{Check, Features, HostReport, Status};

/// Where the probes look and work.
#[derive(Debug, Clone)]
pub struct ProbeOptions {
    /// The daemon's root directory: overlayfs is probed on its file system. Need not exist.
    pub root: PathBuf,
    /// A file that takes the place of the built-in default AppArmor profile.
    pub apparmor_profile: Option<PathBuf>,
    /// Whether the default AppArmor profile is compiled to see if it is good: not for who loads it anyway.
    pub compile_profile: bool,
}

impl Default for ProbeOptions {
    fn default() -> Self {
        Self { root: PathBuf::from("/var/lib/stave"), apparmor_profile: None, compile_profile: true }
    }
}

/// Probes the host with the default directories.
pub fn probe() -> HostReport {
    probe_with(&ProbeOptions::default())
}

/// Probes the host. Takes some tens of milliseconds and blocks: call it off the async threads.
/// Whatever fails becomes a row of the report; nothing is left behind.
pub fn probe_with(options: &ProbeOptions) -> HostReport {
    let mut report = HostReport::default();
    cgroups::probe(&mut report);
    systemd::probe(&mut report);
    namespaces::probe(&mut report);
    filesystems::probe(&mut report, &options.root);
    security::probe(&mut report, options.compile_profile.then_some(options.apparmor_profile.as_deref()));
    capabilities::probe(&mut report);
    network::probe(&mut report);
    kernel::probe(&mut report);
    report
}
