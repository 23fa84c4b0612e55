//! From `Resources` to values in files, and their writing with a way back.

use std::io;
use std::path::{Path, PathBuf};

use crate::fs::write;
use crate::resources::shares_to_weight;
use crate::{BlockIo, CgroupError, Resources};

/// The container's directories that take limits.
pub(crate) struct Dirs<'a> {
    pub(crate) v2: Option<&'a Path>,
    /// controller to its v1 directory
    pub(crate) v1: &'a dyn Fn(&str) -> Option<PathBuf>,
}

/// One value for one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    pub(crate) path: PathBuf,
    pub(crate) value: String,
    /// what to report if the file is missing; `None`: skip it then
    need: Option<(String, String)>,
}

/// Settings that the kernel may want in one order or in the other.
pub(crate) type Group = Vec<Setting>;

struct Plan<'a> {
    dirs: &'a Dirs<'a>,
    groups: Vec<Group>,
}

impl Plan<'_> {
    /// Picks v1 where the controller is mounted there, else v2. A `None` leaves that version out.
    fn add(
        &mut self,
        controller: &str,
        asked: String,
        v1: &[(&str, String)],
        v2: &[(&str, String)],
    ) -> Result<(), CgroupError> {
        let need = Some((controller.to_owned(), asked.clone()));
        let (dir, files) = match ((self.dirs.v1)(controller), self.dirs.v2) {
            (Some(dir), _) => (dir, v1),
            (None, Some(dir)) => (dir.to_path_buf(), v2),
            (None, None) => {
                let file = v1.first().map_or(controller, |f| f.0);
                return Err(CgroupError::NoController {
                    controller: controller.into(),
                    asked,
                    path: file.into(),
                });
            }
        };
        let group = files
            .iter()
            .map(|(file, value)| Setting { path: dir.join(file), value: value.clone(), need: need.clone() })
            .collect();
        self.groups.push(group);
        Ok(())
    }

    /// Marks the last settings of the last group as ones to skip where their file is missing.
    fn last_are_optional(&mut self, count: usize) {
        for setting in self.groups.last_mut().into_iter().flat_map(|group| group.iter_mut().rev().take(count))
        {
            setting.need = None;
        }
    }
}

/// A v2 number: -1 is `max`.
fn or_max(n: i64) -> String {
    if n < 0 { "max".into() } else { n.to_string() }
}

/// All values to write, in order; `unified` comes last and wins.
pub(crate) fn plan(dirs: &Dirs<'_>, r: &Resources) -> Result<Vec<Group>, CgroupError> {
    let mut plan = Plan { dirs, groups: Vec::new() };
    cpu(&mut plan, r)?;
    memory(&mut plan, r)?;
    if let Some(limit) = r.pids_limit.filter(|n| *n != 0) {
        let value = || vec![("pids.max", or_max(limit))];
        plan.add("pids", format!("a pids limit of {limit}"), &value(), &value())?;
    }
    for (size, bytes) in &r.hugepage_limits {
        hugepages(&mut plan, size, *bytes)?;
    }
    block_io(&mut plan, &r.block_io)?;
    for (key, value) in &r.unified {
        unified(&mut plan, key, value)?;
    }
    Ok(plan.groups)
}

fn cpu(plan: &mut Plan<'_>, r: &Resources) -> Result<(), CgroupError> {
    if let Some(shares) = r.cpu_shares.filter(|n| *n != 0) {
        let v1 = [("cpu.shares", shares.max(2).to_string())];
        let v2 = [("cpu.weight", shares_to_weight(shares).to_string())];
        plan.add("cpu", format!("a CPU share of {shares}"), &v1, &v2)?;
    }
    let quota = r.cpu_quota.filter(|n| *n != 0);
    let period = r.cpu_period.filter(|n| *n != 0);
    if quota.is_some() || period.is_some() {
        let mut v1 = Vec::new();
        // A new period with the old quota can exceed the parent's share; `apply` then turns the order.
        v1.extend(period.map(|n| ("cpu.cfs_period_us", n.to_string())));
        v1.extend(quota.map(|n| ("cpu.cfs_quota_us", n.max(-1).to_string())));
        let max = match quota {
            Some(n) => or_max(n),
            // Keep the quota that is set.
            None => plan
                .dirs
                .v2
                .and_then(|dir| std::fs::read_to_string(dir.join("cpu.max")).ok())
                .and_then(|text| text.split_ascii_whitespace().next().map(str::to_owned))
                .unwrap_or_else(|| "max".into()),
        };
        let v2 = [("cpu.max", format!("{max} {}", period.unwrap_or(100_000)))];
        let asked = format!("a CPU quota of {} us in {} us", quota.unwrap_or(-1), period.unwrap_or(100_000));
        plan.add("cpu", asked, &v1, &v2)?;
    }
    for (field, file, value) in
        [("cpuset_cpus", "cpuset.cpus", &r.cpuset_cpus), ("cpuset_mems", "cpuset.mems", &r.cpuset_mems)]
    {
        if value.is_empty() {
            continue;
        }
        if value.len() > 4096 || !value.bytes().all(|b| b.is_ascii_digit() || b == b',' || b == b'-') {
            let reason = "not a list such as 0-3,8";
            return Err(CgroupError::InvalidValue {
                field,
                value: value.chars().take(300).collect(),
                reason,
            });
        }
        let files = [(file, value.clone())];
        plan.add("cpuset", format!("{field} {value}"), &files, &files)?;
    }
    Ok(())
}

fn memory(plan: &mut Plan<'_>, r: &Resources) -> Result<(), CgroupError> {
    let limit = r.memory_limit.filter(|n| *n != 0);
    let swap = r.memory_swap_limit.filter(|n| *n != 0);
    if let (Some(limit), Some(swap)) = (limit, swap)
        && swap > 0
        && (limit < 0 || swap < limit)
    {
        let reason = "memory and swap together can't be less than the memory limit";
        return Err(CgroupError::InvalidValue {
            field: "memory_swap_limit",
            value: swap.to_string(),
            reason,
        });
    }
    if let (None, Some(swap)) = (limit, swap)
        && swap > 0
    {
        let reason = "needs a memory limit beside it";
        return Err(CgroupError::InvalidValue {
            field: "memory_swap_limit",
            value: swap.to_string(),
            reason,
        });
    }
    if limit.is_some() || swap.is_some() {
        // memsw counts memory and swap together, memory.swap.max swap alone. The kernel keeps limit <= memsw, so
        // raising and lowering want different orders: `apply` tries both.
        let both = match (limit, swap) {
            (_, Some(n)) => n.max(-1),
            (Some(n), None) => n.max(-1),
            (None, None) => -1,
        };
        let alone = match (limit, swap) {
            (Some(limit), Some(both)) if limit > 0 && both > 0 => (both - limit).to_string(),
            (_, Some(_)) => "max".into(),
            (Some(limit), None) if limit > 0 => "0".into(),
            _ => "max".into(),
        };
        let mut v1 = Vec::new();
        v1.extend(limit.map(|n| ("memory.limit_in_bytes", n.max(-1).to_string())));
        v1.push(("memory.memsw.limit_in_bytes", both.to_string()));
        let mut v2 = Vec::new();
        v2.extend(limit.map(|n| ("memory.max", or_max(n))));
        v2.push(("memory.swap.max", alone.clone()));
        plan.add("memory", format!("a memory limit of {} bytes", limit.unwrap_or(-1)), &v1, &v2)?;
        // Kernels without swap accounting have no such file, and then the limit on memory is all there is.
        plan.last_are_optional(1);
    }
    Ok(())
}

fn hugepages(plan: &mut Plan<'_>, size: &str, bytes: u64) -> Result<(), CgroupError> {
    let digits = size.bytes().take_while(u8::is_ascii_digit).count();
    if digits == 0 || digits > 6 || !matches!(size.get(digits..), Some("KB" | "MB" | "GB")) {
        let reason = "not a page size such as 2MB or 1GB";
        let value = size.chars().take(300).collect();
        return Err(CgroupError::InvalidValue { field: "hugepage_limits", value, reason });
    }
    let asked = format!("a limit of {bytes} bytes of {size} pages");
    // Both what is in use and what is reserved: over the first alone, a program is killed (SIGBUS) when it touches a page
    // that mmap() has promised; over the second, mmap() fails.
    let value = bytes.to_string();
    let [v1, v1_reserved] = ["", "rsvd."].map(|kind| format!("hugetlb.{size}.{kind}limit_in_bytes"));
    let [v2, v2_reserved] = ["", "rsvd."].map(|kind| format!("hugetlb.{size}.{kind}max"));
    let v1 = [(v1.as_str(), value.clone()), (v1_reserved.as_str(), value.clone())];
    let v2 = [(v2.as_str(), value.clone()), (v2_reserved.as_str(), value)];
    match plan.add("hugetlb", asked, &v1, &v2) {
        // The kubelet limits every size to 0 if the pod wants none: without the controller that is no loss.
        Err(CgroupError::NoController { .. }) if bytes == 0 => return Ok(()),
        other => other?,
    }
    // Since Linux 5.7.
    plan.last_are_optional(if bytes == 0 { 2 } else { 1 });
    Ok(())
}

/// The controller is blkio in v1 and io in v2. Weights are those of the BFQ scheduler, which both have.
fn block_io(plan: &mut Plan<'_>, asked: &BlockIo) -> Result<(), CgroupError> {
    if *asked == BlockIo::default() {
        return Ok(());
    }
    let mut add = |asked: String, v1: &[(&str, String)], v2: &[(&str, String)]| {
        plan.add("blkio", asked, v1, v2).map_err(|error| match error {
            CgroupError::NoController { asked, path, .. } => {
                CgroupError::NoController { controller: "blkio or io".into(), asked, path }
            }
            error => error,
        })
    };
    if let Some(weight) = asked.weight {
        let what = format!("a block I/O weight of {weight}");
        add(what, &[("blkio.bfq.weight", weight.to_string())], &[("io.bfq.weight", weight.to_string())])?;
    }
    for device in &asked.devices {
        let number = format!("{}:{}", device.major, device.minor);
        if let Some(weight) = device.weight {
            let value = format!("{number} {weight}");
            let what = format!("a block I/O weight of {weight} for device {number}");
            add(what, &[("blkio.bfq.weight_device", value.clone())], &[("io.bfq.weight", value)])?;
        }
        let limits = [
            ("blkio.throttle.read_bps_device", "rbps", device.read_bps),
            ("blkio.throttle.write_bps_device", "wbps", device.write_bps),
            ("blkio.throttle.read_iops_device", "riops", device.read_iops),
            ("blkio.throttle.write_iops_device", "wiops", device.write_iops),
        ];
        let limits = limits.iter().filter_map(|(v1, v2, limit)| limit.map(|limit| (*v1, *v2, limit)));
        let v1: Vec<_> = limits.clone().map(|(file, _, limit)| (file, format!("{number} {limit}"))).collect();
        let line: String = limits.map(|(_, key, limit)| format!(" {key}={limit}")).collect();
        if !v1.is_empty() {
            add(
                format!("block I/O limits of device {number}"),
                &v1,
                &[("io.max", format!("{number}{line}"))],
            )?;
        }
    }
    Ok(())
}

fn unified(plan: &mut Plan<'_>, key: &str, value: &str) -> Result<(), CgroupError> {
    let fail = |reason: String| Err(CgroupError::Unified { key: key.chars().take(300).collect(), reason });
    // No slash, and a dot inside: `memory.high`, never `..`.
    let good = !key.is_empty()
        && key.len() <= 255
        && key.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'.')
        && !key.starts_with('.')
        && key.contains('.');
    if !good {
        return fail("not the name of a cgroup v2 file ([a-z0-9_.]+)".into());
    }
    if key.starts_with("cgroup.") {
        return fail("the files cgroup.* are not limits".into());
    }
    if value.len() > 4096 {
        return fail("value longer than 4096 bytes".into());
    }
    let Some(dir) = plan.dirs.v2 else { return fail("this host has no cgroup2 mount".into()) };
    let path = dir.join(key);
    if !path.is_file() {
        let controller = key.split('.').next().unwrap_or_default();
        let available = std::fs::read_to_string(dir.join("cgroup.controllers"));
        if available.is_ok_and(|list| !list.split_ascii_whitespace().any(|known| known == controller)) {
            let asked = format!("unified resource {key:?}");
            return Err(CgroupError::NoController { controller: controller.to_owned(), asked, path });
        }
        return fail(format!("{} does not exist", path.display()));
    }
    plan.groups.push(vec![Setting { path, value: value.to_owned(), need: None }]);
    Ok(())
}

/// Writes all, or puts back what it wrote.
pub(crate) fn apply(groups: &[Group]) -> Result<(), CgroupError> {
    let mut undo: Vec<(PathBuf, String)> = Vec::new();
    for group in groups {
        if let Err(error) = apply_group(group, &mut undo) {
            restore(&mut undo, 0);
            return Err(error);
        }
    }
    Ok(())
}

fn apply_group(group: &[Setting], undo: &mut Vec<(PathBuf, String)>) -> Result<(), CgroupError> {
    let before = undo.len();
    let first = match write_all(&mut group.iter(), undo) {
        Ok(()) => return Ok(()),
        Err(error) => error,
    };
    let other_order =
        matches!(&first, CgroupError::Write { source, .. } if source.kind() == io::ErrorKind::InvalidInput);
    if group.len() < 2 || !other_order {
        return Err(first);
    }
    restore(undo, before);
    write_all(&mut group.iter().rev(), undo)
}

fn write_all(
    settings: &mut dyn Iterator<Item = &Setting>,
    undo: &mut Vec<(PathBuf, String)>,
) -> Result<(), CgroupError> {
    for setting in settings {
        let old = previous(&setting.path);
        match write(&setting.path, &setting.value) {
            Ok(()) => undo.extend(old.map(|old| (setting.path.clone(), old))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => match &setting.need {
                None => tracing::debug!(path = %setting.path.display(), "no such cgroup file, limit skipped"),
                Some((controller, asked)) => {
                    return Err(CgroupError::NoController {
                        controller: controller.clone(),
                        asked: asked.clone(),
                        path: setting.path.clone(),
                    });
                }
            },
            Err(source) => {
                return Err(CgroupError::Write {
                    path: setting.path.clone(),
                    value: setting.value.clone(),
                    source,
                });
            }
        }
    }
    Ok(())
}

/// The value to put back.
fn previous(path: &Path) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim_end().to_owned())
}

fn restore(undo: &mut Vec<(PathBuf, String)>, down_to: usize) {
    while undo.len() > down_to {
        let Some((path, value)) = undo.pop() else { return };
        if let Err(error) = write(&path, &value) {
            tracing::warn!(path = %path.display(), value, %error, "a cgroup limit could not be put back");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::fs;

    fn v2_dir(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, value) in files {
            fs::write(dir.path().join(name), value).unwrap();
        }
        dir
    }

    fn v2_plan(dir: &Path, r: &Resources) -> Result<Vec<(String, String)>, CgroupError> {
        let groups = plan(&Dirs { v2: Some(dir), v1: &|_| None }, r)?;
        let name = |s: Setting| (s.path.file_name().unwrap().to_string_lossy().into_owned(), s.value);
        Ok(groups.into_iter().flatten().map(name).collect())
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    }

    #[test]
    fn v2_values() {
        let dir = v2_dir(&[("memory.swap.max", "max"), ("memory.high", "max")]);
        let r = Resources {
            cpu_shares: Some(1024),
            cpu_quota: Some(20_000),
            cpuset_cpus: "0-1".into(),
            cpuset_mems: "0".into(),
            memory_limit: Some(64 << 20),
            pids_limit: Some(-1),
            hugepage_limits: vec![("2MB".into(), 4 << 20)],
            unified: BTreeMap::from([
                ("memory.swap.max".into(), "1000".into()),
                ("memory.high".into(), "50000".into()),
            ]),
            ..Resources::default()
        };
        let expected = [
            ("cpu.weight", "100"),
            ("cpu.max", "20000 100000"),
            ("cpuset.cpus", "0-1"),
            ("cpuset.mems", "0"),
            ("memory.max", "67108864"),
            ("memory.swap.max", "0"),
            ("pids.max", "max"),
            ("hugetlb.2MB.max", "4194304"),
            ("hugetlb.2MB.rsvd.max", "4194304"),
            ("memory.high", "50000"),
            ("memory.swap.max", "1000"),
        ];
        assert_eq!(v2_plan(dir.path(), &r).unwrap(), pairs(&expected));
        assert_eq!(v2_plan(dir.path(), &Resources::default()).unwrap(), []);
    }

    #[test]
    fn block_devices() {
        use crate::DeviceIo;
        let dir = v2_dir(&[]);
        let device = DeviceIo {
            major: 8,
            minor: 16,
            read_bps: Some(1000),
            write_iops: Some(7),
            ..DeviceIo::default()
        };
        let weighted = DeviceIo { major: 8, weight: Some(30), ..DeviceIo::default() };
        let block_io = BlockIo { weight: Some(80), devices: vec![device, weighted] };
        let r = Resources { block_io, ..Resources::default() };
        let v2 = [("io.bfq.weight", "80"), ("io.max", "8:16 rbps=1000 wiops=7"), ("io.bfq.weight", "8:0 30")];
        assert_eq!(v2_plan(dir.path(), &r).unwrap(), pairs(&v2));
        let blkio = |controller: &str| (controller == "blkio").then(|| dir.path().to_owned());
        let groups = plan(&Dirs { v2: None, v1: &blkio }, &r).unwrap();
        let v1: Vec<_> = groups
            .into_iter()
            .flatten()
            .map(|s| (s.path.file_name().unwrap().to_string_lossy().into_owned(), s.value))
            .collect();
        let wanted = [
            ("blkio.bfq.weight", "80"),
            ("blkio.throttle.read_bps_device", "8:16 1000"),
            ("blkio.throttle.write_iops_device", "8:16 7"),
            ("blkio.bfq.weight_device", "8:0 30"),
        ];
        assert_eq!(v1, pairs(&wanted));
        let none = plan(&Dirs { v2: None, v1: &|_| None }, &r).unwrap_err();
        assert!(none.to_string().contains("blkio or io"), "{none}");
    }

    #[test]
    fn v2_cpu_max_forms() {
        let dir = v2_dir(&[("cpu.max", "30000 50000\n")]);
        let max = |quota, period| {
            let r = Resources { cpu_quota: quota, cpu_period: period, ..Resources::default() };
            v2_plan(dir.path(), &r).unwrap()
        };
        assert_eq!(max(Some(-1), None), pairs(&[("cpu.max", "max 100000")]));
        assert_eq!(max(Some(5000), Some(10_000)), pairs(&[("cpu.max", "5000 10000")]));
        assert_eq!(max(None, Some(40_000)), pairs(&[("cpu.max", "30000 40000")]));
        assert_eq!(max(Some(0), Some(0)), []);
    }

    #[test]
    fn v2_swap_rules() {
        let dir = v2_dir(&[]);
        let of = |limit, swap| {
            v2_plan(
                dir.path(),
                &Resources { memory_limit: limit, memory_swap_limit: swap, ..Resources::default() },
            )
        };
        assert_eq!(
            of(Some(100), Some(150)).unwrap(),
            pairs(&[("memory.max", "100"), ("memory.swap.max", "50")])
        );
        assert_eq!(
            of(Some(100), Some(100)).unwrap(),
            pairs(&[("memory.max", "100"), ("memory.swap.max", "0")])
        );
        assert_eq!(
            of(Some(100), Some(-1)).unwrap(),
            pairs(&[("memory.max", "100"), ("memory.swap.max", "max")])
        );
        assert_eq!(of(Some(100), None).unwrap(), pairs(&[("memory.max", "100"), ("memory.swap.max", "0")]));
        assert_eq!(of(Some(-1), None).unwrap(), pairs(&[("memory.max", "max"), ("memory.swap.max", "max")]));
        assert!(of(Some(100), Some(50)).is_err());
        assert!(of(None, Some(50)).is_err());
    }

    #[test]
    fn bad_values_are_named() {
        let dir = v2_dir(&[]);
        for key in
            ["../memory.max", "memory/max", "..", "nodot", "Memory.max", "", "memory.nope", "cgroup.kill"]
        {
            let r = Resources { unified: BTreeMap::from([(key.into(), "1".into())]), ..Resources::default() };
            let error = v2_plan(dir.path(), &r).unwrap_err();
            assert!(matches!(&error, CgroupError::Unified { key: k, .. } if k == key), "{error}");
        }
        for size in ["", "MB", "2mb", "2MB/../x", "2TB"] {
            let r = Resources { hugepage_limits: vec![(size.into(), 1)], ..Resources::default() };
            assert!(v2_plan(dir.path(), &r).is_err(), "{size}");
        }
        let r = Resources { cpuset_cpus: "0;1".into(), ..Resources::default() };
        assert!(v2_plan(dir.path(), &r).is_err());
    }

    #[test]
    fn writes_all_or_restores() {
        let dir = v2_dir(&[("cpu.weight", "100\n"), ("memory.max", "max\n"), ("memory.swap.max", "max\n")]);
        let read = |name: &str| {
            fs::read_to_string(dir.path().join(name)).unwrap().lines().next().unwrap().to_owned()
        };
        let mut r = Resources {
            cpu_shares: Some(2),
            memory_limit: Some(4096),
            pids_limit: Some(7),
            ..Resources::default()
        };
        let groups = plan(&Dirs { v2: Some(dir.path()), v1: &|_| None }, &r).unwrap();
        let error = apply(&groups).unwrap_err();
        assert!(error.to_string().contains("\"pids\""), "{error}");
        // A plain file keeps the tail of what was longer: cgroup files don't, so look at the start only.
        assert!(read("cpu.weight").starts_with("100") && read("memory.max").starts_with("max"));
        r.pids_limit = None;
        apply(&plan(&Dirs { v2: Some(dir.path()), v1: &|_| None }, &r).unwrap()).unwrap();
        assert!(read("cpu.weight").starts_with('1') && read("memory.max").starts_with("4096"));
    }

    #[test]
    fn missing_hugetlb_matters_only_above_zero() {
        let dir = v2_dir(&[]);
        let of = |bytes| {
            let r = Resources { hugepage_limits: vec![("2MB".into(), bytes)], ..Resources::default() };
            plan(&Dirs { v2: Some(dir.path()), v1: &|_| None }, &r).and_then(|g| apply(&g))
        };
        of(0).unwrap();
        assert!(matches!(of(1), Err(CgroupError::NoController { .. })));
    }
}
