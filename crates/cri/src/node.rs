//! Version, Status, RuntimeConfig: what the node is told once, or polls.

use std::collections::HashMap;
use std::net::IpAddr;

use serde_json::{Value, json};
use stave_cri_proto::v1 as cri;
use stave_pods::Handler;
use tonic::Status;

use crate::Services;
use crate::status::pod_error;

/// The kubelet wants this text exactly; it is the version of its own API, not of ours.
const KUBELET_API: &str = "0.1.0";

/// The ranges in a `pod_cidr`: none, one, or one of each family with a comma between.
fn pod_cidrs(text: &str) -> Result<Vec<String>, Status> {
    const FIELD: &str = "runtime_config.network_config.pod_cidr";
    let bad = |why: &str| Status::invalid_argument(format!("{FIELD} {text:?}: {why}"));
    let mut cidrs: Vec<(IpAddr, String)> = Vec::new();
    for cidr in text.split(',').map(str::trim).filter(|cidr| !cidr.is_empty()) {
        let parsed = cidr.split_once('/').and_then(|(ip, prefix)| {
            let ip: IpAddr = ip.parse().ok()?;
            let prefix: u8 = prefix.parse().ok()?;
            (prefix <= if ip.is_ipv4() { 32 } else { 128 }).then_some(ip)
        });
        let ip = parsed.ok_or_else(|| bad("is not of the form ADDRESS/PREFIX[,ADDRESS/PREFIX]"))?;
        if cidrs.iter().any(|(other, _)| other.is_ipv4() == ip.is_ipv4()) {
            return Err(bad("has two ranges of one family"));
        }
        cidrs.push((ip, cidr.to_owned()));
    }
    Ok(cidrs.into_iter().map(|(_, cidr)| cidr).collect())
}

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
        let network = self
            .0
            .pods
            .network()
            .status()
            .await
            .map_err(|why| ("NetworkPluginNotReady", format!("Network plugin returns error: {why}")));
        let conditions = vec![condition("RuntimeReady", Ok(())), condition("NetworkReady", network)];
        let runtimes = self.0.pods.runtimes();
        let listed = |name: &str, handler: &Handler| {
            let features = cri::RuntimeHandlerFeatures {
                recursive_read_only_mounts: self.0.features.recursive_read_only
                    && handler.recursive_read_only(),
                user_namespaces: self.0.features.user_namespaces
                    && self.0.features.idmapped_mounts
                    && handler.joins("user"),
            };
            cri::RuntimeHandler { name: name.to_owned(), features: Some(features) }
        };
        // The default handler is looked up by "" and by its name.
        let mut runtime_handlers: Vec<_> =
            runtimes.find("").map(|handler| listed("", handler)).into_iter().collect();
        runtime_handlers.extend(runtimes.all().iter().map(|handler| listed(&handler.name, handler)));
        let mut info = HashMap::new();
        if verbose {
            info.insert("config".to_owned(), self.0.config_json.clone());
            info.insert("pulls".to_owned(), self.pulls_json());
            info.insert("jobs".to_owned(), self.jobs_json());
            if let Some((config, status)) = self.0.pods.network().cni() {
                info.insert("cniconfig".to_owned(), config.to_string());
                info.insert("lastCNILoadStatus".to_owned(), status.err().unwrap_or_else(|| "OK".to_owned()));
            }
            info.insert("ready_supervisors".to_owned(), self.pool_json());
            let certificate = self.0.streaming.certificate().await;
            let streaming = json!({ "url": self.0.streaming.base_url(), "certificate": certificate });
            info.insert("streaming".to_owned(), streaming.to_string());
            info.insert("runtimes".to_owned(), runtimes.describe().to_string());
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

    /// The kubelet tells the node's pod CIDRs when it has learned them, and again after a restart.
    pub(crate) async fn update_config(&self, request: cri::UpdateRuntimeConfigRequest) -> Result<(), Status> {
        let network = request.runtime_config.and_then(|config| config.network_config).unwrap_or_default();
        let cidrs = pod_cidrs(&network.pod_cidr)?;
        if cidrs.is_empty() {
            return Ok(());
        }
        self.0.pods.set_pod_cidrs(cidrs).await.map_err(pod_error)
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

    fn pool_json(&self) -> String {
        let pool = self.0.pods.pool();
        json!({
            "wanted": pool.size, "ready": pool.ready, "used": pool.used, "missed": pool.missed, "error": pool.error,
        })
        .to_string()
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

#[cfg(test)]
mod tests {
    use super::pod_cidrs;

    #[test]
    fn pod_cidrs_are_one_a_family() {
        assert!(pod_cidrs("").unwrap().is_empty());
        assert_eq!(pod_cidrs("10.1.0.0/24").unwrap(), ["10.1.0.0/24"]);
        assert_eq!(pod_cidrs("10.1.0.0/24, fd00::/64").unwrap(), ["10.1.0.0/24", "fd00::/64"]);
        for bad in ["10.1.0.0", "10.1.0.0/33", "x/8", "10.1.0.0/24,10.2.0.0/24", "10.1.0.0/24;fd00::/64", "/"]
        {
            let error = pod_cidrs(bad).unwrap_err();
            assert_eq!(error.code(), tonic::Code::InvalidArgument, "{bad}");
            assert!(error.message().contains("pod_cidr") && error.message().contains(bad), "{error}");
        }
    }
}
