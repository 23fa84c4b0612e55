//! The root file system: overlay or plain directory, and the pivot into it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
    mount, mount_change, move_mount, open_tree, unmount,
};
use stave_supervisor_proto::v1::{Propagation, RootFs};
use stave_sys::{MountAttr, mount_setattr};

use crate::error::{Context, Error, Result};
use crate::mounts::kernel_log;

const STAGE: &str = "rootfs";
/// Longest string that fsconfig(2) takes.
const FSCONFIG_MAX: usize = 255;
/// Longest option string of mount(2): a page, with its NUL.
const OPTIONS_MAX: usize = 4095;
/// Most lower layers of an overlay (OVL_MAX_STACK).
const LAYERS_MAX: usize = 500;

pub(crate) fn validate(root: &RootFs) -> Result<()> {
    let invalid = |message: String| Err(Error::invalid(STAGE, message));
    if root.lower_dirs.is_empty() {
        return invalid("lower_dirs is empty".to_owned());
    }
    if root.lower_dirs.len() > LAYERS_MAX {
        return invalid(format!("{} layers are more than {LAYERS_MAX}", root.lower_dirs.len()));
    }
    if root.upper_dir.is_empty() != root.work_dir.is_empty() {
        return invalid("one of upper_dir and work_dir is missing".to_owned());
    }
    if root.lower_dirs.len() == 1 && root.upper_dir.is_empty() && !root.options.is_empty() {
        return invalid(format!("options {:?} for a plain directory", root.options));
    }
    let dirs = root.lower_dirs.iter().chain([&root.upper_dir, &root.work_dir]).filter(|d| !d.is_empty());
    for dir in dirs {
        if !dir.starts_with('/') || dir.contains('\0') {
            return invalid(format!("{dir:?} is not an absolute path"));
        }
    }
    Ok(())
}

/// Cuts the copied mount tree off the host: nothing that is mounted from now on shows there.
pub(crate) fn leave_host_propagation() -> Result<()> {
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::DOWNSTREAM)
        .at(STAGE, || "make / a recursive slave".to_owned())
}

/// Mounts the root file system over its topmost lower directory, in the caller's mount namespace,
/// and returns the root of the new mount.
pub(crate) fn mount_root(root: &RootFs) -> Result<OwnedFd> {
    let Some(top) = root.lower_dirs.first() else {
        return Err(Error::invalid(STAGE, "lower_dirs is empty"));
    };
    let tree = if root.lower_dirs.len() == 1 && root.upper_dir.is_empty() {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(CWD, top.as_str(), flags).at(STAGE, || format!("{top:?}"))?;
        let private = MountAttr { propagation: libc::MS_PRIVATE, ..MountAttr::default() };
        mount_setattr(tree.as_fd(), false, &private).at(STAGE, || format!("{top:?}"))?;
        Some(tree)
    } else {
        overlay(root)?
    };
    match tree {
        Some(tree) => {
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            move_mount(&tree, "", CWD, top.as_str(), flags).at(STAGE, || format!("move_mount to {top:?}"))?;
            Ok(tree)
        }
        None => classic_overlay(root, top),
    }
}

/// Moves a root file system that another process has made over the old root, where nothing else needs to be seen.
pub(crate) fn attach_root(tree: &OwnedFd) -> Result<()> {
    move_mount(tree, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .at(STAGE, || "move_mount over /".to_owned())
}

/// An overlay by the new mount API; none where the kernel doesn't know `lowerdir+` (before 6.7), or a
/// path is too long for fsconfig(2).
fn overlay(root: &RootFs) -> Result<Option<OwnedFd>> {
    let all = root.lower_dirs.iter().chain([&root.upper_dir, &root.work_dir]);
    if all.clone().any(|path| path.len() > FSCONFIG_MAX) {
        return Ok(None);
    }
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).at(STAGE, || "fsopen overlay".to_owned())?;
    let set = |key: &str, value: &str| fsconfig_set_string(&context, key, value);
    let failed = |what: String, e: Errno| Error::os(STAGE, format!("{what}{}", kernel_log(&context)), e);
    set("source", "overlay").at(STAGE, || "source".to_owned())?;
    for (n, lower) in root.lower_dirs.iter().enumerate() {
        match set("lowerdir+", lower) {
            Ok(()) => {}
            Err(Errno::INVAL) if n == 0 => return Ok(None),
            Err(e) => return Err(failed(format!("lower directory {lower:?}"), e)),
        }
    }
    if !root.upper_dir.is_empty() {
        set("upperdir", &root.upper_dir)
            .map_err(|e| failed(format!("upper directory {:?}", root.upper_dir), e))?;
        set("workdir", &root.work_dir)
            .map_err(|e| failed(format!("work directory {:?}", root.work_dir), e))?;
    }
    for option in &root.options {
        match option.split_once('=') {
            Some((key, value)) => set(key, value),
            None => fsconfig_set_flag(&context, option.as_str()),
        }
        .map_err(|e| failed(format!("overlay option {option:?}"), e))?;
    }
    fsconfig_create(&context).map_err(|e| failed(format!("overlay of {:?}", root.lower_dirs), e))?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
        .at(STAGE, || "fsmount overlay".to_owned())
        .map(Some)
}

/// An overlay by mount(2). The option string is limited to a page, so the directories are named
/// relative to the one that is above all of them.
fn classic_overlay(root: &RootFs, top: &str) -> Result<OwnedFd> {
    let common = common_parent(&root.lower_dirs);
    let options = classic_options(root, common)?;
    rustix::process::chdir(common).at(STAGE, || format!("{common:?}"))?;
    let options_c = std::ffi::CString::new(options).map_err(|_| Error::invalid(STAGE, "NUL in a path"))?;
    mount("overlay", top, "overlay", MountFlags::empty(), options_c.as_c_str())
        .at(STAGE, || format!("overlay with {options_c:?}"))?;
    rustix::process::chdir("/").at(STAGE, || "chdir /".to_owned())?;
    rustix::fs::open(top, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .at(STAGE, || format!("{top:?}"))
}

fn classic_options(root: &RootFs, common: &Path) -> Result<String> {
    let mut options = String::from("lowerdir=");
    for (n, lower) in root.lower_dirs.iter().enumerate() {
        let relative = Path::new(lower).strip_prefix(common).ok().and_then(Path::to_str);
        let relative = relative.filter(|r| !r.is_empty()).unwrap_or(lower);
        options.push_str(if n == 0 { "" } else { ":" });
        options.push_str(&escape(relative, &['\\', ':', ',']));
    }
    if !root.upper_dir.is_empty() {
        let upper = escape(&root.upper_dir, &['\\', ',']);
        let work = escape(&root.work_dir, &['\\', ',']);
        options.push_str(&format!(",upperdir={upper},workdir={work}"));
    }
    for option in &root.options {
        options.push(',');
        // A label has commas in it.
        match option.strip_prefix("context=") {
            Some(label) => options.push_str(&format!("context=\"{label}\"")),
            None => options.push_str(option),
        }
    }
    if options.len() > OPTIONS_MAX {
        let message =
            format!("{} layers need {} bytes of mount options", root.lower_dirs.len(), options.len());
        return Err(Error::invalid(STAGE, message));
    }
    Ok(options)
}

fn escape(path: &str, special: &[char]) -> String {
    let mut escaped = String::with_capacity(path.len());
    for c in path.chars() {
        if special.contains(&c) {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

pub(crate) fn common_parent(dirs: &[String]) -> &Path {
    let mut dirs = dirs.iter().map(|d| Path::new(d.as_str()));
    let first = dirs.next().and_then(Path::parent).unwrap_or(Path::new("/"));
    dirs.fold(first, |common, dir| {
        common.ancestors().find(|a| dir.parent().is_some_and(|p| p.starts_with(a))).unwrap_or(Path::new("/"))
    })
}

/// Makes the root mount itself read-only; what is mounted below keeps its own attributes.
pub(crate) fn make_read_only(root: BorrowedFd<'_>) -> Result<()> {
    let attr = MountAttr { set: MountAttrFlags::MOUNT_ATTR_RDONLY.bits().into(), ..MountAttr::default() };
    mount_setattr(root, false, &attr).at(STAGE, || "read-only".to_owned())
}

/// Makes `root` the root directory and detaches everything of the host.
pub(crate) fn pivot(root: BorrowedFd<'_>, propagation: Propagation) -> Result<()> {
    rustix::process::fchdir(root).at(STAGE, || "fchdir".to_owned())?;
    // The old root lands on top of the new one, and the working directory is in it (pivot_root(2)).
    rustix::process::pivot_root(".", ".").at(STAGE, || "pivot_root".to_owned())?;
    unmount(".", UnmountFlags::DETACH).at(STAGE, || "detach the old root".to_owned())?;
    rustix::process::chdir("/").at(STAGE, || "chdir /".to_owned())?;
    let propagation = match propagation {
        Propagation::Private => return Ok(()),
        Propagation::Slave => libc::MS_SLAVE,
        Propagation::Shared => libc::MS_SHARED,
    };
    mount_setattr(root, false, &MountAttr { propagation, ..MountAttr::default() })
        .at(STAGE, || "propagation of /".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(s: &[&str]) -> Vec<String> {
        s.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn options_of_the_classic_mount() {
        let mut root =
            RootFs { lower_dirs: strings(&["/l/a/fs", "/l/b:1,2/fs", "/l/c"]), ..RootFs::default() };
        root.upper_dir = "/u,1".into();
        root.work_dir = "/w".into();
        root.options = strings(&["volatile", "context=u:r:t:s0:c1,c2"]);
        let common = common_parent(&root.lower_dirs);
        assert_eq!(common, Path::new("/l"));
        assert_eq!(
            classic_options(&root, common).unwrap(),
            "lowerdir=a/fs:b\\:1\\,2/fs:c,upperdir=/u\\,1,workdir=/w,volatile,context=\"u:r:t:s0:c1,c2\""
        );
        assert_eq!(common_parent(&strings(&["/a/x", "/b/y"])), Path::new("/"));
        assert_eq!(common_parent(&strings(&["/a/b/c", "/a/b"])), Path::new("/a"));
        root.lower_dirs = (0..490).map(|n| format!("/l/{n:064}")).collect();
        assert!(classic_options(&root, Path::new("/l")).unwrap_err().message.contains("490 layers"));
    }

    #[test]
    fn bad_roots_are_refused() {
        let good = RootFs { lower_dirs: strings(&["/a"]), ..RootFs::default() };
        validate(&good).unwrap();
        for bad in [
            RootFs::default(),
            RootFs { lower_dirs: strings(&["a"]), ..RootFs::default() },
            RootFs { upper_dir: "/u".into(), ..good.clone() },
            RootFs { upper_dir: "/u".into(), work_dir: "w".into(), ..good.clone() },
            RootFs { lower_dirs: vec!["/a".to_owned(); 501], ..good.clone() },
            // They would be lost.
            RootFs { options: strings(&["context=u:r:t:s0"]), ..good },
        ] {
            assert!(validate(&bad).is_err(), "{bad:?}");
        }
    }
}
