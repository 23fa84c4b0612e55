use std::path::{Path, PathBuf};

use crate::CgroupError;

/// One mounted v1 hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct V1Mount {
    /// its controllers joined by commas, or `name=…` for a hierarchy without controllers
    pub name: String,
    /// mount point
    pub mount: PathBuf,
    /// controllers, such as `cpu` and `cpuacct`
    pub controllers: Vec<String>,
}

/// The mounted cgroup hierarchies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layout {
    /// cgroup v2 alone.
    Unified {
        /// mount point of cgroup2
        mount: PathBuf,
    },
    /// v1 hierarchies, with or without a cgroup2 mount beside them.
    Hybrid {
        /// mount point of cgroup2; none on pure v1 hosts
        v2: Option<PathBuf>,
        /// the v1 hierarchies, in mount order
        v1: Vec<V1Mount>,
    },
}

impl Layout {
    /// The cgroup2 mount.
    pub fn v2(&self) -> Option<&Path> {
        match self {
            Self::Unified { mount } => Some(mount),
            Self::Hybrid { v2, .. } => v2.as_deref(),
        }
    }

    /// The v1 hierarchies; empty on a v2 host.
    pub fn v1(&self) -> &[V1Mount] {
        match self {
            Self::Unified { .. } => &[],
            Self::Hybrid { v1, .. } => v1,
        }
    }

    /// The v1 hierarchy that has a controller.
    pub fn v1_of(&self, controller: &str) -> Option<&V1Mount> {
        self.v1().iter().find(|m| m.controllers.iter().any(|c| c == controller))
    }

    /// All controllers that can limit something here, v1 and v2, sorted.
    pub fn controllers(&self) -> Vec<String> {
        let mut all: Vec<String> = self.v1().iter().flat_map(|m| m.controllers.iter().cloned()).collect();
        if let Some(v2) = self.v2()
            && let Ok(text) = std::fs::read_to_string(v2.join("cgroup.controllers"))
        {
            all.extend(text.split_ascii_whitespace().map(str::to_owned));
        }
        all.sort();
        all.dedup();
        all
    }
}

/// Finds the hierarchies in `/proc/self/mountinfo` (proc(5)).
pub fn detect() -> Result<Layout, CgroupError> {
    let path = "/proc/self/mountinfo";
    let content = std::fs::read(path).map_err(|e| CgroupError::io("read", path, e))?;
    read(&content).ok_or(CgroupError::NoHierarchy)
}

/// Some other mount of the host may have a name that is not UTF-8: a container with a shared volume makes such a one.
pub(crate) fn read(mountinfo: &[u8]) -> Option<Layout> {
    parse(&String::from_utf8_lossy(mountinfo))
}

/// A hierarchy can be mounted more than once; the first mount that shows its root counts.
fn parse(mountinfo: &str) -> Option<Layout> {
    let mut v2: Option<(PathBuf, bool)> = None;
    let mut v1: Vec<(V1Mount, bool)> = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let left: Vec<&str> = left.split(' ').collect();
        let right: Vec<&str> = right.split(' ').collect();
        let (Some(root), Some(mount), Some(kind), Some(options)) =
            (left.get(3), left.get(4), right.first(), right.get(2))
        else {
            continue;
        };
        let whole = *root == "/";
        let mount = unescape(mount);
        match *kind {
            "cgroup2" if v2.as_ref().is_none_or(|(_, had)| whole && !had) => v2 = Some((mount, whole)),
            "cgroup" => {
                let found = v1_mount(mount, options);
                match v1.iter_mut().find(|(m, _)| m.name == found.name) {
                    Some(known) if whole && !known.1 => *known = (found, true),
                    Some(_) => {}
                    None => v1.push((found, whole)),
                }
            }
            _ => {}
        }
    }
    let v1: Vec<V1Mount> = v1.into_iter().map(|(m, _)| m).collect();
    match (v2, v1.is_empty()) {
        (None, true) => None,
        (Some((mount, _)), true) => Some(Layout::Unified { mount }),
        (v2, false) => Some(Layout::Hybrid { v2: v2.map(|(m, _)| m), v1 }),
    }
}

/// Super options of a v1 mount: flags, the controllers, and perhaps `name=…`.
fn v1_mount(mount: PathBuf, options: &str) -> V1Mount {
    let flags = ["rw", "ro", "noprefix", "clone_children", "xattr", "cpuset_v2_mode", "favordynmods", "none"];
    let mut name = None;
    let mut controllers = Vec::new();
    for option in options.split(',') {
        if option.starts_with("name=") {
            name = Some(option.to_owned());
        } else if !flags.contains(&option) && !option.contains('=') {
            controllers.push(option.to_owned());
        }
    }
    let name = match name {
        Some(name) if controllers.is_empty() => name,
        _ => controllers.join(","),
    };
    V1Mount { name, mount, controllers }
}

/// mountinfo writes blank, tab, newline and backslash as `\ooo`.
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while let Some(&byte) = bytes.get(i) {
        let octal =
            bytes.get(i + 1..i + 4).filter(|d| byte == b'\\' && d.iter().all(|c| (b'0'..=b'7').contains(c)));
        if let Some(digits) = octal {
            out.push(digits.iter().fold(0u8, |n, d| n.wrapping_mul(8).wrapping_add(d - b'0')));
            i += 4;
        } else {
            out.push(byte);
            i += 1;
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unified_host() {
        let text = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n";
        assert_eq!(parse(text), Some(Layout::Unified { mount: "/sys/fs/cgroup".into() }));
    }

    #[test]
    fn hybrid_host_with_comounted_controllers() {
        let text = "\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 /docker/x /mnt/mem rw,relatime - cgroup cgroup rw,memory
36 31 0:32 / /sys/fs/cgroup/me\\040mory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime shared:9 - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
        let Some(layout) = parse(text) else { panic!("nothing found") };
        assert_eq!(layout.v2(), Some(Path::new("/sys/fs/cgroup/unified")));
        let names: Vec<&str> = layout.v1().iter().map(|m| m.name.as_str()).collect();
        assert_eq!(names, ["cpu,cpuacct", "memory", "name=systemd"]);
        assert_eq!(
            layout.v1_of("cpuacct").map(|m| m.mount.clone()),
            Some("/sys/fs/cgroup/cpu,cpuacct".into())
        );
        assert_eq!(layout.v1_of("memory").map(|m| m.mount.clone()), Some("/sys/fs/cgroup/me mory".into()));
        assert!(layout.v1_of("pids").is_none());
    }

    #[test]
    fn pure_v1_and_nothing() {
        let text = "36 31 0:33 / /cg/pids rw - cgroup cgroup rw,pids\n";
        let v1 =
            vec![V1Mount { name: "pids".into(), mount: "/cg/pids".into(), controllers: vec!["pids".into()] }];
        assert_eq!(parse(text), Some(Layout::Hybrid { v2: None, v1 }));
        assert_eq!(parse("1 0 8:1 / / rw - ext4 /dev/vda rw\ngarbage\n"), None);
    }

    #[test]
    fn other_mounts_have_any_name() {
        let text = b"50 23 0:40 / /volume/\xff\xfe - \xf0 rw shared:1 - tmpfs none rw\n\
            30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n";
        assert_eq!(read(text), Some(Layout::Unified { mount: "/sys/fs/cgroup".into() }));
    }

    #[test]
    fn this_host_has_some() {
        let layout = detect().unwrap();
        assert!(layout.controllers().iter().any(|c| c == "memory"), "{layout:?}");
    }
}
