//! The files of a pod: made by the daemon, mounted into its containers.

use std::ffi::CString;
use std::fs;
use std::io::Read as _;
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags};
use stave_cri_proto::v1 as cri;
use stave_supervisor_proto::v1 as proto;

use crate::error::{Error, Result};

/// Most bytes of the host's resolv.conf and hosts files that are taken over.
const HOST_FILE_MAX: u64 = 1 << 20;

pub(crate) const RESOLV_CONF: &str = "resolv.conf";
pub(crate) const HOSTS: &str = "hosts";
pub(crate) const HOSTNAME: &str = "hostname";
pub(crate) const SHM: &str = "shm";
pub(crate) const SOCKET: &str = "supervisor.sock";
pub(crate) const EXITS: &str = "exits";
pub(crate) const CONTAINERS: &str = "containers";
pub(crate) const SUPERVISOR_LOG: &str = "supervisor.log";

/// Makes the pod's directory and those in it. What is there is kept.
pub(crate) fn make_dirs(dir: &Path) -> Result<()> {
    for sub in [dir.to_owned(), dir.join(EXITS), dir.join(CONTAINERS)] {
        stave_state::private_dir(&sub)
            .map_err(|e| Error::internal(format_args!("pod directory {}: mkdir", dir.display()), e))?;
    }
    Ok(())
}

/// Makes the pod's directory and what is in it. `shm`: with a /dev/shm of its own, of so many bytes. `label`: the SELinux label of what
/// containers see of it.
///
/// What containers get of it belongs to root of the pod: the node's, or that of its user namespace.
pub(crate) fn make(
    dir: &Path,
    config: &cri::PodSandboxConfig,
    hostname: &str,
    shm: Option<u64>,
    label: Option<&str>,
) -> Result<()> {
    let (uid, gid) = root_of(config);
    let failed = |what: &str, e: &dyn std::fmt::Display| {
        Error::internal(format_args!("pod directory {}: {what}", dir.display()), e)
    };
    make_dirs(dir)?;
    let host_resolv_conf = read_host_file("/etc/resolv.conf").map_err(|e| failed("/etc/resolv.conf", &e))?;
    let hosts = read_host_file("/etc/hosts").map_err(|e| failed("/etc/hosts", &e))?;
    let host_resolv_conf = String::from_utf8_lossy(&host_resolv_conf);
    let resolv_conf = stave_spec::resolv_conf(config.dns_config.as_ref(), &host_resolv_conf);
    let files = [
        (RESOLV_CONF, resolv_conf.into_bytes()),
        (HOSTS, hosts),
        (HOSTNAME, format!("{hostname}\n").into_bytes()),
    ];
    for (name, content) in files {
        // Readable by all: processes in containers run as any user.
        fs::write(dir.join(name), content).map_err(|e| failed(name, &e))?;
        rustix::fs::chmod(dir.join(name), rustix::fs::Mode::from_raw_mode(0o644))
            .map_err(|e| failed(name, &e))?;
        if uid != 0 {
            std::os::unix::fs::chown(dir.join(name), Some(uid), Some(gid)).map_err(|e| failed(name, &e))?;
        }
    }
    if let Some(label) = label {
        crate::selinux::label_pod_files(dir, label)?;
    }
    if let Some(size) = shm {
        let path = dir.join(SHM);
        fs::create_dir(&path).map_err(|e| failed("shm", &e))?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        // The label has commas in it.
        let context = label.map(|label| format!(",context=\"{label}\"")).unwrap_or_default();
        let options = CString::new(format!("mode=1777,size={size},uid={uid},gid={gid}{context}"));
        let options = options.map_err(|e| failed("shm", &e))?;
        rustix::mount::mount("shm", &path, "tmpfs", flags, options.as_c_str())
            .map_err(|e| failed("mount of shm", &e))?;
    }
    Ok(())
}

/// The node's ids of user and group 0 in the pod's containers.
pub(crate) fn root_of(config: &cri::PodSandboxConfig) -> (u32, u32) {
    let first = |maps: &[proto::IdMapping]| maps.first().map_or(0, |map| map.host_id);
    stave_spec::user_namespace(config).map_or((0, 0), |user| (first(&user.uids), first(&user.gids)))
}

/// Unmounts what [`make`] mounted; nothing there is success.
pub(crate) fn unmount(dir: &Path) -> Result<()> {
    let path = dir.join(SHM);
    match rustix::mount::unmount(&path, UnmountFlags::DETACH) {
        // EINVAL: not a mount point.
        Ok(()) | Err(rustix::io::Errno::NOENT | rustix::io::Errno::INVAL) => Ok(()),
        Err(e) => Err(Error::internal(format_args!("unmounting {}", path.display()), e)),
    }
}

/// The node's hostname.
pub(crate) fn node_hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Bytes: a comment in another encoding is no reason to run no pods.
fn read_host_file(path: &str) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    match fs::File::open(path) {
        Ok(file) => file.take(HOST_FILE_MAX).read_to_end(&mut text).map(|_| text),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(text),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_host_are_taken_in_any_encoding() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hosts");
        let text = b"127.0.0.1 localhost # b\xfcro\n";
        fs::write(&path, text).unwrap();
        assert_eq!(read_host_file(path.to_str().unwrap()).unwrap(), text);
        assert!(read_host_file(dir.path().join("none").to_str().unwrap()).unwrap().is_empty());
    }
}
