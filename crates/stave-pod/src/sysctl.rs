//! Writing the pod's sysctls in the pod's namespaces.

use std::os::fd::OwnedFd;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use stave_supervisor_proto::v1::{Failure, SetUpPod};

use crate::failure;

const MAX_SYSCTLS: usize = 256;
const MAX_KEY: usize = 256;
/// Most that the kernel takes of a sysctl in one write.
const MAX_VALUE: usize = 4096;

/// The namespace that a sysctl belongs to. All others belong to the node, and no pod sets them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Namespace {
    Network,
    Ipc,
    Uts,
}

/// Refuses sysctls that can't be the pod's own, before anything is changed.
pub(crate) fn check(request: &SetUpPod) -> Result<(), Failure> {
    if request.sysctls.len() > MAX_SYSCTLS {
        return Err(failure::invalid(format!(
            "{} sysctls are over the limit of {MAX_SYSCTLS}",
            request.sysctls.len()
        )));
    }
    for (key, value) in &request.sysctls {
        let refuse = |why: &str| Err(failure::invalid(format!("sysctl {key:?}: {why}")));
        if key.len() > MAX_KEY || !is_dotted_name(key) {
            return refuse("not a name in dotted form");
        }
        if value.len() > MAX_VALUE || value.contains('\0') {
            return refuse("the value is too long or has a NUL");
        }
        match namespace(key) {
            None => return refuse("it belongs to the node, not to a namespace"),
            Some(Namespace::Network) if !request.new_network_namespace => {
                return refuse("the pod uses the node's network namespace");
            }
            Some(Namespace::Ipc) if !request.new_ipc_namespace => {
                return refuse("the pod uses the node's IPC namespace");
            }
            Some(Namespace::Uts) if !request.new_uts_namespace => {
                return refuse("the pod uses the node's UTS namespace");
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Writes these, name and value. The namespaces are the caller's.
pub(crate) fn write_all<'a>(
    sysctls: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> Result<(), Failure> {
    let mut sysctls = sysctls.into_iter().peekable();
    if sysctls.peek().is_none() {
        return Ok(());
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, "/proc/sys", flags, Mode::empty())
        .map_err(|errno| failure::system("open /proc/sys", errno))?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    // On the way down the kernel goes through the entries of all network namespaces: those of one directory share it.
    let mut last: Option<(String, OwnedFd)> = None;
    for (key, value) in sysctls {
        let (dir, name) = key.rsplit_once('.').unwrap_or(("", key));
        let mut write = || {
            let opened = match last.take().filter(|(of, _)| of == dir) {
                Some((_, opened)) => opened,
                None => rustix::fs::openat2(&root, dir.replace('.', "/"), flags, Mode::empty(), resolve)?,
            };
            let (_, opened) = last.insert((dir.to_owned(), opened));
            let file =
                rustix::fs::openat2(opened, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty(), resolve)?;
            match rustix::io::write(&file, value.as_bytes())? {
                count if count == value.len() => Ok(()),
                _ => Err(Errno::IO),
            }
        };
        write().map_err(|errno| failure::system(format!("sysctl {key:?}: write {value:?}"), errno))?;
    }
    Ok(())
}

fn is_dotted_name(key: &str) -> bool {
    key.split('.').all(|part| {
        !part.is_empty()
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
    })
}

/// As the documentation of sysctls and ipc_namespaces(7), uts_namespaces(7) have it.
fn namespace(key: &str) -> Option<Namespace> {
    const IPC: [&str; 11] = [
        "kernel.auto_msgmni",
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.msg_next_id",
        "kernel.sem",
        "kernel.sem_next_id",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    if key.starts_with("net.") {
        Some(Namespace::Network)
    } else if key.starts_with("fs.mqueue.") || key == "kernel.shm_next_id" || IPC.contains(&key) {
        Some(Namespace::Ipc)
    } else if key == "kernel.domainname" || key == "kernel.hostname" {
        Some(Namespace::Uts)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(key: &str, own: bool) -> SetUpPod {
        SetUpPod {
            new_network_namespace: own,
            new_ipc_namespace: own,
            new_uts_namespace: own,
            sysctls: [(key.to_owned(), "1".to_owned())].into(),
            ..Default::default()
        }
    }

    #[test]
    fn only_what_belongs_to_the_pod() {
        for key in ["net.ipv4.ip_forward", "kernel.shmmax", "fs.mqueue.msg_max", "kernel.domainname"] {
            assert!(check(&request(key, true)).is_ok(), "{key}");
            let refusal = check(&request(key, false)).expect_err("the node's");
            assert!(refusal.message.contains("the pod uses the node's"), "{}", refusal.message);
        }
        for key in ["kernel.panic", "vm.swappiness", "fs.file-max", "kernel.core_pattern", "network.x"] {
            assert!(check(&request(key, true)).is_err(), "{key}");
        }
    }

    #[test]
    fn no_key_leaves_its_directory() {
        for key in
            ["", ".", "..", "net..ip", "net.ipv4/../../kernel.panic", "net.", ".net", "net.ip v4", "net.a\0"]
        {
            assert!(check(&request(key, true)).is_err(), "{key:?}");
        }
        let mut long = request("net.ipv4.ip_forward", true);
        long.sysctls.insert("net.x".into(), "1".repeat(5000));
        assert!(check(&long).is_err());
    }
}
