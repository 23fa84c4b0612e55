//! What /proc tells of processes.

use std::fs;
use std::path::Path;
use std::time::Duration;

pub(crate) fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The name that a process was started by; none for a supervisor that waits for its pod.
pub(crate) fn program(pid: u32) -> Option<String> {
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = command.split(|byte| *byte == 0);
    let first = words.next()?;
    if words.next() == Some(b"--ready") {
        return None;
    }
    let name = Path::new(std::str::from_utf8(first).ok()?).file_name()?;
    Some(name.to_string_lossy().into_owned())
}

/// The proportional set size in KiB: proc_pid_smaps(5).
pub(crate) fn pss(pid: u32) -> Option<u64> {
    let content = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = content.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// User and system time of a process, of its threads, and of the children that it has reaped: proc_pid_stat(5).
pub(crate) fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    // utime, stime, cutime, cstime; the state, field 3, is the first here. 100 ticks a second on all of Linux.
    let ticks: u64 = fields.get(11..15)?.iter().map(|field| field.parse().unwrap_or(0)).sum();
    Some(Duration::from_millis(10 * ticks))
}

/// Its children, at most a few, of all its threads.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>())
        .collect()
}

/// One of its children that has this program in its root: a container, and not a pause.
pub(crate) fn child_with(pid: u32, program: &str) -> Option<u32> {
    children(pid).into_iter().find(|child| Path::new(&format!("/proc/{child}/root{program}")).exists())
}

/// Open descriptors.
pub(crate) fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Memory in KiB that is this process's alone: Private_Clean and Private_Dirty of smaps_rollup.
pub(crate) fn private(pid: u32) -> Option<u64> {
    let content = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let sizes = content.lines().filter(|line| line.starts_with("Private_"));
    Some(sizes.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum())
}
