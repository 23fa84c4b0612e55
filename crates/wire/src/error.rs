use std::path::PathBuf;

use rustix::io::Errno;

/// Why a message could not be sent or received, or a socket not be made.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The socket's buffer is full (send) or empty (recv).
    #[error("the socket is not ready")]
    WouldBlock,
    /// The peer has closed the connection (send).
    #[error("the peer closed the connection")]
    Closed,
    /// More than [`MAX_PAYLOAD`](crate::MAX_PAYLOAD) bytes.
    #[error("payload of {0} bytes is over the limit of {max}", max = crate::MAX_PAYLOAD)]
    PayloadTooLarge(u64),
    /// More than [`MAX_FDS`](crate::MAX_FDS) descriptors.
    #[error("{0} descriptors are over the limit of {max}", max = crate::MAX_FDS)]
    TooManyFds(usize),
    /// The packet is no frame as the module's header has it.
    #[error("malformed packet: {0}")]
    Malformed(&'static str),
    /// The kernel cut the packet or its descriptors (`MSG_TRUNC`, `MSG_CTRUNC`).
    #[error("the packet was truncated: {0}")]
    Truncated(&'static str),
    /// The process at the other end runs as another user.
    #[error("the peer runs as uid {0}, which may not connect")]
    ForeignPeer(u32),
    /// No socket can have this path.
    #[error("socket path {0:?}: {1}")]
    Path(PathBuf, &'static str),
    /// A system call failed.
    #[error("{what}: {errno}")]
    System {
        /// The call and what it was for.
        what: &'static str,
        /// What the kernel said.
        errno: Errno,
    },
    /// A system call that concerns a path failed.
    #[error("{what} {path:?}: {errno}")]
    SystemAt {
        /// The call and what it was for.
        what: &'static str,
        /// The path as given.
        path: PathBuf,
        /// What the kernel said.
        errno: Errno,
    },
}

impl WireError {
    pub(crate) fn system(what: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::System { what, errno }
    }

    /// The error number, where the kernel said no.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::WouldBlock => Some(Errno::AGAIN.raw_os_error()),
            Self::Closed => Some(Errno::PIPE.raw_os_error()),
            Self::System { errno, .. } | Self::SystemAt { errno, .. } => Some(errno.raw_os_error()),
            _ => None,
        }
    }
}
