//! The classic demonstrations of a Linux container, each looked at from both sides: from inside, and from the host.

mod files;
mod limits;
mod mounts;
mod namespaces;
mod rights;
mod time;
pub(crate) mod user;

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags};
use stave_e2e::Daemon;
use stave_e2e::cri::*;

/// The container's PID 1 as the host numbers it.
pub(crate) async fn host_pid(daemon: &Daemon, id: &str) -> u32 {
    let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: true };
    let info = daemon.cri.container_status(request).await.expect("ContainerStatus").info;
    let value: serde_json::Value = serde_json::from_str(&info["info"]).expect("info is JSON");
    value["pid"].as_u64().and_then(|pid| pid.try_into().ok()).expect("a pid")
}

/// A line of /proc/PID/status, seen from the host.
pub(crate) fn status_line(pid: u32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("{name} in {status}")).trim().to_owned()
}

/// A tmpfs on the host, with that propagation; unmounted with all that is on it.
pub(crate) struct HostMount(PathBuf);

impl HostMount {
    pub(crate) fn new(path: &Path, propagation: MsFlags) -> HostMount {
        fs::create_dir_all(path).expect("mount point");
        let none: Option<&str> = None;
        nix::mount::mount(Some("anatomy"), path, Some("tmpfs"), MsFlags::empty(), none).expect("tmpfs");
        let mount = HostMount(path.to_owned());
        nix::mount::mount(none, path, none, propagation, none).expect("propagation");
        mount
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
