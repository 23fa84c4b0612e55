//! Capabilities of this process: what it lacks no container can have.

use std::fs;

use stave_sys::CAPABILITY_NAMES as NAMES;

use crate::report::HostReport;

/// Without one of these no container can be set up.
const ESSENTIAL: &[&str] = &[
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "SETFCAP",
    "NET_ADMIN",
    "SYS_CHROOT",
    "SYS_ADMIN",
    "SYS_PTRACE",
    "MKNOD",
];

pub(crate) fn probe(report: &mut HostReport) {
    const NAME: &str = "capabilities";
    let status = match fs::read_to_string("/proc/self/status") {
        Ok(text) => text,
        Err(error) => {
            report.missing(NAME, format!("/proc/self/status: {error}"), "no container can be set up");
            return;
        }
    };
    let effective = mask(&status, "CapEff:");
    let bounding = mask(&status, "CapBnd:");
    let last = fs::read_to_string("/proc/sys/kernel/cap_last_cap")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(NAMES.len() - 1);
    let known = &NAMES[..NAMES.len().min(last + 1)];
    let has = |mask: u64, name: &str| {
        known.iter().position(|known| *known == name).is_some_and(|bit| mask >> bit & 1 == 1)
    };
    report.features.cap_sys_resource = has(effective, "SYS_RESOURCE");
    report.features.bounding_set =
        known.iter().filter(|name| has(bounding, name)).map(|name| format!("CAP_{name}")).collect();

    let lacking: Vec<&str> = known.iter().copied().filter(|name| !has(effective & bounding, name)).collect();
    if lacking.is_empty() {
        report.ok(NAME, format!("all {} of this kernel", known.len()));
        return;
    }
    let found = format!(
        "lacking {}",
        lacking.iter().map(|name| format!("CAP_{name}")).collect::<Vec<_>>().join(", ")
    );
    let mut costs = vec!["privileged containers go without"];
    if lacking.contains(&"SYS_RESOURCE") {
        costs.push("hard limits can't be raised, oom_score_adj can't be lowered");
    }
    let essential: Vec<&str> = lacking.iter().copied().filter(|name| ESSENTIAL.contains(name)).collect();
    if essential.is_empty() {
        report.degraded(NAME, found, costs.join("; "));
    } else {
        report.missing(NAME, found, format!("no container can be set up without {}", essential.join(", ")));
    }
}

fn mask(status: &str, key: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix(key))
        .and_then(|value| u64::from_str_radix(value.trim(), 16).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_hexadecimal() {
        let status = "Name:\tx\nCapEff:\t000001fffeffffff\nCapBnd:\t000001ffffffffff\n";
        assert_eq!(mask(status, "CapEff:") >> 24 & 1, 0);
        assert_eq!(mask(status, "CapBnd:"), (1 << NAMES.len()) - 1);
        assert_eq!(mask(status, "CapAmb:"), 0);
        assert_eq!(NAMES[24], "SYS_RESOURCE");
        assert!(ESSENTIAL.iter().all(|name| NAMES.contains(name)));
    }
}
