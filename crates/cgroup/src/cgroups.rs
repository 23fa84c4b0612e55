use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::fs::{dir, make_path, remove_tree, write};
use crate::kill::{KILL_LIMIT, Refused, enable_controllers, kill_all, kill_one_by_one};
use crate::path::{check, check_cgroupfs, check_name};
use crate::settings::{Dirs, apply, plan};
use crate::slice::{expand, scope_name, scope_of, slice_name, slice_of};
use crate::{BlockIo, CgroupError, Layout, Resources};

/// Name of the leaf beside the containers that holds a pod's supervisor.
pub const SUPERVISOR_LEAF: &str = "stave-pod";

/// How often memory over a new limit is asked back.
const RECLAIM_ROUNDS: usize = 4;

/// Controllers that every pod has on cgroup v2: for its limits, and for its statistics.
const BASE_CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// Controllers that come when something asks for them: each costs on the way of what it counts.
const MORE_CONTROLLERS: [&str; 5] = ["cpuset", "io", "hugetlb", "misc", "rdma"];

/// A pod's cgroup in all hierarchies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodCgroup {
    /// path below each mount, such as `/kubepods/burstable/pod12-3`
    pub path: String,
    /// true if it did not exist: ours to remove, by `Cgroups::remove_pod`
    pub ours: bool,
    /// directory in the cgroup2 mount
    pub v2_dir: Option<PathBuf>,
    /// name and directory in each v1 hierarchy; v1 has no rule about leaves, so the supervisor can go there
    pub v1: Vec<(String, PathBuf)>,
    /// the supervisor's leaf in the cgroup2 mount
    pub supervisor_dir: Option<PathBuf>,
}

/// A container's cgroup in all hierarchies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerCgroup {
    /// directory in the cgroup2 mount, for `CLONE_INTO_CGROUP`
    pub v2_dir: Option<PathBuf>,
    /// name and directory in each v1 hierarchy: the process goes into `cgroup.procs` of each
    pub v1: Vec<(String, PathBuf)>,
    /// where `oom_kill` is counted: v1 `memory.oom_control` or v2 `memory.events`
    pub oom_file: Option<PathBuf>,
}

/// A pod's scope in systemd, see [`Cgroups::scope`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scope<'a> {
    /// name of the scope, such as `stave-<pod id>.scope`
    pub name: &'a str,
    /// name of the slice that it is in
    pub slice: &'a str,
}

/// Makes, limits and removes the cgroups of pods.
///
/// With the systemd driver the cgroup of a pod sandbox is a scope that systemd starts and delegates to us,
/// in the slice that the kubelet made; all below it is made here, as with the cgroupfs driver. What is done
/// with a cgroup that exists depends on the form of its path only, so that pods go on and end after a change
/// of the driver.
#[derive(Debug, Clone)]
pub struct Cgroups {
    layout: Layout,
    default_parent: String,
    /// The cgroup of systemd itself, "" on a host; none with the cgroupfs driver.
    systemd_root: Option<String>,
}

impl Cgroups {
    /// With the cgroupfs driver. `default_parent` holds the pods that come without a cgroup parent, such as
    /// `/stave`.
    pub fn new(layout: Layout, default_parent: &str) -> Self {
        Self { layout, default_parent: default_parent.to_owned(), systemd_root: None }
    }

    /// With the systemd driver. `default_slice` holds the pods that come without a cgroup parent, such as
    /// `stave.slice`; `root` is the cgroup of systemd itself, "" but in containers.
    pub fn with_systemd(layout: Layout, default_slice: &str, root: &str) -> Result<Self, CgroupError> {
        let root = root.trim_end_matches('/').to_owned();
        let default_parent = format!("{root}{}", expand(slice_name(default_slice)?));
        Ok(Self { layout, default_parent, systemd_root: Some(root) })
    }

    /// The hierarchies in use.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The cgroup of a pod sandbox. With the cgroupfs driver it is the parent as the kubelet gives it, or
    /// `<default parent>/<pod id>`; with the systemd driver `stave-<pod id>.scope` in the slice that the kubelet
    /// gives, or in the default slice. A parent in the other driver's form is an error.
    pub fn pod_path(&self, cgroup_parent: &str, pod_id: &str) -> Result<String, CgroupError> {
        check_name("pod id", pod_id)?;
        let path = match (&self.systemd_root, cgroup_parent) {
            (None, "") => format!("{}/{pod_id}", self.default_parent.trim_end_matches('/')),
            (None, given) => {
                check_cgroupfs(given)?;
                given.to_owned()
            }
            (Some(_), "") => format!("{}/{}", self.default_parent, scope_name(pod_id)),
            (Some(root), given) => {
                format!("{root}{}/{}", expand(slice_name(given)?), scope_name(pod_id))
            }
        };
        check(&path)?;
        Ok(path)
    }

    /// True with the systemd driver.
    pub fn uses_systemd(&self) -> bool {
        self.systemd_root.is_some()
    }

    /// The scope that is to be started before [`Self::create_pod`], and stopped before [`Self::remove_pod`];
    /// none for a path of the cgroupfs driver.
    pub fn scope(pod_path: &str) -> Option<Scope<'_>> {
        Some(Scope { name: scope_of(pod_path)?, slice: slice_of(pod_path)? })
    }

    /// The slice of a pod's scope is there, the kubelet's or that of another pod.
    pub fn slice_exists(&self, pod_path: &str) -> bool {
        let slice = pod_path.rsplit_once('/').map_or("", |(slice, _)| slice);
        self.layout.v2().is_some_and(|mount| dir(mount, slice).is_dir())
    }

    /// True if the cgroup belongs to one pod sandbox alone: a scope, or a child of our default parent. A parent
    /// that the kubelet gave is shared by all sandboxes of a pod uid, the dead and the next one.
    pub fn is_exclusive(&self, pod_path: &str) -> bool {
        if scope_of(pod_path).is_some() {
            return true;
        }
        pod_path
            .strip_prefix(self.default_parent.trim_end_matches('/'))
            .and_then(|rest| rest.strip_prefix('/'))
            .is_some_and(|name| !name.is_empty() && !name.contains('/'))
    }

    /// True if the pod's cgroup is there, where the kubelet makes it.
    pub fn exists(&self, pod_path: &str) -> bool {
        self.main_mount().is_ok_and(|mount| dir(mount, pod_path).is_dir())
    }

    /// Makes the pod's cgroup in every hierarchy, and the supervisor's leaf in cgroup2. What exists is kept; on
    /// an error a cgroup that we made is removed. A scope must have been started; it has no controllers for the
    /// containers before [`Self::delegate`].
    pub fn create_pod(&self, pod_path: &str) -> Result<PodCgroup, CgroupError> {
        check(pod_path)?;
        if scope_of(pod_path).is_some() {
            return self.make_in_scope(pod_path);
        }
        let ours = !dir(self.main_mount()?, pod_path).is_dir();
        self.make_pod(pod_path, ours).inspect_err(|_| {
            if let Err(error) = self.remove_pod(pod_path, ours) {
                tracing::warn!(pod_path, %error, "cgroup of a failed pod not removed");
            }
        })
    }

    /// The part of [`Self::create_pod`] that the pod's supervisor starts in, where the rest can wait: on a hybrid host
    /// the v1 hierarchies take most of the time. To be followed by it; on an error what was made is left to
    /// [`Self::remove_pod`].
    pub fn create_for_supervisor(&self, pod_path: &str) -> Result<(), CgroupError> {
        check(pod_path)?;
        match self.layout {
            Layout::Hybrid { .. } if scope_of(pod_path).is_none() => self.make_v2(pod_path).map(drop),
            _ => self.create_pod(pod_path).map(drop),
        }
    }

    fn make_in_scope(&self, pod_path: &str) -> Result<PodCgroup, CgroupError> {
        let Some(mount) = self.layout.v2() else { return Err(CgroupError::NoHierarchy) };
        let scope = dir(mount, pod_path);
        if !scope.is_dir() {
            return Err(CgroupError::NoScope { path: scope });
        }
        let leaf = scope.join(SUPERVISOR_LEAF);
        make_dir(&leaf, true)?;
        Ok(PodCgroup {
            path: pod_path.to_owned(),
            ours: true,
            v2_dir: Some(scope),
            v1: Vec::new(),
            supervisor_dir: Some(leaf),
        })
    }

    /// Gives the cgroups below a pod's scope their controllers: once the supervisor is in its leaf, and the
    /// process that the scope was started with is gone, as cgroup2 allows processes in leaves only. A limit that
    /// wants another one turns it on down from the root; those that systemd does not know, as hugetlb, it leaves
    /// alone in its slices.
    pub fn delegate(&self, pod_path: &str) {
        if scope_of(pod_path).is_some() {
            enable_controllers(&self.layout, pod_path, &BASE_CONTROLLERS);
        }
    }

    fn make_pod(&self, pod_path: &str, ours: bool) -> Result<PodCgroup, CgroupError> {
        let mut v1 = Vec::new();
        for mount in self.layout.v1() {
            let is_cpuset = mount.controllers.iter().any(|c| c == "cpuset");
            make_path(&mount.mount, pod_path)?;
            let dir = dir(&mount.mount, pod_path);
            if is_cpuset {
                inherit_cpuset(&mount.mount, &dir)?;
            }
            v1.push((mount.name.clone(), dir));
        }
        let supervisor_dir = self.make_v2(pod_path)?;
        let v2_dir = self.layout.v2().map(|mount| dir(mount, pod_path));
        Ok(PodCgroup { path: pod_path.to_owned(), ours, v2_dir, v1, supervisor_dir })
    }

    /// Gives the supervisor's leaf.
    fn make_v2(&self, pod_path: &str) -> Result<Option<PathBuf>, CgroupError> {
        let supervisor_dir = self.supervisor_dir(pod_path);
        if let (Some(mount), Some(leaf)) = (self.layout.v2(), &supervisor_dir) {
            make_path(mount, pod_path)?;
            // Before any process is in the leaf's parent: cgroup2 allows processes in leaves only.
            if let Layout::Unified { .. } = self.layout {
                enable_controllers(&self.layout, pod_path, &BASE_CONTROLLERS);
            }
            make_dir(leaf, true)?;
        }
        Ok(supervisor_dir)
    }

    /// Makes a container's cgroup below the pod's and writes its limits. On an error nothing is left.
    pub fn create_container(
        &self,
        pod_path: &str,
        container_id: &str,
        resources: &Resources,
    ) -> Result<ContainerCgroup, CgroupError> {
        let path = container_path(pod_path, container_id)?;
        let mut made = Vec::new();
        let result = self.make_container(&path, pod_path, resources, &mut made);
        if result.is_err() {
            for dir in made.iter().rev() {
                if let Err(error) = fs::remove_dir(dir) {
                    tracing::warn!(path = %dir.display(), %error, "cgroup of a failed container not removed");
                }
            }
        }
        result
    }

    fn make_container(
        &self,
        path: &str,
        pod_path: &str,
        resources: &Resources,
        made: &mut Vec<PathBuf>,
    ) -> Result<ContainerCgroup, CgroupError> {
        let mut v1 = Vec::new();
        for mount in self.layout.v1() {
            let dir = dir(&mount.mount, path);
            make_dir(&dir, false)?;
            made.push(dir.clone());
            if mount.controllers.iter().any(|c| c == "cpuset") {
                inherit_cpuset(&mount.mount, &dir)?;
            }
            v1.push((mount.name.clone(), dir));
        }
        let mut v2_dir = None;
        let mut refused = Vec::new();
        if let Some(mount) = self.layout.v2() {
            refused = self.enable_for(pod_path, resources);
            let dir = dir(mount, path);
            make_dir(&dir, false)?;
            made.push(dir.clone());
            v2_dir = Some(dir);
        }
        self.limit(path, resources, refused)?;
        Ok(ContainerCgroup { v2_dir, v1, oom_file: self.oom_file_at(path) })
    }

    /// Turns on what the limits ask for in the cgroup2 mount, but for what a hybrid host has in v1. A cgroup passes
    /// on what its parents pass on, so this is done on the whole way down. Gives what was refused.
    fn enable_for(&self, pod_path: &str, resources: &Resources) -> Vec<Refused> {
        let mut wanted: Vec<&str> = resources
            .unified
            .keys()
            .filter_map(|key| key.split('.').next())
            .filter(|c| BASE_CONTROLLERS.contains(c) || MORE_CONTROLLERS.contains(c))
            .collect();
        if let Layout::Unified { .. } = self.layout {
            wanted.extend(BASE_CONTROLLERS);
            if !(resources.cpuset_cpus.is_empty() && resources.cpuset_mems.is_empty()) {
                wanted.push("cpuset");
            }
        }
        if resources.hugepage_limits.iter().any(|(_, bytes)| *bytes > 0) {
            wanted.push("hugetlb");
        }
        if resources.block_io != BlockIo::default() && self.layout.v1_of("blkio").is_none() {
            wanted.push("io");
        }
        wanted.retain(|c| self.layout.v1_of(c).is_none());
        wanted.sort_unstable();
        wanted.dedup();
        if wanted.is_empty() { Vec::new() } else { enable_controllers(&self.layout, pod_path, &wanted) }
    }

    /// Changes limits: all of them, or none. A memory limit below what the container needs is an error.
    pub fn update_container(
        &self,
        pod_path: &str,
        container_id: &str,
        resources: &Resources,
    ) -> Result<(), CgroupError> {
        let path = container_path(pod_path, container_id)?;
        let refused = self.enable_for(pod_path, resources);
        if let (Some(limit @ 1..), None, Some(mount)) =
            (resources.memory_limit, self.layout.v1_of("memory"), self.layout.v2())
        {
            make_room(&dir(mount, &path), limit)?;
        }
        self.limit(&path, resources, refused)
    }

    /// `refused`: why a controller may be missing.
    fn limit(&self, path: &str, resources: &Resources, refused: Vec<Refused>) -> Result<(), CgroupError> {
        let v2 = self.layout.v2().map(|mount| dir(mount, path));
        let v1 = |controller: &str| self.layout.v1_of(controller).map(|mount| dir(&mount.mount, path));
        let done = plan(&Dirs { v2: v2.as_deref(), v1: &v1 }, resources).and_then(|plan| apply(&plan));
        done.map_err(|error| match error {
            CgroupError::NoController { controller, asked, path } => {
                match refused.into_iter().find(|refused| refused.controller == controller) {
                    None => CgroupError::NoController { controller, asked, path },
                    Some(Refused { controller, dir, source }) => {
                        // cgroup v2 has processes or controllers' children in a cgroup, not both.
                        let hint = match source.kind() {
                            io::ErrorKind::ResourceBusy => "; it has processes of its own",
                            _ => "",
                        };
                        CgroupError::NotDelegated { controller, asked, dir, source, hint }
                    }
                }
            }
            error => error,
        })
    }

    /// Removes a container's cgroup, and those that the container made below. Waits a little for processes
    /// that are dying; absent is success. All hierarchies are tried; the first error is returned.
    pub fn remove_container(&self, pod_path: &str, container_id: &str) -> Result<(), CgroupError> {
        let path = container_path(pod_path, container_id)?;
        self.every_dir(&path, |_, dir| remove_tree(dir))
    }

    /// Removes the supervisor's leaf, and the pod's cgroup if `ours`. A scope must have been stopped. One below our default parent goes
    /// with all that is in it; another may be shared with the pod's next sandbox, so it goes only when empty.
    pub fn remove_pod(&self, pod_path: &str, ours: bool) -> Result<(), CgroupError> {
        check(pod_path)?;
        if ours && self.is_exclusive(pod_path) {
            return self.every_dir(pod_path, |_, dir| remove_tree(dir));
        }
        if let Some(leaf) = self.supervisor_dir(pod_path) {
            remove_if_empty(&leaf)?;
        }
        // The kubelet of a hybrid host knows nothing of the cgroup2 mount: that directory is always ours.
        let hybrid = matches!(self.layout, Layout::Hybrid { .. });
        self.every_dir(
            pod_path,
            |is_v2, dir| {
                if ours || (hybrid && is_v2) { remove_if_empty(dir) } else { Ok(()) }
            },
        )
    }

    /// Kills every process in a pod's cgroup, the supervisor too, and waits until they are gone. Only for
    /// cgroups of one sandbox (`is_exclusive`): in a shared one it kills the pod's next sandbox as well, so
    /// there use `kill_container` for each container. Absent is success.
    pub fn kill_pod(&self, pod_path: &str) -> Result<(), CgroupError> {
        check(pod_path)?;
        self.kill(pod_path)
    }

    /// Kills every process in a container's cgroup and waits until they are gone. Absent is success.
    pub fn kill_container(&self, pod_path: &str, container_id: &str) -> Result<(), CgroupError> {
        self.kill(&container_path(pod_path, container_id)?)
    }

    /// Kills every process in the supervisor's leaf, and waits until they are gone. The leaf can be used again. Only
    /// where no other sandbox has its supervisor there. Absent is success.
    pub fn kill_supervisor_leaf(&self, pod_path: &str) -> Result<(), CgroupError> {
        check(pod_path)?;
        let leaf = self.supervisor_dir(pod_path);
        kill_one_by_one(leaf.as_deref().as_slice(), KILL_LIMIT)
    }

    fn kill(&self, path: &str) -> Result<(), CgroupError> {
        let v2 = self.layout.v2().map(|mount| dir(mount, path));
        let v1: Vec<_> = self.layout.v1().iter().map(|m| (m.name.clone(), dir(&m.mount, path))).collect();
        kill_all(v2.as_deref(), &v1)
    }

    /// The supervisor's leaf in the cgroup2 mount; none on pure v1 hosts.
    pub fn supervisor_dir(&self, pod_path: &str) -> Option<PathBuf> {
        self.layout.v2().map(|mount| dir(mount, pod_path).join(SUPERVISOR_LEAF))
    }

    /// Calls `each` (is it v2, its directory) in every hierarchy, past errors; returns the first error.
    fn every_dir(
        &self,
        path: &str,
        mut each: impl FnMut(bool, &Path) -> Result<(), CgroupError>,
    ) -> Result<(), CgroupError> {
        let mut first = Ok(());
        let v2 = self.layout.v2().map(|mount| (true, mount));
        for (is_v2, mount) in
            v2.into_iter().chain(self.layout.v1().iter().map(|m| (false, m.mount.as_path())))
        {
            let result = each(is_v2, &dir(mount, path));
            if first.is_ok() {
                first = result;
            }
        }
        first
    }

    /// The hierarchy that decides whether a pod's cgroup existed: the kubelet makes it where the limits are.
    fn main_mount(&self) -> Result<&Path, CgroupError> {
        self.layout
            .v1_of("memory")
            .or_else(|| self.layout.v1_of("cpu"))
            .map(|m| m.mount.as_path())
            .or_else(|| self.layout.v2())
            .or_else(|| self.layout.v1().first().map(|m| m.mount.as_path()))
            .ok_or(CgroupError::NoHierarchy)
    }
}

pub(crate) fn container_path(pod_path: &str, container_id: &str) -> Result<String, CgroupError> {
    check(pod_path)?;
    check_name("container id", container_id)?;
    if container_id == SUPERVISOR_LEAF {
        return Err(CgroupError::InvalidName { what: "container id", value: container_id.to_owned() });
    }
    Ok(format!("{pod_path}/{container_id}"))
}

/// Brings the memory of a v2 cgroup under a new limit. v1 refuses a limit that is too small (EBUSY), where v2
/// kills. Kernels without `memory.reclaim` (before 5.19) are left to do so.
fn make_room(dir: &Path, limit: i64) -> Result<(), CgroupError> {
    let used =
        || fs::read_to_string(dir.join("memory.current")).ok().and_then(|text| text.trim().parse().ok());
    for _ in 0..RECLAIM_ROUNDS {
        let Some(over) = used().and_then(|used: i64| used.checked_sub(limit)).filter(|over| *over > 0) else {
            return Ok(());
        };
        match write(&dir.join("memory.reclaim"), &over.to_string()) {
            Ok(()) => {}
            // EAGAIN: less than that could be reclaimed. Perhaps enough: the next look tells.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return Ok(()),
        }
    }
    match used() {
        Some(used) if used > limit => Err(CgroupError::InUse { limit, used, path: dir.to_path_buf() }),
        _ => Ok(()),
    }
}

fn make_dir(dir: &Path, may_exist: bool) -> Result<(), CgroupError> {
    match fs::create_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            if may_exist {
                Ok(())
            } else {
                Err(CgroupError::Exists { path: dir.to_path_buf() })
            }
        }
        Err(e) => Err(CgroupError::io("mkdir", dir, e)),
        Ok(()) => Ok(()),
    }
}

/// Removes a cgroup that nobody uses; a busy one stays.
fn remove_if_empty(dir: &Path) -> Result<(), CgroupError> {
    match fs::remove_dir(dir) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.kind() == io::ErrorKind::ResourceBusy => Ok(()),
        Err(e) => Err(CgroupError::io("rmdir", dir, e)),
    }
}

/// A new v1 cpuset has no CPUs and no memory nodes, and takes no process until it has both: those of its parent, which may
/// lack them, too. `mount` has them always.
fn inherit_cpuset(mount: &Path, dir: &Path) -> Result<(), CgroupError> {
    let read = |path: &Path| fs::read_to_string(path).map_err(|e| CgroupError::io("read", path, e));
    let put = |path: PathBuf, value: &str| {
        write(&path, value).map_err(|source| CgroupError::Write { path, value: value.to_owned(), source })
    };
    let mut written = false;
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let path = dir.join(file);
        let (false, Some(parent)) = (dir == mount || !read(&path)?.trim().is_empty(), dir.parent()) else {
            continue;
        };
        inherit_cpuset(mount, parent)?;
        put(path, read(&parent.join(file))?.trim())?;
        written = true;
    }
    if written {
        // Those below have them when they are made. Each write is weighed against all cpusets of the node.
        put(dir.join("cgroup.clone_children"), "1")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_stays_in_use_is_told() {
        let dir = tempfile::tempdir().unwrap();
        make_room(dir.path(), 10).unwrap();
        fs::write(dir.path().join("memory.current"), "4096\n").unwrap();
        // A kernel that can't reclaim on demand.
        make_room(dir.path(), 10).unwrap();
        fs::write(dir.path().join("memory.reclaim"), "").unwrap();
        make_room(dir.path(), 4096).unwrap();
        let error = make_room(dir.path(), 4095).unwrap_err();
        assert!(matches!(error, CgroupError::InUse { limit: 4095, used: 4096, .. }), "{error}");
    }
}
