use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use k8s_cri::v1::*;

/// A pod's configuration, and its id once it runs.
#[derive(Debug, Clone)]
pub struct Pod {
    /// What RunPodSandbox and CreateContainer are given.
    pub config: PodSandboxConfig,
    /// The id that RunPodSandbox gave.
    pub id: String,
}

/// A pod's configuration as the kubelet makes one: namespaces of its own, a name and uid that nobody else has.
pub fn pod(name: &str) -> PodSandboxConfig {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let uid = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid,
            namespace: "stave-e2e".to_owned(),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A container's configuration: that image, that command, and a log file by its name.
pub fn container(name: &str, image: &str, command: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(ImageSpec { image: image.to_owned(), ..Default::default() }),
        command: command.iter().map(|&word| word.to_owned()).collect(),
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources::default()),
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(namespaces()),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}

/// What the kubelet sends unless the pod says otherwise: network and IPC of the pod, a PID namespace a container.
fn namespaces() -> NamespaceOption {
    NamespaceOption {
        network: NamespaceMode::Pod as i32,
        pid: NamespaceMode::Container as i32,
        ipc: NamespaceMode::Pod as i32,
        ..Default::default()
    }
}

/// A label selector.
pub fn selector(labels: &[(&str, &str)]) -> HashMap<String, String> {
    labels.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect()
}

/// A filter's wish for a state.
pub fn state(state: ContainerState) -> Option<ContainerStateValue> {
    Some(ContainerStateValue { state: state as i32 })
}

/// Short ways to the parts of a configuration that tests change.
pub trait Config: Sized {
    /// The namespace options.
    fn namespaces(&mut self) -> &mut NamespaceOption;

    /// The same configuration after a change.
    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}

impl Config for PodSandboxConfig {
    fn namespaces(&mut self) -> &mut NamespaceOption {
        let linux = self.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().namespace_options.get_or_insert_default()
    }
}

impl Config for ContainerConfig {
    fn namespaces(&mut self) -> &mut NamespaceOption {
        let linux = self.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().namespace_options.get_or_insert_default()
    }
}
