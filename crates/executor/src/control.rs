//! The socket between the supervisor and a process on its way to execve.
//!
//! SEQPACKET. To the supervisor: a byte that tells the kind, then a message; with the pty master as
//! SCM_RIGHTS where there is one. To the process: one byte, go on. Both ends are close-on-exec, so the
//! end of file tells the supervisor that execve succeeded, and the process that its supervisor is gone.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use prost::Message;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, sendmsg, socketpair,
};
use stave_supervisor_proto::v1::failure::Kind;
use stave_supervisor_proto::v1::{ContainerCreated, Failure, Identity};

use crate::Report;
use crate::error::{Context, Error, Result};

const STAGE: &str = "control";
const READY: u8 = b'R';
const STAGED: u8 = b'U';
const FAILED: u8 = b'F';
const STARTED: u8 = b'S';
const GO: &[u8] = b"G";
/// More than the largest report: [`crate::user::MAX_GROUPS`] groups of 5 bytes.
const MAX_REPORT: usize = 64 * 1024;
/// Most descriptors of a packet; the kernel's limit is SCM_MAX_FD, 253.
pub(crate) const FDS_MAX: usize = 64;
/// Longer messages are cut.
const MAX_MESSAGE: usize = 4096;

/// Supervisor's end, process's end.
pub(crate) fn pair() -> Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .at(STAGE, || "socketpair".to_owned())
}

pub(crate) fn send_ready(
    control: BorrowedFd<'_>,
    uid: u32,
    gid: u32,
    groups: &[u32],
    console: Option<BorrowedFd<'_>>,
) -> Result<()> {
    let ready = ContainerCreated { uid, gid, groups: groups.to_vec(), pid: 0 };
    let mut packet = vec![READY];
    packet.extend(ready.encode_to_vec());
    send(control, &packet, console).at(STAGE, || "report".to_owned())
}

/// Hands the process that a helper has cloned over to the supervisor.
pub(crate) fn send_started(control: BorrowedFd<'_>, pid: i32, pidfd: BorrowedFd<'_>) -> Result<()> {
    let [a, b, c, d] = pid.to_ne_bytes();
    send(control, &[STARTED, a, b, c, d], Some(pidfd)).at(STAGE, || "started".to_owned())
}

/// Waits for [`send_started`].
pub(crate) fn receive_started(control: BorrowedFd<'_>) -> Result<(i32, OwnedFd)> {
    let ended = || Error::new(STAGE, Kind::Internal, "the helper that clones the process ended early");
    let (packet, pidfd) = receive(control, RecvFlags::empty())?.ok_or_else(ended)?;
    match (packet.as_slice(), pidfd) {
        ([STARTED, a, b, c, d], Some(pidfd)) => Ok((i32::from_ne_bytes([*a, *b, *c, *d]), pidfd)),
        _ => match parse(&packet, None)? {
            Report::Failed(error) => Err(error),
            _ => Err(ended()),
        },
    }
}

/// Waits for [`send_ready`] of a process that has nothing to tell.
pub(crate) fn wait_ready(control: BorrowedFd<'_>) -> Result<()> {
    let ended = || Error::new(STAGE, Kind::Internal, "a process ended during its set-up");
    let (packet, fd) = receive(control, RecvFlags::empty())?.ok_or_else(ended)?;
    match parse(&packet, fd)? {
        Report::Ready { .. } => Ok(()),
        Report::Failed(error) => Err(error),
        Report::Staged(_) | Report::ExecDone => Err(ended()),
    }
}

/// The bundle of an OCI runtime is ready, and the user known.
pub(crate) fn send_staged(control: BorrowedFd<'_>, identity: &Identity) -> Result<()> {
    let mut packet = vec![STAGED];
    packet.extend(identity.encode_to_vec());
    send(control, &packet, None).at(STAGE, || "report".to_owned())
}

/// Best effort: where nobody listens any more, the exit status has to do.
pub(crate) fn send_failed(control: BorrowedFd<'_>, error: &Error) {
    let mut message = format!("{}\0{}", error.stage, error.message);
    if message.len() > MAX_MESSAGE {
        let cut = (0..=MAX_MESSAGE).rev().find(|i| message.is_char_boundary(*i)).unwrap_or(0);
        message.truncate(cut);
    }
    let failure = Failure { kind: error.kind.into(), message, errno: error.errno, ..Failure::default() };
    let mut packet = vec![FAILED];
    packet.extend(failure.encode_to_vec());
    let _ = send(control, &packet, None);
}

fn send(control: BorrowedFd<'_>, packet: &[u8], fd: Option<BorrowedFd<'_>>) -> rustix::io::Result<()> {
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    send_many(control, packet, &fds)
}

/// Sends a packet with up to [`FDS_MAX`] descriptors. Waits for room.
pub(crate) fn send_many(
    control: BorrowedFd<'_>,
    packet: &[u8],
    fds: &[BorrowedFd<'_>],
) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::NOBUFS);
    }
    rustix::io::retry_on_intr(|| {
        sendmsg(control, &[IoSlice::new(packet)], &mut ancillary, SendFlags::NOSIGNAL)
    })
    .map(drop)
}

/// The next report, if one is there. Never blocks.
pub(crate) fn receive_report(control: BorrowedFd<'_>) -> Result<Option<Report>> {
    match receive(control, RecvFlags::DONTWAIT)? {
        Some((packet, fd)) => parse(&packet, fd).map(Some),
        None => Ok(None),
    }
}

/// A packet (empty: the end) and its descriptor; none when none is there yet.
fn receive(control: BorrowedFd<'_>, flags: RecvFlags) -> Result<Option<(Vec<u8>, Option<OwnedFd>)>> {
    Ok(receive_many(control, flags)?.map(|(packet, fds)| (packet, fds.into_iter().next_back())))
}

/// Waits for the next packet of [`send_many`]; an empty one is the end.
pub(crate) fn wait_many(control: BorrowedFd<'_>) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
    Ok(receive_many(control, RecvFlags::empty())?.unwrap_or_default())
}

fn receive_many(control: BorrowedFd<'_>, flags: RecvFlags) -> Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    // Usually a few bytes: the buffer is only as long as the report.
    let peek = flags | RecvFlags::PEEK | RecvFlags::TRUNC;
    let length = match rustix::io::retry_on_intr(|| recv(control, &mut [0_u8; 0][..], peek)) {
        Ok((_, length)) => length,
        Err(Errno::AGAIN) => return Ok(None),
        // The process ended with our GO unread.
        Err(Errno::CONNRESET) => return Ok(Some((Vec::new(), Vec::new()))),
        Err(e) => return Err(Error::os(STAGE, "recv", e)),
    };
    let mut buffer = vec![0; length.min(MAX_REPORT)];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let received = match rustix::io::retry_on_intr(|| {
        recvmsg(control, &mut [IoSliceMut::new(&mut buffer)], &mut ancillary, flags)
    }) {
        Ok(received) => received,
        Err(Errno::AGAIN) => return Ok(None),
        // The process ended with our GO unread.
        Err(Errno::CONNRESET) => return Ok(Some((Vec::new(), Vec::new()))),
        Err(e) => return Err(Error::os(STAGE, "recvmsg", e)),
    };
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(Error::new(STAGE, Kind::Internal, "report was cut"));
    }
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    buffer.truncate(received.bytes);
    Ok(Some((buffer, fds)))
}

fn parse(packet: &[u8], console: Option<OwnedFd>) -> Result<Report> {
    let Some((tag, body)) = packet.split_first() else {
        return Ok(Report::ExecDone);
    };
    let garbled = |e: prost::DecodeError| Error::new(STAGE, Kind::Internal, format!("garbled report: {e}"));
    match *tag {
        READY => {
            let ContainerCreated { uid, gid, groups, .. } =
                ContainerCreated::decode(body).map_err(garbled)?;
            Ok(Report::Ready { uid, gid, groups, console })
        }
        STAGED => Identity::decode(body).map(Report::Staged).map_err(garbled),
        FAILED => {
            let failure = Failure::decode(body).map_err(garbled)?;
            let kind = failure.kind();
            let (stage, message) = failure.message.split_once('\0').unwrap_or((STAGE, &failure.message));
            Ok(Report::Failed(Error {
                stage: stage.to_owned(),
                message: message.to_owned(),
                errno: failure.errno,
                kind,
            }))
        }
        other => Err(Error::new(STAGE, Kind::Internal, format!("unknown report {other:#x}"))),
    }
}

/// Lets the process go on.
pub(crate) fn send_go(control: BorrowedFd<'_>) -> Result<()> {
    send(control, GO, None).at(STAGE, || "start message".to_owned())
}

/// Waits for [`send_go`]; false when the supervisor is gone.
pub(crate) fn wait_go(control: BorrowedFd<'_>) -> bool {
    let mut byte = [0_u8; 1];
    let received = rustix::io::retry_on_intr(|| rustix::io::read(control.as_fd(), &mut byte));
    received == Ok(1) && byte == GO
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_arrive_whole() {
        let (ours, theirs) = pair().unwrap();
        assert!(receive_report(ours.as_fd()).unwrap().is_none());
        let groups: Vec<u32> = (0..crate::user::MAX_GROUPS as u32).map(|i| u32::MAX - i).collect();
        let null = std::fs::File::open("/dev/null").unwrap();
        send_ready(theirs.as_fd(), 1, 2, &groups, Some(null.as_fd())).unwrap();
        let Some(Report::Ready { uid: 1, gid: 2, groups: got, console: Some(fd) }) =
            receive_report(ours.as_fd()).unwrap()
        else {
            panic!("no report");
        };
        assert_eq!(got, groups);
        assert!(rustix::io::fcntl_getfd(&fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));

        let error = Error::os("mount", "\"/data\": é".repeat(2000), Errno::NOENT).with_kind(Kind::NotFound);
        send_failed(theirs.as_fd(), &error);
        let Some(Report::Failed(got)) = receive_report(ours.as_fd()).unwrap() else { panic!("no report") };
        assert_eq!((got.stage.as_str(), got.errno, got.kind), ("mount", libc::ENOENT, Kind::NotFound));
        assert!(error.message.starts_with(&got.message));

        send_go(ours.as_fd()).unwrap();
        assert!(wait_go(theirs.as_fd()));
        drop(theirs);
        assert!(matches!(receive_report(ours.as_fd()), Ok(Some(Report::ExecDone))));
    }

    #[test]
    fn rubbish_is_an_error_and_a_dead_supervisor_is_noticed() {
        let (ours, theirs) = pair().unwrap();
        for rubbish in [&b"X"[..], b"R\xff\xff\xff", b"F\x0a\xff\xff\xff\xff\x0f"] {
            send(theirs.as_fd(), rubbish, None).unwrap();
            assert!(receive_report(ours.as_fd()).is_err());
        }
        drop(ours);
        assert!(!wait_go(theirs.as_fd()));
    }
}
