//! The built-in bridge network: a Linux bridge, a veth pair for each pod, addresses from leases on
//! disk, masquerade and host ports in an nftables table of our own. No program is executed.
//!
//! - The bridge has the first address of each subnet and is the pods' gateway.
//! - The table is `stave-<bridge>` of family inet, replaced as a whole when the bridge is opened. Its forward chain
//!   accepts what goes to and from the bridge, but a drop in another table (a firewall's forward policy, say) still
//!   wins: nftables asks every base chain.
//! - Host ports work from outside, from the host itself, from pods, and on 127.0.0.1; not on `::1`, because
//!   IPv6 has no counterpart of `route_localnet`: the kernel drops answers to `::1` that come from a bridge.
//! - `ip_forward` (and IPv6 `forwarding`) of the host is switched on and stays on.
//!
//! - What others take away (`nft flush ruleset`, a deleted bridge) is put back.
//! - A pod's bandwidth is limited by a token bucket on each end of its veth, and what it sends by a rule on the
//!   host's side, too (a table of that name of family bridge, there as long as a pod or IPv6 needs it).
//! - The MTU is that of the interface with the default route, and follows it; running pods keep theirs.
//!
//! Source: rtnetlink(7), veth(4), the kernel's `networking/ip-sysctl.rst`, `linux/netfilter/nf_tables.h`.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod bandwidth;
mod bridge;
mod connection;
mod conntrack;
mod egress;
mod error;
mod host_ports;
mod keeper;
mod leases;
mod leaving;
mod link;
mod nft;
mod ports;
mod prepared;
mod ranges;
mod resume;
mod rules;
mod status;
mod subnet;
mod sysctl;
mod together;
mod uplink;

pub use bandwidth::Bandwidth;
pub use bridge::{Attachment, Bridge, BridgeConfig, POD_INTERFACE};
pub use error::NetworkError;
pub use ports::{PortMapping, Protocol};
pub use prepared::PreparedLink;
pub use ranges::{BridgeGuard, BridgeNetwork};
