//! Descriptors on tokio's reactor.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers a descriptor with the running runtime.
///
/// tokio deprecated the safe constructors because a type may change the descriptor under it. An
/// `OwnedFd` can't, so the safe one is sound here, and this crate stays without `unsafe`.
#[allow(deprecated)]
pub(crate) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, interest)
}
