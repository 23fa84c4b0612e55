//! The mounts of a plan: prepared as detached trees, then moved onto destinations that are open
//! descriptors, so that no path is looked up twice (CVE-2021-30465).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree, unmount,
};
use stave_paths::{PathError, Root};
use stave_supervisor_proto::v1::mount::Kind as MountKind;
use stave_supervisor_proto::v1::{Cgroup, Mount, Plan, Propagation, RootFs};
use stave_sys::{MountAttr, mount_setattr};

use crate::error::{Context, Error, Result};
use crate::pod_namespaces::UserNamespace;
use crate::{host_mounts, rootfs};

const STAGE: &str = "mount";
const RDONLY: u64 = MountAttrFlags::MOUNT_ATTR_RDONLY.bits() as u64;
const ATIME: u64 = MountAttrFlags::MOUNT_ATTR__ATIME.bits() as u64;
/// Bits of [`Mount::attributes`] that a plan may set.
const ATTRIBUTES: u64 = RDONLY | ATIME | 0x2 | 0x4 | 0x8 | 0x80 | 0x20_0000;
const MOUNTS_MAX: usize = 10_000;
/// The option that gives all files of a file system one SELinux label.
const CONTEXT: &str = "context=";
/// The extended attribute with a file's label.
const SELINUX: &str = "security.selinux";

pub(crate) fn validate(mounts: &[Mount]) -> Result<()> {
    if mounts.len() > MOUNTS_MAX {
        return Err(Error::invalid(STAGE, format!("{} mounts are more than {MOUNTS_MAX}", mounts.len())));
    }
    for mount in mounts {
        let destination = &mount.destination;
        if mount.kind() == MountKind::Image {
            let layers = RootFs {
                lower_dirs: mount.lower_dirs.clone(),
                options: mount.options.clone(),
                ..RootFs::default()
            };
            rootfs::validate(&layers).map_err(|e| at_destination(mount, e))?;
        }
        let problem = if !destination.starts_with('/') {
            "destination is not absolute"
        } else if Path::new(destination).components().count() < 2 {
            "destination is the root"
        } else if mount.kind() == MountKind::Bind && !mount.source.starts_with('/') {
            "source is not absolute"
        } else if mount.kind() == MountKind::Image && mount.attributes & RDONLY == 0 {
            "an image is always read-only"
        } else if mount.kind() == MountKind::FileSystem && mount.fs_type.is_empty() {
            "fs_type is empty"
        } else if mount.attributes & !ATTRIBUTES != 0 {
            "unknown attributes"
        } else {
            continue;
        };
        return Err(Error::invalid(STAGE, format!("{destination:?} from {:?}: {problem}", mount.source)));
    }
    Ok(())
}

/// What of the plan comes from outside of the container, as detached trees.
#[derive(Debug)]
pub(crate) struct Sources {
    /// Host directories and files that are bound, in the order of the plan's mounts.
    pub(crate) mounts: Vec<Source>,
    /// Device nodes that the container itself could not make, each with its place in the plan's devices.
    pub(crate) devices: Vec<(usize, OwnedFd)>,
}

#[derive(Debug)]
pub(crate) enum Source {
    Bind(OwnedFd),
    /// The new file system that the plan asks for.
    Made(OwnedFd),
    /// Name below the destination, tree. An empty name: the destination itself.
    Cgroup(Vec<(String, OwnedFd)>),
    None,
}

/// Opens what comes from the host. Before the tree is cut off the host: only a copy of a mount that
/// is still shared with the host can be one of its peers (bidirectional propagation).
/// `user`: for idmapped mounts.
pub(crate) fn open_sources(plan: &Plan, user: Option<&UserNamespace>) -> Result<Sources> {
    let cgroup = plan.cgroup.clone().unwrap_or_default();
    let open = |mount: &Mount| match mount.kind() {
        MountKind::Bind => {
            let tree = clone_path(&mount.source, mount.recursive).map_err(|e| {
                let what = format!("{:?}: source {:?}", mount.destination, mount.source);
                let error = Error::os(STAGE, what, e);
                let missing = error.errno == libc::ENOENT;
                if missing {
                    error.with_kind(stave_supervisor_proto::v1::failure::Kind::InvalidArgument)
                } else {
                    error
                }
            })?;
            if let Some(user) = user.filter(|_| mount.idmap) {
                host_mounts::idmap_source(tree.as_fd(), user, mount)?;
            }
            Ok(Source::Bind(tree))
        }
        MountKind::Cgroup if plan.cgroup_namespace => cgroup_sources(&cgroup).map(Source::Cgroup),
        // Without a namespace of its own the container sees the host's tree. A new mount would reset
        // the options of the cgroup2 file system for the whole host, a copy leaves them.
        MountKind::Cgroup => {
            let tree = clone_path("/sys/fs/cgroup", true).at(STAGE, || "/sys/fs/cgroup".to_owned())?;
            Ok(Source::Cgroup(vec![(String::new(), tree)]))
        }
        // Once the tree is cut off the host: see `mount_images`.
        MountKind::Image | MountKind::FileSystem => Ok(Source::None),
    };
    let mounts = plan.mounts.iter().map(open).collect::<Result<_>>()?;
    Ok(Sources { mounts, devices: Vec::new() })
}

/// Mounts the images of the plan. In a mount tree that is cut off the host, and before the root file system,
/// which may stand on the same layers.
pub(crate) fn mount_images(plan: &Plan, sources: &mut Sources) -> Result<()> {
    for (mount, source) in plan.mounts.iter().zip(&mut sources.mounts) {
        if mount.kind() == MountKind::Image {
            *source = Source::Bind(image(mount).map_err(|e| at_destination(mount, e))?);
        }
    }
    Ok(())
}

/// A detached tree: the image, or what is at its sub path.
fn image(mount: &Mount) -> Result<OwnedFd> {
    let layers =
        RootFs { lower_dirs: mount.lower_dirs.clone(), options: mount.options.clone(), ..RootFs::default() };
    let root =
        Root::from_dir_fd(rootfs::mount_root(&layers)?).map_err(|e| Error::path(STAGE, "image", &e))?;
    let tree = sub_path(&root, &mount.sub_path);
    // Its place in the tree is over the topmost layer, which others may need to see.
    let place = mount.lower_dirs.first().map(String::as_str).unwrap_or_default();
    unmount(place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
        .at(STAGE, || format!("unmount {place:?}"))?;
    tree
}

fn sub_path(root: &Root, path: &str) -> Result<OwnedFd> {
    let what = || format!("sub path {path:?} of the image");
    let invalid = stave_supervisor_proto::v1::failure::Kind::InvalidArgument;
    let path = if path.is_empty() { "/" } else { path };
    // Resolved with the image's root as "/": no link and no ".." leads out of it.
    let fd = root.resolve(Path::new(path)).map_err(|e| Error::path(STAGE, what(), &e).with_kind(invalid))?;
    let stat = rustix::fs::fstat(&fd).at(STAGE, what)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory | FileType::RegularFile => clone_fd(fd.as_fd(), false).at(STAGE, what),
        _ => Err(Error::invalid(STAGE, format!("{} is neither a directory nor a regular file", what()))),
    }
}

/// The container's own directory of each hierarchy, named as under the host's /sys/fs/cgroup.
fn cgroup_sources(cgroup: &Cgroup) -> Result<Vec<(String, OwnedFd)>> {
    let open = |name: &str, dir: &str| {
        let tree = clone_path(dir, false).at(STAGE, || format!("cgroup {dir:?}"))?;
        Ok((name.to_owned(), tree))
    };
    if cgroup.v1.is_empty() {
        return if cgroup.v2_dir.is_empty() {
            Err(Error::invalid(STAGE, "a cgroup mount, but the plan has no cgroup"))
        } else {
            Ok(vec![open("", &cgroup.v2_dir)?])
        };
    }
    let mut trees = Vec::new();
    for hierarchy in &cgroup.v1 {
        let name = hierarchy.name.strip_prefix("name=").unwrap_or(&hierarchy.name);
        trees.push(open(name, &hierarchy.dir)?);
    }
    if !cgroup.v2_dir.is_empty() {
        trees.push(open("unified", &cgroup.v2_dir)?);
    }
    Ok(trees)
}

pub(crate) fn clone_path(path: &str, recursive: bool) -> rustix::io::Result<OwnedFd> {
    open_tree(CWD, path, clone_flags(recursive))
}

/// A detached copy of the mount (and with `recursive` of all below) that starts at an open file.
pub(crate) fn clone_fd(fd: BorrowedFd<'_>, recursive: bool) -> rustix::io::Result<OwnedFd> {
    open_tree(fd, "", clone_flags(recursive) | OpenTreeFlags::AT_EMPTY_PATH)
}

fn clone_flags(recursive: bool) -> OpenTreeFlags {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive { flags | OpenTreeFlags::AT_RECURSIVE } else { flags }
}

/// Moves a detached tree onto an open file or directory.
pub(crate) fn attach(tree: BorrowedFd<'_>, destination: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", destination, "", flags)
}

/// A new, detached file system.
pub(crate) fn new_file_system(
    fs_type: &str,
    source: &str,
    options: &[String],
    attributes: u64,
) -> Result<OwnedFd> {
    let context =
        fsopen(fs_type, FsOpenFlags::FSOPEN_CLOEXEC).at(STAGE, || format!("file system {fs_type:?}"))?;
    let source = if source.is_empty() { fs_type } else { source };
    let failed = |what: String| move |e| Error::os(STAGE, what, e);
    fsconfig_set_string(&context, "source", source)
        .map_err(|e| failed(format!("{fs_type}: source {source:?}{}", kernel_log(&context)))(e))?;
    // The message queues are one file system of the IPC namespace, which was there before this mount, without a label.
    let (later, options): (Vec<&String>, Vec<_>) =
        options.iter().partition(|option| fs_type == "mqueue" && option.starts_with(CONTEXT));
    for option in options {
        match option.split_once('=') {
            Some((key, value)) => fsconfig_set_string(&context, key, value),
            None => fsconfig_set_flag(&context, option.as_str()),
        }
        .map_err(|e| failed(format!("{fs_type}: option {option:?}{}", kernel_log(&context)))(e))?;
    }
    fsconfig_create(&context).map_err(|e| failed(format!("{fs_type}{}", kernel_log(&context)))(e))?;
    let attributes = MountAttrFlags::from_bits_retain(u32::try_from(attributes).unwrap_or_default());
    let tree = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .at(STAGE, || format!("fsmount {fs_type}"))?;
    for label in later.iter().filter_map(|option| option.strip_prefix(CONTEXT)) {
        set_label(&tree, label).at(STAGE, || format!("{fs_type}: SELinux label {label:?}"))?;
    }
    Ok(tree)
}

/// Labels the message queues of a pod with a user namespace: they are the node's root's, so that no other can, although the
/// IPC namespace is the pod's.
pub(crate) fn label_queues(plan: &Plan) -> Result<()> {
    let labelled = |mount: &&Mount| {
        mount.fs_type == "mqueue" && mount.options.iter().any(|option| option.starts_with(CONTEXT))
    };
    plan.mounts.iter().filter(labelled).try_for_each(|mount| {
        let made = new_file_system(&mount.fs_type, &mount.source, &mount.options, mount.attributes);
        made.map(drop).map_err(|e| at_destination(mount, e))
    })
}

/// Of the root of a file system. One without labels is left as it is, as is one that has the label.
fn set_label(tree: &OwnedFd, label: &str) -> rustix::io::Result<()> {
    // fsmount(2) gives a descriptor that takes no attributes.
    let root =
        rustix::fs::openat(tree, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    match rustix::fs::fsetxattr(&root, SELINUX, label.as_bytes(), XattrFlags::empty()) {
        Err(Errno::OPNOTSUPP) => Ok(()),
        // By the builder, see `label_queues`.
        Err(Errno::PERM) if has_label(&root, label) => Ok(()),
        other => other,
    }
}

fn has_label(root: &OwnedFd, label: &str) -> bool {
    let mut text = [0_u8; 4096];
    rustix::fs::fgetxattr(root, SELINUX, &mut text).is_ok_and(|length| {
        let found = text.get(..length).unwrap_or_default();
        found.strip_suffix(b"\0").unwrap_or(found) == label.as_bytes()
    })
}

/// What the kernel wrote into the log of an fsopen(2) context: " (e tmpfs: Unknown parameter 'x')".
pub(crate) fn kernel_log(context: &OwnedFd) -> String {
    let mut buffer = [0_u8; 512];
    match rustix::io::read(context, &mut buffer) {
        Ok(n) if n > 0 => {
            let text = String::from_utf8_lossy(buffer.get(..n).unwrap_or_default()).trim().to_owned();
            format!(" ({text})")
        }
        _ => String::new(),
    }
}

/// Mounts everything in order. Returns the file systems that are to become read-only once the rest
/// of the set-up has written to them.
pub(crate) fn mount_all(root: &Root, mounts: &[Mount], sources: Vec<Source>) -> Result<Vec<OwnedFd>> {
    let mut read_only_later = Vec::new();
    for (mount, source) in mounts.iter().zip(sources) {
        match source {
            Source::Bind(tree) => bind(root, mount, &tree).map_err(|e| of_kind(mount, e))?,
            Source::Cgroup(trees) => mount_cgroup(root, mount, trees)?,
            source @ (Source::Made(_) | Source::None) => {
                // A tmpfs may get devices, and directories for further mounts: read-only at the end.
                let later = mount.fs_type == "tmpfs" && mount.attributes & RDONLY != 0;
                let attributes = if later { mount.attributes & !RDONLY } else { mount.attributes };
                let tree = match source {
                    Source::Made(tree) => tree,
                    _ => new_file_system(&mount.fs_type, &mount.source, &mount.options, attributes)
                        .map_err(|e| at_destination(mount, e))?,
                };
                let strict = matches!(mount.fs_type.as_str(), "proc" | "sysfs");
                let destination = directory(root, &mount.destination, strict)?;
                set_propagation(&tree, mount.propagation(), false).map_err(|e| at_destination(mount, e))?;
                attach(tree.as_fd(), destination.as_fd()).at(STAGE, || format!("{:?}", mount.destination))?;
                if later {
                    read_only_later.push(tree);
                }
            }
        }
    }
    Ok(read_only_later)
}

/// Makes the destinations of new file systems that a runtime will mount, where they are not below one another, and
/// refuses those that are or pass a symbolic link: runtimes have followed such links out of the container.
pub(crate) fn make_destinations(root: &Root, mounts: &[Mount]) -> Result<()> {
    let own = |mount: &&Mount| matches!(mount.kind(), MountKind::FileSystem | MountKind::Cgroup);
    for mount in mounts.iter().filter(own) {
        let path = Path::new(&mount.destination);
        let below =
            |other: &Mount| path != Path::new(&other.destination) && path.starts_with(&other.destination);
        if !mounts.iter().any(below) {
            directory(root, &mount.destination, true)?;
        }
    }
    Ok(())
}

/// Attaches every bind mount and image of the plan at `dir`/N, N its place in the plan, with propagation and attributes
/// as the plan has them: where an OCI runtime finds them. Gives the trees back.
pub(crate) fn stage(dir: &Path, mounts: &[Mount], sources: Vec<Source>) -> Result<Vec<Option<OwnedFd>>> {
    let mut trees = Vec::with_capacity(mounts.len());
    for (n, (mount, source)) in mounts.iter().zip(sources).enumerate() {
        let Source::Bind(tree) = source else {
            trees.push(None);
            continue;
        };
        let place = dir.join(n.to_string());
        let what = || format!("{:?}: {place:?}", mount.destination);
        set_propagation(&tree, mount.propagation(), true).map_err(|e| at_destination(mount, e))?;
        set_attributes(&tree, mount.attributes, mount.recursive_attributes).at(STAGE, what)?;
        let stat = rustix::fs::fstat(&tree).at(STAGE, what)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            std::fs::create_dir(&place).at(STAGE, what)?;
        } else {
            std::fs::File::create_new(&place).at(STAGE, what)?;
        }
        move_mount(&tree, "", CWD, &place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).at(STAGE, what)?;
        trees.push(Some(tree));
    }
    Ok(trees)
}

fn at_destination(mount: &Mount, mut error: Error) -> Error {
    error.message = format!("{:?}: {}", mount.destination, error.message);
    of_kind(mount, error)
}

/// The kubelet knows the failure of an image's mount by this word.
fn of_kind(mount: &Mount, mut error: Error) -> Error {
    if mount.kind() == MountKind::Image {
        error.stage = "ImageVolumeMountFailed".to_owned();
    }
    error
}

pub(crate) fn make_read_only(trees: &[OwnedFd]) -> Result<()> {
    for tree in trees {
        mount_setattr(tree.as_fd(), false, &MountAttr { set: RDONLY, ..MountAttr::default() })
            .at(STAGE, || "read-only tmpfs".to_owned())?;
    }
    Ok(())
}

fn bind(root: &Root, mount: &Mount, tree: &OwnedFd) -> Result<()> {
    let what = || format!("{:?} from {:?}", mount.destination, mount.source);
    set_propagation(tree, mount.propagation(), true).map_err(|e| at_destination(mount, e))?;
    set_attributes(tree, mount.attributes, mount.recursive_attributes).at(STAGE, what)?;
    let stat = rustix::fs::fstat(tree).at(STAGE, what)?;
    let destination = if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        directory(root, &mount.destination, false)?
    } else {
        root.make_file(Path::new(&mount.destination))
            .map_err(|e| Error::path(STAGE, format!("destination {:?}", mount.destination), &e))?
    };
    attach(tree.as_fd(), destination.as_fd()).at(STAGE, what)
}

fn set_attributes(tree: &OwnedFd, attributes: u64, recursive: bool) -> std::io::Result<()> {
    if attributes == 0 {
        return Ok(());
    }
    // The access time modes are one field: it is cleared before it is set (mount_setattr(2)).
    let clear = if attributes & ATIME == 0 { 0 } else { ATIME };
    mount_setattr(tree.as_fd(), recursive, &MountAttr { set: attributes, clear, ..MountAttr::default() })
}

fn set_propagation(tree: &OwnedFd, propagation: Propagation, recursive: bool) -> Result<()> {
    let propagation = match propagation {
        Propagation::Private => libc::MS_PRIVATE,
        Propagation::Slave => libc::MS_SLAVE,
        Propagation::Shared => libc::MS_SHARED,
    };
    mount_setattr(tree.as_fd(), recursive, &MountAttr { propagation, ..MountAttr::default() })
        .at(STAGE, || "propagation".to_owned())
}

fn mount_cgroup(root: &Root, mount: &Mount, trees: Vec<(String, OwnedFd)>) -> Result<()> {
    let what = || format!("{:?}", mount.destination);
    let destination = directory(root, &mount.destination, true)?;
    if let [(name, tree)] = trees.as_slice()
        && name.is_empty()
    {
        set_propagation(tree, Propagation::Private, true)?;
        set_attributes(tree, mount.attributes, true).at(STAGE, what)?;
        return attach(tree.as_fd(), destination.as_fd()).at(STAGE, what);
    }
    // v1: a tmpfs with a directory for each hierarchy, as the host has it.
    let top = new_file_system("tmpfs", "cgroup", &["mode=755".to_owned()], mount.attributes & !RDONLY)?;
    attach(top.as_fd(), destination.as_fd()).at(STAGE, what)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    for (name, tree) in &trees {
        let what = || format!("{:?}: hierarchy {name:?}", mount.destination);
        rustix::fs::mkdirat(&top, name.as_str(), Mode::from_raw_mode(0o755)).at(STAGE, what)?;
        let dir = rustix::fs::openat(&top, name.as_str(), flags, Mode::empty()).at(STAGE, what)?;
        set_propagation(tree, Propagation::Private, false)?;
        set_attributes(tree, mount.attributes, false).at(STAGE, what)?;
        attach(tree.as_fd(), dir.as_fd()).at(STAGE, what)?;
        // Controllers mounted together go by their single names too.
        if name.contains(',') {
            for alias in name.split(',') {
                rustix::fs::symlinkat(name.as_str(), &top, alias).at(STAGE, what)?;
            }
        }
    }
    if mount.attributes & RDONLY != 0 {
        make_read_only(&[top])?;
    }
    Ok(())
}

/// The destination directory, made when missing. `strict`: no component may be a symbolic link, or
/// an image could place procfs where later steps don't look for it (CVE-2019-19921).
fn directory(root: &Root, destination: &str, strict: bool) -> Result<OwnedFd> {
    let path = Path::new(destination);
    let mode = Mode::from_raw_mode(0o755);
    let made = if strict {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        match root.open_beneath(path, flags) {
            Err(e) if e.is_not_found() => {
                root.make_dir_all(path, mode).and_then(|_| root.open_beneath(path, flags))
            }
            other => other,
        }
    } else {
        root.make_dir_all(path, mode)
    };
    made.map_err(|e| match &e {
        PathError::Escapes { .. } => {
            Error::invalid(STAGE, format!("destination {destination:?} is or passes a symbolic link"))
        }
        _ => Error::path(STAGE, format!("destination {destination:?}"), &e),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_mounts_are_refused() {
        let bind = Mount { source: "/s".into(), destination: "/d".into(), ..Mount::default() };
        validate(std::slice::from_ref(&bind)).unwrap();
        let fs = Mount { kind: MountKind::FileSystem.into(), ..bind.clone() };
        for bad in [
            Mount { destination: "d".into(), ..bind.clone() },
            Mount { destination: String::new(), ..bind.clone() },
            Mount { destination: "/".into(), ..bind.clone() },
            Mount { destination: "//.".into(), ..bind.clone() },
            Mount { source: "s".into(), ..bind.clone() },
            Mount { attributes: 0x10_0000, ..bind.clone() },
            fs,
        ] {
            assert!(validate(std::slice::from_ref(&bad)).is_err(), "{bad:?}");
        }
    }
}
