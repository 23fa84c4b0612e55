//! overlayfs, extended attributes, idmapped mounts and recursive read-only mounts, on the file
//! system that holds the daemon's root and in a mount namespace of the probe's own.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{CWD, XattrFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
    mount, mount_change, move_mount, open_tree, unmount,
};

use stave_sys::{MountAttr, mount_setattr};

use crate::child::{FIRST_ID, UserNamespace};
use crate::report::HostReport;
use crate::scratch::{ScratchDir, in_thread};

/// linux/mount.h
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;
const NO_OVERLAY: &str = "no container gets a root file system: no pod starts";

pub(crate) fn probe(report: &mut HostReport, root: &Path) {
    let scratch = match ScratchDir::near(root) {
        Ok(scratch) => scratch,
        Err(error) => {
            report.missing(
                "overlayfs",
                format!("no scratch directory for {}: {error}", root.display()),
                NO_OVERLAY,
            );
            return;
        }
    };
    let kind = file_system_of(scratch.path());
    overlay(report, &scratch, &kind);

    match rustix::fs::setxattr(scratch.path(), "user.stave", b"1", XattrFlags::empty()) {
        Ok(()) => {
            report.features.user_xattrs = true;
            report.ok("extended attributes", format!("user.* on {kind}"));
        }
        Err(error) => report.degraded(
            "extended attributes",
            format!("user.* on {kind}: {error}"),
            "images whose files have user attributes can't be unpacked whole",
        ),
    }
    mount_attributes(report, &scratch, &kind);
}

fn overlay(report: &mut HostReport, scratch: &ScratchDir, kind: &str) {
    const NAME: &str = "overlayfs";
    let one_by_one = in_thread(|| overlay_works(scratch, "a", &Layers::OneByOne { volatile: false }));
    report.features.overlay_lowerdir_plus = one_by_one.is_ok();
    let works = match &one_by_one {
        Ok(()) => Ok(()),
        Err(_) => in_thread(|| overlay_works(scratch, "b", &Layers::OneString)),
    };
    match works {
        Ok(()) => {
            report.features.overlay = true;
            report.ok(NAME, format!("on {kind}"));
        }
        Err(error) => {
            report.missing(NAME, format!("on {kind}: {error}"), NO_OVERLAY);
            return;
        }
    }
    match one_by_one {
        Ok(()) => report.ok("overlay lowerdir+", "layers one by one"),
        Err(error) => report.degraded(
            "overlay lowerdir+",
            error.to_string(),
            "an image's layers must fit one page of mount options: some 50 layers",
        ),
    }
    match in_thread(|| overlay_works(scratch, "c", &Layers::OneByOne { volatile: true })) {
        Ok(()) => {
            report.features.overlay_volatile = true;
            report.ok("overlay volatile", "works");
        }
        Err(error) => report.degraded(
            "overlay volatile",
            error.to_string(),
            "unmounting a container's root file system syncs the disk",
        ),
    }
}

enum Layers {
    /// fsconfig `lowerdir+` for each.
    OneByOne { volatile: bool },
    /// mount(2) with `lowerdir=A:B`.
    OneString,
}

/// Mounts two layers with an upper directory, reads from each layer, writes and deletes.
fn overlay_works(scratch: &ScratchDir, name: &str, layers: &Layers) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let dir = |leaf: &str| scratch.dir(&format!("{name}/{leaf}"));
    let (bottom, top, upper, work, merged) =
        (dir("bottom")?, dir("top")?, dir("upper")?, dir("work")?, dir("merged")?);
    fs::write(bottom.join("from-bottom"), "bottom")?;
    fs::write(top.join("from-top"), "top")?;
    match layers {
        Layers::OneByOne { volatile } => {
            let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
            fsconfig_set_string(context.as_fd(), "lowerdir+", &top)?;
            fsconfig_set_string(context.as_fd(), "lowerdir+", &bottom)?;
            fsconfig_set_string(context.as_fd(), "upperdir", &upper)?;
            fsconfig_set_string(context.as_fd(), "workdir", &work)?;
            if *volatile {
                fsconfig_set_flag(context.as_fd(), "volatile")?;
            }
            fsconfig_create(context.as_fd())?;
            let detached = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
            attach(&detached, &merged)?;
        }
        Layers::OneString => {
            let options = format!(
                "lowerdir={}:{},upperdir={},workdir={}",
                top.display(),
                bottom.display(),
                upper.display(),
                work.display()
            );
            let options = std::ffi::CString::new(options)?;
            mount("overlay", &merged, "overlay", MountFlags::empty(), Some(options.as_c_str()))?;
        }
    }
    let used = use_overlay(&merged, &upper);
    unmount(&merged, UnmountFlags::DETACH)?;
    used
}

fn use_overlay(merged: &Path, upper: &Path) -> io::Result<()> {
    let told = |what: &str, error: io::Error| io::Error::new(error.kind(), format!("{what}: {error}"));
    if fs::read(merged.join("from-bottom"))? != b"bottom" || fs::read(merged.join("from-top"))? != b"top" {
        return Err(io::Error::other("layers read back wrong"));
    }
    fs::write(merged.join("written"), "x").map_err(|error| told("writing", error))?;
    if !upper.join("written").exists() {
        return Err(io::Error::other("what was written is not in the upper directory"));
    }
    fs::remove_file(merged.join("from-bottom")).map_err(|error| told("deleting (whiteout)", error))?;
    if merged.join("from-bottom").exists() {
        return Err(io::Error::other("a deleted file is still there"));
    }
    Ok(())
}

fn attach(detached: &OwnedFd, target: &Path) -> io::Result<()> {
    move_mount(detached.as_fd(), "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(())
}

/// The type of the file system that holds `path`, by the longest mount point above it.
fn file_system_of(path: &Path) -> String {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let content = fs::read("/proc/self/mountinfo").unwrap_or_default();
    // Names of mounts need not be UTF-8.
    String::from_utf8_lossy(&content)
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let point = left.split(' ').nth(4)?;
            path.starts_with(point).then(|| (point.len(), right.split(' ').next().unwrap_or_default()))
        })
        .max_by_key(|(length, _)| *length)
        .map_or_else(|| "an unknown file system".to_owned(), |(_, kind)| kind.to_owned())
}

fn mount_attributes(report: &mut HostReport, scratch: &ScratchDir, kind: &str) {
    match in_thread(|| recursive_read_only(scratch)) {
        Ok(()) => {
            report.features.recursive_read_only = true;
            report.ok("recursive read-only", "mount_setattr with AT_RECURSIVE");
        }
        Err(error) => report.degraded(
            "recursive read-only",
            error.to_string(),
            "mounts with recursiveReadOnly: Enabled are refused",
        ),
    }
    const NAME: &str = "idmapped mounts";
    const COST: &str =
        "with hostUsers: false the files of images and volumes have the wrong owner: such pods are refused";
    let mapped = UserNamespace::new()
        .and_then(|user| in_thread(|| idmapped(scratch, &user)).map_err(|error| at(kind, &error)));
    match mapped {
        Ok(()) => {
            report.features.idmapped_mounts = true;
            report.ok(NAME, format!("on {kind}"));
        }
        Err(error) => report.degraded(NAME, error.to_string(), COST),
    }
}

fn at(kind: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("on {kind}: {error}"))
}

/// A tree of two mounts is made read-only at once; then neither takes a file.
fn recursive_read_only(scratch: &ScratchDir) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let outer = scratch.dir("read-only")?;
    mount("tmpfs", &outer, "tmpfs", MountFlags::empty(), None)?;
    let inner = scratch.dir("read-only/inner")?;
    mount("tmpfs", &inner, "tmpfs", MountFlags::empty(), None)?;
    let tree = open_tree(CWD, &outer, OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    let read_only =
        MountAttr { set: u64::from(MountAttrFlags::MOUNT_ATTR_RDONLY.bits()), ..MountAttr::default() };
    let result = mount_setattr(tree.as_fd(), true, &read_only).and_then(|()| {
        let refused = |dir: &Path| {
            fs::write(dir.join("file"), "")
                .is_err_and(|error| error.kind() == io::ErrorKind::ReadOnlyFilesystem)
        };
        if refused(&outer) && refused(&inner) { Ok(()) } else { Err(io::Error::other("has no effect")) }
    });
    unmount(&outer, UnmountFlags::DETACH)?;
    result
}

/// A detached copy of a directory is mapped, and a file of the host's 0 shows as the map's 100000.
fn idmapped(scratch: &ScratchDir, user: &UserNamespace) -> io::Result<()> {
    let dir = scratch.dir("idmapped")?;
    fs::write(dir.join("file"), "")?;
    let owner = fs::metadata(dir.join("file"))?.uid();
    let tree = open_tree(CWD, &dir, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    let map = MountAttr {
        set: MOUNT_ATTR_IDMAP,
        userns_fd: u64::try_from(user.namespace.as_raw_fd()).unwrap_or(u64::MAX),
        ..MountAttr::default()
    };
    mount_setattr(tree.as_fd(), false, &map)?;
    let seen = rustix::fs::statat(tree.as_fd(), "file", rustix::fs::AtFlags::empty())?.st_uid;
    if seen == owner + FIRST_ID {
        Ok(())
    } else {
        Err(io::Error::other(format!("owner {owner} shows as {seen}, not as {}", owner + FIRST_ID)))
    }
}
