//! Device nodes and links under /dev.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dev, FileType, Gid, Mode, OFlags, Uid, major, makedev, minor};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use stave_paths::Root;
use stave_supervisor_proto::v1::device::Kind;
use stave_supervisor_proto::v1::mount::Kind as MountKind;
use stave_supervisor_proto::v1::{Device, Plan};

use crate::error::{Context, Error, Result};
use crate::mounts::attach;

const STAGE: &str = "device";

/// Links that programs expect in /dev (OCI runtime specification, Linux, "Dev symbolic links").
const LINKS: [(&str, &str); 6] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
    ("ptmx", "pts/ptmx"),
];

pub(crate) fn validate(devices: &[Device]) -> Result<()> {
    for device in devices {
        let components = Path::new(&device.path).components();
        if !device.path.starts_with('/') || components.count() < 2 || device.path.ends_with('/') {
            return Err(Error::invalid(STAGE, format!("{:?} is not an absolute path", device.path)));
        }
    }
    Ok(())
}

/// Makes the devices of the plan, and the usual links. Where /dev is a directory of the host or of an image nothing is
/// made in it. `nodes`: those that were made outside, by their place in the plan.
pub(crate) fn make_all(root: &Root, plan: &Plan, nodes: Vec<(usize, OwnedFd)>) -> Result<()> {
    let dev = Path::new("/dev");
    let dev_is_bound = plan.mounts.iter().any(|mount| {
        matches!(mount.kind(), MountKind::Bind | MountKind::Image) && Path::new(&mount.destination) == dev
    });
    for (index, device) in plan.devices.iter().enumerate() {
        if dev_is_bound && Path::new(&device.path).starts_with(dev) {
            continue;
        }
        match nodes.iter().find(|(of, _)| *of == index) {
            Some((_, node)) => bind(root, device, node)?,
            None => make(root, device)?,
        }
    }
    if dev_is_bound { Ok(()) } else { make_links(root) }
}

fn bind(root: &Root, device: &Device, node: &OwnedFd) -> Result<()> {
    let what = || format!("{:?}", device.path);
    let target = root.make_file(Path::new(&device.path)).map_err(|e| Error::path(STAGE, what(), &e))?;
    attach(node.as_fd(), target.as_fd()).at(STAGE, what)
}

fn make(root: &Root, device: &Device) -> Result<()> {
    let path = Path::new(&device.path);
    let what = || format!("{:?}", device.path);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::invalid(STAGE, what()));
    };
    let parent =
        root.make_dir_all(parent, Mode::from_raw_mode(0o755)).map_err(|e| Error::path(STAGE, what(), &e))?;
    let (kind, number) = match device.kind() {
        Kind::Char => (FileType::CharacterDevice, makedev(device.major, device.minor)),
        Kind::Block => (FileType::BlockDevice, makedev(device.major, device.minor)),
        Kind::Fifo => (FileType::Fifo, 0),
    };
    // The umask is 0 here.
    match rustix::fs::mknodat(&parent, name, kind, Mode::from_raw_mode(device.mode & 0o7777), number) {
        Ok(()) => {
            let owner = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
            if device.uid != 0 || device.gid != 0 {
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                rustix::fs::chownat(&parent, name, Some(owner.0), Some(owner.1), flags).at(STAGE, what)?;
            }
            Ok(())
        }
        // There already (mounted by the plan, or in the image): fine if it is the very device.
        Err(Errno::EXIST) => {
            let stat = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).at(STAGE, what)?;
            if is(&stat, kind, number) {
                return Ok(());
            }
            Err(Error::invalid(STAGE, format!("{:?} exists and is something else", device.path)))
        }
        // Not allowed to make nodes (a user namespace, a device filter): the host's node, if it is the same.
        Err(Errno::PERM) if device.kind() != Kind::Fifo => {
            bind(root, device, &host_node(device, kind, number)?)
        }
        Err(e) => Err(Error::os(STAGE, format!("mknod {:?}", device.path), e)),
    }
}

fn is(stat: &rustix::fs::Stat, kind: FileType, number: Dev) -> bool {
    FileType::from_raw_mode(stat.st_mode) == kind && (kind == FileType::Fifo || stat.st_rdev == number)
}

fn host_node(device: &Device, kind: FileType, number: Dev) -> Result<OwnedFd> {
    let what = || format!("{:?} of the host", device.path);
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let node = open_tree(CWD, device.path.as_str(), flags).at(STAGE, what)?;
    let stat = rustix::fs::fstat(&node).at(STAGE, what)?;
    if !is(&stat, kind, number) {
        return Err(Error::invalid(STAGE, format!("{} is not {}:{}", what(), device.major, device.minor)));
    }
    Ok(node)
}

/// The usual links in /dev; what is there already stays.
fn make_links(root: &Root) -> Result<()> {
    let dev = root
        .make_dir_all(Path::new("/dev"), Mode::from_raw_mode(0o755))
        .map_err(|e| Error::path(STAGE, "/dev", &e))?;
    for (name, target) in LINKS {
        // Kernels without kcore: the link would lead nowhere.
        if name == "core" && !Path::new(target).exists() {
            continue;
        }
        match rustix::fs::symlinkat(target, &dev, name) {
            // A root without an upper directory can't be written.
            Ok(()) | Err(Errno::EXIST | Errno::ROFS) => {}
            Err(e) => return Err(Error::os(STAGE, format!("link /dev/{name}"), e)),
        }
    }
    Ok(())
}

/// The host's null device, opened and checked by us: never the container's (CVE-2025-31133).
pub(crate) fn open_null() -> Result<OwnedFd> {
    let what = || "/dev/null of the host".to_owned();
    let null =
        rustix::fs::open("/dev/null", OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            .at(STAGE, what)?;
    let stat = rustix::fs::fstat(&null).at(STAGE, what)?;
    let device = (FileType::from_raw_mode(stat.st_mode), major(stat.st_rdev), minor(stat.st_rdev));
    if device != (FileType::CharacterDevice, 1, 3) {
        return Err(Error::invalid(STAGE, format!("{} is not character device 1:3", what())));
    }
    Ok(null)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn null(path: &Path) -> Device {
        Device { path: path.to_str().unwrap().into(), major: 1, minor: 3, mode: 0o666, ..Device::default() }
    }

    #[test]
    fn nodes_are_made_once_and_never_through_a_link() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let root = Root::open(dir.path()).unwrap();
        let device = null(Path::new("/dev/null"));
        make(&root, &device).unwrap();
        make(&root, &device).unwrap();
        let other = Device { minor: 5, ..device.clone() };
        assert!(make(&root, &other).unwrap_err().message.contains("something else"));
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("dev/zero")).unwrap();
        let linked = Device { path: "/dev/zero".into(), minor: 5, ..device };
        assert!(make(&root, &linked).unwrap_err().message.contains("something else"));
        open_null().unwrap();
    }
}
