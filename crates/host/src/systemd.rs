//! Whether systemd can make the cgroups of pods.

use std::path::Path;

use crate::report::HostReport;

/// Is there on hosts that systemd runs, and on no others (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";

/// The system bus where the environment names no other one (D-Bus specification, "Well-known Message Bus
/// Instances").
const BUS: &str = "/run/dbus/system_bus_socket";

pub(crate) fn probe(report: &mut HostReport) {
    let bus = std::env::var_os("DBUS_SYSTEM_BUS_ADDRESS").is_some() || Path::new(BUS).exists();
    let lack = lack(Path::new(BOOTED).is_dir(), report.features.unified_cgroup, bus);
    tell(report, lack);
}

/// Why systemd can't be used, from whether it is PID 1, cgroup v2 stands alone, and there is a D-Bus.
fn lack(booted: bool, unified: bool, bus: bool) -> Option<&'static str> {
    match (booted, unified, bus) {
        (false, ..) => Some("PID 1 is not systemd"),
        (true, false, _) => Some("there are cgroup v1 hierarchies"),
        (true, true, false) => Some("there is no system D-Bus: /run/dbus/system_bus_socket is missing"),
        (true, true, true) => None,
    }
}

fn tell(report: &mut HostReport, lack: Option<&str>) {
    const NAME: &str = "cgroup driver";
    report.features.systemd_cgroup = lack.is_none();
    match lack {
        None => report.ok(NAME, "\"auto\" is systemd: it is PID 1, and makes the scopes of pods"),
        // With cgroupfs nothing is missing, where the kubelet uses it too.
        Some(lack) => report.ok_with_cost(
            NAME,
            format!("\"auto\" is cgroupfs: {lack}"),
            "cgroup.driver = \"systemd\" is refused; the kubelet must use cgroupfs too",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_three_are_needed() {
        assert_eq!(lack(true, true, true), None);
        for (booted, unified, bus, why) in
            [(false, true, true, "PID 1"), (true, false, true, "cgroup v1"), (true, true, false, "D-Bus")]
        {
            let lack = lack(booted, unified, bus);
            assert!(lack.is_some_and(|lack| lack.contains(why)), "{lack:?}");
            let mut report = HostReport::default();
            tell(&mut report, lack);
            assert!(!report.features.systemd_cgroup && report.checks[0].found.contains("cgroupfs"));
        }
        let mut report = HostReport::default();
        tell(&mut report, None);
        assert!(report.features.systemd_cgroup && report.checks[0].found.contains("systemd"));
    }
}
