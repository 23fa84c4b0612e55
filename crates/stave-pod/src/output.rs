//! From a container's pipe or terminal to its log.

use std::cell::RefCell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::io::Errno;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};

use crate::attach::Sinks;
use crate::clock;
use crate::event_loop::Watch;
use crate::log_file::LogFile;
use crate::log_lines::{LineSplitter, OutputKind, append_record};
use crate::report::report;

/// Bytes taken from an output at once: all that a pipe holds.
const READ_SIZE: usize = 64 << 10;
/// Records are written when they have grown to this.
const WRITE_SIZE: usize = 64 << 10;

/// Bytes kept of what comes before there is a log.
const MAX_EARLY: usize = 4096;

/// The start of what is written; it outlives the output.
pub(crate) type Early = Rc<RefCell<Vec<u8>>>;

/// Memory that all outputs share, one after the other.
#[derive(Debug)]
pub(crate) struct Buffers {
    input: Vec<u8>,
    records: Vec<u8>,
}

/// One open output of a container.
#[derive(Debug)]
pub(crate) struct Output {
    watch: Watch,
    kind: OutputKind,
    lines: LineSplitter,
    /// Copies for those who are attached.
    pub(crate) sinks: Sinks,
    /// What comes before there is a log, kept for the message of a failure.
    pub(crate) early: Option<Early>,
    /// The other side of a terminal.
    terminal: Option<OwnedFd>,
}

/// What reading an output found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// There were bytes; there may be more.
    Read,
    /// There were bytes, and a copy of them could not be delivered.
    ReadAndBroke,
    /// Nothing now.
    Empty,
    /// Nobody holds the other end.
    Ended,
}

impl Buffers {
    pub(crate) fn new() -> Self {
        Self { input: vec![0; READ_SIZE], records: Vec::new() }
    }
}

impl Output {
    /// `watch` is the nonblocking read end, watched in order.
    pub(crate) fn new(watch: Watch, kind: OutputKind) -> Self {
        let (lines, sinks) = (LineSplitter::default(), Sinks::default());
        Self { watch, kind, lines, sinks, early: None, terminal: None }
    }

    /// `watch` is a terminal's nonblocking master. Its other side is kept open as well, until
    /// [`release_terminal`](Self::release_terminal): a container may close its terminal and open it again, and
    /// what reading the master says between the two is what it says at the end.
    pub(crate) fn of_terminal(watch: Watch) -> Result<Self, Errno> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let terminal = ioctl_tiocgptpeer(&watch, flags)?;
        Ok(Self { terminal: Some(terminal), ..Self::new(watch, OutputKind::Stdout) })
    }

    /// From here on a terminal that nobody else has open is at its end.
    pub(crate) fn release_terminal(&mut self) {
        self.terminal = None;
    }

    /// Reads once and logs what was read. At most a pipe's content, so that the other output has its turn: what comes
    /// first is read first, but bytes of one pipe can't be told from earlier and later ones of the other.
    pub(crate) fn pump(&mut self, log: Option<&mut LogFile>, buffers: &mut Buffers) -> Progress {
        let count = match rustix::io::retry_on_intr(|| rustix::io::read(&self.watch, &mut buffers.input[..]))
        {
            Ok(0) => return Progress::Ended,
            Ok(count) => count,
            Err(Errno::AGAIN) => return Progress::Empty,
            // EIO is how a terminal says that nobody has its other side open.
            Err(_) => return Progress::Ended,
        };
        if let Err(error) = self.watch.again() {
            report!("watch an output of a container: {error}");
            return Progress::Ended;
        }
        if let Some(early) = &self.early {
            let mut early = early.borrow_mut();
            let read = buffers.input.get(..count).unwrap_or_default();
            let room = MAX_EARLY.saturating_sub(early.len());
            early.extend(read.iter().take(room));
        }
        if let Some(log) = log {
            let timestamp = clock::timestamp(clock::unix_nanos());
            let Buffers { input, records } = buffers;
            let kind = self.kind;
            self.lines.push(input.get(..count).unwrap_or_default(), |tag, head, tail| {
                append_record(records, &timestamp, kind, tag, head, tail);
                if records.len() >= WRITE_SIZE {
                    log.append(records);
                    records.clear();
                }
            });
            log.append(records);
            records.clear();
        }
        if self.sinks.write(buffers.input.get(..count).unwrap_or_default()) {
            return Progress::ReadAndBroke;
        }
        Progress::Read
    }

    /// Logs the start of a line that never ended.
    pub(crate) fn finish(mut self, log: Option<&mut LogFile>, buffers: &mut Buffers) {
        if let Some(log) = log {
            let timestamp = clock::timestamp(clock::unix_nanos());
            let Buffers { records, .. } = buffers;
            self.lines
                .finish(|tag, head, tail| append_record(records, &timestamp, self.kind, tag, head, tail));
            log.append(records);
            records.clear();
        }
    }
}

impl AsFd for Output {
    /// Our end: a pipe's read end, or the master of a terminal.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }
}

/// A pipe: our nonblocking end for reading, and the end for a container to write to.
pub(crate) fn output_pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    set_nonblocking(&reader)?;
    Ok((reader, writer))
}

/// A pipe: the end for a container to read from, and our nonblocking end for writing.
pub(crate) fn input_pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    set_nonblocking(&writer)?;
    Ok((reader, writer))
}

/// Makes reads and writes answer `EAGAIN` instead of waiting.
pub(crate) fn set_nonblocking(fd: &OwnedFd) -> Result<(), Errno> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)
}
