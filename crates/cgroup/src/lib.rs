//! cgroups of pods and containers, on cgroup v2 and on hosts with v1 hierarchies.
//!
//! Each controller is driven where it is mounted: in its v1 hierarchy if there is one, else in the
//! cgroup2 mount. On a pure v2 host that means v2 for everything; on a hybrid host the limits go to
//! v1, and the cgroup2 mount tracks, freezes and kills.
//!
//! The paths here come from the kubelet and from our own records and are validated; no container
//! can influence them, so plain `std::fs` is enough. The v1 part is a dozen of files to write: short enough to
//! go without a library.
//!
//! With the systemd driver, the cgroup of a pod is a scope that systemd delegates to us ([`Cgroups::scope`]); what is
//! below is the same. Speaking to systemd is another crate's.
//!
//! Calls block (mkdir, writes, and waits for a busy cgroup to empty): run them off the async threads.
//!
//! Source: the kernel's `admin-guide/cgroup-v2.rst` and `admin-guide/cgroup-v1/`, cgroups(7).
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod cgroups;
mod error;
mod fs;
mod kill;
mod layout;
mod oom;
mod path;
mod resources;
mod settings;
mod slice;

pub use cgroups::{Cgroups, ContainerCgroup, PodCgroup, SUPERVISOR_LEAF, Scope};
pub use error::CgroupError;
pub use layout::{Layout, V1Mount, detect};
pub use oom::oom_kills;
pub use resources::{BlockIo, DeviceIo, Resources, shares_to_weight};

/// Reads mountinfo: for the fuzz target.
#[cfg(fuzzing)]
pub fn fuzz_mountinfo(mountinfo: &[u8]) {
    if let Some(layout) = layout::read(mountinfo) {
        assert!(layout.v2().is_some() || !layout.v1().is_empty());
    }
}
