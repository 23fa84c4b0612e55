//! A pod's attachment to the network, as it is kept.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::{Mutex, watch};

use crate::CniError;
use crate::config::Network;

/// Name of the interface in a pod.
pub const INTERFACE: &str = "eth0";

/// What plugins are told of a pod.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Pod {
    /// The pod's id: `CNI_CONTAINERID`.
    pub id: String,
    /// `K8S_POD_NAMESPACE` of `CNI_ARGS`.
    pub namespace: String,
    /// `K8S_POD_NAME`
    pub name: String,
    /// `K8S_POD_UID`
    pub uid: String,
    /// By capability the argument that plugins with this capability get in `runtimeConfig`.
    pub capabilities: Map<String, Value>,
}

impl Pod {
    /// Whether plugins can be told all of it.
    pub fn validate(&self) -> Result<(), CniError> {
        self.args().map(|_| ())
    }

    /// `CNI_ARGS`. Without `IgnoreUnknown` the stock plugins fail on what they don't know.
    fn args(&self) -> Result<String, CniError> {
        let pairs = [
            ("K8S_POD_NAMESPACE", "config.metadata.namespace", &self.namespace),
            ("K8S_POD_NAME", "config.metadata.name", &self.name),
            ("K8S_POD_INFRA_CONTAINER_ID", "id", &self.id),
            ("K8S_POD_UID", "config.metadata.uid", &self.uid),
        ];
        let mut args = "IgnoreUnknown=1".to_owned();
        for (key, field, value) in pairs {
            if value.contains(|c: char| matches!(c, ';' | '=') || c.is_control()) {
                return Err(CniError::Argument {
                    field: field.to_owned(),
                    value: value.clone(),
                    reason: "has a ';', '=' or control character, which CNI_ARGS can't carry".to_owned(),
                });
            }
            args.push_str(&format!(";{key}={value}"));
        }
        Ok(args)
    }
}

/// One command at a time for a pod, as the specification wants it.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    /// Held by ADD, DEL and CHECK.
    pub(crate) busy: Mutex<()>,
    /// DEL has been asked for: it does not wait for a CHECK, and none comes after it.
    pub(crate) leaving: watch::Sender<bool>,
}

/// The record: all that DEL needs, written before the first plugin runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Attachment {
    pub(crate) pod_id: String,
    /// The file that the network namespace is bound to.
    pub(crate) netns: PathBuf,
    pub(crate) interface: String,
    /// `CNI_ARGS`
    pub(crate) args: String,
    pub(crate) capabilities: Map<String, Value>,
    /// The configuration as it was then.
    pub(crate) network: Network,
    /// What the last plugin's ADD answered; none: ADD has not come to its end.
    pub(crate) result: Option<Value>,
    #[serde(skip)]
    pub(crate) turn: Arc<Turn>,
}

impl Attachment {
    pub(crate) fn new(pod: &Pod, netns: PathBuf, network: Network) -> Result<Self, CniError> {
        Ok(Self {
            pod_id: pod.id.clone(),
            netns,
            interface: INTERFACE.to_owned(),
            args: pod.args()?,
            capabilities: pod.capabilities.clone(),
            network,
            result: None,
            turn: Arc::default(),
        })
    }

    /// The environment of ADD, DEL and CHECK. `netns` is empty when the namespace is gone.
    pub(crate) fn environment(&self, netns: &Path) -> Vec<(&'static str, OsString)> {
        vec![
            ("CNI_CONTAINERID", self.pod_id.clone().into()),
            ("CNI_NETNS", netns.into()),
            ("CNI_IFNAME", self.interface.clone().into()),
            ("CNI_ARGS", self.args.clone().into()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_that_would_smuggle_others_are_refused() {
        let pod = Pod {
            id: "i".into(),
            namespace: "ns".into(),
            name: "n".into(),
            uid: "u".into(),
            ..Pod::default()
        };
        assert_eq!(
            pod.args().unwrap(),
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=n;K8S_POD_INFRA_CONTAINER_ID=i;K8S_POD_UID=u"
        );
        for bad in ["a;K8S_POD_NAME=b", "a=b", "a\nb", "\0"] {
            let error = Pod { name: bad.into(), ..pod.clone() }.args().unwrap_err();
            assert!(error.to_string().contains("config.metadata.name"), "{error}");
        }
    }
}
