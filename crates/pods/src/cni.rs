//! What CNI plugins are told of a pod: from the CRI's terms to CNI's.

use std::net::IpAddr;

use serde_json::{Map, Value, json};
use stave_cni::{CniError, Pod};
use stave_cri_proto::v1 as cri;

use crate::bandwidth::Bandwidth;
use crate::error::{Code, Error, Result};
use crate::host_ports::port_mappings;

/// The hardware address that a pod wants, for plugins with the capability `mac`.
const MAC: &str = "cni.stave/mac";
/// The addresses that it wants, with prefix lengths and commas between, for those with `ips`.
const IPS: &str = "cni.stave/ips";

/// The most that a bucket of the bandwidth plugin holds, in bits: what other runtimes give it.
const BURST: u32 = u32::MAX;

/// A pod as plugins know it.
pub(crate) fn pod(id: &str, config: &cri::PodSandboxConfig) -> Result<Pod> {
    let metadata = config.metadata.clone().unwrap_or_default();
    let pod = Pod {
        id: id.to_owned(),
        namespace: metadata.namespace,
        name: metadata.name,
        uid: metadata.uid,
        capabilities: capabilities(config)?,
    };
    pod.validate().map_err(|e| error(&e))?;
    Ok(pod)
}

/// The names and forms are those of CNI's CONVENTIONS.md.
fn capabilities(config: &cri::PodSandboxConfig) -> Result<Map<String, Value>> {
    let mut all = Map::new();
    all.insert("io.kubernetes.cri.pod-annotations".to_owned(), json!(config.annotations));
    let ports: Vec<_> = port_mappings(config)?
        .iter()
        .map(|port| {
            json!({
                "hostPort": port.host_port,
                "containerPort": port.container_port,
                "protocol": port.protocol.to_string(),
                "hostIP": port.host_ip.map_or_else(String::new, |ip| ip.to_string()),
            })
        })
        .collect();
    if !ports.is_empty() {
        all.insert("portMappings".to_owned(), ports.into());
    }
    let bandwidth = Bandwidth::of(&config.annotations)?;
    if bandwidth != Bandwidth::default() {
        let mut limits = Map::new();
        for (direction, rate) in [("ingress", bandwidth.ingress), ("egress", bandwidth.egress)] {
            if let Some(rate) = rate {
                limits.insert(format!("{direction}Rate"), rate.into());
                limits.insert(format!("{direction}Burst"), BURST.into());
            }
        }
        all.insert("bandwidth".to_owned(), limits.into());
    }
    if let Some(dns) = &config.dns_config {
        let dns = json!({ "servers": dns.servers, "searches": dns.searches, "options": dns.options });
        all.insert("dns".to_owned(), dns);
    }
    let parent = config.linux.as_ref().map_or("", |linux| linux.cgroup_parent.as_str());
    if !parent.is_empty() {
        all.insert("cgroupPath".to_owned(), parent.into());
    }
    let bad = |key: &str, text: &str, why: &str| {
        Error::new(Code::InvalidArgument, format!("config.annotations[{key:?}] {text:?}: {why}"))
    };
    if let Some(text) = config.annotations.get(MAC) {
        let octets: Vec<_> = text.split(':').collect();
        let hex = |octet: &&str| octet.len() == 2 && octet.bytes().all(|b| b.is_ascii_hexdigit());
        if octets.len() != 6 || !octets.iter().all(hex) {
            return Err(bad(MAC, text, "is no hardware address, such as 0a:58:0a:58:00:02"));
        }
        all.insert("mac".to_owned(), text.clone().into());
    }
    if let Some(text) = config.annotations.get(IPS) {
        let ips: Vec<&str> = text.split(',').map(str::trim).collect();
        let good = |ip: &&str| {
            let (ip, prefix) = ip.split_once('/').unwrap_or((ip, "0"));
            let prefix: Option<u8> = prefix.parse().ok();
            ip.parse::<IpAddr>()
                .is_ok_and(|ip| prefix.is_some_and(|p| p <= if ip.is_ipv4() { 32 } else { 128 }))
        };
        if !ips.iter().all(good) {
            return Err(bad(IPS, text, "has something that is no address, such as 10.1.0.5/24"));
        }
        all.insert("ips".to_owned(), ips.into());
    }
    Ok(all)
}

/// Whose fault it is.
pub(crate) fn error(error: &CniError) -> Error {
    let code = match error {
        CniError::Argument { .. } => Code::InvalidArgument,
        CniError::NotReady(_) | CniError::Missing { .. } | CniError::Template { .. } => {
            Code::FailedPrecondition
        }
        CniError::Timeout { .. } => Code::DeadlineExceeded,
        _ => Code::Internal,
    };
    Error::new(code, format!("network: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn config(annotations: &[(&str, &str)]) -> cri::PodSandboxConfig {
        cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: "web".into(),
                uid: "1-2".into(),
                namespace: "default".into(),
                attempt: 0,
            }),
            annotations: annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn capabilities_have_the_conventions_names() {
        let mut config = config(&[
            ("kubernetes.io/ingress-bandwidth", "1M"),
            (MAC, "0a:00:00:00:00:01"),
            (IPS, "10.1.0.5/24, fd00::5"),
        ]);
        config.port_mappings = vec![
            cri::PortMapping {
                container_port: 80,
                host_port: 8080,
                host_ip: "127.0.0.1".into(),
                ..Default::default()
            },
            cri::PortMapping { container_port: 81, ..Default::default() },
        ];
        config.dns_config = Some(cri::DnsConfig { servers: vec!["10.0.0.10".into()], ..Default::default() });
        config.linux =
            Some(cri::LinuxPodSandboxConfig { cgroup_parent: "/kubepods/pod1".into(), ..Default::default() });
        let pod = pod("id", &config).unwrap();
        assert_eq!((pod.name.as_str(), pod.namespace.as_str(), pod.uid.as_str()), ("web", "default", "1-2"));
        let expected = json!({
            "io.kubernetes.cri.pod-annotations": config.annotations,
            "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"}],
            "bandwidth": {"ingressRate": 1_000_000, "ingressBurst": 4_294_967_295u32},
            "dns": {"servers": ["10.0.0.10"], "searches": [], "options": []},
            "cgroupPath": "/kubepods/pod1",
            "mac": "0a:00:00:00:00:01",
            "ips": ["10.1.0.5/24", "fd00::5"],
        });
        assert_eq!(Value::Object(pod.capabilities), expected);
        let plain = cri::PodSandboxConfig { annotations: HashMap::new(), ..self::config(&[]) };
        let capabilities = self::pod("id", &plain).unwrap().capabilities;
        assert_eq!(Value::Object(capabilities), json!({"io.kubernetes.cri.pod-annotations": {}}));
    }

    #[test]
    fn bad_ones_are_refused_by_name() {
        for (key, value) in
            [(MAC, "0a:00"), (MAC, "zz:00:00:00:00:01"), (IPS, "10.0.0.1,"), (IPS, "10.0.0.1/33"), (IPS, "x")]
        {
            let error = pod("id", &config(&[(key, value)])).unwrap_err();
            assert_eq!(error.code, Code::InvalidArgument);
            assert!(error.message.contains(key) && error.message.contains(value), "{error}");
        }
        let mut smuggler = config(&[]);
        smuggler.metadata.as_mut().unwrap().name = "a;K8S_POD_NAMESPACE=kube-system".into();
        let error = pod("id", &smuggler).unwrap_err();
        assert!(
            error.code == Code::InvalidArgument && error.message.contains("config.metadata.name"),
            "{error}"
        );
    }
}
