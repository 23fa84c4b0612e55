use std::io;
use std::net::IpAddr;

use crate::Protocol;

/// What can go wrong with the bridge network; the message names the object and the value.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// A setting that can't work.
    #[error("network.bridge.{field} {value:?}: {reason}")]
    Config {
        /// `name` or `subnets`
        field: &'static str,
        /// the value as given
        value: String,
        /// what is wrong with it
        reason: String,
    },
    /// The subnet is in use on this host.
    #[error(
        "subnet {subnet} of bridge {bridge} collides with {with}; choose another in network.bridge.subnets"
    )]
    Collision {
        /// our subnet
        subnet: String,
        /// our bridge
        bridge: String,
        /// the interface or route that has it
        with: String,
    },
    /// Ranges that the kubelet tells can't be used now.
    #[error("ranges {ranges} for pods: {why}")]
    Ranges {
        /// those that it told
        ranges: String,
        /// what is in the way
        why: String,
    },
    /// An interface of that name exists, but is no bridge.
    #[error("interface {name} exists and is not a bridge")]
    NotABridge {
        /// its name
        name: String,
    },
    /// A pod id that can't name an interface and a record.
    #[error("invalid pod id {pod_id:?}: 1 to 128 letters, digits, '-' and '_' are allowed")]
    PodId {
        /// the id as given
        pod_id: String,
    },
    /// The pod has addresses already.
    #[error("pod {pod_id} is attached already")]
    Attached {
        /// the pod
        pod_id: String,
    },
    /// No address is left.
    #[error("no free address in subnet {subnet}: all {size} are leased")]
    Exhausted {
        /// the subnet
        subnet: String,
        /// how many addresses it has for pods
        size: u128,
    },
    /// Another pod has the host port.
    #[error("host port {port}/{protocol}{} of pod {pod_id} is in use by pod {holder}", on(.ip))]
    PortInUse {
        /// the pod that asks
        pod_id: String,
        /// the pod that has it
        holder: String,
        /// the port
        port: u16,
        /// its protocol
        protocol: Protocol,
        /// the host address, if one was asked for
        ip: Option<IpAddr>,
    },
    /// A port mapping that can't work.
    #[error("port mapping {host_port} to {container_port}: {reason}")]
    PortMapping {
        /// port on the host
        host_port: u16,
        /// port in the pod
        container_port: u16,
        /// what is wrong with it
        reason: String,
    },
    /// A netlink request about an interface, address or route failed.
    #[error("{what}: {source}")]
    Netlink {
        /// what was tried
        what: String,
        /// the kernel's answer
        source: io::Error,
    },
    /// An nftables batch failed.
    #[error("nftables table {table}: {what}: {source}")]
    Nft {
        /// our table
        table: String,
        /// what was tried
        what: String,
        /// the kernel's answer
        source: io::Error,
    },
    /// A file of /proc/sys could not be read or written.
    #[error("{call} {path}: {source}")]
    Sysctl {
        /// `read` or `write`
        call: &'static str,
        /// the file
        path: String,
        /// the kernel's answer
        source: io::Error,
    },
    /// A lease could not be stored or removed.
    #[error("network lease: {0}")]
    Lease(#[from] stave_state::StateError),
    /// The network is not as it should be (`Bridge::status`).
    #[error("the bridge network is not ready: {0}")]
    NotReady(String),
    /// A worker thread could not be started or died.
    #[error("network worker: {0}")]
    Worker(String),
}

fn on(ip: &Option<IpAddr>) -> String {
    ip.map(|ip| format!(" on {ip}")).unwrap_or_default()
}

impl NetworkError {
    pub(crate) fn netlink(what: impl Into<String>, error: rtnetlink::Error) -> Self {
        let source = match &error {
            rtnetlink::Error::NetlinkError(message) => message.to_io(),
            other => io::Error::other(other.to_string()),
        };
        Self::Netlink { what: what.into(), source }
    }
}

/// The errno of a failed netlink request.
pub(crate) fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io().raw_os_error(),
        _ => None,
    }
}
