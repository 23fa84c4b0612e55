//! seccomp and the security modules.

use std::fs;
use std::io;
use std::path::Path;

use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountFlags, MountPropagationFlags};

use crate::report::HostReport;
use crate::scratch::{ScratchDir, in_thread};

pub(crate) fn probe(report: &mut HostReport, compile_profile: Option<Option<&Path>>) {
    seccomp(report);
    let modules = active_modules();
    let names = |modules: &io::Result<String>| match modules {
        Ok(list) => format!("active modules: {list}"),
        Err(error) => format!("list of modules unreadable: {error}"),
    };
    let found = names(&modules);
    let has = |name: &str| modules.as_ref().is_ok_and(|list| list.split(',').any(|module| module == name));

    let apparmor = has("apparmor") && stave_lsm::apparmor::enabled();
    // Compiled in but without a policy, SELinux has no file system and no labels.
    let selinux = Path::new("/sys/fs/selinux/enforce").exists();
    let landlock = has("landlock");
    report.features.apparmor = apparmor;
    report.features.selinux = selinux;
    report.features.landlock = landlock;

    let confined = apparmor || selinux;
    module(report, "AppArmor", apparmor, confined, &found, "pods that name an AppArmor profile are refused");
    if apparmor && let Some(file) = compile_profile {
        default_profile(report, file);
    }
    let selinux_found = match fs::read_to_string("/sys/fs/selinux/enforce") {
        Ok(text) if text.trim() == "1" => "enforcing".to_owned(),
        Ok(_) => "permissive".to_owned(),
        Err(_) => found.clone(),
    };
    module(report, "SELinux", selinux, confined, &selinux_found, "SELinux options of pods have no effect");
    if landlock {
        report.ok("Landlock", found);
    } else {
        report.degraded("Landlock", found, "programs in containers can't confine themselves with it");
    }
}

/// What the daemon loads at its start. Here it is only compiled.
fn default_profile(report: &mut HostReport, file: Option<&Path>) {
    const NAME: &str = "AppArmor profile";
    const COST: &str =
        "pods that ask for the runtime's default profile are refused, those that ask for none run unconfined";
    match stave_lsm::apparmor::check_default(file) {
        Ok(()) => {
            let from = file.map_or_else(|| "built in".to_owned(), |file| file.display().to_string());
            report.ok(NAME, format!("{}, {from}", stave_lsm::apparmor::DEFAULT_PROFILE));
        }
        Err(error) => report.degraded(NAME, error.to_string(), COST),
    }
}

/// Hosts have one of AppArmor and SELinux: the lack of the other is told, but no fault.
fn module(
    report: &mut HostReport,
    name: &'static str,
    active: bool,
    confined: bool,
    found: &str,
    cost: &'static str,
) {
    if active {
        report.ok(name, found);
    } else if confined {
        report.ok_with_cost(name, format!("not active; {found}"), cost);
    } else {
        report.degraded(name, format!("not active; {found}"), cost);
    }
}

/// The list of active security modules. Where securityfs isn't mounted, it is mounted for a
/// moment in a mount namespace of its own.
fn active_modules() -> io::Result<String> {
    if let Ok(list) = fs::read_to_string("/sys/kernel/security/lsm") {
        return Ok(list.trim().to_owned());
    }
    let scratch = ScratchDir::near(&std::env::temp_dir())?;
    in_thread(|| {
        unshare(CloneFlags::CLONE_NEWNS)?;
        rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        rustix::mount::mount("securityfs", scratch.path(), "securityfs", MountFlags::RDONLY, None)?;
        let list = fs::read_to_string(scratch.path().join("lsm"));
        rustix::mount::unmount(scratch.path(), rustix::mount::UnmountFlags::DETACH)?;
        Ok(list?.trim().to_owned())
    })
}

fn seccomp(report: &mut HostReport) {
    const NAME: &str = "seccomp";
    const COST: &str = "containers run without a system call filter; pods that name a profile are refused";
    match fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail") {
        Ok(text) => {
            let actions: Vec<&str> = text.split_ascii_whitespace().collect();
            let lacking: Vec<&str> =
                ["errno", "kill_process", "log"].into_iter().filter(|name| !actions.contains(name)).collect();
            report.features.seccomp = lacking.is_empty();
            report.features.seccomp_notify = actions.contains(&"user_notif");
            if lacking.is_empty() {
                report.ok(NAME, format!("actions {}", actions.join(", ")));
            } else {
                report.degraded(NAME, format!("actions {} lack", lacking.join(", ")), COST);
            }
        }
        Err(error) => report.degraded(NAME, format!("/proc/sys/kernel/seccomp: {error}"), COST),
    }
}
