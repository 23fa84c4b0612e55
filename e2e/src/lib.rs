//! Whole-program tests of Stave over its socket: a daemon of its own for each test, a registry with images built
//! from Debian packages, and the CRI client of the k8s-cri crate, which shares no code with ours.
//!
//! The tests are in `tests/e2e`, by behaviour; they run as root. `hack/test` runs them as it should be done; by hand:
//!
//! ```text
//! cargo build -p stave -p stave-pod && cargo test -p stave-e2e restart
//! ```
//!
//! `STAVE_BIN_DIR` names the directory of other builds of `stave` and `stave-pod`. `STAVE_E2E_KEEP=1` leaves the
//! directory of a failed test in place, with the daemon's log. `STAVE_E2E_RUNTIME=/usr/sbin/runc` lets that OCI runtime make the containers of
//! all tests that don't choose one. `STAVE_E2E_PEER_SOCKET` runs the tests against
//! another runtime that is up already, to learn what it does.
//!
//! In a slow machine, as the VM of `hack/vm`: `STAVE_E2E_SLOWNESS` multiplies the time limits, `STAVE_E2E_AT_ONCE` says how many
//! daemons run at once, `STAVE_E2E_REGISTRY` names a registry's storage that holds the images already, and with
//! `STAVE_E2E_SEED` tests hand the image that most of them need to each other.
#![forbid(unsafe_code)]
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test's way to fail is to panic"
)]

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

mod cgroups;
mod chain;
mod client;
mod daemon;
mod leftovers;
mod logs;
mod netns;
mod newer;
mod proxy;
mod registry;
mod requests;
mod seed;
mod slot;
mod tools;

pub use cgroups::{cgroup_directories, make_cgroup, remove_cgroup, systemctl, systemd_driver};
pub use chain::Chain;
pub use client::Cri;
pub use daemon::{Daemon, Options};
pub use leftovers::Leftovers;
pub use logs::{LogLine, parse_log, read_log};
pub use netns::{namespaces_behind, namespaces_without_link};
pub use newer::{newer_client, translate};
pub use proxy::{Fault, Proxy};
pub use registry::{Registry, image, repo_root};
pub use requests::{Config, Pod, container, pod, selector, state};
pub use tools::{Crictl, go_tools};

pub use k8s_cri::v1 as cri;
/// The project's own definition, see [`newer_client`].
pub use stave_cri_proto::v1 as newer_cri;

/// The OCI runtime that makes the containers of tests that don't choose one, `STAVE_E2E_RUNTIME`: not all that the executor
/// does can be asked of one.
pub fn oci_runtime() -> Option<PathBuf> {
    std::env::var_os("STAVE_E2E_RUNTIME").filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// True where that runtime does not say that it knows namespaces of this kind ("time", "user"): pods that want one are refused,
/// as the tests of `oci_runtime` show, and a test that is about nothing else has nothing to test. It says so.
pub fn skipped_without(namespace: &str) -> bool {
    let Some(runtime) = oci_runtime() else { return false };
    let features = std::process::Command::new(&runtime).arg("features").output();
    let features = features.map(|output| output.stdout).unwrap_or_default();
    let features: serde_json::Value = serde_json::from_slice(&features).unwrap_or_default();
    let all = features.pointer("/linux/namespaces").and_then(serde_json::Value::as_array);
    let known = all.is_some_and(|all| all.iter().any(|one| one == namespace));
    if !known {
        eprintln!("SKIPPED: {} names no {namespace} namespaces in its features", runtime.display());
    }
    !known
}

/// How much slower than most this machine is: `STAVE_E2E_SLOWNESS`.
fn slowness() -> u32 {
    static SLOWNESS: OnceLock<u32> = OnceLock::new();
    *SLOWNESS.get_or_init(|| match std::env::var("STAVE_E2E_SLOWNESS") {
        Ok(text) => text.parse().expect("STAVE_E2E_SLOWNESS is a whole number"),
        Err(_) => 1,
    })
}

/// A time limit of a test: `seconds`, times `STAVE_E2E_SLOWNESS` where the machine is that much slower than most.
pub fn limit(seconds: u64) -> Duration {
    Duration::from_secs(seconds) * slowness()
}

/// How long a test waits before it looks again: longer in a slow machine, where to look takes long as well.
pub(crate) fn pause(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds) * slowness().div_ceil(2)
}

/// Waits until `check` gives a value, for ten seconds at most (see [`limit`]); then panics with `what`.
pub async fn eventually<T>(what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let end = std::time::Instant::now() + limit(10);
    loop {
        if let Some(value) = check().await {
            return value;
        }
        assert!(std::time::Instant::now() < end, "waited {:?} in vain: {what}", limit(10));
        tokio::time::sleep(pause(20)).await;
    }
}
