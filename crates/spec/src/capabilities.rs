//! Capabilities of a container.

use std::str::FromStr as _;

use oci_spec::runtime::Capability;
use stave_cri_proto::v1 as cri;
use stave_supervisor_proto::v1::Capabilities;
use stave_sys::CAPABILITY_NAMES as NAMES;

use crate::SpecError;
use crate::text::at_most;

/// What containers have unless they say otherwise: the set of containerd and CRI-O's ancestors.
const DEFAULT: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// Every capability there is.
const ALL: u64 = (1 << NAMES.len()) - 1;

/// The number of a capability, with or without CAP_, in any case.
fn number(name: &str) -> Option<usize> {
    let upper = name.to_ascii_uppercase();
    let name = upper.strip_prefix("CAP_").unwrap_or(&upper);
    NAMES.iter().position(|n| *n == name)
}

/// The sets: add ALL, then drop ALL, then single adds, then single drops. An ambient capability goes
/// into all sets; without any, the inheritable and ambient sets are empty (CVE-2022-29162).
pub(crate) fn capabilities(
    request: Option<&cri::Capability>,
    privileged: bool,
) -> Result<Capabilities, SpecError> {
    let at = "config.linux.security_context.capabilities";
    let empty = cri::Capability::default();
    let request = request.unwrap_or(&empty);
    let (add_all, add) = mask(&format!("{at}.add_capabilities"), &request.add_capabilities)?;
    let (drop_all, drop) = mask(&format!("{at}.drop_capabilities"), &request.drop_capabilities)?;
    let (ambient_all, ambient) =
        mask(&format!("{at}.add_ambient_capabilities"), &request.add_ambient_capabilities)?;
    if privileged {
        return Ok(Capabilities {
            bounding: ALL,
            effective: ALL,
            permitted: ALL,
            inheritable: 0,
            ambient: 0,
        });
    }
    let mut set = DEFAULT.iter().filter_map(|name| number(name)).fold(0, |set, n| set | (1 << n));
    if add_all {
        set = ALL;
    }
    if drop_all {
        set = 0;
    }
    let ambient = (if ambient_all { ALL } else { ambient }) & !drop;
    set = (set | add | ambient) & !drop;
    Ok(Capabilities { bounding: set, effective: set, permitted: set, inheritable: ambient, ambient })
}

/// Whether ALL is among the names, and the bits of the others.
fn mask(field: &str, names: &[String]) -> Result<(bool, u64), SpecError> {
    at_most(field, names.len(), 1024)?;
    let mut all = false;
    let mut bits = 0;
    for (i, name) in names.iter().enumerate() {
        if name.eq_ignore_ascii_case("ALL") {
            all = true;
            continue;
        }
        let n = number(name)
            .ok_or_else(|| SpecError::invalid(format!("{field}[{i}]"), name, "is not a capability"))?;
        bits |= 1 << n;
    }
    Ok((all, bits))
}

/// Bits as the OCI specification has them.
pub(crate) fn to_oci(bits: u64) -> oci_spec::runtime::Capabilities {
    (0..NAMES.len())
        .filter(|n| bits & (1 << n) != 0)
        .filter_map(|n| Capability::from_str(NAMES[n]).ok())
        .collect()
}

/// And back.
pub(crate) fn from_oci(set: Option<&oci_spec::runtime::Capabilities>) -> u64 {
    let names = set.into_iter().flatten().map(ToString::to_string);
    names.filter_map(|name| number(&name)).fold(0, |bits, n| bits | (1 << n))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(add: &[&str], drop: &[&str], ambient: &[&str]) -> cri::Capability {
        let own = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        cri::Capability {
            add_capabilities: own(add),
            drop_capabilities: own(drop),
            add_ambient_capabilities: own(ambient),
        }
    }

    fn bits(names: &[&str]) -> u64 {
        names.iter().fold(0, |set, name| set | (1 << number(name).unwrap()))
    }

    #[test]
    fn adds_and_drops() {
        let default = bits(&DEFAULT);
        assert_eq!(default.count_ones(), 14);
        let table: &[(&[&str], &[&str], u64)] = &[
            (&[], &[], default),
            (&["NET_ADMIN"], &[], default | bits(&["NET_ADMIN"])),
            (&["cap_net_admin"], &[], default | bits(&["NET_ADMIN"])),
            (&[], &["CHOWN"], default & !bits(&["CHOWN"])),
            (&["ALL"], &[], ALL),
            (&[], &["ALL"], 0),
            (&["ALL"], &["ALL"], 0),
            (&["NET_ADMIN"], &["ALL"], bits(&["NET_ADMIN"])),
            (&["ALL"], &["NET_ADMIN"], ALL & !bits(&["NET_ADMIN"])),
            (&["NET_ADMIN"], &["NET_ADMIN"], default),
            (&["all"], &["ALL", "KILL"], 0),
        ];
        for (add, drop, want) in table {
            let got = capabilities(Some(&request(add, drop, &[])), false).unwrap();
            assert_eq!(
                (got.bounding, got.effective, got.permitted),
                (*want, *want, *want),
                "{add:?} {drop:?}"
            );
        }
        assert_eq!(capabilities(None, false).unwrap().effective, default);
    }

    #[test]
    fn cve_2022_29162() {
        // Whatever is added, nothing is inheritable or ambient unless it is asked for.
        for privileged in [false, true] {
            let got = capabilities(Some(&request(&["ALL"], &[], &[])), privileged).unwrap();
            assert_eq!((got.inheritable, got.ambient), (0, 0));
        }
    }

    #[test]
    fn ambient_goes_into_all_sets() {
        let got = capabilities(Some(&request(&[], &["ALL"], &["NET_BIND_SERVICE"])), false).unwrap();
        let want = bits(&["NET_BIND_SERVICE"]);
        assert_eq!(
            (got.bounding, got.effective, got.permitted, got.inheritable, got.ambient),
            (want, want, want, want, want)
        );
        let got = capabilities(Some(&request(&[], &["KILL"], &["KILL"])), false).unwrap();
        assert_eq!((got.ambient, got.effective & want_kill()), (0, 0));
    }

    fn want_kill() -> u64 {
        bits(&["KILL"])
    }

    #[test]
    fn unknown_names_are_refused() {
        for (bad, field) in [
            (request(&["KILL", "NOPE"], &[], &[]), "add_capabilities[1]"),
            (request(&[], &[""], &[]), "drop_capabilities[0]"),
            (request(&[], &[], &["CAP_CAP_KILL"]), "add_ambient_capabilities[0]"),
        ] {
            for privileged in [false, true] {
                let error = capabilities(Some(&bad), privileged).unwrap_err();
                assert_eq!(error.field, format!("config.linux.security_context.capabilities.{field}"));
            }
        }
    }

    #[test]
    fn all_have_an_oci_name() {
        assert_eq!(to_oci(ALL).len(), 41);
        assert_eq!(from_oci(Some(&to_oci(ALL))), ALL);
        for (n, name) in NAMES.iter().enumerate() {
            assert_eq!(from_oci(Some(&to_oci(1 << n))), 1 << n, "{name}");
        }
        assert_eq!(from_oci(None), 0);
    }
}
