//! From a CRI request to an OCI runtime specification, and to the executor's plan.
//!
//! Pure functions: what must be looked up on the host comes in as facts ([`Host`]).
//! [`container`] is the way in: CRI → [`oci_spec::runtime::Spec`] → [`Plan`].
#![forbid(unsafe_code)]

mod apparmor;
mod capabilities;
mod classes;
mod container;
mod devices;
mod dns;
mod error;
mod exec;
mod facts;
mod host;
mod log_path;
mod lower;
mod mounts;
mod oci;
mod pod;
mod process;
mod resources;
mod security;
mod selinux;
mod signal;
mod sysctl;
mod text;
mod time_offsets;
mod user;
mod user_namespace;

pub use classes::Class;
pub use container::{ContainerSpec, Relabel, container};
pub use dns::resolv_conf;
pub use error::{Code, SpecError};
pub use exec::exec_process;
pub use facts::{
    AppArmor, ContainerFacts, Host, HostDevice, ImageDefaults, ImageVolume, MountPeers, PodFacts, SeLinux,
};
pub use host::LiveHost;
pub use log_path::log_path;
pub use pod::validate_pod;
pub use process::validate_args;
pub use resources::{Resources, resources};
pub use security::Seccomp;
pub use selinux::{Labels as SeLinuxLabels, pod_labels};
pub use signal::{cri_signal, signal};
pub use stave_supervisor_proto::v1::Plan;
pub use sysctl::{NETWORK_DEFAULTS, default_sysctls};
pub use time_offsets::{TIME_OFFSETS, time_namespace};
pub use user_namespace::user_namespace;

/// Reads mountinfo: for the fuzz target.
#[cfg(fuzzing)]
pub fn fuzz_mountinfo(mountinfo: &[u8], path: &std::path::Path) {
    host::peers_of(mountinfo, path);
}
