//! The daemon's connection.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use prost::Message;
use rustix::event::{PollFd, PollFlags, Timespec};
use stave_supervisor_proto::v1::Packet;
use stave_wire::WireError;

use crate::event_loop::{Key, Watch};

/// Packets and bytes that may wait for a daemon that doesn't read. Past that the connection is
/// closed: replies are lost to it then, exits are told again to the next one.
const MAX_QUEUED: usize = 1024;
const MAX_QUEUED_BYTES: usize = 1 << 20;

/// Where the reply to a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReplyTo {
    /// The connection that asked. Another one gets no reply.
    pub(crate) connection: Key,
    /// The request's number.
    pub(crate) seq: u64,
}

/// Why packets can't be sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// Too much waits for it.
    #[error("the daemon does not read")]
    NotReading,
    /// The socket is of no use any more.
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// One connection, from accept to close.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: Watch,
    /// Tells the connections of a supervisor apart.
    pub(crate) key: Key,
    /// Hello was said and answered.
    pub(crate) greeted: bool,
    queue: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    queued_bytes: usize,
}

impl Connection {
    pub(crate) fn new(socket: Watch, key: Key) -> Self {
        Self { socket, key, greeted: false, queue: VecDeque::new(), queued_bytes: 0 }
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Sends a packet, or queues it. After an error the connection is of no use.
    pub(crate) fn send(&mut self, packet: &Packet, fds: Vec<OwnedFd>) -> Result<(), SendError> {
        let bytes = packet.encode_to_vec();
        if self.queue.is_empty() {
            match send_one(self.socket.as_fd(), &bytes, &fds) {
                Err(WireError::WouldBlock) => {}
                done => return Ok(done?),
            }
            self.set_writable(true)?;
        }
        if self.queue.len() >= MAX_QUEUED || self.queued_bytes + bytes.len() > MAX_QUEUED_BYTES {
            return Err(SendError::NotReading);
        }
        self.queued_bytes += bytes.len();
        self.queue.push_back((bytes, fds));
        Ok(())
    }

    /// Sends what is queued, as far as the socket takes it.
    pub(crate) fn flush(&mut self) -> Result<(), WireError> {
        while let Some((bytes, fds)) = self.queue.front() {
            match send_one(self.socket.as_fd(), bytes, fds) {
                Err(WireError::WouldBlock) => return Ok(()),
                done => done?,
            }
            self.queued_bytes -= bytes.len();
            self.queue.pop_front();
        }
        self.queue = VecDeque::new();
        self.set_writable(false)
    }

    /// Sends all that is queued, waiting for the peer at most `limit`.
    pub(crate) fn flush_within(&mut self, limit: Duration) -> Result<(), SendError> {
        let deadline = Instant::now() + limit;
        while !self.queue.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(SendError::NotReading);
            }
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            // An error of poll shows in the next send.
            let _ = rustix::event::poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], Some(&timeout));
            self.flush()?;
        }
        Ok(())
    }

    fn set_writable(&self, writable: bool) -> Result<(), WireError> {
        self.socket.set_writable(writable).map_err(|errno| WireError::System { what: "epoll_ctl", errno })
    }
}

fn send_one(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[OwnedFd]) -> Result<(), WireError> {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    stave_wire::send(socket, bytes, &fds)
}
