//! The socket over which a runtime hands the master of a terminal to its caller (OCI runtimes' --console-socket).

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::{Errno, IoSliceMut};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SocketAddrUnix,
    SocketFlags, SocketType, recvmsg,
};
use stave_supervisor_proto::v1::Failure;

use crate::failure;

/// A listening socket with this name in a directory. The runtime, whose working directory that is, gets the bare
/// name: a whole path could be longer than an address of a socket may be.
pub(super) fn listen(dir: &Path, name: &str) -> Result<OwnedFd, Failure> {
    let make = || -> Result<OwnedFd, Errno> {
        let dir =
            rustix::fs::openat(CWD, dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        let address = SocketAddrUnix::new(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()))?;
        rustix::net::bind(&socket, &address)?;
        rustix::net::listen(&socket, 1)?;
        Ok(socket)
    };
    make().map_err(|errno| failure::system(format!("console socket {name:?}"), errno))
}

/// The terminal's master, once the runtime has done its work: it was sent before that, so nothing is waited for.
pub(super) fn receive(listener: &OwnedFd) -> Result<OwnedFd, Failure> {
    let failed = |what: &'static str| move |errno| failure::system(format!("console socket: {what}"), errno);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::accept_with(listener, flags).map_err(failed("no runtime came"))?;
    let mut buffer = [0_u8; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket.as_fd(),
        &mut [IoSliceMut::new(&mut buffer)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    )
    .map_err(failed("nothing was sent"))?;
    let mut master = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            master = fds.last();
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(failure::internal("console socket: more than one descriptor was sent"));
    }
    let master = master.ok_or_else(|| failure::internal("console socket: no descriptor was sent"))?;
    if !rustix::termios::isatty(&master) {
        return Err(failure::internal("console socket: what was sent is no terminal"));
    }
    Ok(master)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_terminal_will_do() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let listener = listen(&deep, "console.sock").unwrap();
        assert!(receive(&listener).unwrap_err().message.contains("no runtime came"));
        let link = dir.path().join("s");
        std::os::unix::fs::symlink(&deep, &link).unwrap();
        let mut runtime = std::os::unix::net::UnixStream::connect(link.join("console.sock")).unwrap();
        assert!(receive(&listener).unwrap_err().message.contains("nothing was sent"));
        runtime = std::os::unix::net::UnixStream::connect(link.join("console.sock")).unwrap_or(runtime);
        std::io::Write::write_all(&mut runtime, b"/dev/ptmx").unwrap();
        assert!(receive(&listener).unwrap_err().message.contains("no descriptor was sent"));
    }
}
