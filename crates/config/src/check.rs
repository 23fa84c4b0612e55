//! What a value must be. Errors read on after the value: "... is no absolute path".
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use crate::{CgroupDriver, Subnet};

/// `sun_path` has 108 bytes, the last for the NUL (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// `IFNAMSIZ` is 16, with the NUL.
const MAX_INTERFACE_NAME: usize = 15;

/// `PATH_MAX`, with the NUL.
const MAX_PATH: usize = 4095;

/// An absolute path that says where it leads: UTF-8, no `.` or `..`, not the root directory.
pub(crate) fn path(path: &Path) -> Result<PathBuf, String> {
    let Some(text) = path.to_str() else {
        return Err("is not UTF-8".to_owned());
    };
    if !path.is_absolute() {
        return Err("is no absolute path".to_owned());
    }
    if text.chars().any(char::is_control) {
        return Err("has control characters".to_owned());
    }
    if text.len() > MAX_PATH {
        return Err(format!("is longer than {MAX_PATH} bytes"));
    }
    // Path::components drops "." by itself, so look at the text.
    if text.split('/').any(|part| part == "." || part == "..") {
        return Err("has \".\" or \"..\" in it".to_owned());
    }
    let path: PathBuf = path.components().collect();
    if path.components().all(|part| part == Component::RootDir) {
        return Err("is the root directory".to_owned());
    }
    Ok(path)
}

/// A path that fits a socket address.
pub(crate) fn socket_path(given: &Path) -> Result<PathBuf, String> {
    let path = path(given)?;
    match path.as_os_str().as_bytes().len() {
        len if len > MAX_SOCKET_PATH => {
            Err(format!("has {len} bytes; the path of a socket may have {MAX_SOCKET_PATH}"))
        }
        _ => Ok(path),
    }
}

/// A name that the kernel takes for an interface (`dev_valid_name`), and that nft and ip print as it is.
pub(crate) fn interface(name: &str) -> Result<String, String> {
    if name.is_empty() || name.len() > MAX_INTERFACE_NAME {
        return Err(format!("has {} bytes; an interface name has 1 to {MAX_INTERFACE_NAME}", name.len()));
    }
    if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) || name == "." || name == ".."
    {
        return Err("is no interface name: letters, digits, \"-\", \"_\" and \".\" only".to_owned());
    }
    Ok(name.to_owned())
}

/// One subnet a family, each with room for the bridge and at least one pod; or none at all.
pub(crate) fn subnets(subnets: &[Subnet]) -> Result<(), String> {
    for ipv4 in [true, false] {
        let (name, range) = if ipv4 { ("IPv4", 8..=30) } else { ("IPv6", 32..=126) };
        let mut family = subnets.iter().filter(|subnet| subnet.address().is_ipv4() == ipv4);
        if let Some(subnet) = family.next() {
            if !range.contains(&subnet.prefix_len()) {
                return Err(format!(
                    "has {subnet}: for {name} the prefix length is {} to {}",
                    range.start(),
                    range.end()
                ));
            }
            if subnet.address().is_loopback() || subnet.address().is_multicast() {
                return Err(format!("has {subnet}, which is no network for pods"));
            }
        }
        if let Some(second) = family.next() {
            return Err(format!("has a second subnet of {name}: {second}"));
        }
    }
    Ok(())
}

/// The form that the driver takes: a path for cgroupfs, the name of a slice for systemd.
pub(crate) fn cgroup_parent(driver: CgroupDriver, parent: &str) -> Result<(), String> {
    match driver {
        // Which form is right shows when the driver is found.
        CgroupDriver::Auto if parent.is_empty() => Ok(()),
        CgroupDriver::Auto if parent.ends_with(".slice") => cgroup_parent(CgroupDriver::Systemd, parent),
        CgroupDriver::Auto => cgroup_parent(CgroupDriver::Cgroupfs, parent),
        CgroupDriver::Cgroupfs => path(Path::new(parent)).map(|_| ()).map_err(|err| {
            format!("{err}; with driver = \"cgroupfs\" it is the path of a cgroup, as \"/stave\"")
        }),
        CgroupDriver::Systemd => {
            let slice = parent.strip_suffix(".slice").is_some_and(|stem| {
                !stem.is_empty()
                    && stem.split('-').all(|part| !part.is_empty())
                    && stem.bytes().all(|b| b.is_ascii_alphanumeric() || b":-_.\\".contains(&b))
            });
            // UNIT_NAME_MAX is 256, with the NUL.
            if slice && parent.len() <= 255 {
                Ok(())
            } else {
                Err("is no slice; with driver = \"systemd\" it is the name of one, as \"stave.slice\""
                    .to_owned())
            }
        }
    }
}

/// The name of a runtime handler: a DNS label, as RuntimeClass demands.
pub(crate) fn handler(name: &str) -> Result<(), String> {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let label = !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(|b| alphanumeric(b) || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    if label {
        Ok(())
    } else {
        Err("can't be a runtime handler: its name must be 1 to 63 of a-z, 0-9 and inner \"-\"".to_owned())
    }
}
