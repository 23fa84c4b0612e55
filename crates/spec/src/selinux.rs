//! SELinux options of a security context, and the labels that come of them.

use stave_cri_proto::v1::{self as cri, SeLinuxOption};
use stave_lsm::selinux::{Label, Policy};

use crate::{SeLinux, SpecError};

/// The labels of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Labels {
    /// Of its processes.
    pub(crate) process: String,
    /// Of the files that are made in it, and of its mounts.
    pub(crate) mount: String,
}

/// The labels of a container; none where SELinux is off. Options that the container leaves out are the pod's (all of
/// them, or none), and then the policy's. A privileged container gets the type for that and no categories, unless it
/// names its own.
pub(crate) fn of_container(
    field: &str,
    own: Option<&SeLinuxOption>,
    pod: Option<&cri::LinuxSandboxSecurityContext>,
    privileged: bool,
    selinux: Option<SeLinux<'_>>,
) -> Result<Option<Labels>, SpecError> {
    let own = match own {
        Some(options) if validate(field, options)? => Some(options),
        _ => None,
    };
    let Some(SeLinux { policy, level }) = selinux else { return Ok(None) };
    let pods = pod.and_then(|pod| pod.selinux_options.as_ref());
    let options = own.or(pods).cloned().unwrap_or_default();
    let level = match (options.level.as_str(), pods.map_or("", |pods| pods.level.as_str())) {
        ("", _) if privileged => &policy.process.level,
        ("", "") => level,
        ("", pods) => pods,
        (own, _) => own,
    };
    let kind = if privileged { &policy.privileged } else { &policy.process.kind };
    let or = |own: &String, other: &String| if own.is_empty() { other.clone() } else { own.clone() };
    let process = Label {
        user: or(&options.user, &policy.process.user),
        role: or(&options.role, &policy.process.role),
        kind: or(&options.r#type, kind),
        level: level.to_owned(),
    };
    Ok(Some(Labels { process: process.to_string(), mount: file_label(policy, &options, level) }))
}

/// Files have the role and the type of the policy, whatever the process has.
fn file_label(policy: &Policy, options: &SeLinuxOption, level: &str) -> String {
    let user = if options.user.is_empty() { policy.file.user.clone() } else { options.user.clone() };
    Label { user, level: level.to_owned(), ..policy.file.clone() }.to_string()
}

/// The label of the files that a pod's containers share: /dev/shm, /etc/hosts and the like.
pub fn mount_label(config: &cri::PodSandboxConfig, selinux: SeLinux<'_>) -> String {
    let context = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let options = context.and_then(|context| context.selinux_options.clone()).unwrap_or_default();
    let level = if options.level.is_empty() { selinux.level } else { &options.level };
    file_label(selinux.policy, &options, level)
}

/// Checks the syntax of SELinux options. True: one of them is set.
pub(crate) fn validate(field: &str, options: &SeLinuxOption) -> Result<bool, SpecError> {
    for (name, value) in [("user", &options.user), ("role", &options.role), ("type", &options.r#type)] {
        if !value.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.' || b == b'-') {
            return Err(SpecError::invalid(format!("{field}.{name}"), value, "is not an SELinux name"));
        }
    }
    if !options.level.is_empty() && !is_level_range(&options.level) {
        let message = "is not an SELinux level, such as \"s0:c1,c2\"";
        return Err(SpecError::invalid(format!("{field}.level"), &options.level, message));
    }
    Ok([&options.user, &options.role, &options.r#type, &options.level].iter().any(|v| !v.is_empty()))
}

/// `level` or `level-level`, with `level` = `sN` or `sN:cN,cN.cN`.
fn is_level_range(text: &str) -> bool {
    text.len() <= 4096 && text.splitn(2, '-').all(is_level)
}

fn is_level(text: &str) -> bool {
    let (sensitivity, categories) = match text.split_once(':') {
        Some((sensitivity, categories)) => (sensitivity, Some(categories)),
        None => (text, None),
    };
    number(sensitivity, 's', 15).is_some()
        && categories.is_none_or(|list| {
            list.split(',').all(|item| match item.split_once('.') {
                Some((low, high)) => {
                    matches!((number(low, 'c', 1023), number(high, 'c', 1023)), (Some(l), Some(h)) if l < h)
                }
                None => number(item, 'c', 1023).is_some(),
            })
        })
}

fn number(text: &str, prefix: char, max: u32) -> Option<u32> {
    let digits = text.strip_prefix(prefix)?;
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok().filter(|n| *n <= max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(kind: &str, level: &str) -> SeLinuxOption {
        SeLinuxOption { r#type: kind.into(), level: level.into(), ..Default::default() }
    }

    #[test]
    fn labels_of_containers() {
        let policy = Policy::default();
        let of = |own: Option<SeLinuxOption>, pod: Option<SeLinuxOption>, privileged| {
            let pod = cri::LinuxSandboxSecurityContext { selinux_options: pod, ..Default::default() };
            let selinux = SeLinux { policy: &policy, level: "s0:c1,c2" };
            let labels =
                of_container("f", own.as_ref(), Some(&pod), privileged, Some(selinux)).unwrap().unwrap();
            (labels.process, labels.mount)
        };
        let want = |process: &str, mount: &str| {
            (format!("system_u:system_r:{process}"), format!("system_u:object_r:container_file_t:{mount}"))
        };
        assert_eq!(of(None, None, false), want("container_t:s0:c1,c2", "s0:c1,c2"));
        assert_eq!(of(Some(options("", "")), None, false), want("container_t:s0:c1,c2", "s0:c1,c2"));
        // All of the pod's, or the container's own.
        let pod = || Some(options("pod_t", "s0:c5"));
        assert_eq!(of(None, pod(), false), want("pod_t:s0:c5", "s0:c5"));
        assert_eq!(of(Some(options("own_t", "")), pod(), false), want("own_t:s0:c5", "s0:c5"));
        assert_eq!(of(Some(options("", "s0:c9")), pod(), false), want("container_t:s0:c9", "s0:c9"));
        assert_eq!(of(None, None, true), want("spc_t:s0", "s0"));
        assert_eq!(of(Some(options("own_t", "s0:c9")), None, true), want("own_t:s0:c9", "s0:c9"));
        let user = SeLinuxOption { user: "u_u".into(), role: "r_r".into(), ..Default::default() };
        let labels = of(Some(user), None, false);
        assert_eq!(labels.0, "u_u:r_r:container_t:s0:c1,c2");
        assert_eq!(labels.1, "u_u:object_r:container_file_t:s0:c1,c2");
        // Where it is off, options are checked and have no effect.
        assert_eq!(of_container("f", Some(&options("own_t", "")), None, false, None).unwrap(), None);
        assert_eq!(
            of_container("f", Some(&options("", "x")), None, false, None).unwrap_err().field,
            "f.level"
        );
        let config = cri::PodSandboxConfig::default();
        let selinux = SeLinux { policy: &policy, level: "s0:c1,c2" };
        assert_eq!(mount_label(&config, selinux), "system_u:object_r:container_file_t:s0:c1,c2");
    }

    #[test]
    fn reads_selinux_levels() {
        for good in ["s0", "s0:c1", "s0:c1,c2", "s0:c0.c1023", "s0-s0:c0.c1023", "s0:c1,c3.c5-s15:c1023"] {
            assert!(is_level_range(good), "{good}");
        }
        for bad in
            ["", "s", "s16", "s0:", "s0:c1024", "s0:c1,", "s0:c2.c1", "c1", "s0-", "s0:c1,c2\n", "s0-s1-s2"]
        {
            assert!(!is_level_range(bad), "{bad:?}");
        }
        let options = SeLinuxOption { r#type: "spc_t;".into(), ..Default::default() };
        assert_eq!(validate("f", &options).unwrap_err().field, "f.type");
        let options = SeLinuxOption { level: "nonsense".into(), ..Default::default() };
        assert_eq!(validate("f", &options).unwrap_err().field, "f.level");
        assert!(!validate("f", &SeLinuxOption::default()).unwrap());
        let options = SeLinuxOption { level: "s0:c1,c2".into(), ..Default::default() };
        assert!(validate("f", &options).unwrap());
    }
}
