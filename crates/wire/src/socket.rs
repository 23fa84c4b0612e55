//! Listening, connecting, accepting.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::WireError;

const BACKLOG: i32 = 16;

/// Makes a listening socket at `path`, mode 0600. A file that is there already is an error
/// (`EADDRINUSE`): nothing is unlinked.
pub fn listen(path: &Path) -> Result<OwnedFd, WireError> {
    let socket = socket()?;
    // The inode of the socket file takes the mode of the socket (unix(7) has it only between the
    // lines), so that no other user can connect even for a moment.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(WireError::system("fchmod of a socket"))?;
    let short = ShortPath::new(path)?;
    rustix::net::bind(&socket, &short.address).map_err(|errno| WireError::SystemAt {
        what: "bind",
        path: path.into(),
        errno,
    })?;
    rustix::net::listen(&socket, BACKLOG).map_err(|errno| WireError::SystemAt {
        what: "listen",
        path: path.into(),
        errno,
    })?;
    Ok(socket)
}

/// Connects to the socket at `path`. [`WireError::WouldBlock`] when too many connections wait there.
pub fn connect(path: &Path) -> Result<OwnedFd, WireError> {
    let socket = socket()?;
    let short = ShortPath::new(path)?;
    rustix::io::retry_on_intr(|| rustix::net::connect(&socket, &short.address)).map_err(
        |errno| match errno {
            Errno::AGAIN => WireError::WouldBlock,
            errno => WireError::SystemAt { what: "connect", path: path.into(), errno },
        },
    )?;
    Ok(socket)
}

/// Accepts a connection; `None` when none waits. The process that connected must run as our own
/// effective user, which is root outside of tests: [`WireError::ForeignPeer`] otherwise.
pub fn accept(listener: BorrowedFd<'_>) -> Result<Option<OwnedFd>, WireError> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = match rustix::io::retry_on_intr(|| rustix::net::accept_with(listener, flags)) {
        Ok(socket) => socket,
        // The peer left between connect and accept.
        Err(Errno::AGAIN | Errno::CONNABORTED) => return Ok(None),
        Err(errno) => return Err(WireError::System { what: "accept4", errno }),
    };
    let peer = rustix::net::sockopt::socket_peercred(&socket).map_err(WireError::system("SO_PEERCRED"))?.uid;
    if peer != rustix::process::geteuid() {
        return Err(WireError::ForeignPeer(peer.as_raw()));
    }
    Ok(Some(socket))
}

fn socket() -> Result<OwnedFd, WireError> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(WireError::system("socket"))
}

/// An address for a path of any length: `sun_path` has 108 bytes, and the state directory's path
/// may be longer, so the name is resolved from a descriptor of its directory.
struct ShortPath {
    address: SocketAddrUnix,
    _dir: OwnedFd,
}

impl ShortPath {
    fn new(path: &Path) -> Result<Self, WireError> {
        let invalid = |why| WireError::Path(path.into(), why);
        let name = path.file_name().ok_or_else(|| invalid("it names no file"))?;
        let parent = match path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None => return Err(invalid("it names no file")),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(CWD, parent, flags, Mode::empty())
            .map_err(|errno| WireError::SystemAt { what: "open", path: parent.into(), errno })?;
        let short: PathBuf = format!("/proc/self/fd/{}", dir.as_raw_fd()).into();
        let address = SocketAddrUnix::new(short.join(name)).map_err(|_| invalid("the name is too long"))?;
        Ok(Self { address, _dir: dir })
    }
}
