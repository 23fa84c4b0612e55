//! Resource classes of the node, which annotations name since the CRI has no field for them. The keys are those that
//! other runtimes take.

use stave_cri_proto::v1::{ContainerConfig, PodSandboxConfig};

use crate::SpecError;

/// A class, and what asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// The annotation, as `pod annotation "…"`.
    pub field: String,
    /// Its value.
    pub name: String,
}

/// The class of block I/O that a container asks for. Errors: a class of cache and memory bandwidth (Intel RDT), of
/// which there are none.
pub(crate) fn block_io(pod: &PodSandboxConfig, config: &ContainerConfig) -> Result<Option<Class>, SpecError> {
    if let Some(Class { field, name }) = class("rdt", pod, config) {
        return Err(SpecError::precondition(field, name, "classes of Intel RDT are not built"));
    }
    Ok(class("blockio", pod, config))
}

/// The container's own, else the pod's for it, else the pod's for all. An empty value is none.
fn class(kind: &str, pod: &PodSandboxConfig, config: &ContainerConfig) -> Option<Class> {
    let name = config.metadata.as_ref().map_or("", |metadata| metadata.name.as_str());
    let of_container = format!("io.kubernetes.cri.{kind}-class");
    let for_container = format!("{kind}.resources.beta.kubernetes.io/container.{name}");
    let for_all = format!("{kind}.resources.beta.kubernetes.io/pod");
    let own = config.annotations.get(&of_container).map(|name| ("annotation", of_container, name));
    let own = own
        .or_else(|| pod.annotations.get(&for_container).map(|name| ("pod annotation", for_container, name)));
    let own = own.or_else(|| pod.annotations.get(&for_all).map(|name| ("pod annotation", for_all, name)));
    own.filter(|(.., name)| !name.is_empty())
        .map(|(whose, key, name)| Class { field: format!("{whose} {key:?}"), name: name.clone() })
}

#[cfg(test)]
mod tests {
    use stave_cri_proto::v1::ContainerMetadata;

    use super::*;

    #[test]
    fn the_nearest_wins() {
        let metadata = Some(ContainerMetadata { name: "main".into(), attempt: 0 });
        let mut config = ContainerConfig { metadata, ..Default::default() };
        let mut pod = PodSandboxConfig::default();
        assert_eq!(block_io(&pod, &config).unwrap(), None);
        let mut set = |key: &str, value: &str| {
            pod.annotations.insert(format!("blockio.resources.beta.kubernetes.io/{key}"), value.into());
            block_io(&pod, &config).unwrap().map(|class| class.name)
        };
        assert_eq!(set("container.other", "x"), None);
        assert_eq!(set("pod", "slow").as_deref(), Some("slow"));
        assert_eq!(set("container.main", "fast").as_deref(), Some("fast"));
        assert_eq!(set("container.main", "").as_deref(), None);
        config.annotations.insert("io.kubernetes.cri.blockio-class".into(), "own".into());
        assert_eq!(block_io(&pod, &config).unwrap().unwrap().name, "own");
        pod.annotations.insert("rdt.resources.beta.kubernetes.io/pod".into(), "gold".into());
        let error = block_io(&pod, &config).unwrap_err();
        assert!(error.field.contains("rdt.resources.beta.kubernetes.io/pod"), "{error}");
    }
}
