//! A pod's interface, made before its pod.

use std::os::fd::OwnedFd;

use rtnetlink::Handle;

use crate::link::{self, Inside, Link};
use crate::{NetworkError, leaving};

/// The host's ends of pods to come; `stv` and the pod's id are those of pods.
pub(crate) const PREFIX: &str = "stvready";

/// A veth pair with one end in the bridge and the other in the network namespace of a pod to come; both are down, and
/// the pod's has no address. It goes with the namespace.
#[derive(Debug)]
pub struct PreparedLink {
    name: String,
    pub(crate) index: u32,
    /// the bridge's when it was made
    pub(crate) mtu: Option<u32>,
    pub(crate) inside: Inside,
}

impl PreparedLink {
    /// False: somebody has deleted it.
    pub fn exists(&self) -> bool {
        leaving::exists(&self.name)
    }
}

/// A name that no other has.
pub(crate) fn new_name() -> Result<String, NetworkError> {
    let mut bytes = [0u8; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| NetworkError::Worker(format!("getrandom: {errno}")))?;
    // An interface's name has 15 bytes at most.
    Ok(format!("{PREFIX}{:07x}", u32::from_ne_bytes(bytes) >> 4))
}

/// Makes the pair, and writes the settings that must be there before the pod's end comes up.
pub(crate) async fn make(
    handle: &Handle,
    bridge: &Link,
    name: &str,
    netns: OwnedFd,
    ipv6: bool,
) -> Result<PreparedLink, NetworkError> {
    link::veth(handle, name, bridge, &netns).await?;
    let made = async {
        let index = link::settle(handle, name).await?;
        Ok(PreparedLink {
            name: name.to_owned(),
            index,
            mtu: bridge.mtu,
            inside: link::enter(netns, ipv6).await?,
        })
    };
    let made: Result<PreparedLink, NetworkError> = made.await;
    if made.is_err()
        && let Ok(Some(found)) = link::find(handle, name).await
        && let Err(error) = link::delete(handle, found.index, name).await
    {
        tracing::warn!(%error, "interface left behind");
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_differ() {
        let (one, two) = (new_name().unwrap(), new_name().unwrap());
        assert!(one.len() == 15 && one.starts_with(PREFIX) && one != two, "{one} {two}");
    }
}
