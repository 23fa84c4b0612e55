//! The floor of an exec: what the kernel alone takes for a process in the namespaces and cgroups of a container.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};
use stave_sys::{Fork, ForkArgs};

use crate::procfs::child_with;

/// The first argument of the process that measures.
pub(crate) const ARGUMENT: &str = "floor";
const TRUE: &str = "/bin/true";

/// Runs `true` `count` times after the container that `supervisor` started, in a process of its own: it must have a
/// single thread, and does not come back from the container's namespaces. Gives the sorted times in ms.
pub(crate) fn measure(supervisor: u32, count: usize) -> Result<Vec<f64>> {
    let init = child_with(supervisor, TRUE).context("no container with the program to run")?;
    let output = Command::new("/proc/self/exe")
        .args([ARGUMENT, &init.to_string(), &count.to_string()])
        .output()
        .context("measuring the floor")?;
    ensure!(output.status.success(), "the floor: {}", String::from_utf8_lossy(&output.stderr));
    let mut times = Vec::new();
    for line in String::from_utf8(output.stdout)?.lines() {
        times.push(line.parse().with_context(|| line.to_owned())?);
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

/// That process: prints a time in ms for each run.
pub(crate) fn main(arguments: &[String]) -> Result<()> {
    let [init, count] = arguments else { bail!("usage: bench {ARGUMENT} PID COUNT") };
    let (pid, count): (i32, usize) = (init.parse()?, count.parse()?);
    let cgroups = Cgroups::of(pid)?;
    let pid = Pid::from_raw(pid).context("a pid")?;
    let init = pidfd_open(pid, PidfdFlags::empty())?;
    // As a supervisor does, it lives in these.
    setns(&init, CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)?;
    let command = [CString::new("true")?];
    let path = CString::new(TRUE)?;
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let begin = Instant::now();
        let mut cloned: Result<Fork> = Err(anyhow::anyhow!("the helper ended early"));
        stave_sys::help(|| cloned = clone(init.as_fd(), &cgroups, &path, &command))?;
        let Fork::Parent { pid, .. } = cloned? else { bail!("not the parent") };
        let pid = Pid::from_raw(pid).context("no pid")?;
        let status = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED)?.context("no status")?;
        ensure!(status.exit_status() == Some(0), "{status:?}");
        times.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    for time in times {
        println!("{time:.4}");
    }
    Ok(())
}

fn clone(init: BorrowedFd<'_>, cgroups: &Cgroups, path: &CString, command: &[CString]) -> Result<Fork> {
    setns(init, CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID)?;
    let args = ForkArgs { namespaces: 0, cgroup: cgroups.v2.as_ref().map(|dir| dir.as_fd()), sibling: true };
    match stave_sys::fork(&args)? {
        Fork::Child => match execute(init, cgroups, path, command) {
            Ok(never) => match never {},
            Err(_) => stave_sys::exit_now(1),
        },
        parent => Ok(parent),
    }
}

fn execute(
    init: BorrowedFd<'_>,
    cgroups: &Cgroups,
    path: &CString,
    command: &[CString],
) -> Result<Infallible> {
    for tasks in &cgroups.v1 {
        rustix::io::write(tasks, b"0")?;
    }
    setns(init, CloneFlags::CLONE_NEWCGROUP)?;
    Err(stave_sys::execve(path, command, &[]).into())
}

/// A process's cgroups.
struct Cgroups {
    /// `tasks` of each v1 hierarchy.
    v1: Vec<OwnedFd>,
    /// A directory.
    v2: Option<OwnedFd>,
}

impl Cgroups {
    fn of(pid: i32) -> Result<Self> {
        let mounts = fs::read_to_string("/proc/mounts")?;
        let mount = |kind: &str, controllers: &str| {
            mounts.lines().find_map(|line| {
                let fields: Vec<&str> = line.split(' ').collect();
                let [_, point, found, options, ..] = fields[..] else { return None };
                let has = |one: &str| options.split(',').any(|option| option == one);
                (found == kind && controllers.split(',').all(|one| one.is_empty() || has(one)))
                    .then(|| PathBuf::from(point))
            })
        };
        let mut cgroups = Self { v1: Vec::new(), v2: None };
        for line in fs::read_to_string(format!("/proc/{pid}/cgroup"))?.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            let kind = if controllers.is_empty() { "cgroup2" } else { "cgroup" };
            let Some(mount) = mount(kind, controllers) else { continue };
            let dir = mount.join(Path::new(path).strip_prefix("/")?);
            if kind == "cgroup2" {
                cgroups.v2 = Some(File::open(&dir).with_context(|| dir.display().to_string())?.into());
            } else {
                let tasks = dir.join("tasks");
                let file = OpenOptions::new().write(true).open(&tasks);
                cgroups.v1.push(file.with_context(|| tasks.display().to_string())?.into());
            }
        }
        Ok(cgroups)
    }
}
