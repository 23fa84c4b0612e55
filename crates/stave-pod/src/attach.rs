//! Attachments: copies of a container's output for the daemon, and its input.
//!
//! A copy is a pipe of which the daemon has the read end. The container never waits for it: a pipe that is
//! full drops its attachment.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use stave_supervisor_proto::v1::packet::Body;
use stave_supervisor_proto::v1::{Attach, Attached, AttachmentDropped};

use crate::calls::Answer;
use crate::connection::ReplyTo;
use crate::container::Container;
use crate::event_loop::{EventLoop, Key, Source, Watch};
use crate::output::{self, Output};
use crate::report::report;
use crate::supervisor::Supervisor;
use crate::{failure, ids};

/// Attachments to the outputs of one container.
const MAX_ATTACHMENTS: usize = 128;
/// How far a reader may fall behind, in bytes. Memory is taken only for what waits.
const PIPE_SIZE: usize = 1 << 20;

/// The write end of one copy of an output.
#[derive(Debug)]
pub(crate) struct Sink {
    key: Key,
    attach_id: String,
    pipe: Watch,
    /// The reader is gone or too slow.
    broken: Option<Broken>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    Gone,
    Slow,
}

/// All copies of one output.
#[derive(Debug, Default)]
pub(crate) struct Sinks(Vec<Sink>);

impl Sinks {
    /// Writes to all of them, without waiting. True: one of them broke.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> bool {
        for sink in &mut self.0 {
            sink.write(bytes);
        }
        self.0.iter().any(|sink| sink.broken.is_some())
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn has(&self, key: Key) -> bool {
        self.0.iter().any(|sink| sink.key == key)
    }

    /// Drops those whose reader is gone; gives the ids of those that were too slow.
    fn take_broken(&mut self) -> Vec<String> {
        let slow = self.0.iter().filter(|sink| sink.broken == Some(Broken::Slow));
        let slow = slow.map(|sink| sink.attach_id.clone()).collect();
        self.0.retain(|sink| sink.broken.is_none());
        slow
    }

    fn drop_attachment(&mut self, attach_id: &str) {
        self.0.retain(|sink| sink.attach_id != attach_id);
    }

    fn hang_up(&mut self, key: Key) {
        self.0.retain(|sink| sink.key != key);
    }
}

impl Sink {
    fn write(&mut self, mut bytes: &[u8]) {
        while self.broken.is_none() && !bytes.is_empty() {
            match rustix::io::retry_on_intr(|| rustix::io::write(&self.pipe, bytes)) {
                Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
                Err(Errno::AGAIN) => self.broken = Some(Broken::Slow),
                Err(_) => self.broken = Some(Broken::Gone),
            }
        }
    }
}

/// What an attachment hands to the daemon.
#[derive(Default)]
struct Ends {
    attached: Attached,
    fds: Vec<OwnedFd>,
}

impl Supervisor {
    /// Attaches to a running container.
    pub(crate) fn attach(&mut self, to: ReplyTo, call: &Attach) -> Answer {
        ids::check("attach_id", &call.attach_id)?;
        if !(call.stdin || call.stdout || call.stderr) {
            return Err(failure::invalid("none of stdin, stdout and stderr is asked for"));
        }
        let (stdout_key, stderr_key) = (self.next_key(), self.next_key());
        // Not by container_mut: the event loop is needed as well.
        let container =
            self.containers.values_mut().find(|container| container.id == call.container_id).ok_or_else(
                || failure::not_found(format!("container {:?} is not in this pod", call.container_id)),
            )?;
        if !container.is_running() {
            return Err(failure::precondition(format!(
                "container {:?} is {}, not running",
                container.id,
                container.state_name()
            )));
        }
        if container.sinks() + 2 > MAX_ATTACHMENTS * 2 {
            return Err(failure::exhausted(format!(
                "{MAX_ATTACHMENTS} clients are attached to container {:?}",
                container.id
            )));
        }
        let made = attach(&self.events, container, call, stdout_key, stderr_key);
        match made {
            Ok(Ends { attached, fds }) => {
                self.reply(to, Body::Attached(attached), fds);
                Ok(None)
            }
            Err(errno) => {
                for output in [&mut container.stdout, &mut container.stderr].into_iter().flatten() {
                    output.sinks.drop_attachment(&call.attach_id);
                }
                Err(failure::system("make the pipes of the attachment", errno))
            }
        }
    }

    /// The daemon has closed its end of a copy.
    pub(crate) fn sink_hung_up(&mut self, key: Key) {
        for container in self.containers.values_mut() {
            for output in [&mut container.stdout, &mut container.stderr].into_iter().flatten() {
                output.sinks.hang_up(key);
            }
        }
    }

    /// Drops the attachments of a container whose copies broke, and tells of those that were too slow.
    pub(crate) fn drop_broken_sinks(&mut self, key: Key) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let mut slow = Vec::new();
        for output in [&mut container.stdout, &mut container.stderr].into_iter().flatten() {
            slow.extend(output.sinks.take_broken());
        }
        // One that is attached to both outputs may have been too slow for both.
        slow.sort_unstable();
        slow.dedup();
        container.attachments_dropped += slow.len() as u64;
        let container_id = container.id.clone();
        for attach_id in slow {
            let Some(container) = self.containers.get_mut(&key) else { return };
            for output in [&mut container.stdout, &mut container.stderr].into_iter().flatten() {
                output.sinks.drop_attachment(&attach_id);
            }
            report!("container {container_id}: attachment {attach_id} is dropped, since it reads too slowly");
            let dropped = AttachmentDropped { attach_id, container_id: container_id.clone() };
            self.tell(Body::AttachmentDropped(dropped));
        }
    }
}

impl Container {
    /// A copy of one of its outputs has this key.
    pub(crate) fn has_sink(&self, key: Key) -> bool {
        [&self.stdout, &self.stderr].into_iter().flatten().any(|output| output.sinks.has(key))
    }

    fn sinks(&self) -> usize {
        [&self.stdout, &self.stderr].into_iter().flatten().map(|output| output.sinks.len()).sum()
    }
}

fn attach(
    events: &EventLoop,
    container: &mut Container,
    call: &Attach,
    stdout_key: Key,
    stderr_key: Key,
) -> Result<Ends, Errno> {
    let mut ends = Ends::default();
    if container.terminal {
        if let Some(output) = &container.stdout {
            ends.fds.push(rustix::io::fcntl_dupfd_cloexec(output, 3)?);
            ends.attached.terminal = true;
        }
    } else if call.stdin
        && !container.stdin_once
        && let Some(stdin) = &container.stdin
    {
        ends.fds.push(rustix::io::fcntl_dupfd_cloexec(stdin, 3)?);
        ends.attached.stdin = true;
    }
    if call.stdout
        && let Some(output) = &mut container.stdout
    {
        ends.fds.push(add_sink(events, output, stdout_key, &call.attach_id)?);
        ends.attached.stdout = true;
    }
    if call.stderr
        && let Some(output) = &mut container.stderr
    {
        ends.fds.push(add_sink(events, output, stderr_key, &call.attach_id)?);
        ends.attached.stderr = true;
    }
    // Last, since it can't be taken back: given away, so that the input ends with whoever has it, even
    // if that is killed.
    if call.stdin
        && container.stdin_once
        && let Some(stdin) = container.stdin.take()
    {
        ends.fds.insert(0, stdin);
        ends.attached.stdin = true;
    }
    Ok(ends)
}

/// Adds a copy to an output, and gives its read end.
fn add_sink(events: &EventLoop, output: &mut Output, key: Key, attach_id: &str) -> Result<OwnedFd, Errno> {
    let (reader, writer) = output::output_pipe()?;
    output::set_nonblocking(&writer)?;
    // Where the user's limit on pipes refuses, the usual size must do.
    let _ = rustix::pipe::fcntl_setpipe_size(&writer, PIPE_SIZE);
    let pipe = events.watch_hang_up(writer, Source::Sink(key))?;
    output.sinks.0.push(Sink { key, attach_id: attach_id.to_owned(), pipe, broken: None });
    Ok(reader)
}
