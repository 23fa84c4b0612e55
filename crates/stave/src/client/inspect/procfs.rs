//! Reading /proc/PID of a container's init (proc(5)).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use anyhow::{Context as _, bail};

/// Most bytes taken from one file of /proc.
const FILE_MAX: u64 = 16 << 20;

/// One process.
pub(crate) struct Proc {
    dir: PathBuf,
    /// Clock ticks after boot, field 22 of stat: with the pid, it tells this process from any other.
    start_time: u64,
    status: BTreeMap<String, String>,
}

/// One line of mountinfo.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct MountPoint {
    pub(crate) id: u64,
    pub(crate) root: String,
    pub(crate) point: String,
    /// Attributes of the mount: "ro", "nosuid", ...
    pub(crate) options: Vec<String>,
    /// "shared:N", "master:N".
    pub(crate) tags: Vec<String>,
    pub(crate) fs_type: String,
}

impl Proc {
    pub(crate) fn open(pid: i32) -> anyhow::Result<Self> {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let stat = read(&dir.join("stat"))?;
        let start_time =
            start_time(&stat).with_context(|| format!("{}: {stat:?}", dir.join("stat").display()))?;
        let status = fields(&read(&dir.join("status"))?);
        Ok(Self { dir, start_time, status })
    }

    /// An error when the pid has gone to another process since.
    pub(crate) fn same_as(&self, other: &Self) -> anyhow::Result<()> {
        if self.start_time != other.start_time {
            bail!("the container has ended meanwhile, try again");
        }
        Ok(())
    }

    /// A field of status, with its values joined by single blanks; empty where this kernel has none.
    pub(crate) fn status(&self, field: &str) -> &str {
        self.status.get(field).map_or("", String::as_str)
    }

    /// A hexadecimal field of status.
    pub(crate) fn mask(&self, field: &str) -> anyhow::Result<u64> {
        let text = self.status(field);
        u64::from_str_radix(text, 16).with_context(|| format!("{} of /proc/PID/status: {text:?}", field))
    }

    /// A file of the process, without the newline or NUL at its end.
    pub(crate) fn text(&self, file: &str) -> anyhow::Result<String> {
        Ok(read(&self.dir.join(file))?.trim_end_matches(['\n', '\0', ' ']).to_owned())
    }

    /// `pid:[4026531836]`; none where the kernel has no such namespace.
    pub(crate) fn namespace(&self, name: &str) -> anyhow::Result<Option<String>> {
        namespace(&self.dir.join("ns").join(name))
    }

    /// The user namespace that owns one of its namespaces, as `user:[4026531837]`; none where the kernel does not tell.
    pub(crate) fn owner(&self, name: &str) -> Option<String> {
        let namespace = fs::File::open(self.dir.join("ns").join(name)).ok()?;
        let owner = stave_sys::namespace_owner(namespace.as_fd()).ok()?;
        Some(format!("user:[{}]", rustix::fs::fstat(&owner).ok()?.st_ino))
    }

    /// Its cgroup in each hierarchy, "" being the one of cgroup v2.
    pub(crate) fn cgroups(&self) -> anyhow::Result<BTreeMap<String, String>> {
        Ok(cgroups(&self.text("cgroup")?))
    }

    /// What is mounted, in the order of the kernel: of several at one point the last one is on top.
    pub(crate) fn mounts(&self) -> anyhow::Result<Vec<MountPoint>> {
        Ok(self.text("mountinfo")?.lines().filter_map(mount_point).collect())
    }

    /// The root directory of the process.
    pub(crate) fn root(&self) -> PathBuf {
        self.dir.join("root")
    }
}

/// A namespace of the caller: the node's.
pub(crate) fn own_namespace(name: &str) -> anyhow::Result<Option<String>> {
    namespace(&PathBuf::from("/proc/self/ns").join(name))
}

fn namespace(path: &std::path::Path) -> anyhow::Result<Option<String>> {
    match fs::read_link(path) {
        Ok(target) => Ok(Some(target.to_string_lossy().into_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| path.display().to_string()),
    }
}

/// At most [`FILE_MAX`] bytes; paths and names in it need not be UTF-8.
fn read(path: &std::path::Path) -> anyhow::Result<String> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    fs::File::open(path)
        .and_then(|file| file.take(FILE_MAX).read_to_end(&mut bytes))
        .with_context(|| path.display().to_string())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The command, field 2, may have blanks and parentheses in it.
fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

fn fields(status: &str) -> BTreeMap<String, String> {
    let words = |value: &str| value.split_whitespace().collect::<Vec<_>>().join(" ");
    status
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key.to_owned(), words(value)))
        .collect()
}

fn cgroups(text: &str) -> BTreeMap<String, String> {
    let line = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        Some((parts.next()?.to_owned(), parts.next()?.to_owned()))
    };
    text.lines().filter_map(line).collect()
}

fn mount_point(line: &str) -> Option<MountPoint> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ');
    let id = left.next()?.parse().ok()?;
    let root = unescape(left.nth(2)?);
    let point = unescape(left.next()?);
    let options = left.next()?.split(',').map(str::to_owned).collect();
    let tags = left.map(str::to_owned).collect();
    let fs_type = right.split(' ').next()?.to_owned();
    Some(MountPoint { id, root, point, options, tags, fs_type })
}

/// mountinfo writes blanks as `\040`.
fn unescape(text: &str) -> String {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let octal =
            tail.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(byte);
                rest = &tail[3..];
            }
            None => {
                plain.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_process() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let proc = Proc::open(pid).unwrap();
        proc.same_as(&Proc::open(pid).unwrap()).unwrap();
        assert!(proc.start_time > 0);
        assert_eq!(proc.status("Pid"), pid.to_string());
        proc.mask("CapBnd").unwrap();
        assert_eq!(proc.namespace("mnt").unwrap(), own_namespace("mnt").unwrap());
        assert_eq!(proc.namespace("nosuch").unwrap(), None);
        assert!(proc.mounts().unwrap().iter().any(|mount| mount.point == "/"));
        assert!(!proc.cgroups().unwrap().is_empty());
        assert!(Proc::open(i32::MAX).is_err());
    }

    #[test]
    fn lines_of_the_kernel() {
        assert_eq!(start_time("7 (a) b) S 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4242 1 2"), Some(4242));
        let mount =
            mount_point("31 22 0:6 /s\\040ub /a\\040b ro,nosuid shared:3 master:2 - tmpfs none rw").unwrap();
        assert_eq!((mount.id, mount.root.as_str(), mount.point.as_str()), (31, "/s ub", "/a b"));
        assert_eq!(
            (mount.options, mount.tags),
            (vec!["ro".into(), "nosuid".into()], vec!["shared:3".into(), "master:2".into()])
        );
        assert_eq!(mount.fs_type, "tmpfs");
        let all = cgroups("3:cpu,cpuacct:/a/b\n0::/c:d\n");
        assert_eq!((all["cpu,cpuacct"].as_str(), all[""].as_str()), ("/a/b", "/c:d"));
        assert_eq!(fields("Uid:\t0\t0\t0\t0\nGroups:\t1 2 \n")["Uid"], "0 0 0 0");
    }
}
