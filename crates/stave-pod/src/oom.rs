//! How often the kernel's OOM killer acted in a cgroup.

use std::io::Read;

/// The number in the line `oom_kill N` of memory.events (cgroup v2) or memory.oom_control (v1,
/// since Linux 4.13). `None` without a file or line.
pub(crate) fn kills(oom_file: &str) -> Option<u64> {
    if oom_file.is_empty() {
        return None;
    }
    let mut text = String::new();
    std::fs::File::open(oom_file).ok()?.take(4096).read_to_string(&mut text).ok()?;
    parse(&text)
}

fn parse(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_file() {
        assert_eq!(parse("low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n"), Some(2));
        assert_eq!(parse("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"), Some(7));
        assert_eq!(parse("oom_kill_disable 0\nunder_oom 0\n"), None);
        assert_eq!(kills(""), None);
        assert_eq!(kills("/nonexistent/memory.events"), None);
    }
}
