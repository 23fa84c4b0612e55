use std::fs;
use std::io;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

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

/// Writes a value. One that is there already is fine where /proc/sys is read-only.
pub(crate) fn write(name: &str, value: &str) -> Result<(), NetworkError> {
    let (dir, file) = name.rsplit_once('/').unwrap_or((".", name));
    write_all(dir, &[(file, value)])
}

/// Writes settings of one directory of `/proc/sys/net`, which is looked up once: on the way to it the kernel goes through the
/// entries of that name of all network namespaces (proc_sys_compare).
fn write_all(dir: &str, settings: &[(&str, &str)]) -> Result<(), NetworkError> {
    let fail =
        |call, path: String| move |errno: Errno| NetworkError::Sysctl { call, path, source: errno.into() };
    let path = format!("/proc/sys/net/{dir}");
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = openat(CWD, &path, flags, Mode::empty()).map_err(fail("open", path))?;
    for (file, value) in settings {
        let written = openat(&opened, *file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .and_then(|file| rustix::io::write(&file, value.as_bytes()));
        match written {
            Err(Errno::ROFS | Errno::ACCESS)
                if read(&format!("{dir}/{file}"))?.as_deref() == Some(*value) => {}
            written => {
                written.map_err(fail("write", format!("/proc/sys/net/{dir}/{file}")))?;
            }
        }
    }
    Ok(())
}

/// Whether the kernel speaks IPv6.
pub(crate) fn has_ipv6() -> bool {
    fs::exists("/proc/sys/net/ipv6").unwrap_or(false)
}

/// Writes IPv6 settings of an interface, which a kernel without IPv6 does not need.
pub(crate) fn write_ipv6(interface: &str, settings: &[(&str, &str)]) -> Result<(), NetworkError> {
    match write_all(&format!("ipv6/conf/{interface}"), settings) {
        Err(NetworkError::Sysctl { source, .. })
            if source.kind() == io::ErrorKind::NotFound && !has_ipv6() =>
        {
            Ok(())
        }
        result => result,
    }
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
