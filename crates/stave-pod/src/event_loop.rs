//! A safe layer over epoll(7): what is watched is known by name, and is forgotten when it is dropped.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

pub(crate) use rustix::event::epoll::EventFlags;

/// Number of an entry of the supervisor's tables; never used twice.
pub(crate) type Key = u32;

/// Where an event comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// A connection waits to be accepted.
    Listener,
    /// A signal arrived, SIGCHLD above all.
    Signals,
    /// The daemon's connection of this generation.
    Connection(Key),
    /// The pod's init has ended.
    PodInit,
    /// The init of a container has ended.
    ContainerEnd(Key),
    /// The init of a container reports.
    ContainerControl(Key),
    /// Output of a container.
    ContainerStdout(Key),
    /// Error output of a container.
    ContainerStderr(Key),
    /// An exec'd process has ended.
    ExecEnd(Key),
    /// An exec'd process reports.
    ExecControl(Key),
    /// The daemon has closed its end of a copy of an output.
    Sink(Key),
    /// A TCP connection is there, or has failed.
    Connect(Key),
    /// A call of an OCI runtime has ended.
    RuntimeEnd(Key),
    /// An OCI runtime's bundle is ready, or is not.
    RuntimeControl(Key),
    /// An OCI runtime complains.
    RuntimeStderr(Key),
}

impl Source {
    fn encode(self) -> u64 {
        let (kind, key) = match self {
            Self::Listener => (0, 0),
            Self::Signals => (1, 0),
            Self::Connection(key) => (2, key),
            Self::PodInit => (3, 0),
            Self::ContainerEnd(key) => (4, key),
            Self::ContainerControl(key) => (5, key),
            Self::ContainerStdout(key) => (6, key),
            Self::ContainerStderr(key) => (7, key),
            Self::ExecEnd(key) => (8, key),
            Self::ExecControl(key) => (9, key),
            Self::Sink(key) => (10, key),
            Self::Connect(key) => (11, key),
            Self::RuntimeEnd(key) => (40, key),
            Self::RuntimeControl(key) => (41, key),
            Self::RuntimeStderr(key) => (42, key),
        };
        kind << 32 | u64::from(key)
    }

    fn decode(data: u64) -> Option<Self> {
        let key = data as u32;
        Some(match data >> 32 {
            0 => Self::Listener,
            1 => Self::Signals,
            2 => Self::Connection(key),
            3 => Self::PodInit,
            4 => Self::ContainerEnd(key),
            5 => Self::ContainerControl(key),
            6 => Self::ContainerStdout(key),
            7 => Self::ContainerStderr(key),
            8 => Self::ExecEnd(key),
            9 => Self::ExecControl(key),
            10 => Self::Sink(key),
            11 => Self::Connect(key),
            40 => Self::RuntimeEnd(key),
            41 => Self::RuntimeControl(key),
            42 => Self::RuntimeStderr(key),
            _ => return None,
        })
    }
}

/// The events of the whole supervisor.
pub(crate) struct EventLoop {
    epoll: Rc<OwnedFd>,
    events: Vec<epoll::Event>,
}

/// A descriptor that the event loop watches until this is dropped.
///
/// It is taken off the epoll set by hand: closing does not do that while a forked child still has
/// a copy, and a copy in a child that waits would then be reported for ever.
#[derive(Debug)]
pub(crate) struct Watch {
    epoll: Rc<OwnedFd>,
    fd: OwnedFd,
    source: Source,
}

impl EventLoop {
    pub(crate) fn new() -> Result<Self, Errno> {
        let epoll = Rc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        Ok(Self { epoll, events: Vec::with_capacity(32) })
    }

    /// Reports `source` when `fd` is readable or hung up.
    pub(crate) fn watch(&self, fd: OwnedFd, source: Source) -> Result<Watch, Errno> {
        self.add(fd, source, EventFlags::IN)
    }

    /// Reports `source` once when `fd` becomes readable or is hung up, and again after [`Watch::again`]. Such events
    /// come in the order in which their descriptors became readable; those of [`watch`](Self::watch) keep the place in the
    /// queue that they had the last time, before what has come since.
    pub(crate) fn watch_in_order(&self, fd: OwnedFd, source: Source) -> Result<Watch, Errno> {
        self.add(fd, source, EventFlags::IN | EventFlags::ET)
    }

    /// Like [`watch`](Self::watch), on a copy of a descriptor that somebody else owns.
    pub(crate) fn watch_copy(&self, fd: BorrowedFd<'_>, source: Source) -> Result<Watch, Errno> {
        self.watch(rustix::io::fcntl_dupfd_cloexec(fd, 3)?, source)
    }

    /// Reports once that the process of a pidfd has ended. Not again and again: while a debugger
    /// holds it, it can't be reaped yet, and SIGCHLD tells when it can.
    pub(crate) fn watch_end(&self, pidfd: BorrowedFd<'_>, source: Source) -> Result<Watch, Errno> {
        let fd = rustix::io::fcntl_dupfd_cloexec(pidfd, 3)?;
        self.add(fd, source, EventFlags::IN | EventFlags::ET)
    }

    /// Reports that nobody holds the other end any more, and nothing else.
    pub(crate) fn watch_hang_up(&self, fd: OwnedFd, source: Source) -> Result<Watch, Errno> {
        self.add(fd, source, EventFlags::empty())
    }

    /// Reports that `fd` is writable, or has failed.
    pub(crate) fn watch_writable(&self, fd: OwnedFd, source: Source) -> Result<Watch, Errno> {
        self.add(fd, source, EventFlags::OUT)
    }

    fn add(&self, fd: OwnedFd, source: Source, flags: EventFlags) -> Result<Watch, Errno> {
        epoll::add(&self.epoll, &fd, epoll::EventData::new_u64(source.encode()), flags)?;
        Ok(Watch { epoll: Rc::clone(&self.epoll), fd, source })
    }

    /// Waits for events, at most `timeout`; `None` waits without end.
    pub(crate) fn wait(&mut self, timeout: Option<Duration>) -> Result<Vec<(Source, EventFlags)>, Errno> {
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        });
        self.events.clear();
        let spare = rustix::buffer::spare_capacity(&mut self.events);
        match epoll::wait(&self.epoll, spare, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        let known = self.events.iter().filter_map(|event| {
            let (data, flags) = (event.data, event.flags);
            Source::decode(data.u64()).map(|source| (source, flags))
        });
        Ok(known.collect())
    }
}

impl Watch {
    /// Of [`EventLoop::watch_in_order`]: what is there now, or comes, is reported once more.
    pub(crate) fn again(&self) -> Result<(), Errno> {
        let flags = EventFlags::IN | EventFlags::ET;
        epoll::modify(&self.epoll, &self.fd, epoll::EventData::new_u64(self.source.encode()), flags)
    }

    /// Also reports when the descriptor is writable, or no longer.
    pub(crate) fn set_writable(&self, writable: bool) -> Result<(), Errno> {
        let flags = if writable { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
        epoll::modify(&self.epoll, &self.fd, epoll::EventData::new_u64(self.source.encode()), flags)
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = epoll::delete(&self.epoll, &self.fd);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_survive_the_kernel() {
        for source in [
            Source::Listener,
            Source::Signals,
            Source::Connection(u32::MAX),
            Source::PodInit,
            Source::ContainerEnd(1),
            Source::ContainerControl(2),
            Source::ContainerStdout(3),
            Source::ContainerStderr(4),
            Source::ExecEnd(5),
            Source::ExecControl(6),
            Source::Sink(7),
            Source::Connect(8),
            Source::RuntimeEnd(9),
            Source::RuntimeControl(10),
            Source::RuntimeStderr(11),
        ] {
            assert_eq!(Source::decode(source.encode()), Some(source));
        }
        assert_eq!(Source::decode(u64::MAX), None);
    }

    #[test]
    fn what_is_readable_first_is_reported_first() {
        let mut events = EventLoop::new().expect("epoll");
        let now = Some(Duration::ZERO);
        let pipe = |source| {
            let (reader, writer) = rustix::pipe::pipe().expect("pipe");
            (events.watch_in_order(reader, source).expect("watch"), writer)
        };
        let (out, err) = (Source::ContainerStdout(1), Source::ContainerStderr(1));
        let ((out_reader, out_writer), (err_reader, err_writer)) = (pipe(out), pipe(err));
        let write = |pipe: &OwnedFd| assert_eq!(rustix::io::write(pipe, b"x"), Ok(1));
        let read = |watch: &Watch| {
            assert_eq!(rustix::io::read(watch, &mut [0; 1][..]), Ok(1));
            watch.again().expect("again");
        };
        let sources = |events: &mut EventLoop| -> Vec<Source> {
            events.wait(now).expect("wait").into_iter().map(|(source, _)| source).collect()
        };
        write(&out_writer);
        assert_eq!(sources(&mut events), [out]);
        read(&out_reader);
        // Before the next wait.
        write(&err_writer);
        write(&out_writer);
        assert_eq!(sources(&mut events), [err, out]);
        // One byte of two is left, which must not be forgotten.
        write(&err_writer);
        read(&err_reader);
        read(&out_reader);
        assert_eq!(sources(&mut events), [err]);
        read(&err_reader);
        assert!(sources(&mut events).is_empty());
        write(&out_writer);
        drop((out_writer, err_writer));
        assert_eq!(sources(&mut events), [out, err]);
        read(&out_reader);
        assert_eq!(sources(&mut events), [out], "its end, once it is read");
    }

    #[test]
    fn a_dropped_watch_is_silent_though_a_copy_is_open() {
        let mut events = EventLoop::new().expect("epoll");
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        let copy = rustix::io::dup(&reader).expect("dup");
        let watch = events.watch(reader, Source::Signals).expect("watch");
        drop(writer);
        let now = Some(Duration::ZERO);
        assert_eq!(events.wait(now).expect("wait"), [(Source::Signals, EventFlags::HUP)]);
        drop(watch);
        assert!(events.wait(now).expect("wait").is_empty());
        drop(copy);
    }
}
