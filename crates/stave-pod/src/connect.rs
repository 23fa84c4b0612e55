//! TCP connections into the pod's network namespace, which is the supervisor's own, for port-forward.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use stave_supervisor_proto::v1::packet::Body;
use stave_supervisor_proto::v1::{Connect, Connected, Failure};

use crate::calls::Answer;
use crate::connection::ReplyTo;
use crate::event_loop::{EventLoop, Key, Source, Watch};
use crate::failure;
use crate::supervisor::Supervisor;

const MAX_CONNECTS: usize = 1024;
/// For both addresses. On loopback only a listener that does not accept takes time.
const LIMIT: Duration = Duration::from_secs(10);
/// What `localhost` is, in the order that they are tried.
const ADDRESSES: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// A connection that is being made.
#[derive(Debug)]
pub(crate) struct PendingConnect {
    to: ReplyTo,
    port: u16,
    socket: Watch,
    /// Index in [`ADDRESSES`] of the one that is tried.
    tried: usize,
    /// Why the addresses before it did not do.
    refusals: Vec<String>,
    pub(crate) deadline: Instant,
}

/// How far connecting came.
enum Progress {
    Connected(OwnedFd),
    Waiting(Watch),
    Refused(Errno),
}

impl Supervisor {
    /// Starts to connect; the reply follows.
    pub(crate) fn connect(&mut self, to: ReplyTo, call: &Connect) -> Answer {
        let port = u16::try_from(call.port)
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| failure::invalid(format!("port {} is not in 1 to 65535", call.port)))?;
        if !self.pod.is_set_up() {
            return Err(failure::precondition("the pod is not set up"));
        }
        if self.connects.len() >= MAX_CONNECTS {
            return Err(failure::exhausted(format!("{MAX_CONNECTS} connections are being made")));
        }
        self.connect_next(to, port, 0, Vec::new(), Instant::now() + LIMIT)
    }

    /// Tries the addresses from `first` on.
    fn connect_next(
        &mut self,
        to: ReplyTo,
        port: u16,
        first: usize,
        mut refusals: Vec<String>,
        deadline: Instant,
    ) -> Answer {
        for (tried, address) in ADDRESSES.into_iter().enumerate().skip(first) {
            let address = SocketAddr::new(address, port);
            let key = self.next_key();
            match start(&self.events, address, key) {
                Progress::Connected(socket) => {
                    self.reply(to, Body::Connected(Connected {}), Some(socket));
                    return Ok(None);
                }
                Progress::Waiting(socket) => {
                    let pending = PendingConnect { to, port, socket, tried, refusals, deadline };
                    self.connects.insert(key, pending);
                    return Ok(None);
                }
                Progress::Refused(errno) => refusals.push(format!("{address}: {errno}")),
            }
        }
        Err(refused(port, &refusals))
    }

    /// A connection is there, or failed.
    pub(crate) fn connect_ready(&mut self, key: Key) {
        let Some(mut pending) = self.connects.remove(&key) else { return };
        let result = sockopt::socket_error(&pending.socket).unwrap_or_else(Err);
        let answer = match result {
            Ok(()) => match rustix::io::fcntl_dupfd_cloexec(&pending.socket, 3) {
                Ok(socket) => {
                    drop(pending.socket);
                    return self.reply(pending.to, Body::Connected(Connected {}), Some(socket));
                }
                Err(errno) => Err(failure::system("copy the connected socket", errno)),
            },
            Err(errno) => {
                if let Some(address) = ADDRESSES.get(pending.tried) {
                    pending.refusals.push(format!("{}: {errno}", SocketAddr::new(*address, pending.port)));
                }
                let PendingConnect { to, port, tried, refusals, deadline, .. } = pending;
                self.connect_next(to, port, tried + 1, refusals, deadline)
            }
        };
        if let Err(failure) = answer {
            self.reply(pending.to, Body::Failure(failure), None);
        }
    }

    /// Gives up what takes too long.
    pub(crate) fn time_out_connects(&mut self, now: Instant) {
        let due = self.connects.iter().filter(|(_, pending)| pending.deadline <= now);
        for key in due.map(|(key, _)| *key).collect::<Vec<_>>() {
            let Some(mut pending) = self.connects.remove(&key) else { continue };
            pending.refusals.push(format!("nobody accepted within {LIMIT:?}"));
            let failure = refused(pending.port, &pending.refusals);
            self.reply(pending.to, Body::Failure(failure), None);
        }
    }
}

fn refused(port: u16, refusals: &[String]) -> Failure {
    failure::internal(format!("connect to port {port} in the pod: {}", refusals.join(", ")))
}

fn start(events: &EventLoop, address: SocketAddr, key: Key) -> Progress {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = match rustix::net::socket_with(family, SocketType::STREAM, flags, None) {
        Ok(socket) => socket,
        Err(errno) => return Progress::Refused(errno),
    };
    match rustix::net::connect(socket.as_fd(), &address) {
        Ok(()) => Progress::Connected(socket),
        Err(Errno::INPROGRESS | Errno::INTR) => match events.watch_writable(socket, Source::Connect(key)) {
            Ok(watch) => Progress::Waiting(watch),
            Err(errno) => Progress::Refused(errno),
        },
        Err(errno) => Progress::Refused(errno),
    }
}
