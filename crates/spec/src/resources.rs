//! Limits of a container, in the CRI's units.

use std::collections::{BTreeMap, HashSet};

use oci_spec::runtime as oci;
use stave_cri_proto::v1::LinuxContainerResources;

use crate::SpecError;
use crate::text::at_most;

/// Validated limits. `None` and empty: leave alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Relative weight, 2 to 262144.
    pub cpu_shares: Option<u64>,
    /// Microseconds of CPU time per period; -1: unlimited.
    pub cpu_quota: Option<i64>,
    /// Microseconds.
    pub cpu_period: Option<u64>,
    /// CPU list ("0-3,7").
    pub cpuset_cpus: String,
    /// Memory node list.
    pub cpuset_mems: String,
    /// Bytes; -1: unlimited.
    pub memory_limit: Option<i64>,
    /// Bytes of memory and swap together; -1: unlimited.
    pub memory_swap_limit: Option<i64>,
    /// Number of tasks; the CRI has no field for it, so it is set by the node's configuration alone.
    pub pids_limit: Option<i64>,
    /// Page size ("2MB") and bytes.
    pub hugepage_limits: Vec<(String, u64)>,
    /// Files of cgroup v2 and what to write, last of all.
    pub unified: BTreeMap<String, String>,
    /// -1000 to 1000. Set whenever the request has resources, also when it is 0.
    pub oom_score_adj: Option<i32>,
}

/// Bounds of the kernel (cpu.cfs_period_us, cpu.cfs_quota_us, cpu.shares).
const PERIOD: std::ops::RangeInclusive<i64> = 1_000..=1_000_000;
const QUOTA_MIN: i64 = 1_000;
const SHARES: (i64, i64) = (2, 262_144);

/// Checks what a request asks for; `field` is its path in the request. Errors: a value out of range.
pub fn resources(field: &str, config: Option<&LinuxContainerResources>) -> Result<Resources, SpecError> {
    let Some(config) = config else { return Ok(Resources::default()) };
    let at = |name: &str| format!("{field}.{name}");
    if config.cpu_period != 0 && !PERIOD.contains(&config.cpu_period) {
        return Err(SpecError::invalid(
            at("cpu_period"),
            config.cpu_period,
            "must be 0 (unset) or between 1000 and 1000000 µs",
        ));
    }
    if !(config.cpu_quota == 0 || config.cpu_quota == -1 || config.cpu_quota >= QUOTA_MIN) {
        return Err(SpecError::invalid(
            at("cpu_quota"),
            config.cpu_quota,
            "must be 0 (unset), -1 (unlimited) or at least 1000 µs",
        ));
    }
    if config.cpu_shares < 0 {
        return Err(SpecError::invalid(at("cpu_shares"), config.cpu_shares, "must not be negative"));
    }
    for (name, value) in [
        ("memory_limit_in_bytes", config.memory_limit_in_bytes),
        ("memory_swap_limit_in_bytes", config.memory_swap_limit_in_bytes),
    ] {
        if value < -1 {
            let message = "must be 0 (unset), -1 (unlimited) or a number of bytes";
            return Err(SpecError::invalid(at(name), value, message));
        }
    }
    let (memory, swap) = (config.memory_limit_in_bytes, config.memory_swap_limit_in_bytes);
    if swap > 0 && (memory > swap || memory == -1) {
        let message = "counts memory and swap together, so it can't be below memory_limit_in_bytes";
        return Err(SpecError::invalid(at("memory_swap_limit_in_bytes"), swap, message));
    }
    let oom_score_adj = i32::try_from(config.oom_score_adj).ok().filter(|n| (-1000..=1000).contains(n));
    let oom_score_adj = oom_score_adj.ok_or_else(|| {
        SpecError::invalid(at("oom_score_adj"), config.oom_score_adj, "must be between -1000 and 1000")
    })?;
    list(&at("cpuset_cpus"), &config.cpuset_cpus)?;
    list(&at("cpuset_mems"), &config.cpuset_mems)?;
    Ok(Resources {
        cpu_shares: positive(config.cpu_shares)
            .map(|_| config.cpu_shares.clamp(SHARES.0, SHARES.1).unsigned_abs()),
        cpu_quota: (config.cpu_quota != 0).then_some(config.cpu_quota),
        cpu_period: positive(config.cpu_period),
        cpuset_cpus: config.cpuset_cpus.clone(),
        cpuset_mems: config.cpuset_mems.clone(),
        memory_limit: (memory != 0).then_some(memory),
        memory_swap_limit: (swap != 0).then_some(swap),
        pids_limit: None,
        hugepage_limits: hugepages(&at("hugepage_limits"), config)?,
        unified: unified(&at("unified"), config)?,
        oom_score_adj: Some(oom_score_adj),
    })
}

fn positive(value: i64) -> Option<u64> {
    u64::try_from(value).ok().filter(|v| *v > 0)
}

/// A list of cpuset(7): numbers and ranges.
fn list(field: &str, text: &str) -> Result<(), SpecError> {
    let number = |digits: &str| {
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        digits.parse::<u32>().ok().filter(|n| plain && *n < 65536)
    };
    let item = |item: &str| match item.split_once('-') {
        Some((low, high)) => matches!((number(low), number(high)), (Some(l), Some(h)) if l <= h),
        None => number(item).is_some(),
    };
    if text.len() > 4096 || !(text.is_empty() || text.split(',').all(item)) {
        return Err(SpecError::invalid(
            field,
            text,
            "must be a list of numbers and ranges, such as \"0-3,7\"",
        ));
    }
    Ok(())
}

fn hugepages(field: &str, config: &LinuxContainerResources) -> Result<Vec<(String, u64)>, SpecError> {
    at_most(field, config.hugepage_limits.len(), 64)?;
    let mut seen = HashSet::new();
    let mut all = Vec::new();
    for (i, limit) in config.hugepage_limits.iter().enumerate() {
        let field = format!("{field}[{i}].page_size");
        let size = limit.page_size.as_str();
        let digits = ["KB", "MB", "GB"].iter().find_map(|unit| size.strip_suffix(unit)).unwrap_or("");
        let plain = digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
        if !(plain && digits.parse::<u32>().is_ok_and(u32::is_power_of_two)) {
            let message = "must be a page size of the kernel, such as \"2MB\"";
            return Err(SpecError::invalid(field, size, message));
        }
        if !seen.insert(size) {
            return Err(SpecError::invalid(field, size, "is given twice"));
        }
        all.push((size.to_owned(), limit.limit));
    }
    Ok(all)
}

/// Files of controllers only: those of the cgroup itself would move or kill processes.
fn unified(field: &str, config: &LinuxContainerResources) -> Result<BTreeMap<String, String>, SpecError> {
    at_most(field, config.unified.len(), 256)?;
    let mut all = BTreeMap::new();
    for (key, value) in &config.unified {
        let field = format!("{field}[{key:?}]");
        let part = |part: &str| {
            !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
        };
        let well_formed = key.len() <= 255 && key.contains('.') && key.split('.').all(part);
        if !well_formed || key.starts_with("cgroup.") {
            return Err(SpecError::invalid(field, value, "the key must be \"CONTROLLER.PARAMETER\""));
        }
        if value.is_empty() || value.len() > 4095 || value.chars().any(char::is_control) {
            return Err(SpecError::invalid(field, value, "must be one line of 1 to 4095 bytes"));
        }
        all.insert(key.clone(), value.clone());
    }
    Ok(all)
}

impl Resources {
    /// OCI `linux.resources`, with the device rules.
    pub(crate) fn to_oci(&self, devices: Vec<oci::LinuxDeviceCgroup>) -> oci::LinuxResources {
        let text = |list: &str| (!list.is_empty()).then(|| list.to_owned());
        let mut cpu = oci::LinuxCpu::default();
        cpu.set_shares(self.cpu_shares)
            .set_quota(self.cpu_quota)
            .set_period(self.cpu_period)
            .set_cpus(text(&self.cpuset_cpus))
            .set_mems(text(&self.cpuset_mems));
        let mut memory = oci::LinuxMemory::default();
        memory.set_limit(self.memory_limit).set_swap(self.memory_swap_limit);
        let hugepages = self.hugepage_limits.iter().map(|(size, limit)| {
            let mut hugepage = oci::LinuxHugepageLimit::default();
            hugepage.set_page_size(size.clone()).set_limit(i64::try_from(*limit).unwrap_or(i64::MAX));
            hugepage
        });
        let hugepages: Vec<_> = hugepages.collect();
        let unified: std::collections::HashMap<_, _> = self.unified.clone().into_iter().collect();
        let mut all = oci::LinuxResources::default();
        all.set_devices(Some(devices))
            .set_cpu((cpu != oci::LinuxCpu::default()).then_some(cpu))
            .set_memory((memory != oci::LinuxMemory::default()).then_some(memory))
            .set_hugepage_limits((!hugepages.is_empty()).then_some(hugepages))
            .set_unified((!unified.is_empty()).then_some(unified));
        all
    }
}

#[cfg(test)]
mod tests {
    use stave_cri_proto::v1::HugepageLimit;

    use super::*;

    fn field_of(change: impl FnOnce(&mut LinuxContainerResources)) -> Option<String> {
        let mut config = LinuxContainerResources::default();
        change(&mut config);
        resources("r", Some(&config)).err().map(|e| e.field)
    }

    #[test]
    fn zero_leaves_alone() {
        assert_eq!(resources("r", None).unwrap(), Resources::default());
        let zero = resources("r", Some(&LinuxContainerResources::default())).unwrap();
        assert_eq!(zero, Resources { oom_score_adj: Some(0), ..Default::default() });
    }

    #[test]
    fn ranges() {
        for (bad, change) in [
            ("cpu_period", (|c, v| c.cpu_period = v) as fn(&mut LinuxContainerResources, i64)),
            ("cpu_quota", |c, v| c.cpu_quota = v),
            ("cpu_shares", |c, v| c.cpu_shares = v),
            ("memory_limit_in_bytes", |c, v| c.memory_limit_in_bytes = v),
            ("memory_swap_limit_in_bytes", |c, v| c.memory_swap_limit_in_bytes = v),
            ("oom_score_adj", |c, v| c.oom_score_adj = v),
        ] {
            let (good, wrong): (&[i64], &[i64]) = match bad {
                "cpu_period" => (&[0, 1000, 1_000_000], &[-1, 999, 1_000_001, i64::MIN]),
                "cpu_quota" => (&[0, -1, 1000, i64::MAX], &[1, 999, -2, i64::MIN]),
                "cpu_shares" => (&[0, 1, 2, i64::MAX], &[-1, i64::MIN]),
                "oom_score_adj" => (&[0, -1000, 1000], &[-1001, 1001, 1 << 32, i64::MIN]),
                _ => (&[0, -1, 1, i64::MAX], &[-2, i64::MIN]),
            };
            for value in good {
                assert_eq!(field_of(|c| change(c, *value)), None, "{bad} {value}");
            }
            for value in wrong {
                assert_eq!(field_of(|c| change(c, *value)), Some(format!("r.{bad}")), "{value}");
            }
        }
        let shares = |n| {
            let config = LinuxContainerResources { cpu_shares: n, ..Default::default() };
            resources("r", Some(&config)).unwrap().cpu_shares
        };
        assert_eq!(
            (shares(0), shares(1), shares(1024), shares(1 << 40)),
            (None, Some(2), Some(1024), Some(262_144))
        );
    }

    #[test]
    fn swap_counts_memory() {
        let field = Some("r.memory_swap_limit_in_bytes".to_owned());
        for (memory, swap, bad) in
            [(10, 10, false), (10, 9, true), (-1, 9, true), (0, 9, false), (10, -1, false)]
        {
            let got = field_of(|c| {
                c.memory_limit_in_bytes = memory;
                c.memory_swap_limit_in_bytes = swap;
            });
            assert_eq!(got, field.clone().filter(|_| bad), "{memory} {swap}");
        }
    }

    #[test]
    fn lists() {
        for good in ["", "0", "0-3", "0-3,7", "5,1-1"] {
            assert_eq!(field_of(|c| c.cpuset_cpus = good.into()), None, "{good}");
        }
        for bad in ["a", "1-", "-1", "3-1", "1,,2", "1\n", " 1", "1,", "99999999999", "0-70000", "+1"] {
            assert_eq!(field_of(|c| c.cpuset_cpus = bad.into()), Some("r.cpuset_cpus".into()), "{bad:?}");
            assert_eq!(field_of(|c| c.cpuset_mems = bad.into()), Some("r.cpuset_mems".into()), "{bad:?}");
        }
    }

    #[test]
    fn page_sizes() {
        let limit = |size: &str| HugepageLimit { page_size: size.into(), limit: 1 };
        for good in ["2MB", "1GB", "64KB", "16GB"] {
            assert_eq!(field_of(|c| c.hugepage_limits = vec![limit(good)]), None, "{good}");
        }
        for bad in ["", "MB", "2M", "2mb", "3MB", "0MB", "02MB", "-2MB", "../2MB", "2MB/x", "2TB"] {
            assert!(field_of(|c| c.hugepage_limits = vec![limit(bad)]).is_some(), "{bad}");
        }
        let twice = field_of(|c| c.hugepage_limits = vec![limit("2MB"), limit("2MB")]);
        assert_eq!(twice.as_deref(), Some("r.hugepage_limits[1].page_size"));
    }

    #[test]
    fn unified_keys_stay_in_controllers() {
        for good in ["memory.high", "memory.swap.max", "hugetlb.2MB.max", "io.max", "misc.max"] {
            assert_eq!(field_of(|c| drop(c.unified.insert(good.into(), "1".into()))), None, "{good}");
        }
        for bad in [
            "",
            "memory",
            "cgroup.procs",
            "cgroup.kill",
            "../memory.max",
            "memory./max",
            "memory..max",
            "a.b\n",
        ] {
            assert!(field_of(|c| drop(c.unified.insert(bad.into(), "1".into()))).is_some(), "{bad:?}");
        }
        for bad in ["", "1\n2", "\0"] {
            assert!(
                field_of(|c| drop(c.unified.insert("memory.high".into(), bad.into()))).is_some(),
                "{bad:?}"
            );
        }
    }
}
