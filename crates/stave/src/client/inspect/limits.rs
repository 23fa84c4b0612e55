//! The cgroup: where the init is, and what its files say.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use stave_cgroup::{Layout, detect, shares_to_weight};
use stave_cri_proto::v1::LinuxContainerResources;

use super::Asked;
use super::report::Row;

pub(crate) fn rows(asked: &Asked, cgroups: &BTreeMap<String, String>) -> anyhow::Result<Vec<Row>> {
    let layout = detect()?;
    let resources =
        asked.status.resources.as_ref().and_then(|resources| resources.linux.clone()).unwrap_or_default();
    let mut rows = vec![membership(&asked.cgroup, cgroups)];
    let files = Files { layout, path: asked.cgroup.trim_start_matches('/').to_owned() };
    rows.extend(cpu(&files, &resources));
    rows.extend(memory(&files, &resources));
    rows.extend(files.row("pids", "pids", "pids.max", "pids.max", None));
    for limit in &resources.hugepage_limits {
        let size = &limit.page_size;
        let (v1, v2) = (format!("hugetlb.{size}.limit_in_bytes"), format!("hugetlb.{size}.max"));
        // No file, no such pages: a limit of 0 holds all the same.
        rows.extend(files.row("hugetlb", &format!("{size} pages"), &v1, &v2, Some(limit.limit.to_string())));
    }
    let mut unified: Vec<_> = resources.unified.iter().collect();
    unified.sort();
    for (file, value) in unified {
        let kernel = files.v2(file).and_then(|path| read(&path)).unwrap_or_else(|| "no such file".to_owned());
        let differs = !says(&kernel, value);
        rows.push(Row::compare(file, value, kernel).differs(differs));
    }
    rows.extend(files.pressure());
    rows.extend(files.oom_kills());
    Ok(rows)
}

/// Whether a file has all words of what was written to it, line by line: `io.weight` and `io.max` print more than that.
fn says(kernel: &str, written: &str) -> bool {
    written.lines().all(|written| {
        kernel.lines().any(|line| {
            written.split_whitespace().all(|word| line.split_whitespace().any(|known| known == word))
        })
    })
}

/// The container's path in every hierarchy.
fn membership(asked: &str, cgroups: &BTreeMap<String, String>) -> Row {
    let elsewhere: Vec<String> = cgroups
        .iter()
        .filter(|(_, path)| *path != asked)
        .map(|(name, path)| format!("{name}:{path}"))
        .collect();
    let kernel = if elsewhere.is_empty() { "container".to_owned() } else { elsewhere.join(" ") };
    let names: Vec<&str> =
        cgroups.keys().map(|name| if name.is_empty() { "cgroup2" } else { name }).collect();
    Row::compare("cgroup", "container", kernel).detail(names.join(" "))
}

/// The container's cgroup files.
struct Files {
    layout: Layout,
    path: String,
}

impl Files {
    /// The directory of a controller, and whether it is one of v1.
    fn dir(&self, controller: &str) -> Option<(PathBuf, bool)> {
        match self.layout.v1_of(controller) {
            Some(v1) => Some((v1.mount.join(&self.path), true)),
            None => Some((self.layout.v2()?.join(&self.path), false)),
        }
    }

    fn v2(&self, file: &str) -> Option<PathBuf> {
        // A name from the request: checked when it was taken, but this reads as root.
        let plain = !file.contains('/') && !file.starts_with('.');
        self.layout.v2().filter(|_| plain).map(|mount| mount.join(&self.path).join(file))
    }

    /// The value of the controller's file, if there is one; `max` for none.
    fn value(&self, controller: &str, v1: &str, v2: &str) -> Option<(String, bool)> {
        let (dir, is_v1) = self.dir(controller)?;
        let value = read(&dir.join(if is_v1 { v1 } else { v2 }))?;
        Some((if is_v1 { no_limit(&value) } else { value }, is_v1))
    }

    /// Pressure stall information of cgroup v2: how long some of its tasks have waited.
    fn pressure(&self) -> Vec<Row> {
        let kinds = [
            ("cpu pressure", "cpu.pressure"),
            ("memory pressure", "memory.pressure"),
            ("io pressure", "io.pressure"),
        ];
        let row = |(what, file): (&str, &str)| {
            let text = read(&self.v2(file)?)?;
            Some(Row::tell(what, text.lines().next().unwrap_or_default()).detail(file))
        };
        kinds.into_iter().filter_map(row).collect()
    }

    fn oom_kills(&self) -> Option<Row> {
        let (dir, is_v1) = self.dir("memory")?;
        let file = if is_v1 { "memory.oom_control" } else { "memory.events" };
        let kills = stave_cgroup::oom_kills(&dir.join(file))?;
        Some(Row::tell("OOM kills", kills.to_string()).detail(file))
    }

    fn row(&self, controller: &str, what: &str, v1: &str, v2: &str, asked: Option<String>) -> Option<Row> {
        match self.value(controller, v1, v2) {
            Some((kernel, is_v1)) => {
                Some(Row::maybe(what, asked, kernel).detail(if is_v1 { v1 } else { v2 }))
            }
            None => asked
                .filter(|asked| asked != "0" && asked != "max")
                .map(|asked| Row::compare(what, asked, "none").detail(format!("no controller {controller}"))),
        }
    }
}

fn cpu(files: &Files, asked: &LinuxContainerResources) -> Vec<Row> {
    let is_v1 = files.layout.v1_of("cpu").is_some();
    let shares = u64::try_from(asked.cpu_shares).ok().filter(|shares| *shares > 0).map(|shares| {
        let shares = shares.clamp(2, 262_144);
        if is_v1 { shares.to_string() } else { shares_to_weight(shares).to_string() }
    });
    let mut rows: Vec<Row> =
        files.row("cpu", "cpu weight", "cpu.shares", "cpu.weight", shares).into_iter().collect();
    let limited = asked.cpu_quota != 0 || asked.cpu_period != 0;
    let period = if asked.cpu_period == 0 { 100_000 } else { asked.cpu_period };
    let quota = if asked.cpu_quota > 0 { asked.cpu_quota.to_string() } else { "max".to_owned() };
    let wanted = limited.then(|| format!("{quota} {period}"));
    let kernel = match is_v1 {
        false => files.value("cpu", "", "cpu.max").map(|(value, _)| value),
        true => {
            let value = |file| files.value("cpu", file, "").map(|(value, _)| value);
            value("cpu.cfs_quota_us")
                .zip(value("cpu.cfs_period_us"))
                .map(|(quota, period)| format!("{quota} {period}"))
        }
    };
    if let Some(kernel) = kernel {
        rows.push(Row::maybe("cpu quota", wanted, kernel).detail("us in a period of us"));
    }
    for (what, file, wanted) in
        [("cpus", "cpuset.cpus", &asked.cpuset_cpus), ("memory nodes", "cpuset.mems", &asked.cpuset_mems)]
    {
        let wanted = (!wanted.is_empty()).then(|| list(wanted));
        if let Some((kernel, _)) = files.value("cpuset", file, file) {
            rows.push(Row::maybe(what, wanted, list(&kernel)).detail(file));
        }
    }
    rows
}

fn memory(files: &Files, asked: &LinuxContainerResources) -> Vec<Row> {
    let limit = asked.memory_limit_in_bytes;
    let bytes = |limit: i64| if limit < 0 { "max".to_owned() } else { pages(limit).to_string() };
    let wanted = (limit != 0).then(|| bytes(limit));
    let (v1, v2) = ("memory.limit_in_bytes", "memory.max");
    let mut rows: Vec<Row> = files.row("memory", "memory", v1, v2, wanted).into_iter().collect();
    // v1 counts memory and swap together, v2 swap alone. Without a limit for both there is no swap.
    let both = if asked.memory_swap_limit_in_bytes == 0 { limit } else { asked.memory_swap_limit_in_bytes };
    let is_v1 = files.layout.v1_of("memory").is_some();
    let named = asked.unified.contains_key("memory.swap.max");
    let wanted = (both != 0 && !named).then(|| match (is_v1, both, limit) {
        (true, both, _) => bytes(both),
        (false, both, limit) if both > 0 && limit > 0 => pages(both - limit).to_string(),
        _ => "max".to_owned(),
    });
    let what = if is_v1 { "memory and swap" } else { "swap" };
    // Kernels without swap accounting have no such file, and then no limit.
    if files.value("memory", "memory.memsw.limit_in_bytes", "memory.swap.max").is_some() {
        rows.extend(files.row("memory", what, "memory.memsw.limit_in_bytes", "memory.swap.max", wanted));
    }
    rows.extend(files.row("memory", "memory in use", "memory.usage_in_bytes", "memory.current", None));
    rows
}

fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// v1 writes no limit as -1, or as the largest number of whole pages.
fn no_limit(value: &str) -> String {
    match value.parse::<i64>() {
        Ok(-1) => "max".to_owned(),
        Ok(number) if number >= i64::MAX - 0xffff => "max".to_owned(),
        _ => value.to_owned(),
    }
}

/// The kernel counts memory in whole pages.
fn pages(bytes: i64) -> i64 {
    bytes - bytes % page_size()
}

/// AT_PAGESZ of getauxval(3).
fn page_size() -> i64 {
    let vector = std::fs::read("/proc/self/auxv").unwrap_or_default();
    let (words, _) = vector.as_chunks::<8>();
    let (pairs, _) = words.as_chunks::<2>();
    let found = pairs.iter().map(|pair| pair.map(i64::from_ne_bytes)).find(|[kind, _]| *kind == 6);
    found.map_or(4096, |[_, size]| size).max(1)
}

/// A list of numbers and ranges as the kernel writes it: sorted, ranges as long as can be.
fn list(text: &str) -> String {
    let mut numbers: Vec<u32> = Vec::new();
    for part in text.split(',') {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        let (Ok(low), Ok(high)) = (low.trim().parse::<u32>(), high.trim().parse::<u32>()) else {
            return text.to_owned();
        };
        if high > 65_535 {
            return text.to_owned();
        }
        numbers.extend(low..=high);
    }
    numbers.sort_unstable();
    numbers.dedup();
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some((_, high)) if *high + 1 == number => *high = number,
            _ => ranges.push((number, number)),
        }
    }
    let one = |(low, high): &(u32, u32)| if low == high { low.to_string() } else { format!("{low}-{high}") };
    ranges.iter().map(one).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_in_one_form() {
        assert_eq!(no_limit("-1"), "max");
        assert_eq!(no_limit("9223372036854771712"), "max");
        assert_eq!(no_limit("4096"), "4096");
        assert_eq!((pages(4097), pages(4096)), (4096, 4096));
        assert_eq!((list("3,0-1"), list("0,1"), list("")), ("0-1,3".into(), "0-1".into(), "".into()));
        assert_eq!(list("0-4294967295"), "0-4294967295");
    }

    #[test]
    fn v2_files_are_compared() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("pod/c1");
        std::fs::create_dir_all(&own).unwrap();
        for (file, value) in [
            ("cpu.weight", "59"),
            ("cpu.max", "max 100000"),
            ("memory.max", "8192"),
            ("memory.swap.max", "0"),
            ("pids.max", "max"),
        ] {
            std::fs::write(own.join(file), format!("{value}\n")).unwrap();
        }
        let files = Files { layout: Layout::Unified { mount: dir.path().into() }, path: "pod/c1".into() };
        let asked = LinuxContainerResources {
            cpu_shares: 512,
            cpu_quota: 5000,
            memory_limit_in_bytes: 8200,
            ..Default::default()
        };
        let rows = [cpu(&files, &asked), memory(&files, &asked)].concat();
        let differing: Vec<&str> =
            rows.iter().filter(|row| row.differs).map(|row| row.what.as_str()).collect();
        assert_eq!(differing, ["cpu quota"], "{rows:?}");
        assert_eq!(rows.iter().find(|row| row.what == "swap").unwrap().asked.as_deref(), Some("0"));
        assert!(files.row("hugetlb", "2MB", "a", "b", Some("0".into())).is_none());
        assert!(files.row("hugetlb", "2MB", "a", "b", Some("1".into())).unwrap().differs);
        assert!(files.v2("../../x").is_none());
    }

    #[test]
    fn files_that_print_more_than_was_written() {
        for (kernel, written) in [
            ("default 50", "50"),
            ("254:0 rbps=1048576 wbps=max riops=max wiops=100", "254:0 rbps=1048576 wiops=100"),
            ("8:0 rbps=1 wbps=max\n254:0 rbps=2 wbps=max", "254:0 rbps=2"),
            ("50331648", "50331648"),
        ] {
            assert!(says(kernel, written), "{kernel:?} {written:?}");
        }
        for (kernel, written) in
            [("default 100", "50"), ("8:0 rbps=1\n254:0 rbps=2", "254:0 rbps=1"), ("max", "4096"), ("", "1")]
        {
            assert!(!says(kernel, written), "{kernel:?} {written:?}");
        }
    }

    #[test]
    fn pressure_and_oom_kills_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("pod/c1");
        std::fs::create_dir_all(&own).unwrap();
        std::fs::write(own.join("cpu.pressure"), "some avg10=1.50 total=7\nfull avg10=0.00 total=0\n")
            .unwrap();
        std::fs::write(own.join("memory.events"), "oom 2\noom_kill 3\n").unwrap();
        let files = Files { layout: Layout::Unified { mount: dir.path().into() }, path: "pod/c1".into() };
        let pressure = files.pressure();
        assert_eq!(pressure.len(), 1);
        assert_eq!(
            (pressure[0].what.as_str(), pressure[0].kernel.as_str()),
            ("cpu pressure", "some avg10=1.50 total=7")
        );
        assert_eq!(files.oom_kills().unwrap().kernel, "3");
    }

    #[test]
    fn another_cgroup_is_told() {
        let own = |path: &str| {
            BTreeMap::from([("".to_owned(), "/p/c".to_owned()), ("cpu".to_owned(), path.to_owned())])
        };
        assert!(!membership("/p/c", &own("/p/c")).differs);
        let row = membership("/p/c", &own("/"));
        assert_eq!((row.differs, row.kernel.as_str()), (true, "cpu:/"));
    }
}
