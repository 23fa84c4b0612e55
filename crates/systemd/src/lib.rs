//! Units of systemd over D-Bus: the scopes that hold pods.
//!
//! A scope is started with a process in it, and systemd delegates its cgroup to us; it ends by itself when its last
//! process does. Every call here has a deadline over all its steps, waits for systemd's job, and finds its way
//! through a restart of the bus or of systemd (`systemctl daemon-reexec`) meanwhile.
//!
//! Source: org.freedesktop.systemd1(5), systemd.scope(5), systemd's `docs/CGROUP_DELEGATION.md`.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod bus;
mod error;
mod units;

pub use error::SystemdError;
pub use units::{Scope, Systemd, Unit};
