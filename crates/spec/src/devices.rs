//! Devices of a container.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};
use stave_cri_proto::v1 as cri;
use stave_supervisor_proto::v1::device::Kind;

use crate::text::{absolute, absolute_without_dotdot, at_most, clean, is_at_or_below};
use crate::{ContainerFacts, HostDevice, SpecError};

/// Nodes of the host's /dev that a container has its own of, or none.
const NOT_FROM_HOST: &[&str] =
    &["/dev/console", "/dev/fd", "/dev/mqueue", "/dev/ptmx", "/dev/pts", "/dev/shm", "/dev/core"];

/// Most device nodes of a container.
const DEVICES_MAX: usize = 16384;

/// Nodes to make, and what the device controller is to allow.
pub(crate) struct Devices {
    pub(crate) nodes: Vec<LinuxDevice>,
    pub(crate) rules: Vec<LinuxDeviceCgroup>,
    /// Where the node of a path is in `nodes`.
    index: HashMap<String, usize>,
}

/// The request's devices, and all of the host's for privileged containers. `mounted`: destinations of the
/// request's mounts; a node below one would be made in a directory of the host.
pub(crate) fn devices(
    f: &ContainerFacts<'_>,
    privileged: bool,
    mounted: &[String],
) -> Result<Devices, SpecError> {
    if let Some(device) = f.config.cdi_devices.first() {
        let message = "CDI devices are not built yet";
        return Err(SpecError::unimplemented("config.CDI_devices[0].name", &device.name, message));
    }
    let rules = vec![rule(privileged, None, None, "rwm")];
    let mut all = Devices { nodes: Vec::new(), rules, index: HashMap::new() };
    if privileged {
        let found = f.host.all_devices().map_err(|error| {
            SpecError::precondition(
                "config.linux.security_context.privileged",
                true,
                format!("/dev: {error}"),
            )
        })?;
        for device in found {
            let path = device.path.to_string_lossy().into_owned();
            let wanted = is_at_or_below(&path, "/dev")
                && path != "/dev"
                && !NOT_FROM_HOST.iter().any(|own| is_at_or_below(&path, own))
                && !mounted.iter().any(|mount| is_at_or_below(&path, mount));
            if wanted {
                add(&mut all, &device, path);
            }
        }
    }
    at_most("config.devices", f.config.devices.len(), DEVICES_MAX)?;
    for (i, device) in f.config.devices.iter().enumerate() {
        requested(&format!("config.devices[{i}]"), device, f, mounted, privileged, &mut all)?;
    }
    at_most("config.devices", all.nodes.len(), DEVICES_MAX)?;
    Ok(all)
}

fn requested(
    field: &str,
    device: &cri::Device,
    f: &ContainerFacts<'_>,
    mounted: &[String],
    privileged: bool,
    all: &mut Devices,
) -> Result<(), SpecError> {
    let at = |name: &str| format!("{field}.{name}");
    absolute(&at("host_path"), &device.host_path)?;
    let container_path = match device.container_path.as_str() {
        "" => &device.host_path,
        _ => &device.container_path,
    };
    absolute_without_dotdot(&at("container_path"), container_path)?;
    let base = clean(container_path);
    if base == "/" || (base == "/dev" && *container_path != device.host_path) {
        return Err(SpecError::invalid(at("container_path"), container_path, "can't be a device"));
    }
    let access = device.permissions.as_str();
    let in_order: String = "rwm".chars().filter(|c| access.contains(*c)).collect();
    if access.is_empty() || in_order.len() != access.len() {
        let message = "must be one or more of \"r\", \"w\" and \"m\", each once";
        return Err(SpecError::invalid(at("permissions"), access, message));
    }
    let host_path = clean(&device.host_path);
    let found = f.host.devices(Path::new(&device.host_path)).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => {
            SpecError::invalid(at("host_path"), &device.host_path, "does not exist on the host")
        }
        ErrorKind::InvalidInput => SpecError::invalid(at("host_path"), &device.host_path, "is not a device"),
        _ => SpecError::precondition(at("host_path"), &device.host_path, error.to_string()),
    })?;
    if found.is_empty() {
        return Err(SpecError::invalid(at("host_path"), &device.host_path, "has no devices"));
    }
    for device in found {
        let below = device.path.strip_prefix(&host_path).unwrap_or(Path::new(""));
        let path = clean(&Path::new(&base).join(below).to_string_lossy());
        if !below.as_os_str().is_empty() && NOT_FROM_HOST.iter().any(|own| is_at_or_below(&path, own)) {
            continue;
        }
        // Whoever mounts the host's /dev has the node already.
        let in_mount = mounted.iter().find(|mount| is_at_or_below(&path, mount));
        match in_mount {
            Some(mount) if !is_at_or_below(&path, "/dev") => {
                let message = format!("is inside the mount on {mount:?}");
                return Err(SpecError::invalid(at("container_path"), path, message));
            }
            Some(_) => {}
            None => add(all, &device, path),
        }
        if !privileged {
            let major = Some((device.kind, device.major));
            all.rules.push(rule(true, major, Some(device.minor), access));
        }
    }
    Ok(())
}

/// A later device of the same path replaces an earlier one.
fn add(all: &mut Devices, device: &HostDevice, path: String) {
    let node = node(device, &path);
    match all.index.get(&path).and_then(|i| all.nodes.get_mut(*i)) {
        Some(old) => *old = node,
        None => {
            all.index.insert(path, all.nodes.len());
            all.nodes.push(node);
        }
    }
}

fn oci_type(kind: Kind) -> LinuxDeviceType {
    match kind {
        Kind::Char => LinuxDeviceType::C,
        Kind::Block => LinuxDeviceType::B,
        Kind::Fifo => LinuxDeviceType::P,
    }
}

fn node(device: &HostDevice, path: &str) -> LinuxDevice {
    let mut node = LinuxDevice::default();
    node.set_path(PathBuf::from(path))
        .set_typ(oci_type(device.kind))
        .set_major(device.major.into())
        .set_minor(device.minor.into())
        .set_file_mode(Some(device.mode & 0o7777))
        .set_uid(Some(device.uid))
        .set_gid(Some(device.gid));
    node
}

fn rule(allow: bool, major: Option<(Kind, u32)>, minor: Option<u32>, access: &str) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow).set_access(Some(access.to_owned()));
    if let Some((kind, major)) = major {
        rule.set_typ(Some(oci_type(kind))).set_major(Some(major.into())).set_minor(minor.map(Into::into));
    }
    rule
}
