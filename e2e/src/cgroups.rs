use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::daemon::Daemon;

/// Whether the tests' daemons use the systemd cgroup driver: `STAVE_E2E_CGROUP_DRIVER`, else cgroupfs.
pub fn systemd_driver() -> bool {
    static SYSTEMD: OnceLock<bool> = OnceLock::new();
    *SYSTEMD.get_or_init(|| match std::env::var("STAVE_E2E_CGROUP_DRIVER").as_deref() {
        Ok("systemd") => true,
        Ok("cgroupfs" | "") | Err(_) => false,
        Ok(other) => panic!("STAVE_E2E_CGROUP_DRIVER={other}: is neither cgroupfs nor systemd"),
    })
}

/// Runs systemctl; true if that was a success. Tried again for a while when it has no answer: a test restarts systemd.
pub fn systemctl(arguments: &[&str]) -> bool {
    for _ in 0..10 {
        let mut command = Command::new("systemctl");
        command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
        let status = command.status().expect("systemctl");
        if status.code() != Some(1) {
            return status.success();
        }
        std::thread::sleep(std::time::Duration::from_millis(500));
    }
    false
}

impl Daemon {
    /// The cgroup parent that a kubelet would send for a pod, outside of this daemon's own: in the driver's form.
    pub fn kubelet_parent(&self, name: &str, pod: &str) -> String {
        let own = self.cgroup_parent();
        match own.strip_suffix(".slice") {
            Some(own) => format!("{own}{name}.slice{own}{name}-{pod}.slice"),
            None => format!("{own}-{name}/{pod}"),
        }
    }

    /// The cgroup of a pod without a cgroup parent.
    pub fn pod_cgroup(&self, id: &str) -> String {
        match systemd_driver() {
            true => format!("{}/stave-{id}.scope", self.cgroup_parent()),
            false => format!("{}/{id}", self.cgroup_parent()),
        }
    }
}

/// Makes a cgroup as the kubelet does it, by the driver.
pub fn make_cgroup(cgroup: &str) {
    if systemd_driver() {
        assert!(systemctl(&["start", unit(cgroup)]), "systemctl start {cgroup}");
        return;
    }
    for dir in cgroup_directories(cgroup) {
        // Of a run that was killed, or failed.
        children(&dir).for_each(|child| remove_tree(&child));
        fs::create_dir_all(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    }
}

fn children(dir: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir())
}

/// Removes a cgroup without processes, and those below it.
fn remove_tree(dir: &Path) {
    children(dir).for_each(|child| remove_tree(&child));
    let _ = fs::remove_dir(dir);
}

/// Removes an empty cgroup that [`make_cgroup`] made, and the one that it is in.
pub fn remove_cgroup(cgroup: &str) {
    let parent = Path::new(cgroup).parent().and_then(Path::to_str).expect("a parent");
    for cgroup in [cgroup, parent] {
        if systemd_driver() {
            systemctl(&["stop", unit(cgroup)]);
        }
        for dir in cgroup_directories(cgroup) {
            let _ = fs::remove_dir(dir);
        }
    }
}

/// A cgroup's directory in each hierarchy.
pub fn cgroup_directories(cgroup: &str) -> Vec<PathBuf> {
    crate::leftovers::hierarchies().into_iter().map(|mount| mount.join(&cgroup[1..])).collect()
}

fn unit(cgroup: &str) -> &str {
    cgroup.rsplit('/').next().expect("a name")
}
