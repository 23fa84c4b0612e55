//! Sending and receiving.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use crate::frame::{self, Frame};
use crate::{MAX_FDS, MAX_INLINE, MAX_PAYLOAD, WireError};

/// The message's own descriptors and the memfd.
const MAX_WIRE_FDS: usize = MAX_FDS + 1;
const SEALS: SealFlags = SealFlags::WRITE.union(SealFlags::GROW).union(SealFlags::SHRINK);

/// A received message.
#[derive(Debug)]
pub struct Message {
    /// At most [`MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
    /// At most [`MAX_FDS`] descriptors, close-on-exec, in the order they were sent.
    pub fds: Vec<OwnedFd>,
}

/// Sends one message, whole or not at all.
pub fn send(socket: BorrowedFd<'_>, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), WireError> {
    if payload.len() > MAX_PAYLOAD {
        return Err(WireError::PayloadTooLarge(payload.len() as u64));
    }
    if fds.len() > MAX_FDS {
        return Err(WireError::TooManyFds(fds.len()));
    }
    if payload.len() <= MAX_INLINE {
        let parts = [IoSlice::new(&frame::INLINE_HEADER), IoSlice::new(payload)];
        return send_packet(socket, &parts, fds);
    }
    let memfd = sealed_memfd(payload)?;
    let mut all = Vec::with_capacity(fds.len() + 1);
    all.extend_from_slice(fds);
    all.push(memfd.as_fd());
    send_packet(socket, &[IoSlice::new(&frame::memfd_header(payload.len()))], &all)
}

fn send_packet(
    socket: BorrowedFd<'_>,
    parts: &[IoSlice<'_>],
    fds: &[BorrowedFd<'_>],
) -> Result<(), WireError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_WIRE_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(WireError::TooManyFds(fds.len()));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    match rustix::io::retry_on_intr(|| rustix::net::sendmsg(socket, parts, &mut control, flags)) {
        Ok(_) => Ok(()), // SOCK_SEQPACKET sends whole packets.
        Err(Errno::AGAIN) => Err(WireError::WouldBlock),
        Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => Err(WireError::Closed),
        Err(errno) => Err(WireError::System { what: "sendmsg", errno }),
    }
}

fn sealed_memfd(payload: &[u8]) -> Result<OwnedFd, WireError> {
    let memfd = rustix::fs::memfd_create(c"stave-message", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(WireError::system("memfd_create"))?;
    let mut done = 0;
    while let Some(rest) = payload.get(done..).filter(|rest| !rest.is_empty()) {
        match rustix::io::retry_on_intr(|| rustix::io::pwrite(&memfd, rest, done as u64)) {
            Ok(0) => return Err(WireError::System { what: "write of a memfd", errno: Errno::IO }),
            Ok(written) => done += written,
            Err(errno) => return Err(WireError::System { what: "write of a memfd", errno }),
        }
    }
    rustix::fs::fcntl_add_seals(&memfd, SEALS).map_err(WireError::system("F_ADD_SEALS"))?;
    Ok(memfd)
}

/// Receives one message. `None`: the peer has closed the connection.
///
/// After any error but [`WireError::WouldBlock`] the connection should be closed.
pub fn recv(socket: BorrowedFd<'_>) -> Result<Option<Message>, WireError> {
    // Ask for the length first, so that the buffer is only as long as the packet.
    let peek = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT;
    let mut nothing = [0u8; 0];
    let mut peek_length = || rustix::io::retry_on_intr(|| rustix::net::recv(socket, &mut nothing, peek));
    let length = match peek_length() {
        // The peer closed with something of ours unread. The kernel says so once, before what the
        // peer had sent: that is read first.
        Err(Errno::CONNRESET) => peek_length(),
        other => other,
    };
    let length = match length {
        Ok((_, length)) => length,
        Err(errno) => return closed_or_error(errno),
    };
    if length == 0 {
        return Ok(None);
    }
    if length > frame::MAX_PACKET {
        return Err(WireError::Truncated("it is longer than any frame"));
    }
    let mut packet = vec![0; length];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_WIRE_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let mut receive = || {
        rustix::io::retry_on_intr(|| {
            rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut packet)], &mut control, flags)
        })
    };
    let received = match receive() {
        Err(Errno::CONNRESET) => receive(), // As above: it may come between the two calls.
        other => other,
    };
    let received = match received {
        Ok(received) => received,
        Err(errno) => return closed_or_error(errno),
    };
    // Taken out before anything is checked, so that they are closed when the packet is refused.
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(WireError::Truncated("descriptors were lost"));
    }
    if received.flags.contains(ReturnFlags::TRUNC) || received.bytes != length {
        return Err(WireError::Truncated("bytes were lost"));
    }
    let payload = match frame::parse(&packet)? {
        Frame::Inline => {
            packet.drain(..1);
            packet
        }
        Frame::Memfd(len) => {
            let memfd = fds.pop().ok_or(WireError::Malformed("the memfd is missing"))?;
            read_memfd(&memfd, len)?
        }
    };
    if fds.len() > MAX_FDS {
        return Err(WireError::TooManyFds(fds.len()));
    }
    Ok(Some(Message { payload, fds }))
}

fn closed_or_error(errno: Errno) -> Result<Option<Message>, WireError> {
    match errno {
        Errno::AGAIN => Err(WireError::WouldBlock),
        Errno::CONNRESET => Ok(None),
        errno => Err(WireError::System { what: "recvmsg", errno }),
    }
}

fn read_memfd(memfd: &OwnedFd, len: usize) -> Result<Vec<u8>, WireError> {
    // Only memfds have seals: a pipe, a socket or a file of a slow file system ends here.
    let seals = rustix::fs::fcntl_get_seals(memfd)
        .map_err(|_| WireError::Malformed("the last descriptor is not a memfd"))?;
    if !seals.contains(SEALS) {
        return Err(WireError::Malformed("the memfd is not sealed"));
    }
    let stat = rustix::fs::fstat(memfd).map_err(WireError::system("fstat of a memfd"))?;
    if stat.st_size != len as i64 {
        return Err(WireError::Malformed("the memfd has another length"));
    }
    let mut payload = vec![0; len];
    let mut done = 0;
    while let Some(rest) = payload.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match rustix::io::retry_on_intr(|| rustix::io::pread(memfd, &mut *rest, done as u64)) {
            Ok(0) => return Err(WireError::Malformed("the memfd is shorter than its length")),
            Ok(read) => done += read,
            Err(errno) => return Err(WireError::System { what: "read of a memfd", errno }),
        }
    }
    Ok(payload)
}
