//! oom_score_adj (proc(5)) of processes.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use stave_supervisor_proto::v1::Process;

use crate::error::{Context, Result};

const STAGE: &str = "oom_score_adj";
const FILE: &str = "/proc/self/oom_score_adj";

/// The calling process's becomes that of `process`. Needs the host's /proc. Allocates nothing.
pub(crate) fn set(process: &Process) -> Result<()> {
    let value = wanted(process);
    let open = OpenOptions::new().write(true).custom_flags(OFlags::CLOEXEC.bits() as i32).open(FILE);
    open.map(OwnedFd::from).and_then(|file| write(&file, value)).at(STAGE, || value.to_string())
}

/// Without a value of its own a process must not keep the supervisor's.
fn wanted(process: &Process) -> i32 {
    process.oom_score_adj.unwrap_or(0)
}

fn write(file: &OwnedFd, value: i32) -> std::io::Result<()> {
    let mut text = [0_u8; 12];
    let mut rest = &mut text[..];
    let _ = write!(rest, "{value}"); // An i32 has at most 11 characters.
    let length = 12 - rest.len();
    match rustix::io::pwrite(file, &text[..length], 0) {
        // Lowering needs CAP_SYS_RESOURCE, which root in a virtual machine or container may lack.
        Ok(_) | Err(Errno::ACCESS | Errno::PERM) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The supervisor's own value while it makes a process, which inherits what is there. To look into the /proc of each new
/// process, which the kernel makes for that and takes away again, costs as much as the clone of the helper.
pub(crate) struct Lent {
    file: OwnedFd,
    own: i32,
}

impl Lent {
    /// The caller's value becomes that of `process`.
    pub(crate) fn set(process: &Process) -> Result<Self> {
        let open = || rustix::fs::open(FILE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        let file = open().at(STAGE, || FILE.to_owned())?;
        let mut text = [0_u8; 16];
        let length = rustix::io::pread(&file, &mut text, 0).at(STAGE, || FILE.to_owned())?;
        let own = std::str::from_utf8(&text[..length]).ok().and_then(|text| text.trim().parse().ok());
        let own = own.ok_or(Errno::INVAL).at(STAGE, || format!("{:?}", &text[..length]))?;
        let lent = Self { file, own };
        let value = wanted(process);
        if value != own {
            write(&lent.file, value).at(STAGE, || value.to_string())?;
        }
        Ok(lent)
    }

    /// The caller's value is its own again.
    pub(crate) fn restore(self) -> Result<()> {
        write(&self.file, self.own).at(STAGE, || self.own.to_string())
    }
}
