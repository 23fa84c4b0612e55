//! What of a container in a user namespace is mounted by the host.
//!
//! In the namespace nobody may look into the directories of the host, mount an overlay on them, or make device
//! nodes. So the *builder*, a short-lived process that is root of the node in a mount namespace of its own, makes
//! the root file system and all that comes from the host as detached trees, and passes them to the init by
//! descriptor, which moves them into the mount namespace that its user namespace owns.
//!
//! Files keep their owners on the disk: the layers are shown through idmapped mounts (mount_setattr(2)). One is
//! enough for all layers, since it is of the directory that all of them are in. The upper directory is not
//! idmapped: what the container writes belongs on the disk, too, to users that are nobody on the node.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, makedev};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, move_mount};
use stave_paths::Root;
use stave_supervisor_proto::v1::device::Kind as DeviceKind;
use stave_supervisor_proto::v1::failure::Kind;
use stave_supervisor_proto::v1::mount::Kind as MountKind;
use stave_supervisor_proto::v1::{Cgroup, Device, Mount, Plan};
use stave_sys::{MountAttr, mount_setattr};

use crate::error::{Context, Error, Result};
use crate::mounts::{self, Source, Sources, clone_fd, clone_path, new_file_system};
use crate::pod_namespaces::UserNamespace;
use crate::{control, process, rootfs};

const STAGE: &str = "mount";
const MOUNT_ATTR_IDMAP: u64 = 0x10_0000;
const RDONLY: u64 = 1;
/// Files of a cgroup that belong to whom it is delegated to (/sys/kernel/cgroup/delegate).
const DELEGATED: [&str; 5] =
    ["cgroup.procs", "cgroup.threads", "cgroup.subtree_control", "memory.oom.group", "memory.reclaim"];

/// The builder's whole life. `trees` goes to the init; failures are reported as those of the init are.
pub(crate) fn build(plan: &Plan, user: &UserNamespace, trees: OwnedFd, control: OwnedFd) -> ! {
    process::run_child(control.as_fd(), || {
        process::isolate(None, &[control.as_fd(), trees.as_fd(), user.fd()])?;
        let (root, sources) = make(plan, user)?;
        send(trees.as_fd(), root, sources)?;
        stave_sys::exit_now(0)
    })
}

fn make(plan: &Plan, user: &UserNamespace) -> Result<(OwnedFd, Sources)> {
    let rootfs = plan.root.clone().unwrap_or_default();
    let mut sources = mounts::open_sources(plan, Some(user))?;
    rootfs::leave_host_propagation()?;
    idmap_layers(plan, user)?;
    mounts::mount_images(plan, &mut sources)?;
    mounts::label_queues(plan)?;
    let root = rootfs::mount_root(&rootfs)?;
    let root = clone_fd(root.as_fd(), false).at("rootfs", || "copy of the root".to_owned())?;
    make_devices(plan, user, &mut sources)?;
    delegate_cgroup(plan, user)?;
    Ok((root, sources))
}

/// An idmapped mount of a detached tree. `recursive`: of what is mounted in it, too, if all of it can be mapped; else
/// only of its root, as the OCI runtime specification has it for `idmap`.
pub(crate) fn idmap(tree: BorrowedFd<'_>, user: &UserNamespace, recursive: bool) -> std::io::Result<()> {
    use std::os::fd::AsRawFd;
    let userns_fd = u64::try_from(user.fd().as_raw_fd()).unwrap_or(u64::MAX);
    let attr = MountAttr { set: MOUNT_ATTR_IDMAP, userns_fd, ..MountAttr::default() };
    match mount_setattr(tree, recursive, &attr) {
        Err(e) if recursive && matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EPERM)) => {
            mount_setattr(tree, false, &attr)
        }
        other => other,
    }
}

/// The same for a mount of the plan.
pub(crate) fn idmap_source(tree: BorrowedFd<'_>, user: &UserNamespace, mount: &Mount) -> Result<()> {
    idmap(tree, user, mount.recursive).map_err(|e| {
        let why = match e.raw_os_error() {
            Some(libc::EINVAL) => {
                let magic = rustix::fs::fstatfs(tree).map_or(0, |fs| fs.f_type);
                format!("its file system (magic number {magic:#x}) can't be idmapped")
            }
            Some(libc::EPERM) => "it is idmapped already, or mounted by another user namespace".to_owned(),
            _ => "idmapped mount".to_owned(),
        };
        let what = format!("{:?}: source {:?}: {why}", mount.destination, mount.source);
        Error::os(STAGE, what, e).with_kind(Kind::FailedPrecondition)
    })
}

/// Covers the directories that all layers are in by idmapped mounts of themselves. In the builder's mount
/// namespace, cut off the host: nobody else sees them.
pub(crate) fn idmap_layers(plan: &Plan, user: &UserNamespace) -> Result<()> {
    let root = plan.root.clone().unwrap_or_default();
    let images = plan.mounts.iter().filter(|mount| mount.kind() == MountKind::Image);
    let layers: Vec<String> =
        root.lower_dirs.iter().chain(images.flat_map(|mount| &mount.lower_dirs)).cloned().collect();
    for place in places(&layers, &root.upper_dir) {
        let what = || format!("idmapped mount of the layers in {place:?}");
        let text = place.to_str().ok_or_else(|| Error::invalid(STAGE, what()))?;
        let tree = clone_path(text, false).at(STAGE, what)?;
        idmap(tree.as_fd(), user, false)
            .map_err(|e| Error::os(STAGE, what(), e).with_kind(Kind::FailedPrecondition))?;
        move_mount(&tree, "", CWD, text, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).at(STAGE, what)?;
    }
    Ok(())
}

/// The directory that all layers are in. Where that has the upper directory, too, or is the root: each layer.
fn places(layers: &[String], upper: &str) -> Vec<PathBuf> {
    let common = rootfs::common_parent(layers).to_owned();
    if common != Path::new("/") && !Path::new(upper).starts_with(&common) {
        return vec![common];
    }
    let mut all: Vec<PathBuf> = layers.iter().map(PathBuf::from).collect();
    all.sort();
    all.dedup();
    all
}

/// Makes a tmpfs on /dev with the device nodes in it: on one that the user namespace has mounted no device works.
/// The nodes keep their owners of the node, so that root of the container may use those that everybody may use, and
/// no disk.
fn make_devices(plan: &Plan, user: &UserNamespace, sources: &mut Sources) -> Result<()> {
    make_single_devices(plan, user, sources)?;
    let is_dev =
        |mount: &Mount| mount.fs_type == "tmpfs" && Path::new(&mount.destination) == Path::new("/dev");
    let Some(index) = plan.mounts.iter().position(is_dev) else { return Ok(()) };
    let (Some(mount), Some(source)) = (plan.mounts.get(index), sources.mounts.get_mut(index)) else {
        return Ok(());
    };
    let (uid, gid) = user.root();
    let mut options = mount.options.clone();
    options.extend([format!("uid={}", uid.as_raw()), format!("gid={}", gid.as_raw())]);
    let tree = new_file_system("tmpfs", &mount.source, &options, mount.attributes & !RDONLY)?;
    let copy = tree.try_clone().at(STAGE, || "/dev".to_owned())?;
    let dev = Root::from_dir_fd(copy).map_err(|e| Error::path(STAGE, "/dev", &e))?;
    for device in &plan.devices {
        if let Ok(path) = Path::new(&device.path).strip_prefix("/dev") {
            make_device(&dev, path, device, user)?;
        }
    }
    *source = Source::Made(tree);
    Ok(())
}

/// Makes the nodes outside of /dev on a tmpfs that nobody sees, each to be bound by itself. The root file system can't
/// have them: what is in the upper directory stays on the disk.
fn make_single_devices(plan: &Plan, user: &UserNamespace, sources: &mut Sources) -> Result<()> {
    let outside = |device: &Device| {
        !Path::new(&device.path).starts_with("/dev") && !matches!(device.kind(), DeviceKind::Fifo)
    };
    let mut wanted = plan.devices.iter().enumerate().filter(|(_, device)| outside(device)).peekable();
    if wanted.peek().is_none() {
        return Ok(());
    }
    let tree = new_file_system("tmpfs", "devices", &["mode=755".to_owned()], 0)?;
    // Somewhere in the builder's mount namespace: only of an attached mount there are copies.
    rootfs::attach_root(&tree)?;
    let copy = tree.try_clone().at(STAGE, || "devices".to_owned())?;
    let root = Root::from_dir_fd(copy).map_err(|e| Error::path(STAGE, "devices", &e))?;
    for (index, device) in wanted {
        let name = index.to_string();
        make_device(&root, Path::new(&name), device, user)?;
        let what = || format!("device {:?}", device.path);
        let node = rustix::fs::openat(&tree, name.as_str(), OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())
            .at(STAGE, what)?;
        sources.devices.push((index, clone_fd(node.as_fd(), false).at(STAGE, what)?));
    }
    Ok(())
}

/// Makes all nodes in a directory, named by their number in the plan, for an OCI runtime to bind.
pub(crate) fn stage_devices(plan: &Plan, user: &UserNamespace, place: &Path) -> Result<()> {
    let dir = std::fs::File::open(place).at(STAGE, || format!("{place:?}"))?;
    let root = Root::from_dir_fd(dir.into()).map_err(|e| Error::path(STAGE, format!("{place:?}"), &e))?;
    for (index, device) in plan.devices.iter().enumerate() {
        make_device(&root, Path::new(&index.to_string()), device, user)?;
    }
    Ok(())
}

fn make_device(dev: &Root, path: &Path, device: &Device, user: &UserNamespace) -> Result<()> {
    let what = || format!("device {:?}", device.path);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let mut made = PathBuf::new();
    for part in parent.components() {
        made.push(part);
        let dir = dev
            .make_dir_all(&made, Mode::from_raw_mode(0o755))
            .map_err(|e| Error::path(STAGE, what(), &e))?;
        let (uid, gid) = user.root();
        rustix::fs::chownat(&dir, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH).at(STAGE, what)?;
    }
    // With a slash in front: no path is empty.
    let dir = dev
        .make_dir_all(&Path::new("/").join(parent), Mode::from_raw_mode(0o755))
        .map_err(|e| Error::path(STAGE, what(), &e))?;
    let (kind, number) = match device.kind() {
        DeviceKind::Char => (FileType::CharacterDevice, makedev(device.major, device.minor)),
        DeviceKind::Block => (FileType::BlockDevice, makedev(device.major, device.minor)),
        // The init makes it itself.
        DeviceKind::Fifo => return Ok(()),
    };
    match rustix::fs::mknodat(&dir, name, kind, Mode::from_raw_mode(device.mode & 0o7777), number) {
        // Twice in the plan: the init compares.
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(Error::os(STAGE, format!("mknod {:?}", device.path), e)),
    }
    let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
    rustix::fs::chownat(&dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).at(STAGE, what)
}

/// A container that may write its cgroup2 directory gets it as its own, as far as cgroups(7) delegates.
pub(crate) fn delegate_cgroup(plan: &Plan, user: &UserNamespace) -> Result<()> {
    let writable = |mount: &Mount| mount.kind() == MountKind::Cgroup && mount.attributes & RDONLY == 0;
    let Some(Cgroup { v2_dir, .. }) = plan.cgroup.as_ref().filter(|cgroup| !cgroup.v2_dir.is_empty()) else {
        return Ok(());
    };
    if !plan.cgroup_namespace || !plan.mounts.iter().any(writable) {
        return Ok(());
    }
    let (uid, gid) = user.root();
    let dir = Path::new(v2_dir);
    rustix::fs::chown(dir, Some(uid), Some(gid)).at("cgroup", || format!("chown {dir:?}"))?;
    for name in DELEGATED {
        match rustix::fs::chown(dir.join(name), Some(uid), Some(gid)) {
            // A controller that this cgroup does not have.
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => return Err(Error::os("cgroup", format!("chown {name:?} in {dir:?}"), e)),
        }
    }
    Ok(())
}

/// What a descriptor is: a line each, in their order.
fn send(socket: BorrowedFd<'_>, root: OwnedFd, sources: Sources) -> Result<()> {
    let mut all = vec![("root\n".to_owned(), root)];
    all.extend(sources.devices.into_iter().map(|(index, node)| (format!("device {index}\n"), node)));
    for (index, source) in sources.mounts.into_iter().enumerate() {
        match source {
            Source::Bind(tree) => all.push((format!("bind {index}\n"), tree)),
            Source::Made(tree) => all.push((format!("made {index}\n"), tree)),
            Source::Cgroup(trees) => {
                all.extend(trees.into_iter().map(|(name, tree)| (format!("cgroup {index} {name}\n"), tree)))
            }
            Source::None => {}
        }
    }
    for chunk in all.chunks(control::FDS_MAX) {
        let text: String = chunk.iter().map(|(line, _)| line.as_str()).collect();
        let fds: Vec<BorrowedFd<'_>> = chunk.iter().map(|(_, fd)| fd.as_fd()).collect();
        control::send_many(socket, text.as_bytes(), &fds).at(STAGE, || "hand the mounts over".to_owned())?;
    }
    control::send_many(socket, b"end\n", &[]).at(STAGE, || "hand the mounts over".to_owned())
}

/// The init's side: the root and the sources, as the builder made them.
pub(crate) fn receive(socket: BorrowedFd<'_>, plan: &Plan) -> Result<(OwnedFd, Sources)> {
    let broken = |what: &str| Error::new(STAGE, Kind::Internal, format!("the builder of the mounts {what}"));
    let mut root = None;
    let mut sources: Vec<Source> = plan.mounts.iter().map(|_| Source::None).collect();
    let mut devices = Vec::new();
    loop {
        let (packet, fds) = control::wait_many(socket)?;
        // It has reported why itself.
        let text = std::str::from_utf8(&packet).ok().filter(|text| !text.is_empty());
        let text = text.ok_or_else(|| broken("ended early"))?;
        if text == "end\n" {
            let root = root.ok_or_else(|| broken("sent no root"))?;
            return Ok((root, Sources { mounts: sources, devices }));
        }
        if text.lines().count() != fds.len() {
            return Err(broken("sent a garbled message"));
        }
        for (line, fd) in text.lines().zip(fds) {
            let mut words = line.splitn(3, ' ');
            let (kind, index) = (words.next(), words.next().and_then(|index| index.parse::<usize>().ok()));
            if let (Some("device"), Some(index)) = (kind, index) {
                devices.push((index, fd));
                continue;
            }
            let place = index.and_then(|index| sources.get_mut(index));
            match (kind, place) {
                (Some("root"), None) => root = Some(fd),
                (Some("bind"), Some(place)) => *place = Source::Bind(fd),
                (Some("made"), Some(place)) => *place = Source::Made(fd),
                (Some("cgroup"), Some(place)) => {
                    let name = words.next().unwrap_or_default().to_owned();
                    match place {
                        Source::Cgroup(trees) => trees.push((name, fd)),
                        place => *place = Source::Cgroup(vec![(name, fd)]),
                    }
                }
                _ => return Err(broken("sent a garbled message")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_place_for_all_layers() {
        let layers = ["/r/layers/a/fs".to_owned(), "/r/layers/b/fs".to_owned()];
        assert_eq!(places(&layers, "/r/containers/c/upper"), [Path::new("/r/layers")]);
        assert_eq!(places(&layers[..1], "/r/containers/c/upper"), [Path::new("/r/layers/a")]);
        let each = [Path::new("/r/layers/a/fs"), Path::new("/r/layers/b/fs")];
        assert_eq!(places(&layers, "/r/layers/upper"), each);
    }

    #[test]
    fn trees_arrive_in_their_places() {
        let (ours, theirs) = control::pair().unwrap();
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let plan = Plan { mounts: vec![Mount::default(); 150], ..Plan::default() };
        let mut sources: Vec<Source> = (0..147).map(|_| Source::Bind(null())).collect();
        sources.push(Source::Made(null()));
        sources.push(Source::None);
        sources.push(Source::Cgroup(vec![("cpu,cpuacct".into(), null()), (String::new(), null())]));
        let sources = Sources { mounts: sources, devices: vec![(7, null()), (9, null())] };
        let sender = std::thread::spawn(move || send(ours.as_fd(), null(), sources));
        let (_root, Sources { mounts: received, devices }) = receive(theirs.as_fd(), &plan).unwrap();
        sender.join().unwrap().unwrap();
        assert_eq!(devices.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [7, 9]);
        assert!(received[..147].iter().all(|source| matches!(source, Source::Bind(_))));
        assert!(matches!(received[147], Source::Made(_)));
        assert!(matches!(received[148], Source::None));
        let Source::Cgroup(trees) = &received[149] else { panic!("no cgroup") };
        assert_eq!(trees.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["cpu,cpuacct", ""]);
        // One that dies has reported; the init does not go on with half of it.
        let (ours, theirs) = control::pair().unwrap();
        drop(ours);
        assert!(receive(theirs.as_fd(), &plan).unwrap_err().message.contains("ended early"));
    }
}
