//! Version, Status, RuntimeConfig: what the node is told once, or polls.

use std::collections::HashMap;

use serde_json::{Value, json};
use stave_cri_proto::v1 as cri;
use tonic::Status;

use crate::Services;

/// The kubelet wants this text exactly; it is the version of its own API, not of ours.
const KUBELET_API: &str = "0.1.0";

impl Services {
    pub(crate) fn version(&self) -> cri::VersionResponse {
        cri::VersionResponse {
            version: KUBELET_API.to_owned(),
            runtime_name: "stave".to_owned(),
            runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
            runtime_api_version: "v1".to_owned(),
        }
    }

    pub(crate) async fn node_status(&self, verbose: bool) -> Result<cri::StatusResponse, Status> {
        let condition = |kind: &str, status: Result<(), (&str, String)>| {
            let (reason, message) =
                status.clone().err().map_or((String::new(), String::new()), |(r, m)| (r.into(), m));
            cri::RuntimeCondition { r#type: kind.to_owned(), status: status.is_ok(), reason, message }
        };
        let network = self.0.pods.network().status().await.map_err(|why| ("NetworkNotReady", why));
        let conditions = vec![condition("RuntimeReady", Ok(())), condition("NetworkReady", network)];
        let features = cri::RuntimeHandlerFeatures {
            recursive_read_only_mounts: self.0.features.recursive_read_only,
            user_namespaces: false,
        };
        // The default handler is looked up by "" and by its name.
        let runtime_handlers = std::iter::once("")
            .chain(self.0.pods.handlers().iter().map(String::as_str))
            .map(|name| cri::RuntimeHandler { name: name.to_owned(), features: Some(features) })
            .collect();
        let mut info = HashMap::new();
        if verbose {
            info.insert("config".to_owned(), self.0.config_json.clone());
            info.insert("pulls".to_owned(), self.pulls_json());
            info.insert("jobs".to_owned(), self.jobs_json());
        }
        Ok(cri::StatusResponse {
            status: Some(cri::RuntimeStatus { conditions }),
            info,
            runtime_handlers,
            features: Some(cri::RuntimeFeatures {
                supplemental_groups_policy: true,
                user_namespaces_host_network: false,
            }),
        })
    }

    pub(crate) fn runtime_config(&self) -> cri::RuntimeConfigResponse {
        let driver =
            if self.0.systemd_cgroup { cri::CgroupDriver::Systemd } else { cri::CgroupDriver::Cgroupfs };
        cri::RuntimeConfigResponse {
            linux: Some(cri::LinuxRuntimeConfiguration { cgroup_driver: driver.into() }),
        }
    }

    fn pulls_json(&self) -> String {
        let pulls: Vec<Value> = self
            .0
            .images
            .pulls()
            .iter()
            .map(|pull| {
                let done = pull.layers.iter().filter(|l| l.stage == stave_images::LayerStage::Done).count();
                json!({
                    "reference": pull.reference,
                    "stage": pull.stage,
                    "bytes_done": pull.done,
                    "bytes_total": pull.total,
                    "layers_done": done,
                    "layers_total": pull.layers.len(),
                })
            })
            .collect();
        Value::from(pulls).to_string()
    }

    fn jobs_json(&self) -> String {
        let jobs: Vec<Value> = self
            .0
            .pods
            .jobs()
            .into_iter()
            .map(|(identity, stage, since)| json!({ "job": identity, "stage": stage, "seconds": since.as_secs_f64() }))
            .collect();
        Value::from(jobs).to_string()
    }
}
