//! What is mounted in a container.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;
use stave_cri_proto::v1 as cri;

use crate::text::{absolute, at_most, clean, is_at_or_below};
use crate::{ContainerFacts, Host, ImageVolume, MountPeers, SpecError, user_namespace};

/// The mounts of a container, in the order that they are made.
pub(crate) struct Mounts {
    pub(crate) list: Vec<Mount>,
    /// OCI `rootfsPropagation`: "" (private), "rslave" or "rshared".
    pub(crate) root_propagation: &'static str,
    /// Cleaned destinations of the request's mounts.
    pub(crate) requested: Vec<String>,
    /// Which of `list` are images: index, layers from the top, sub path.
    pub(crate) images: Vec<(usize, Vec<String>, String)>,
}

/// One mount of the request, on its way into the list.
struct Requested {
    mount: Mount,
    propagation: cri::MountPropagation,
    /// Layers and sub path of an image.
    image: Option<(Vec<String>, String)>,
}

/// Defaults, the pod's files and the request's mounts. A default gives way to a request for its path.
pub(crate) fn mounts(
    f: &ContainerFacts<'_>,
    privileged: bool,
    readonly_rootfs: bool,
) -> Result<Mounts, SpecError> {
    at_most("config.mounts", f.config.mounts.len(), 4096)?;
    let mut root_propagation = "";
    let mut wanted = Vec::with_capacity(f.config.mounts.len());
    for (i, mount) in f.config.mounts.iter().enumerate() {
        let field = format!("config.mounts[{i}]");
        let one = match &mount.image {
            Some(image) => {
                // They are idmapped as all images of the pod's containers.
                user_namespace::idmapped(&field, mount, f.pod.config)?;
                image_volume(&field, mount, image, f.image_volumes.iter().find(|v| v.mount == i))?
            }
            None => requested(&field, mount, f.host, f.pod.config)?,
        };
        let propagation = one.propagation;
        if propagation == cri::MountPropagation::PropagationBidirectional {
            root_propagation = "rshared";
        } else if propagation == cri::MountPropagation::PropagationHostToContainer
            && root_propagation.is_empty()
        {
            root_propagation = "rslave";
        }
        wanted.push(one);
    }
    let requested: Vec<String> = wanted.iter().map(|one| destination(&one.mount)).collect();
    let dev = requested.iter().any(|path| path == "/dev");

    let mut list = defaults(privileged, user_namespace::has_gid(f.pod.config, TTY));
    list.retain(|mount| {
        let path = destination(mount);
        // With the host's /dev in the container, its own devpts and mqueue are what is wanted.
        let hidden = dev && is_at_or_below(&path, "/dev");
        !hidden && !requested.contains(&path)
    });
    let mut later: Vec<_> = pod_files(f, readonly_rootfs).into_iter().map(|mount| (mount, None)).collect();
    later.retain(|(mount, _)| !requested.contains(&destination(mount)));
    later.extend(wanted.into_iter().map(|one| (one.mount, one.image)));
    // Parents before children; what is asked for in an order stays in it (the sort is stable).
    later.sort_by_cached_key(|(mount, _)| {
        destination(mount).split('/').filter(|part| !part.is_empty()).count()
    });
    let mut images = Vec::new();
    for (mount, image) in later {
        images.extend(image.map(|(layers, sub_path)| (list.len(), layers, sub_path)));
        list.push(mount);
    }
    Ok(Mounts { list, root_propagation, requested, images })
}

/// Destination of a mount as text; all of ours are.
pub(crate) fn destination(mount: &Mount) -> String {
    mount.destination().to_string_lossy().into_owned()
}

fn new(destination: &str, kind: &str, source: &Path, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(PathBuf::from(destination))
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(source.to_owned()))
        .set_options(Some(options.iter().map(|o| (*o).to_owned()).collect()));
    mount
}

/// The group of terminals.
const TTY: u32 = 5;

/// The file systems of every container. `tty`: there is a group of terminals.
fn defaults(privileged: bool, tty: bool) -> Vec<Mount> {
    let mode = if privileged { "rw" } else { "ro" };
    let kernel = |path, kind: &str, options: &[&str]| new(path, kind, Path::new(kind), options);
    let pts = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"];
    vec![
        kernel("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        kernel("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        kernel("/dev/pts", "devpts", if tty { &pts } else { &pts[..5] }),
        kernel("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        kernel("/sys", "sysfs", &["nosuid", "noexec", "nodev", mode]),
        kernel("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", mode]),
    ]
}

/// Files and shared memory of the pod.
fn pod_files(f: &ContainerFacts<'_>, readonly_rootfs: bool) -> Vec<Mount> {
    let mode = if readonly_rootfs { "ro" } else { "rw" };
    let file = |path, source| new(path, "bind", source, &["bind", "rprivate", mode]);
    let shm = match f.pod.shm {
        Some(shm) => new("/dev/shm", "bind", shm, &["rbind", "rprivate", "rw", "nosuid", "nodev", "noexec"]),
        None => new("/dev/shm", "bind", Path::new("/dev/shm"), &["rbind", "rprivate", "rw"]),
    };
    vec![
        file("/etc/hostname", f.pod.hostname_file),
        file("/etc/hosts", f.pod.hosts),
        file("/etc/resolv.conf", f.pod.resolv_conf),
        shm,
    ]
}

/// One mount of the request.
fn requested(
    field: &str,
    mount: &cri::Mount,
    host: &dyn Host,
    pod: &cri::PodSandboxConfig,
) -> Result<Requested, SpecError> {
    let at = |name: &str| format!("{field}.{name}");
    let path = container_path(&at("container_path"), mount)?;
    if !mount.image_sub_path.is_empty() {
        return Err(SpecError::invalid(at("image_sub_path"), &mount.image_sub_path, "needs an image"));
    }
    if mount.host_path.is_empty() {
        return Err(SpecError::invalid(at("host_path"), "", "is required"));
    }
    absolute(&at("host_path"), &mount.host_path)?;
    let idmapped = user_namespace::idmapped(field, mount, pod)?;
    let propagation = cri::MountPropagation::try_from(mount.propagation).map_err(|_| {
        SpecError::invalid(at("propagation"), mount.propagation, "is not a propagation of the CRI")
    })?;
    if mount.recursive_read_only {
        let needs = if !mount.readonly {
            Some("needs readonly")
        } else if propagation != cri::MountPropagation::PropagationPrivate {
            Some("needs the propagation PROPAGATION_PRIVATE")
        } else {
            None
        };
        if let Some(needs) = needs {
            return Err(SpecError::invalid(at("recursive_read_only"), true, needs));
        }
    }
    let refused =
        |error: std::io::Error| SpecError::precondition(at("host_path"), &mount.host_path, error.to_string());
    let source = Path::new(&mount.host_path);
    if !host.exists(source).map_err(refused)? {
        return Err(SpecError::invalid(at("host_path"), &mount.host_path, "does not exist on the host"));
    }
    let peers = match propagation {
        cri::MountPropagation::PropagationPrivate => MountPeers::default(),
        _ => host.mount_peers(source).map_err(refused)?,
    };
    let option = match propagation {
        cri::MountPropagation::PropagationPrivate => "rprivate",
        cri::MountPropagation::PropagationHostToContainer if peers.shared || peers.slave => "rslave",
        cri::MountPropagation::PropagationBidirectional if peers.shared => "rshared",
        cri::MountPropagation::PropagationHostToContainer => {
            let message = "is not on a shared or slave mount, which PROPAGATION_HOST_TO_CONTAINER needs";
            return Err(SpecError::precondition(at("host_path"), &mount.host_path, message));
        }
        cri::MountPropagation::PropagationBidirectional => {
            let message = "is not on a shared mount, which PROPAGATION_BIDIRECTIONAL needs";
            return Err(SpecError::precondition(at("host_path"), &mount.host_path, message));
        }
    };
    let mode = match (mount.readonly, mount.recursive_read_only) {
        (_, true) => "rro",
        (true, false) => "ro",
        (false, false) => "rw",
    };
    let mut new = new(&path, "bind", source, &["rbind", option, mode]);
    if let Some(user) = user_namespace::user_namespace(pod).filter(|_| idmapped) {
        new.set_uid_mappings(Some(user_namespace::to_oci(&user.uids)))
            .set_gid_mappings(Some(user_namespace::to_oci(&user.gids)));
    }
    Ok(Requested { mount: new, propagation, image: None })
}

fn container_path(field: &str, mount: &cri::Mount) -> Result<String, SpecError> {
    absolute(field, &mount.container_path)?;
    let path = clean(&mount.container_path);
    if path == "/" {
        return Err(SpecError::invalid(field, &mount.container_path, "would cover everything"));
    }
    Ok(path)
}

/// A mount of an image: what is in its layers, read-only. Programs in it may be executed; its device nodes,
/// should it have any, stay without effect.
fn image_volume(
    field: &str,
    mount: &cri::Mount,
    image: &cri::ImageSpec,
    found: Option<&ImageVolume>,
) -> Result<Requested, SpecError> {
    let at = |name: &str| format!("{field}.{name}");
    let path = container_path(&at("container_path"), mount)?;
    if !mount.host_path.is_empty() {
        return Err(SpecError::invalid(at("host_path"), &mount.host_path, "must be empty with an image"));
    }
    if !mount.readonly {
        return Err(SpecError::invalid(at("readonly"), false, "must be true with an image"));
    }
    let private = cri::MountPropagation::PropagationPrivate;
    if mount.propagation != private as i32 {
        return Err(SpecError::invalid(
            at("propagation"),
            mount.propagation,
            "an image has nothing to propagate",
        ));
    }
    let sub_path = &mount.image_sub_path;
    if sub_path.starts_with('/') || sub_path.len() > 4095 || sub_path.split('/').any(|part| part == "..") {
        let message = "must be a path in the image, relative and without \"..\"";
        return Err(SpecError::invalid(at("image_sub_path"), sub_path, message));
    }
    crate::text::no_nul(&at("image_sub_path"), sub_path)?;
    let name = &image.image;
    let found = found.ok_or_else(|| {
        SpecError::new(crate::Code::NotFound, at("image.image"), name, "no such image; pull it first")
    })?;
    let layers: Vec<String> = found.lower_dirs.iter().map(|dir| dir.to_string_lossy().into_owned()).collect();
    if layers.is_empty() {
        return Err(SpecError::precondition(at("image.image"), name, "the image has no layers"));
    }
    let lower = format!("lowerdir={}", layers.join(":"));
    let new = new(&path, "overlay", Path::new("overlay"), &["ro", "nodev", &lower]);
    Ok(Requested { mount: new, propagation: private, image: Some((layers, sub_path.clone())) })
}

/// The image's volumes that nothing is mounted on, as directories to make. A ".." would reach out of
/// the volume (CVE-2022-23648).
pub(crate) fn directories(volumes: &[String], mounts: &Mounts) -> Result<Vec<String>, SpecError> {
    let field = "image.volumes";
    at_most(field, volumes.len(), 1024)?;
    let mounted: Vec<String> = mounts.list.iter().map(destination).collect();
    let mut directories = Vec::new();
    for volume in volumes {
        // Old builders wrote relative ones; they are meant from the root.
        let path = if volume.starts_with('/') { volume.clone() } else { format!("/{volume}") };
        crate::text::absolute_without_dotdot(field, &path)
            .map_err(|e| SpecError::invalid(field, volume, e.message))?;
        let path = clean(&path);
        let covered = mounted.iter().any(|mount| is_at_or_below(&path, mount));
        if path != "/" && !covered && !directories.contains(&path) {
            directories.push(path);
        }
    }
    directories.sort();
    Ok(directories)
}
