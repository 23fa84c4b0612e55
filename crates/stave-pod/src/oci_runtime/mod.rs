//! Containers that an OCI runtime makes: its command line is driven instead of the executor.
//!
//! The runtime's processes are children like all others, each with a deadline: nothing here waits for one. What they
//! make is left to us, their subreaper, so a container's init and an exec'd process become children of ours, and from
//! then on differ in nothing from those that the executor made. Signals that must arrive (SIGKILL) go by pidfd and
//! cgroup, and need no runtime.

mod adopt;
mod call;
mod console;
mod container;
mod exec;
mod message;
mod tree;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;

use stave_supervisor_proto::v1::{Identity, OciRuntime};

use crate::output::Early;
use crate::reaper::ExitStatus;

pub(crate) use adopt::Strays;
pub(crate) use call::RuntimeCall;
pub(crate) use tree::kill_tree;

/// What a container of an OCI runtime has beside others.
#[derive(Debug)]
pub(crate) struct OciContainer {
    /// Without the text of config.json.
    runtime: Rc<OciRuntime>,
    bundle: PathBuf,
    /// Known once the bundle is ready.
    identity: Identity,
    umask: Option<u32>,
    /// Where the runtime sends the master of the container's terminal.
    console: Option<OwnedFd>,
    /// What the runtime writes to the container's standard error while it makes it.
    pub(crate) early: Early,
    /// The init has ended while `start` still ran: what that says comes first.
    held_end: Option<(ExitStatus, i64)>,
    deletion: Deletion,
    /// Forget the container once `delete` is done.
    forget: bool,
}

/// Whether the runtime's own state of a container is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deletion {
    /// The container lives, or is being made.
    NotYet,
    /// `delete` runs.
    Running,
    /// There is nothing left.
    Done,
}

impl OciContainer {
    /// The runtime's `delete` has not come to its end.
    pub(crate) fn is_deleting(&self) -> bool {
        self.deletion == Deletion::Running
    }

    /// The end of the init is known, but not yet told.
    pub(crate) fn holds_end(&self) -> bool {
        self.held_end.is_some()
    }

    /// Asks for the container to be forgotten once it is deleted.
    pub(crate) fn forget_later(&mut self) {
        self.forget = true;
    }
}
