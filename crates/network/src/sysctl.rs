use std::fs;
use std::io;

use crate::NetworkError;

/// Reads `/proc/sys/net/<name>` of the calling thread's network namespace; none if the kernel lacks it.
pub(crate) fn read(name: &str) -> Result<Option<String>, NetworkError> {
    let path = format!("/proc/sys/net/{name}");
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(NetworkError::Sysctl { call: "read", path, source }),
    }
}

/// Writes a value unless it is there already: /proc/sys may be read-only, and set right.
pub(crate) fn write(name: &str, value: &str) -> Result<(), NetworkError> {
    if read(name)?.as_deref() == Some(value) {
        return Ok(());
    }
    let path = format!("/proc/sys/net/{name}");
    // Not `fs::write`: it asks for a truncation and may create.
    fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()))
        .map_err(|source| NetworkError::Sysctl { call: "write", path, source })
}

/// Whether the kernel speaks IPv6.
pub(crate) fn has_ipv6() -> bool {
    fs::exists("/proc/sys/net/ipv6").unwrap_or(false)
}

/// Like `write`, for IPv6 settings that a kernel without IPv6 does not need.
pub(crate) fn write_ipv6(name: &str, value: &str) -> Result<(), NetworkError> {
    if has_ipv6() { write(name, value) } else { Ok(()) }
}

/// Switches IPv6 forwarding on. A forwarding host ignores router advertisements unless an interface's `accept_ra` is 2:
/// those that listened go on listening, or the host would lose its default route.
pub(crate) fn forward_ipv6() -> Result<(), NetworkError> {
    if read("ipv6/conf/all/forwarding")?.as_deref() == Some("1") {
        return Ok(());
    }
    let entries = fs::read_dir("/proc/sys/net/ipv6/conf").map_err(|source| NetworkError::Sysctl {
        call: "read",
        path: "/proc/sys/net/ipv6/conf".into(),
        source,
    })?;
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        if name == "all" || name == "default" || name == "lo" {
            continue;
        }
        let forwards = read(&format!("ipv6/conf/{name}/forwarding"))?.as_deref() == Some("1");
        if !forwards && read(&format!("ipv6/conf/{name}/accept_ra"))?.as_deref() == Some("1") {
            write(&format!("ipv6/conf/{name}/accept_ra"), "2")?;
        }
    }
    write("ipv6/conf/all/forwarding", "1")
}
