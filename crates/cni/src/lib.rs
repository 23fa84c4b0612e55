//! The runtime's side of CNI: finds the administrator's network configuration, runs its plugins, keeps what they
//! answered.
//!
//! - The first usable configuration by name in the directory counts; the directory is watched, and so is what is above it.
//! - What a pod was attached with (configuration, arguments, result) is kept in a record of its own, so that DEL does
//!   not need the file any more, and finds the pod after a crash of the daemon or a reboot.
//! - A pod's network namespace is bound to a file while it is attached: see [`Settings::netns_dir`].
//! - ADD, DEL and CHECK of a pod never run at the same time; a CHECK is killed for DEL.
//! - Plugins are programs that the administrator trusts with the node, but what they print has limits, and a
//!   plugin that hangs is killed with what it started.
//!
//! Source: the CNI specification 0.3.1 to 1.1.0 (SPEC.md, CONVENTIONS.md).
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod attachment;
mod chain;
mod cni;
mod config;
mod directory;
mod error;
mod exec;
mod gc;
mod netns;
mod plugin;
mod ready;
mod result;
mod template;
mod version;
mod watch;

pub use attachment::{INTERFACE, Pod};
pub use cni::{Cni, Settings};
pub use directory::{Inspection, inspect};
pub use error::CniError;
pub use version::Version;

/// For the fuzz target: any bytes as a configuration, as a result of each version, and as a template.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    for list in [true, false] {
        if let Ok(network) = config::Network::parse(data, list) {
            assert!(network.plugins.iter().all(|p| !p.kind().is_empty() && !p.kind().contains('/')));
        }
    }
    for version in version::ALL {
        if let Ok(value) = result::parse(data, *version) {
            let _ = result::addresses(&value, INTERFACE);
        }
    }
    let _ = plugin::supported_versions(data);
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = template::render(text, &["10.1.0.0/24".to_owned(), "fd00::/64".to_owned()]);
    }
}
