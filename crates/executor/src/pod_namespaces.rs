//! User and time namespace of a pod. The supervisor is in neither: it holds them by descriptor, and the processes
//! of the pod enter them on their way.
//!
//! A user namespace can't be left again, so a short-lived child makes it, together with the namespaces that it
//! is to own, and the supervisor joins only those: it stays root of the node, with all rights in them.

use std::convert::Infallible;
use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{AtFlags, FileType, Gid, Uid};
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};
use stave_supervisor_proto::v1::failure::Kind;
use stave_supervisor_proto::v1::{self as proto, IdMapping, TimeNamespace};
use stave_sys::{Fork, ForkArgs};

use crate::error::{Context, Error, Result};
use crate::init::{cloned_into_pid_ns, fork_in};
use crate::{control, process};

const STAGE: &str = "namespaces";
/// CLONE_NEWTIME of linux/sched.h.
pub(crate) const NEWTIME: CloneFlags = CloneFlags::from_bits_retain(0x80);
/// Most lines of a map (UID_GID_MAP_MAX_EXTENTS).
const MAPPINGS_MAX: usize = 340;
const NANOS: i64 = 1_000_000_000;

/// The user and time namespaces that the processes of a pod are in; by default the node's.
#[derive(Debug, Default)]
pub struct PodNamespaces {
    pub(crate) user: Option<UserNamespace>,
    pub(crate) time: Option<OwnedFd>,
}

/// Namespaces of a pod that its supervisor is in.
#[derive(Debug, Clone, Copy, Default)]
pub struct OwnNamespaces {
    /// Network.
    pub network: bool,
    /// System V IPC and POSIX message queues.
    pub ipc: bool,
    /// Hostname.
    pub uts: bool,
}

impl OwnNamespaces {
    fn flags(self) -> CloneFlags {
        let mut flags = CloneFlags::empty();
        flags.set(CloneFlags::CLONE_NEWNET, self.network);
        flags.set(CloneFlags::CLONE_NEWIPC, self.ipc);
        flags.set(CloneFlags::CLONE_NEWUTS, self.uts);
        flags
    }
}

impl PodNamespaces {
    /// Makes the namespaces of a pod. The caller, which must be single-threaded, is in those of `own` afterwards;
    /// with a user namespace that one owns them, and all that come later.
    pub fn enter(
        own: OwnNamespaces,
        user: Option<&proto::UserNamespace>,
        time: Option<&TimeNamespace>,
    ) -> Result<PodNamespaces> {
        if let Some(user) = user {
            check(user)?;
        }
        let flags = own.flags();
        if user.is_none() && time.is_none() {
            if !flags.is_empty() {
                unshare(flags).at(STAGE, || format!("unshare {flags:?}"))?;
            }
            return Ok(PodNamespaces::default());
        }
        let made = if user.is_some() { flags | CloneFlags::CLONE_NEWUSER } else { flags };
        let (ours, theirs) = control::pair()?;
        let args = ForkArgs { namespaces: made.bits() as u64, cgroup: None, sibling: false };
        match fork_in(None, &args)? {
            Fork::Child => process::run_child(theirs.as_fd(), || hold(theirs.as_fd(), time.is_some())),
            Fork::Parent { pid, pidfd } => {
                drop(theirs);
                let taken = control::wait_ready(ours.as_fd()).and_then(|()| take(pid, flags, user, time));
                // It waits for this; where something failed, for nothing.
                drop(ours);
                let _ = pidfd_send_signal(&pidfd, Signal::KILL);
                let _ =
                    rustix::io::retry_on_intr(|| waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED));
                taken
            }
        }
    }

    /// Fails where the pod has a user namespace and an OCI runtime has made this process in the node's: its root would be
    /// the node's. `pid` is that of a child which has not been reaped; one that has ended is in none, which is success.
    pub fn check_user_of(&self, pid: i32) -> Result<()> {
        if self.user.is_none() {
            return Ok(());
        }
        let own = inode("/proc/self/ns/user").at(STAGE, || "own user namespace".to_owned())?;
        let path = format!("/proc/{pid}/ns/user");
        match inode(&path) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Ok(()),
            Ok(found) if found == own => {
                let why = "the runtime has put a process into the node's user namespace, not into the pod's";
                Err(Error::new(STAGE, Kind::Internal, why.to_owned()))
            }
            other => other.map(drop).at(STAGE, || path),
        }
    }

    pub(crate) fn user_fd(&self) -> Option<BorrowedFd<'_>> {
        self.user.as_ref().map(UserNamespace::fd)
    }

    pub(crate) fn time_fd(&self) -> Option<BorrowedFd<'_>> {
        self.time.as_ref().map(AsFd::as_fd)
    }

    /// Moves the calling process, and so its children, into the pod's time namespace.
    pub(crate) fn join_time(&self) -> Result<()> {
        let Some(time) = &self.time else { return Ok(()) };
        setns(time, NEWTIME).at(STAGE, || "setns time namespace".to_owned())
    }
}

/// The number of a namespace, given by its file in /proc.
fn inode(path: &str) -> std::io::Result<u64> {
    std::fs::metadata(path).map(|file| std::os::unix::fs::MetadataExt::ino(&file))
}

/// The child that makes the namespaces; it ends with its parent's descriptor.
fn hold(control: BorrowedFd<'_>, time: bool) -> Result<Infallible> {
    process::isolate(None, &[control])?;
    if time {
        unshare(NEWTIME).map_err(|e| {
            let unknown = e == nix::errno::Errno::EINVAL;
            let error = Error::os(STAGE, "unshare time namespace", e);
            if unknown { error.with_kind(Kind::FailedPrecondition) } else { error }
        })?;
    }
    control::send_ready(control, 0, 0, &[], None)?;
    control::wait_go(control);
    stave_sys::exit_now(0)
}

/// Writes maps and offsets, takes the namespaces of the child, and enters those that are the caller's too.
fn take(
    pid: i32,
    flags: CloneFlags,
    user: Option<&proto::UserNamespace>,
    time: Option<&TimeNamespace>,
) -> Result<PodNamespaces> {
    // Ours until we wait for it, so the number can't be another process.
    let proc = |name: &str| format!("/proc/{pid}/{name}");
    let open = |name: &str| File::open(proc(name)).map(OwnedFd::from).at(STAGE, || proc(name));
    let mut namespaces = PodNamespaces::default();
    if let Some(user) = user {
        for (file, maps) in [("uid_map", &user.uids), ("gid_map", &user.gids)] {
            // All lines in one write (user_namespaces(7)).
            let text: String = maps
                .iter()
                .map(|map| format!("{} {} {}\n", map.container_id, map.host_id, map.length))
                .collect();
            fs::write(proc(file), &text).map_err(|e| {
                let invalid = e.raw_os_error() == Some(libc::EINVAL);
                let error = Error::os(STAGE, format!("{file} {text:?}"), e);
                if invalid { error.with_kind(Kind::InvalidArgument) } else { error }
            })?;
        }
        let id = |maps| {
            host_id(maps, 0).ok_or_else(|| Error::invalid(STAGE, "the container's id 0 is not mapped"))
        };
        let root = (Uid::from_raw(id(&user.uids)?), Gid::from_raw(id(&user.gids)?));
        namespaces.user = Some(UserNamespace { fd: open("ns/user")?, root });
    }
    if let Some(time) = time {
        // Before the first process is in it: then they can't be changed any more.
        let text = offsets(time);
        fs::write(proc("timens_offsets"), &text).map_err(|e| {
            let out_of_range = e.raw_os_error() == Some(libc::ERANGE);
            let error = Error::os(STAGE, format!("offsets of the clocks {text:?}"), e);
            if out_of_range { error.with_kind(Kind::InvalidArgument) } else { error }
        })?;
        namespaces.time = Some(open("ns/time_for_children")?);
    }
    for (flag, name) in [
        (CloneFlags::CLONE_NEWNET, "ns/net"),
        (CloneFlags::CLONE_NEWIPC, "ns/ipc"),
        (CloneFlags::CLONE_NEWUTS, "ns/uts"),
    ] {
        if flags.contains(flag) {
            setns(open(name)?, flag).at(STAGE, || format!("setns {name}"))?;
        }
    }
    Ok(namespaces)
}

/// Lines of /proc/PID/timens_offsets: clock, seconds, nanoseconds (time_namespaces(7)).
fn offsets(time: &TimeNamespace) -> String {
    let line = |clock: &str, ns: i64| format!("{clock} {} {}\n", ns.div_euclid(NANOS), ns.rem_euclid(NANOS));
    line("monotonic", time.monotonic) + &line("boottime", time.boottime)
}

fn check(user: &proto::UserNamespace) -> Result<()> {
    for (name, maps) in [("uids", &user.uids), ("gids", &user.gids)] {
        let invalid = |why: &str| Err(Error::invalid(STAGE, format!("user_namespace.{name}: {why}")));
        if maps.is_empty() || maps.len() > MAPPINGS_MAX {
            return invalid(&format!("{} mappings are not 1 to {MAPPINGS_MAX}", maps.len()));
        }
        let overflows = |first: u32, map: &IdMapping| first.checked_add(map.length).is_none();
        if maps.iter().any(|m| m.length == 0 || overflows(m.host_id, m) || overflows(m.container_id, m)) {
            return invalid("a mapping is empty, or goes beyond the last id");
        }
        if maps.iter().any(|map| map.host_id == 0) {
            return invalid("the node's id 0 can't be mapped");
        }
        if host_id(maps, 0).is_none() {
            return invalid("the container's id 0 is not mapped");
        }
    }
    Ok(())
}

/// A user namespace, and what the ids of its root are on the node.
#[derive(Debug)]
pub(crate) struct UserNamespace {
    fd: OwnedFd,
    root: (Uid, Gid),
}

impl UserNamespace {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The node's ids of root inside.
    pub(crate) fn root(&self) -> (Uid, Gid) {
        self.root
    }

    /// Gives the caller's pipes to root inside: whoever opens /dev/stdout anew needs rights on the pipe, which the
    /// node's root owns, and that one does not exist in the namespace.
    pub(crate) fn own_pipes(&self) -> Result<()> {
        let (uid, gid) = self.root;
        for fd in [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()] {
            let stat = rustix::fs::fstat(fd).at("stdio", || "fstat".to_owned())?;
            // Nothing else: the null device is the host's.
            if FileType::from_raw_mode(stat.st_mode) == FileType::Fifo {
                let flags = AtFlags::EMPTY_PATH;
                rustix::fs::chownat(fd, "", Some(uid), Some(gid), flags)
                    .at("stdio", || format!("chown to {}", uid.as_raw()))?;
            }
        }
        Ok(())
    }

    /// Makes the calling process root of the namespace, with all capabilities in it and none outside.
    pub(crate) fn enter(&self) -> Result<()> {
        setns(&self.fd, CloneFlags::CLONE_NEWUSER).at(STAGE, || "setns user namespace".to_owned())?;
        become_root()
    }
}

/// In a user namespace just joined: from the ids outside, which it does not know, to those of its root.
pub(crate) fn become_root() -> Result<()> {
    let (uid, gid) = (Uid::ROOT, Gid::ROOT);
    rustix::thread::set_thread_groups(&[]).at(STAGE, || "setgroups".to_owned())?;
    rustix::thread::set_thread_res_gid(gid, gid, gid).at(STAGE, || "setresgid 0".to_owned())?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).at(STAGE, || "setresuid 0".to_owned())?;
    // A change of ids resets it to the system's fs.suid_dumpable.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .at(STAGE, || "not dumpable".to_owned())
}

fn host_id(maps: &[IdMapping], id: u32) -> Option<u32> {
    maps.iter().find_map(|map| {
        let offset = id.checked_sub(map.container_id).filter(|offset| *offset < map.length)?;
        map.host_id.checked_add(offset)
    })
}

/// Clones a process into a user namespace, as a child of the caller, and waits for the helper that does it:
/// `prepare` runs in that one with the rights of the node's root, then it becomes root of the namespace and
/// clones. So the namespaces that are made with the process belong to the user namespace, and the process
/// never has more rights than in there. It borrows what was prepared, since it closes descriptors that it does not own.
pub(crate) fn fork_inside<T>(
    user: &UserNamespace,
    cgroup: Option<BorrowedFd<'_>>,
    namespaces: CloneFlags,
    control: BorrowedFd<'_>,
    prepare: impl FnOnce(BorrowedFd<'_>) -> Result<T>,
    body: impl FnOnce(&T) -> Result<Infallible>,
) -> Result<(i32, OwnedFd)> {
    let (handover, helpers) = control::pair()?;
    match fork_in(None, &ForkArgs { namespaces: 0, cgroup, sibling: false })? {
        Fork::Child => process::run_child(helpers.as_fd(), || {
            let prepared = prepare(helpers.as_fd())?;
            user.enter()?;
            let args = ForkArgs { namespaces: namespaces.bits() as u64, cgroup: None, sibling: true };
            match stave_sys::fork(&args).map_err(cloned_into_pid_ns)? {
                Fork::Parent { pid, pidfd } => {
                    control::send_started(helpers.as_fd(), pid, pidfd.as_fd())?;
                    stave_sys::exit_now(0)
                }
                Fork::Child => process::run_child(control, || body(&prepared)),
            }
        }),
        Fork::Parent { pidfd: helper, .. } => {
            drop(helpers);
            let started = control::receive_started(handover.as_fd());
            rustix::io::retry_on_intr(|| waitid(WaitId::PidFd(helper.as_fd()), WaitIdOptions::EXITED))
                .at("clone", || "wait for the helper".to_owned())?;
            started
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(container_id: u32, host_id: u32, length: u32) -> IdMapping {
        IdMapping { container_id, host_id, length }
    }

    #[test]
    fn ids_are_mapped() {
        let maps = [map(0, 65536, 1000), map(2000, 200_000, 10)];
        assert_eq!(host_id(&maps, 0), Some(65536));
        assert_eq!(host_id(&maps, 999), Some(66535));
        assert_eq!(host_id(&maps, 1000), None);
        assert_eq!(host_id(&maps, 2009), Some(200_009));
    }

    #[test]
    fn bad_maps_are_refused() {
        let with = |maps: Vec<IdMapping>| proto::UserNamespace { uids: maps.clone(), gids: maps };
        check(&with(vec![map(0, 1000, 65536)])).unwrap();
        for bad in [
            vec![],
            vec![map(0, 1000, 0)],
            vec![map(1, 1000, 10)],
            vec![map(0, 0, 10)],
            vec![map(0, u32::MAX, 2)],
            vec![map(0, 1, 1); 341],
        ] {
            assert!(check(&with(bad.clone())).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn offsets_have_positive_nanoseconds() {
        let text = offsets(&TimeNamespace { boottime: -1, monotonic: 3_600_000_000_001 });
        assert_eq!(text, "monotonic 3600 1\nboottime -1 999999999\n");
    }
}
