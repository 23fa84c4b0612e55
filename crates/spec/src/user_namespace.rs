//! User namespaces of pods (KEP-127).

use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder};
use stave_cri_proto::v1::{
    self as cri, IdMapping, LinuxContainerSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig,
};
use stave_supervisor_proto::v1 as plan;

use crate::SpecError;

/// The user namespace that a pod asks for; `None`: the node's. The config has passed [`crate::validate_pod`].
pub fn user_namespace(config: &PodSandboxConfig) -> Option<plan::UserNamespace> {
    let options = requested(config)?;
    let maps = |maps: &[IdMapping]| {
        maps.iter()
            .map(|map| plan::IdMapping {
                container_id: map.container_id,
                host_id: map.host_id,
                length: map.length,
            })
            .collect()
    };
    Some(plan::UserNamespace { uids: maps(&options.uids), gids: maps(&options.gids) })
}

/// The options of a pod that asks for a user namespace.
pub(crate) fn requested(config: &PodSandboxConfig) -> Option<&cri::UserNamespace> {
    let context = config.linux.as_ref()?.security_context.as_ref()?;
    let options = context.namespace_options.as_ref()?.userns_options.as_ref()?;
    (options.mode == NamespaceMode::Pod as i32).then_some(options)
}

/// Whether processes of the pod can be in this group: a short mapping has few.
pub(crate) fn has_gid(pod: &PodSandboxConfig, gid: u32) -> bool {
    requested(pod).and_then(|options| options.gids.first()).is_none_or(|map| gid < map.length)
}

/// Checks `userns_options` of a pod or container. `field`: that of the namespace options.
pub(crate) fn validate(field: &str, options: &NamespaceOption) -> Result<(), SpecError> {
    let Some(userns) = &options.userns_options else { return Ok(()) };
    let at = format!("{field}.userns_options");
    let mode = NamespaceMode::try_from(userns.mode)
        .map_err(|_| SpecError::invalid(format!("{at}.mode"), userns.mode, "is not a namespace mode"))?;
    match mode {
        NamespaceMode::Node if userns.uids.is_empty() && userns.gids.is_empty() => return Ok(()),
        NamespaceMode::Node => {
            let message = "must have no uids and gids with mode NODE";
            return Err(SpecError::invalid(at, mode.as_str_name(), message));
        }
        NamespaceMode::Pod => {}
        mode => {
            let message = "is not a mode of user namespaces";
            return Err(SpecError::invalid(format!("{at}.mode"), mode.as_str_name(), message));
        }
    }
    let uids = mapping(&format!("{at}.uids"), &userns.uids)?;
    let gids = mapping(&format!("{at}.gids"), &userns.gids)?;
    if uids.length != gids.length {
        let message = format!("must be as many as the uids, {}", uids.length);
        return Err(SpecError::invalid(format!("{at}.gids[0].length"), gids.length, message));
    }
    // Root of a user namespace has no rights in namespaces that it does not own: sysfs, procfs and mqueue could not
    // be mounted.
    for (name, value) in [("network", options.network), ("pid", options.pid), ("ipc", options.ipc)] {
        if value == NamespaceMode::Node as i32 {
            let message = "the node's namespace does not go with a user namespace of the pod";
            return Err(SpecError::invalid(format!("{field}.{name}"), "NODE", message));
        }
    }
    Ok(())
}

/// The one mapping that the CRI allows.
fn mapping<'a>(field: &str, maps: &'a [IdMapping]) -> Result<&'a IdMapping, SpecError> {
    let [map] = maps else {
        return Err(SpecError::invalid(field, maps.len(), "must have exactly one mapping"));
    };
    let at = |name: &str| format!("{field}[0].{name}");
    if map.container_id != 0 {
        return Err(SpecError::invalid(at("container_id"), map.container_id, "must be 0: root needs an id"));
    }
    if map.length == 0 {
        return Err(SpecError::invalid(at("length"), 0, "must be at least 1"));
    }
    if map.host_id == 0 {
        return Err(SpecError::invalid(at("host_id"), 0, "would make root of the node root of the pod"));
    }
    // 4294967295 is no id, but "leave it".
    if map.host_id.checked_add(map.length).is_none() {
        let message = format!("with {} ids goes beyond the last one, 4294967294", map.length);
        return Err(SpecError::invalid(at("host_id"), map.host_id, message));
    }
    Ok(map)
}

/// A container is in its pod's user namespace: it may say so, or nothing, and nothing else.
pub(crate) fn same_as_pod(
    field: &str,
    options: Option<&cri::UserNamespace>,
    pod: &PodSandboxConfig,
) -> Result<(), SpecError> {
    let Some(own) = options else { return Ok(()) };
    let (field, node) = (format!("{field}.userns_options"), own.mode == NamespaceMode::Node as i32);
    match (requested(pod), node) {
        (None, true) => Ok(()),
        (Some(of_pod), false) if of_pod == own => Ok(()),
        (Some(_), true) => Err(SpecError::invalid(field, "NODE", "the pod has a user namespace")),
        (None, false) => Err(SpecError::invalid(field, "POD", "the pod has no user namespace")),
        (Some(of_pod), false) => {
            let message = format!("is not the mapping of the pod, {}", text(of_pod));
            Err(SpecError::invalid(field, text(own), message))
        }
    }
}

fn text(options: &cri::UserNamespace) -> String {
    let maps = |maps: &[IdMapping]| {
        let all: Vec<String> =
            maps.iter().map(|m| format!("{}:{}:{}", m.container_id, m.host_id, m.length)).collect();
        all.join(",")
    };
    format!("uids {} gids {}", maps(&options.uids), maps(&options.gids))
}

/// The numeric ids of a container's process exist in the pod's user namespace. (Those that a name stands for are found
/// out later.)
pub(crate) fn check_ids(
    at: &str,
    context: &LinuxContainerSecurityContext,
    user: &plan::User,
    pod: &PodSandboxConfig,
) -> Result<(), SpecError> {
    let Some(length) = requested(pod).and_then(|o| o.uids.first()).map(|map| map.length) else {
        return Ok(());
    };
    let check = |field: String, id: u32| match id < length {
        true => Ok(()),
        false => Err(SpecError::invalid(
            field,
            id,
            format!("the pod's user namespace has ids up to {}", length - 1),
        )),
    };
    if user.name.is_empty() {
        let field =
            if context.run_as_user.is_some() { format!("{at}.run_as_user") } else { "image.user".into() };
        check(field, user.uid)?;
    }
    if let Some(gid) = user.gid {
        let field =
            if context.run_as_group.is_some() { format!("{at}.run_as_group") } else { "image.user".into() };
        check(field, gid)?;
    }
    user.supplemental_groups
        .iter()
        .enumerate()
        .try_for_each(|(i, gid)| check(format!("{at}.supplemental_groups[{i}]"), *gid))
}

/// Whether a mount is idmapped: with the pod's own mapping, or not at all.
pub(crate) fn idmapped(field: &str, mount: &cri::Mount, pod: &PodSandboxConfig) -> Result<bool, SpecError> {
    let at = |name: &str| format!("{field}.{name}");
    if mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty() {
        return Ok(false);
    }
    let Some(of_pod) = requested(pod) else {
        let name = if mount.uid_mappings.is_empty() { "gidMappings" } else { "uidMappings" };
        return Err(SpecError::invalid(at(name), &mount.host_path, "the pod has no user namespace"));
    };
    for (name, own, of_pod) in [
        ("uidMappings", &mount.uid_mappings, &of_pod.uids),
        ("gidMappings", &mount.gid_mappings, &of_pod.gids),
    ] {
        if own != of_pod {
            return Err(SpecError::invalid(
                at(name),
                &mount.host_path,
                "are not those of the pod's user namespace",
            ));
        }
    }
    Ok(true)
}

/// A pod's mappings as the OCI runtime specification has them.
pub(crate) fn to_oci(maps: &[plan::IdMapping]) -> Vec<LinuxIdMapping> {
    let one = |map: &plan::IdMapping| {
        let builder = LinuxIdMappingBuilder::default().container_id(map.container_id).host_id(map.host_id);
        // All of its fields are set, so there is no error.
        builder.size(map.length).build().unwrap_or_default()
    };
    maps.iter().map(one).collect()
}

/// The range of groups of net.ipv4.ping_group_range, which is meant in the pod's ids, in those of the node: there the
/// value is written.
pub(crate) fn ping_group_range(value: &str, pod: &PodSandboxConfig) -> Result<String, SpecError> {
    const FIELD: &str = "config.linux.sysctls[\"net.ipv4.ping_group_range\"]";
    let Some(map) = requested(pod).and_then(|options| options.gids.first()) else {
        return Ok(value.to_owned());
    };
    let numbers: Vec<Option<u32>> = value.split_whitespace().map(|word| word.parse().ok()).collect();
    let [Some(first), Some(last)] = numbers.as_slice() else {
        return Err(SpecError::invalid(FIELD, value, "must be two ids of groups"));
    };
    // "1 0": nobody.
    if first > last {
        return Ok(value.to_owned());
    }
    if *last >= map.length {
        let message = format!("the pod's user namespace has ids up to {}", map.length - 1);
        return Err(SpecError::invalid(FIELD, value, message));
    }
    Ok(format!("{} {}", map.host_id + first, map.host_id + last))
}
