//! Where the kernel counts its OOM kills.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use crate::Cgroups;
use crate::cgroups::container_path;
use crate::fs::dir;

/// The processes that the OOM killer has ended in a cgroup, on v2 with those below it: the line `oom_kill` of
/// v2 `memory.events` or v1 `memory.oom_control` (since Linux 4.13). None without the file or the line.
pub fn oom_kills(file: &Path) -> Option<u64> {
    let mut text = String::new();
    std::fs::File::open(file).ok()?.take(4096).read_to_string(&mut text).ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

impl Cgroups {
    /// The file for [`oom_kills`] of a container; none where it has no cgroup. inotify tells of changes on v2 only.
    pub fn oom_file(&self, pod_path: &str, container_id: &str) -> Option<PathBuf> {
        self.oom_file_at(&container_path(pod_path, container_id).ok()?)
    }

    pub(crate) fn oom_file_at(&self, path: &str) -> Option<PathBuf> {
        let file = match (self.layout().v1_of("memory"), self.layout().v2()) {
            (Some(mount), _) => dir(&mount.mount, path).join("memory.oom_control"),
            (None, Some(mount)) => dir(mount, path).join("memory.events"),
            (None, None) => return None,
        };
        file.exists().then_some(file)
    }
}
