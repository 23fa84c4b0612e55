//! SELinux options of a security context, and the labels that come of them.

use stave_cri_proto::v1::{self as cri, SeLinuxOption};
use stave_lsm::selinux::Label;

use crate::{Host, SeLinux, SpecError};

/// The labels of a container, or of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labels {
    /// Of its processes.
    pub process: String,
    /// Of the files that are made in it, and of its mounts.
    pub mount: String,
}

/// The labels of a container; none where SELinux is off. Options that the container leaves out are the pod's (all of
/// them, or none), and then the policy's. `free`: it is privileged or sees the node's processes or its IPC, which the usual
/// type could not use; its processes get the type for that and no categories, unless the options name others. Its files
/// are the pod's all the same.
pub(crate) fn of_container(
    field: &str,
    own: Option<&SeLinuxOption>,
    pod: Option<&cri::LinuxSandboxSecurityContext>,
    free: bool,
    selinux: Option<SeLinux<'_>>,
    host: &dyn Host,
) -> Result<Option<Labels>, SpecError> {
    let own = match own {
        Some(options) if validate(field, options)? => Some(options),
        _ => None,
    };
    let Some(selinux) = selinux else { return Ok(None) };
    let pods = pod.and_then(|pod| pod.selinux_options.as_ref());
    let mut options = own.or(pods).cloned().unwrap_or_default();
    let own_level = !options.level.is_empty();
    if let (false, Some(pods)) = (own_level, pods) {
        options.level.clone_from(&pods.level);
    }
    labels(field, &options, free, own_level, selinux, host).map(Some)
}

/// The labels of what the containers of a pod share: its init; /dev/shm, /etc/hosts and the like.
pub fn pod_labels(
    config: &cri::PodSandboxConfig,
    selinux: SeLinux<'_>,
    host: &dyn Host,
) -> Result<Labels, SpecError> {
    let context = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let options = context.and_then(|context| context.selinux_options.clone()).unwrap_or_default();
    let namespaces = context.and_then(|context| context.namespace_options.as_ref());
    let node = |namespaces: &cri::NamespaceOption| {
        [namespaces.pid(), namespaces.ipc()].contains(&cri::NamespaceMode::Node)
    };
    let free = context.is_some_and(|context| context.privileged) || namespaces.is_some_and(node);
    let own_level = !options.level.is_empty();
    let field = "config.linux.security_context.selinux_options";
    labels(field, &options, free, own_level, selinux, host)
}

/// `own_level`: the level of the options is for processes that are free, too.
fn labels(
    field: &str,
    options: &SeLinuxOption,
    free: bool,
    own_level: bool,
    SeLinux { policy, level }: SeLinux<'_>,
    host: &dyn Host,
) -> Result<Labels, SpecError> {
    let or = |own: &String, other: &str| if own.is_empty() { other.to_owned() } else { own.clone() };
    let level = or(&options.level, level);
    let process = Label {
        user: or(&options.user, &policy.process.user),
        role: or(&options.role, &policy.process.role),
        kind: or(&options.r#type, if free { &policy.privileged } else { &policy.process.kind }),
        level: if free && !own_level { policy.process.level.clone() } else { level.clone() },
    };
    // Files have the role and the type of the policy, whatever the process has.
    let mount = Label { user: or(&options.user, &policy.file.user), level, ..policy.file.clone() };
    Ok(Labels { process: known(field, &process, host)?, mount: known(field, &mount, host)? })
}

/// As the kernel will write it; one that it does not know is refused before anything is made.
fn known(field: &str, label: &Label, host: &dyn Host) -> Result<String, SpecError> {
    let refused = |message: String| SpecError::precondition(field, label, message);
    match host.selinux_label(&label.to_string()) {
        Ok(Some(label)) => Ok(label),
        Ok(None) => Err(refused("is not a label of the node's SELinux policy".to_owned())),
        Err(e) => Err(refused(format!("can't be looked up in the node's SELinux policy: {e}"))),
    }
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
    use std::io;
    use std::path::Path;

    use stave_lsm::selinux::Policy;

    use super::*;
    use crate::{HostDevice, MountPeers};

    /// A policy that lacks `absent_t`, and knows `alias_t` by another name.
    struct Fake;

    impl Host for Fake {
        fn devices(&self, _: &Path) -> io::Result<Vec<HostDevice>> {
            Ok(Vec::new())
        }

        fn all_devices(&self) -> io::Result<Vec<HostDevice>> {
            Ok(Vec::new())
        }

        fn exists(&self, _: &Path) -> io::Result<bool> {
            Ok(false)
        }

        fn apparmor_loaded(&self, _: &str) -> io::Result<bool> {
            Ok(false)
        }

        fn selinux_label(&self, label: &str) -> io::Result<Option<String>> {
            Ok((!label.contains("absent_t")).then(|| label.replace("alias_t", "container_t")))
        }

        fn mount_peers(&self, _: &Path) -> io::Result<MountPeers> {
            Ok(MountPeers::default())
        }
    }

    fn options(kind: &str, level: &str) -> SeLinuxOption {
        SeLinuxOption { r#type: kind.into(), level: level.into(), ..Default::default() }
    }

    #[test]
    fn labels_of_containers() {
        let policy = Policy::default();
        let of = |own: Option<SeLinuxOption>, pod: Option<SeLinuxOption>, free| {
            let pod = cri::LinuxSandboxSecurityContext { selinux_options: pod, ..Default::default() };
            let selinux = SeLinux { policy: &policy, level: "s0:c1,c2" };
            let labels = of_container("f", own.as_ref(), Some(&pod), free, Some(selinux), &Fake);
            let labels = labels.unwrap().unwrap();
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
        assert_eq!(of(None, None, true), want("spc_t:s0", "s0:c1,c2"));
        assert_eq!(of(None, Some(options("", "s0:c5")), true), want("spc_t:s0:c5", "s0:c5"));
        assert_eq!(of(Some(options("own_t", "")), pod(), true), want("own_t:s0", "s0:c5"));
        assert_eq!(of(Some(options("own_t", "s0:c9")), None, true), want("own_t:s0:c9", "s0:c9"));
        let user = SeLinuxOption { user: "u_u".into(), role: "r_r".into(), ..Default::default() };
        let labels = of(Some(user), None, false);
        assert_eq!(labels.0, "u_u:r_r:container_t:s0:c1,c2");
        assert_eq!(labels.1, "u_u:object_r:container_file_t:s0:c1,c2");
        // Where it is off, options are checked and have no effect.
        assert_eq!(of_container("f", Some(&options("own_t", "")), None, false, None, &Fake).unwrap(), None);
        assert_eq!(
            of_container("f", Some(&options("", "x")), None, false, None, &Fake).unwrap_err().field,
            "f.level"
        );
        // As the kernel writes it, and only what it knows.
        assert_eq!(of(Some(options("alias_t", "")), None, false), want("container_t:s0:c1,c2", "s0:c1,c2"));
        let selinux = SeLinux { policy: &policy, level: "s0:c1,c2" };
        let absent = options("absent_t", "");
        let error = of_container("f", Some(&absent), None, false, Some(selinux), &Fake).unwrap_err();
        assert_eq!((error.field.as_str(), error.code), ("f", crate::Code::FailedPrecondition));
        assert!(error.to_string().contains("system_u:system_r:absent_t:s0:c1,c2"), "{error}");
    }

    #[test]
    fn labels_of_pods() {
        let policy = Policy::default();
        let of = |context: cri::LinuxSandboxSecurityContext| {
            let linux = cri::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
            let config = cri::PodSandboxConfig { linux: Some(linux), ..Default::default() };
            pod_labels(&config, SeLinux { policy: &policy, level: "s0:c1,c2" }, &Fake)
        };
        let node = |pid: cri::NamespaceMode, ipc: cri::NamespaceMode| cri::LinuxSandboxSecurityContext {
            namespace_options: Some(cri::NamespaceOption {
                pid: pid as i32,
                ipc: ipc as i32,
                ..Default::default()
            }),
            ..Default::default()
        };
        let usual = of(cri::LinuxSandboxSecurityContext::default()).unwrap();
        assert_eq!(usual.process, "system_u:system_r:container_t:s0:c1,c2");
        assert_eq!(usual.mount, "system_u:object_r:container_file_t:s0:c1,c2");
        use cri::NamespaceMode::{Node, Pod};
        let privileged = cri::LinuxSandboxSecurityContext { privileged: true, ..Default::default() };
        for context in [privileged, node(Node, Pod), node(Pod, Node)] {
            let free = of(context).unwrap();
            assert_eq!(free.process, "system_u:system_r:spc_t:s0");
            assert_eq!(free.mount, usual.mount);
        }
        let selinux_options = Some(options("absent_t", ""));
        let error = of(cri::LinuxSandboxSecurityContext { selinux_options, ..Default::default() });
        assert_eq!(error.unwrap_err().field, "config.linux.security_context.selinux_options");
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
