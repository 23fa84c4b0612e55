//! Ending a process with all that it has started.
//!
//! A runtime's own helpers, and what is executed in a container by a runtime, are in no cgroup of their own. So
//! the descendants are looked for in /proc, and stopped before they are killed, so that none escapes by forking. A
//! process that has left both its parent and its session is not found.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Times that they are looked for; one more than generations that fork while they are found.
const ROUNDS: usize = 8;

/// A line of /proc/PID/stat, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    parent: i32,
    session: i32,
    started: u64,
}

/// SIGKILL to a child of ours that is not reaped yet, and to all of its descendants.
pub(crate) fn kill_tree(pid: i32, pidfd: BorrowedFd<'_>) {
    // Errors: it has ended, and there is nothing to stop or kill.
    let _ = pidfd_send_signal(pidfd, Signal::STOP);
    let mut found: BTreeMap<i32, OwnedFd> = BTreeMap::new();
    for _ in 0..ROUNDS {
        let all = near(pid).unwrap_or_else(processes);
        let mut new = false;
        for member in members(pid, &all) {
            if member == pid || found.contains_key(&member) {
                continue;
            }
            let opened = Pid::from_raw(member).and_then(|raw| pidfd_open(raw, PidfdFlags::empty()).ok());
            // The number may have been given to another process since.
            if let Some(opened) = opened
                && all.get(&member).map(|stat| stat.started) == stat(member).map(|stat| stat.started)
            {
                let _ = pidfd_send_signal(&opened, Signal::STOP);
                found.insert(member, opened);
                new = true;
            }
        }
        if !new {
            break;
        }
    }
    for descendant in found.values() {
        let _ = pidfd_send_signal(descendant, Signal::KILL);
    }
    let _ = pidfd_send_signal(pidfd, Signal::KILL);
}

/// `root`, its descendants, and its session if it leads one.
fn members(root: i32, all: &BTreeMap<i32, Stat>) -> BTreeSet<i32> {
    let mut members = BTreeSet::from([root]);
    loop {
        let before = members.len();
        for (pid, stat) in all {
            if stat.session == root || members.contains(&stat.parent) {
                members.insert(*pid);
            }
        }
        if members.len() == before {
            return members;
        }
    }
}

/// The processes among which those are, at no more cost than they are many: nobody waits for a node's whole /proc. What
/// has lost its parent is a child of ours, or of the first process of a PID namespace, which is one of our children.
/// None without the kernel's CONFIG_PROC_CHILDREN.
fn near(root: i32) -> Option<BTreeMap<i32, Stat>> {
    if !std::path::Path::new("/proc/thread-self/children").exists() {
        return None;
    }
    let ours = children(i32::try_from(std::process::id()).ok()?);
    let orphans = ours.iter().flat_map(|child| children(*child)).chain(ours.iter().copied());
    let in_session = |pid: &i32| stat(*pid).is_some_and(|stat| stat.session == root);
    let mut queue: Vec<i32> = orphans.filter(in_session).chain([root]).collect();
    let mut all = BTreeMap::new();
    while let Some(pid) = queue.pop() {
        if let Some(stat) = stat(pid)
            && all.insert(pid, stat).is_none()
        {
            queue.extend(children(pid));
        }
    }
    Some(all)
}

/// Children of all threads of a process (proc_pid_task_children(5)).
fn children(pid: i32) -> Vec<i32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// Where there is no other way.
fn processes() -> BTreeMap<i32, Stat> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return BTreeMap::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid| Some((pid, stat(pid)?))).collect()
}

fn stat(pid: i32) -> Option<Stat> {
    parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// proc_pid_stat(5): the name in parentheses may hold anything.
fn parse(text: &str) -> Option<Stat> {
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
    // state ppid pgrp session ... starttime: fields 3, 4, 5, 6 and 22.
    let parent = fields.nth(1)?.parse().ok()?;
    let session = fields.nth(1)?.parse().ok()?;
    let started = fields.nth(15)?.parse().ok()?;
    Some(Stat { parent, session, started })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn lines_of_proc() {
        let line = "7 (a) b) S 3 7 5 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 4711 9 9";
        assert_eq!(parse(line), Some(Stat { parent: 3, session: 5, started: 4711 }));
        assert_eq!(parse("7 (a"), None);
        assert_eq!(stat(std::process::id() as i32).map(|stat| stat.started > 0), Some(true));
    }

    #[test]
    fn descendants_and_the_session() {
        let stat = |parent, session| Stat { parent, session, started: 1 };
        let all = BTreeMap::from([
            (10, stat(1, 10)),
            (11, stat(10, 10)),
            (12, stat(11, 12)),
            (13, stat(1, 10)),
            (20, stat(1, 20)),
        ]);
        assert_eq!(members(10, &all), BTreeSet::from([10, 11, 12, 13]));
    }

    #[test]
    fn an_orphan_is_known_by_its_session() {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
        let mut child = std::process::Command::new("setsid")
            .args(["/bin/sh", "-c", "(sleep 1000 &); echo on; exec sleep 1000"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut byte = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
        let pid = child.id() as i32;
        let found = members(pid, &near(pid).expect("CONFIG_PROC_CHILDREN"));
        let orphan = found.iter().copied().find(|member| *member != pid).expect("the orphan");
        assert_ne!(stat(orphan).unwrap().parent, pid);
        let pidfd = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
        kill_tree(pid, pidfd.as_fd());
        child.wait().unwrap();
        let options = rustix::process::WaitOptions::empty();
        let (_, status) = rustix::process::waitpid(Pid::from_raw(orphan), options).unwrap().unwrap();
        assert_eq!(status.terminating_signal(), Some(9));
    }

    #[test]
    fn nothing_of_a_tree_is_left() {
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", "sleep 1000 & (setsid sleep 1000 & exec sleep 1000) & echo on; wait"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut byte = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(100));
        let pid = child.id() as i32;
        let before = members(pid, &processes());
        assert!(before.len() >= 3, "{before:?}");
        assert_eq!(members(pid, &near(pid).expect("CONFIG_PROC_CHILDREN")), before);
        let pidfd = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
        kill_tree(pid, pidfd.as_fd());
        child.wait().unwrap();
        let alive = |pid: &&i32| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            !text.is_empty() && !text.contains(") Z ")
        };
        for _ in 0..100 {
            if before.iter().filter(alive).count() == 0 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        panic!("left: {:?}", before.iter().filter(alive).collect::<Vec<_>>());
    }
}
