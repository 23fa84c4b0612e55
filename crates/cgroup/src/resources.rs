use std::collections::BTreeMap;

/// Limits of one container, in the terms of the CRI. `None`, zero and empty leave a limit alone;
/// -1 lifts it.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Resources {
    /// relative CPU weight, as v1 `cpu.shares` (2 to 262144)
    pub cpu_shares: Option<u64>,
    /// CPU time in each period, microseconds
    pub cpu_quota: Option<i64>,
    /// length of the period, microseconds; 100000 if only the quota is given
    pub cpu_period: Option<u64>,
    /// CPUs, such as `0-3,8`
    pub cpuset_cpus: String,
    /// memory nodes, such as `0`
    pub cpuset_mems: String,
    /// memory, bytes
    pub memory_limit: Option<i64>,
    /// memory and swap together, bytes; without it a memory limit allows no swap
    pub memory_swap_limit: Option<i64>,
    /// processes and threads
    pub pids_limit: Option<i64>,
    /// page size (`2MB`, `1GB`) and bytes of such pages; zero is a limit here
    pub hugepage_limits: Vec<(String, u64)>,
    /// weights and throttles of block devices
    pub block_io: BlockIo,
    /// v2 files and values, written last
    pub unified: BTreeMap<String, String>,
}

/// Limits of block devices.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct BlockIo {
    /// relative weight on all devices (BFQ), 1 to 1000
    pub weight: Option<u64>,
    /// single devices
    pub devices: Vec<DeviceIo>,
}

/// Limits of one block device.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct DeviceIo {
    /// its number
    pub major: u32,
    /// its number
    pub minor: u32,
    /// relative weight (BFQ), 1 to 1000
    pub weight: Option<u64>,
    /// bytes a second
    pub read_bps: Option<u64>,
    /// bytes a second
    pub write_bps: Option<u64>,
    /// operations a second
    pub read_iops: Option<u64>,
    /// operations a second
    pub write_iops: Option<u64>,
}

/// `cpu.weight` (1 to 10000) for `cpu.shares`, by the curve that runc and crun use: 2, 1024 and 262144
/// become 1, 100 and 10000. Zero (unset) stays zero.
pub fn shares_to_weight(shares: u64) -> u64 {
    match shares {
        0 => 0,
        1 | 2 => 1,
        262_144.. => 10_000,
        _ => {
            let l = (shares as f64).log2();
            let exponent = (l * l + 125.0 * l) / 612.0 - 7.0 / 34.0;
            // Rounding noise must not lift an exact 100 to 101.
            (10f64.powf(exponent) - 1e-9).ceil().clamp(1.0, 10_000.0) as u64
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights() {
        let pairs = [
            (0, 0),
            (1, 1),
            (2, 1),
            (3, 2),
            (102, 17),
            (512, 59),
            (1024, 100),
            (2048, 174),
            (262_144, 10_000),
            (u64::MAX, 10_000),
        ];
        for (shares, weight) in pairs {
            assert_eq!(shares_to_weight(shares), weight, "shares {shares}");
        }
        let mut last = 0;
        for shares in (2..262_200).step_by(97) {
            let weight = shares_to_weight(shares);
            assert!(weight >= last, "not monotonic at {shares}");
            last = weight;
        }
    }
}
