//! The label of a security module that a process changes to with its execve.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::OFlags;
use stave_paths::open_own_proc;
use stave_supervisor_proto::v1::Process;
use stave_supervisor_proto::v1::failure::Kind;

use crate::error::{Context, Error, Result};

/// The kernel takes and gives at most a page.
const MAX: usize = 4095;
/// "exec NAME" is what AppArmor wants.
const EXEC: &str = "exec ";

/// What can be checked before anything is made.
pub(crate) fn validate(process: &Process) -> Result<()> {
    let fields = [("apparmor_profile", &process.apparmor_profile), ("selinux_label", &process.selinux_label)];
    for (field, value) in fields {
        if value.len() > MAX - EXEC.len() || value.chars().any(char::is_control) {
            return Err(Error::invalid("process", format!("{field}: {value:?} is no label")));
        }
    }
    Ok(())
}

/// Labels to be written, in files that are open already.
#[derive(Debug, Default)]
pub(crate) struct Labels(Vec<Label>);

#[derive(Debug)]
struct Label {
    stage: &'static str,
    /// attr/exec of the process. Only the process itself can write to it, and only until its execve.
    file: OwnedFd,
    content: String,
    wanted: String,
}

/// Opens the files of the calling process, which only it can write to then. Not the container's /proc is asked, whatever
/// that may be, but an instance of procfs of our own (CVE-2019-16884, CVE-2025-52881).
///
/// To be called before the mount namespace is the container's: in one that belongs to a user namespace the kernel makes a
/// procfs only while another is in full view (mount_too_revealing), and a volume at /proc is none.
pub(crate) fn open(process: &Process) -> Result<Labels> {
    let mut labels = Vec::new();
    let mut add = |stage, paths: &[&str], prefix, wanted: &String| {
        if !wanted.is_empty() {
            let file = open_first(stage, paths)?;
            labels.push(Label { stage, file, content: format!("{prefix}{wanted}"), wanted: wanted.clone() });
        }
        Ok::<_, Error>(())
    };
    // Kernels before 5.8 have no directory for each module.
    add("apparmor", &["attr/apparmor/exec", "attr/exec"], EXEC, &process.apparmor_profile)?;
    add("selinux", &["attr/exec"], "", &process.selinux_label)?;
    Ok(Labels(labels))
}

fn open_first(stage: &str, paths: &[&str]) -> Result<OwnedFd> {
    let mut last = Error::invalid(stage, "no file for the label");
    for path in paths {
        match open_own_proc(Path::new(path), OFlags::RDWR) {
            Ok(file) => return Ok(file),
            Err(e) => {
                let gone = e.is_not_found();
                last = Error::path(stage, format!("/proc/thread-self/{path}"), &e);
                if !gone {
                    break;
                }
            }
        }
    }
    Err(last)
}

impl Labels {
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(|label| label.file.as_fd())
    }

    /// Tells the kernel, and asks it whether it was understood: a process without its label must not start.
    pub(crate) fn write(&self) -> Result<()> {
        self.0.iter().try_for_each(Label::write)
    }
}

impl Label {
    fn write(&self) -> Result<()> {
        let what = || format!("label {:?}", self.wanted);
        // The profile was there at CreateContainer, or it is the policy that says no.
        let written = rustix::io::write(&self.file, self.content.as_bytes())
            .map_err(|e| Error::os(self.stage, what(), e).with_kind(Kind::FailedPrecondition))?;
        let set = read(self.file.as_fd()).at(self.stage, what)?;
        if written == self.content.len() && name(&set) == self.wanted {
            return Ok(());
        }
        Err(Error::invalid(self.stage, format!("{} was written, and the kernel says {set:?}", what())))
    }
}

fn read(file: BorrowedFd<'_>) -> rustix::io::Result<String> {
    let mut buffer = vec![0; MAX + 1];
    let n = rustix::io::pread(file, &mut buffer, 0)?;
    Ok(String::from_utf8_lossy(buffer.get(..n).unwrap_or_default()).into_owned())
}

/// Of what the kernel gives: SELinux ends it with a NUL, AppArmor with " (MODE)" and a newline.
fn name(set: &str) -> &str {
    let set = set.trim_end_matches(['\0', '\n']);
    match set.rfind(" (") {
        Some(end) if set.ends_with(')') => set.get(..end).unwrap_or(set),
        _ => set,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_gives() {
        for (given, wanted) in [
            ("stave-default (enforce)\n", "stave-default"),
            ("odd (1) name (complain)\n", "odd (1) name"),
            ("system_u:system_r:container_t:s0:c1,c2\0", "system_u:system_r:container_t:s0:c1,c2"),
            ("unconfined\n", "unconfined"),
            ("", ""),
        ] {
            assert_eq!(name(given), wanted);
        }
    }

    #[test]
    fn labels_are_one_line() {
        for bad in ["a\nb".to_owned(), "a\0".to_owned(), "x".repeat(MAX)] {
            for process in [
                Process { apparmor_profile: bad.clone(), ..Process::default() },
                Process { selinux_label: bad.clone(), ..Process::default() },
            ] {
                assert!(validate(&process).is_err(), "{bad:?}");
            }
        }
    }
}
