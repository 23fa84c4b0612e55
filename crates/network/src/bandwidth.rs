//! Limits of a pod's traffic, by a token bucket (tc-tbf(8)) on each end of its veth: what comes out of an end is what
//! the other one receives. That takes no classifier, no action and no ifb device, which many kernels have as modules or
//! not at all, and the pod's own end is in the pod's network namespace, out of the node's way. A pod with CAP_NET_ADMIN
//! can take its own bucket away, since it owns that namespace: then a rule on the node's side drops what is too much.

use futures::StreamExt as _;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use rtnetlink::Handle;
use rtnetlink::packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use serde::{Deserialize, Serialize};

use crate::NetworkError;
use crate::nft::Attrs;

/// Bits per second, each way; none: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// to the pod
    pub ingress: Option<u64>,
    /// from the pod
    pub egress: Option<u64>,
}

/// Most that may go at once: what the rate gives in this part of a second, but at least some full packets.
const BURST_PART: u64 = 50;
const BURST: (u64, u64) = (16 << 10, 64 << 20);
/// What may wait, beside that: what the rate gives in this part of a second.
const QUEUE_PART: u64 = 10;
const LEAST_QUEUE: u64 = 16 << 10;

/// `linux/rtnetlink.h` and `linux/pkt_sched.h`.
const TCA_OPTIONS: u16 = 2;
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
const TC_LINKLAYER_ETHERNET: u8 = 1;

/// Limits what an interface sends, in bits per second. A limit that is there is replaced.
pub(crate) async fn limit(
    handle: &Handle,
    index: u32,
    name: &str,
    bits: u64,
    mtu: Option<u32>,
) -> Result<(), NetworkError> {
    let Ok(index) = i32::try_from(index) else {
        return Err(NetworkError::Worker(format!("interface index {index} of {name}")));
    };
    let mut message = TcMessage::with_index(index);
    message.header.parent = TcHandle::ROOT;
    message.attributes.push(TcAttribute::Kind("tbf".to_owned()));
    let options = options(bits, mtu.unwrap_or(1500));
    message.attributes.push(TcAttribute::Other(DefaultNla::new(TCA_OPTIONS, options)));
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewQueueDiscipline(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
    let failed = |error| NetworkError::netlink(format!("limit {name} to {bits} bit/s (tc tbf)"), error);
    let mut answers = handle.clone().request(request).map_err(failed)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload
            && error.code.is_some()
        {
            return Err(failed(rtnetlink::Error::NetlinkError(error)));
        }
    }
    Ok(())
}

/// The attributes of a token bucket.
fn options(bits: u64, mtu: u32) -> Vec<u8> {
    let rate = (bits / 8).max(1);
    // A packet larger than the bucket would never get through.
    let burst = (rate / BURST_PART).clamp(BURST.0.max(2 * u64::from(mtu)), BURST.1);
    let limit = burst + (rate / QUEUE_PART).max(LEAST_QUEUE);
    let word = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_ne_bytes();
    // struct tc_tbf_qopt: two struct tc_ratespec, of which the second, the peak rate, stays 0; then limit, buffer, mtu.
    let mut parameters = vec![0, TC_LINKLAYER_ETHERNET];
    parameters.resize(8, 0);
    parameters.extend(word(rate));
    parameters.resize(24, 0);
    parameters.extend(word(limit));
    parameters.resize(36, 0);
    let mut attributes =
        Attrs::default().bytes(TCA_TBF_PARMS, &parameters).bytes(TCA_TBF_BURST, &word(burst));
    if rate > u64::from(u32::MAX) {
        attributes = attributes.bytes(TCA_TBF_RATE64, &rate.to_ne_bytes());
    }
    attributes.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_always_fits() {
        for (bits, mtu) in [(1_000, 1500), (1_000_000, 65535), (1_000_000_000_000_000, 9000)] {
            let bytes = options(bits, mtu);
            // TCA_TBF_PARMS has 40 bytes with its header; TCA_TBF_BURST follows.
            let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
            assert_eq!(u16::from_ne_bytes([bytes[42], bytes[43]]), TCA_TBF_BURST);
            assert!(word(44) >= 2 * mtu && word(28) > word(44), "{bits} {mtu}");
            assert_eq!(bytes.len() > 48, bits / 8 > u64::from(u32::MAX));
        }
    }
}
