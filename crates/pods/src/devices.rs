//! The device list of a container, on its cgroup.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Mutex;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, Spec};
use stave_sys::{ACCESS_MKNOD, ACCESS_READ, ACCESS_WRITE, DeviceFilter, DeviceRule};

use crate::error::{Code, Error, Result};
use crate::jobs::lock;

const ALL: u32 = ACCESS_MKNOD | ACCESS_READ | ACCESS_WRITE;

/// What every container may use (OCI runtime specification, config-linux.md, "Default Devices"):
/// null, zero, full, random, urandom, tty, console, ptmx, pseudo-terminals.
const DEFAULT: [(u32, Option<u32>); 9] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
];

/// Loading a program costs a millisecond, and most containers have the same list: the last one is kept.
#[derive(Default)]
pub(crate) struct DeviceFilters(Mutex<Option<(Vec<DeviceRule>, DeviceFilter)>>);

impl DeviceFilters {
    /// Puts the specification's device list on the container's cgroup: a BPF program where there is a
    /// cgroup2 directory, else the v1 devices controller.
    pub(crate) fn apply(&self, spec: &Spec, cgroup: &stave_cgroup::ContainerCgroup) -> Result<()> {
        let rules = rules(spec);
        if rules.last().is_some_and(|rule| rule.allow && matches_all(rule)) {
            return Ok(());
        }
        if let Some(dir) = &cgroup.v2_dir {
            return self
                .attach(&rules, dir)
                .map_err(|e| Error::internal(format_args!("device filter on {}", dir.display()), e));
        }
        let v1 = cgroup.v1.iter().find(|(name, _)| name.split(',').any(|controller| controller == "devices"));
        let Some((_, dir)) = v1 else {
            return Err(Error::new(
                Code::FailedPrecondition,
                "devices: the host has neither a cgroup2 mount nor a v1 devices controller to restrict them",
            ));
        };
        for rule in &rules {
            let path = dir.join(if rule.allow { "devices.allow" } else { "devices.deny" });
            std::fs::write(&path, v1_line(rule)).map_err(|e| Error::internal(path.display(), e))?;
        }
        Ok(())
    }

    fn attach(&self, rules: &[DeviceRule], dir: &Path) -> std::io::Result<()> {
        let dir = std::fs::File::open(dir)?;
        let mut kept = lock(&self.0);
        if let Some((_, filter)) = kept.as_ref().filter(|(known, _)| known == rules) {
            return filter.attach(dir.as_fd());
        }
        let filter = DeviceFilter::load(rules)?;
        filter.attach(dir.as_fd())?;
        *kept = Some((rules.to_vec(), filter));
        Ok(())
    }
}

fn rules(spec: &Spec) -> Vec<DeviceRule> {
    let asked = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref())
        .and_then(|resources| resources.devices().as_ref())
        .map_or(&[][..], Vec::as_slice);
    let mut rules = vec![DeviceRule { allow: false, block: None, major: None, minor: None, access: ALL }];
    // Making a node is harmless as long as it can't be opened; package managers do it.
    rules.push(DeviceRule { allow: true, block: None, major: None, minor: None, access: ACCESS_MKNOD });
    rules.extend(DEFAULT.map(|(major, minor)| DeviceRule {
        allow: true,
        block: Some(false),
        major: Some(major),
        minor,
        access: ALL,
    }));
    // The specification starts with "deny all" as well, or "allow all" for privileged containers.
    rules.extend(asked.iter().map(rule).filter(|rule| rule.allow || !matches_all(rule)));
    rules
}

fn matches_all(rule: &DeviceRule) -> bool {
    rule.block.is_none() && rule.major.is_none() && rule.minor.is_none() && rule.access == ALL
}

fn rule(asked: &LinuxDeviceCgroup) -> DeviceRule {
    let number = |number: Option<i64>| number.and_then(|n| u32::try_from(n).ok());
    let access = asked.access().as_deref().unwrap_or("rwm");
    let bit = |letter, bit| if access.contains(letter) { bit } else { 0 };
    DeviceRule {
        allow: asked.allow(),
        block: match asked.typ() {
            Some(LinuxDeviceType::B) => Some(true),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(false),
            _ => None,
        },
        major: number(asked.major()),
        minor: number(asked.minor()),
        access: bit('r', ACCESS_READ) | bit('w', ACCESS_WRITE) | bit('m', ACCESS_MKNOD),
    }
}

/// One line of devices.allow or devices.deny (kernel: cgroup-v1/devices.rst).
fn v1_line(rule: &DeviceRule) -> String {
    let kind = match rule.block {
        None => "a",
        Some(true) => "b",
        Some(false) => "c",
    };
    let number = |number: Option<u32>| number.map_or_else(|| "*".to_owned(), |n| n.to_string());
    let access: String = [(ACCESS_READ, 'r'), (ACCESS_WRITE, 'w'), (ACCESS_MKNOD, 'm')]
        .into_iter()
        .filter(|(bit, _)| rule.access & bit != 0)
        .map(|(_, letter)| letter)
        .collect();
    format!("{kind} {}:{} {access}", number(rule.major), number(rule.minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_list_denies_all_first() {
        let rules = rules(&Spec::default());
        assert!(!rules[0].allow && matches_all(&rules[0]));
        assert!(rules.iter().all(|rule| !(rule.allow && matches_all(rule))));
        assert_eq!(v1_line(&rules[2]), "c 1:3 rwm");
        assert_eq!(v1_line(rules.last().unwrap()), "c 136:* rwm");
    }

    #[test]
    fn a_disk_is_in_the_list_only_when_asked_for() {
        let mut asked = LinuxDeviceCgroup::default();
        asked
            .set_allow(true)
            .set_typ(Some(LinuxDeviceType::B))
            .set_major(Some(8))
            .set_minor(Some(0))
            .set_access(Some("r".to_owned()));
        assert_eq!(v1_line(&rule(&asked)), "b 8:0 r");
    }
}
