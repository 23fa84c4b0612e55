//! The size of a pod's /dev/shm.

use stave_cri_proto::v1 as cri;

use crate::error::{Code, Error, Result};
use crate::quantity::quantity;

/// The CRI has no field for it. This is CRI-O's annotation, on the pod.
const KEY: &str = "io.kubernetes.cri-o.ShmSize";
/// Bytes; what other runtimes give.
const DEFAULT: u64 = 64 << 20;

/// In bytes. Errors: an annotation that is no size, or with the IPC namespace of the node, whose /dev/shm it is then.
pub(crate) fn size(config: &cri::PodSandboxConfig) -> Result<u64> {
    let Some(text) = config.annotations.get(KEY) else { return Ok(DEFAULT) };
    let bad =
        |why: &str| Error::new(Code::InvalidArgument, format!("config.annotations[{KEY:?}] {text:?}: {why}"));
    let options =
        config.linux.as_ref().and_then(|linux| linux.security_context.as_ref()?.namespace_options.as_ref());
    if options.is_some_and(|options| options.ipc() == cri::NamespaceMode::Node) {
        return Err(bad("the pod has the node's IPC namespace, and so the node's /dev/shm"));
    }
    // 0 would be no limit: tmpfs(5).
    quantity(text)
        .filter(|bytes| (1..=i64::MAX as u64).contains(bytes))
        .ok_or_else(|| bad("is no size, such as 128Mi"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sized(text: &str) -> cri::PodSandboxConfig {
        let annotations = [(KEY.to_owned(), text.to_owned())].into();
        cri::PodSandboxConfig { annotations, ..cri::PodSandboxConfig::default() }
    }

    #[test]
    fn sizes_and_what_is_none() {
        assert_eq!(size(&cri::PodSandboxConfig::default()).unwrap(), 64 << 20);
        assert_eq!(size(&sized("128Mi")).unwrap(), 128 << 20);
        for text in ["0", "", "-1Mi", "much", "10E", "64 Mi"] {
            let error = size(&sized(text)).unwrap_err();
            assert_eq!(error.code, Code::InvalidArgument, "{text}");
            assert!(
                error.message.contains(KEY) && error.message.contains(&format!("{text:?}")),
                "{}",
                error.message
            );
        }
        let mut node = sized("1Gi");
        let options = cri::NamespaceOption { ipc: cri::NamespaceMode::Node.into(), ..Default::default() };
        let context =
            cri::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
        node.linux =
            Some(cri::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() });
        assert!(size(&node).unwrap_err().message.contains("IPC namespace"));
    }
}
