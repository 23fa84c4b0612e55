//! Sysctls of a pod's interface. They can't be written with the others, before there is one.

use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::error::{Code, Error, Result};

/// Whether a sysctl, in dotted form, is one interface's: `net.ipv4.conf.eth0.arp_notify`. All that is no good name is not.
pub(crate) fn is_of_interface(key: &str) -> bool {
    let parts: Vec<&str> = key.split('.').collect();
    let is_name = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
    };
    match parts[..] {
        ["net", "ipv4" | "ipv6", "conf" | "neigh", interface, name] => {
            !matches!(interface, "all" | "default" | "lo") && is_name(interface) && is_name(name)
        }
        _ => false,
    }
}

/// Whether a sysctl counts for all interfaces, or for those that are made after it was written:
/// `net.ipv6.conf.all.disable_ipv6`, `net.ipv4.conf.default.rp_filter`. It must be written before the pod's is made.
pub(crate) fn is_of_all_interfaces(key: &str) -> bool {
    matches!(key.split('.').collect::<Vec<_>>()[..], ["net", _, "conf" | "neigh", "all" | "default", ..])
}

/// Writes them in a network namespace.
pub(crate) async fn write(netns: OwnedFd, sysctls: Vec<(String, String)>) -> Result<()> {
    let (send, receive) = tokio::sync::oneshot::channel();
    // A thread of its own that ends here: its network namespace is not that of the process.
    std::thread::Builder::new()
        .name("pod-sysctls".into())
        .spawn(move || {
            // The receiver is gone if the daemon ends.
            let _ = send.send(write_here(&netns, &sysctls));
        })
        .map_err(|e| Error::internal("thread", e))?;
    receive.await.unwrap_or_else(|e| Err(Error::internal("thread", e)))
}

fn write_here(netns: &OwnedFd, sysctls: &[(String, String)]) -> Result<()> {
    move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|e| Error::internal("the pod's network namespace", e))?;
    for (key, value) in sysctls {
        let file =
            std::fs::OpenOptions::new().write(true).open(format!("/proc/sys/{}", key.replace('.', "/")));
        file.and_then(|mut file| file.write_all(value.as_bytes())).map_err(|e| {
            let code = match e.kind() {
                std::io::ErrorKind::NotFound | std::io::ErrorKind::InvalidInput => Code::InvalidArgument,
                _ => Code::Internal,
            };
            Error::new(code, format!("config.linux.sysctls[{key:?}] {value:?}: {e}"))
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_those_of_one_interface() {
        for key in [
            "net.ipv4.conf.eth0.arp_notify",
            "net.ipv6.neigh.eth0.retrans_time_ms",
            "net.ipv4.conf.net1.forwarding",
        ] {
            assert!(is_of_interface(key), "{key}");
        }
        for key in [
            "net.ipv4.conf.all.arp_notify",
            "net.ipv6.conf.default.disable_ipv6",
            "net.ipv4.conf.lo.arp_notify",
            "net.ipv4.ip_forward",
            "net.ipv4.conf.eth0.",
            "net.ipv4.conf..x",
            "net.ipv4.conf.a/b.x",
            "net.ipv4.conf.eth0.x.y",
            "kernel.shmmax",
        ] {
            assert!(!is_of_interface(key), "{key}");
        }
    }

    #[test]
    fn those_that_an_interface_inherits() {
        for key in ["net.ipv6.conf.all.disable_ipv6", "net.ipv4.neigh.default.gc_thresh1"] {
            assert!(is_of_all_interfaces(key), "{key}");
        }
        for key in ["net.ipv4.conf.eth0.arp_notify", "net.ipv4.ip_forward", "net.core.somaxconn", "conf.all"]
        {
            assert!(!is_of_all_interfaces(key), "{key}");
        }
    }
}
