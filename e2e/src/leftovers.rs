use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What a daemon's pods may leave behind, found by the directory, the cgroup and the bridge that are its alone.
#[derive(Debug, Clone)]
pub struct Leftovers {
    directory: PathBuf,
    cgroup_parent: String,
    bridge: String,
}

impl Leftovers {
    /// Of a daemon with its root and state below `directory`.
    pub fn of(directory: &Path, cgroup_parent: &str, bridge: &str) -> Leftovers {
        assert!(directory.is_absolute() && directory.components().count() > 2 && cgroup_parent.len() > 1);
        Leftovers {
            directory: directory.to_owned(),
            cgroup_parent: cgroup_parent.to_owned(),
            bridge: bridge.to_owned(),
        }
    }

    /// All that there is, in words. `words` are ids and addresses that no file, directory or rule may still
    /// name; a daemon that runs (`daemon`) is none.
    pub fn find(&self, words: &[String], daemon: Option<u32>) -> Vec<String> {
        let mut found = Vec::new();
        found.extend(self.processes(daemon).iter().map(|pid| format!("process {pid}: {}", command_of(*pid))));
        found.extend(self.mounts().iter().map(|mount| format!("mount {}", mount.display())));
        found.extend(self.cgroups().iter().map(|cgroup| format!("cgroup {}", cgroup.display())));
        found.extend(
            self.ports(daemon.is_some())
                .iter()
                .map(|port| format!("network device {port} at the bridge {}", self.bridge)),
        );
        found.extend(self.named(words));
        let links: Vec<_> = words.iter().filter_map(|word| link_of(word)).collect();
        let there = links.iter().filter(|link| Path::new("/sys/class/net").join(link).exists());
        found.extend(there.map(|link| format!("network device {link}")));
        if let Ok(output) = Command::new("nft").args(["list", "ruleset"]).output() {
            let rules = String::from_utf8_lossy(&output.stdout).into_owned();
            found.extend(
                words
                    .iter()
                    .chain(&links)
                    .filter(|word| contains_word(&rules, word))
                    .map(|word| format!("nft rule with {word}")),
            );
        }
        found
    }

    /// Takes everything away by force, as far as that goes: for after a failed test.
    pub fn sweep(&self) {
        for _ in 0..100 {
            let processes = self.processes(None);
            for pid in &processes {
                let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            }
            let cgroups = self.all_cgroups();
            // What systemd holds for active it would not make again.
            if let Some(slice) = self.slice().filter(|_| !cgroups.is_empty()) {
                crate::systemctl(&["stop", slice]);
            }
            for cgroup in &cgroups {
                let _ = fs::remove_dir(cgroup);
            }
            if processes.is_empty() && cgroups.iter().all(|cgroup| !cgroup.exists()) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        for mount in self.mounts().iter().rev() {
            let _ = nix::mount::umount2(mount, nix::mount::MntFlags::MNT_DETACH);
        }
        if Path::new("/sys/class/net").join(&self.bridge).exists() {
            let _ = Command::new("ip").args(["link", "delete", &self.bridge]).status();
        }
        // Our table of nftables has the bridge's name in it, in whatever form.
        if let Ok(output) = Command::new("nft").args(["list", "tables"]).output() {
            for line in String::from_utf8_lossy(&output.stdout).lines() {
                let words: Vec<_> = line.split_whitespace().collect();
                if let ["table", family, name] = words[..]
                    && name.ends_with(&self.bridge)
                {
                    let _ = Command::new("nft").args(["delete", "table", family, name]).status();
                }
            }
        }
    }

    /// The slice that is the daemon's alone, with the systemd cgroup driver.
    fn slice(&self) -> Option<&str> {
        let name = &self.cgroup_parent[1..];
        name.ends_with(".slice").then_some(name)
    }

    /// Processes in the daemon's cgroups, in a mount namespace that shows its directory, or with it in their
    /// command line.
    fn processes(&self, daemon: Option<u32>) -> BTreeSet<i32> {
        let directory = self.directory.to_string_lossy().into_owned();
        let own_mounts = fs::read_link("/proc/self/ns/mnt").ok();
        let own_root = fs::metadata("/").map(|root| (root.dev(), root.ino())).ok();
        let mut found = BTreeSet::new();
        for cgroup in self.all_cgroups() {
            let procs = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
            found.extend(procs.lines().filter_map(|line| line.parse::<i32>().ok()));
        }
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            let path = entry.path();
            let read = |file: &str| fs::read(path.join(file)).unwrap_or_default();
            let names =
                |content: Vec<u8>| String::from_utf8_lossy(&content).contains(&format!("{directory}/"));
            // Kernel threads and zombies, most of what there is.
            let command = read("cmdline");
            if command.is_empty() {
                continue;
            }
            let program = command.split(|byte| matches!(byte, 0)).next().unwrap_or_default();
            let program = program.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
            if program.starts_with(b"stave") && names(command.clone()) {
                found.insert(pid);
                continue;
            }
            // An init that has not pivoted yet still sees all mounts of the host, those of other tests too. It is
            // its supervisor's copy, and has the same command line.
            let root = fs::metadata(path.join("root")).map(|root| (root.dev(), root.ino())).ok();
            let other_mounts = fs::read_link(path.join("ns/mnt")).ok() != own_mounts && root != own_root;
            if other_mounts && names(read("mountinfo")) {
                found.insert(pid);
            }
        }
        found.remove(&(std::process::id() as i32));
        if let Some(daemon) = daemon {
            found.remove(&(daemon as i32));
        }
        found.retain(|pid| *pid > 1);
        found
    }

    fn mounts(&self) -> Vec<PathBuf> {
        let content = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        content
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .map(PathBuf::from)
            .filter(|path| path.starts_with(&self.directory) && *path != self.directory.join("root"))
            .collect()
    }

    /// The daemon's cgroups, deepest first, its parent included.
    fn all_cgroups(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for hierarchy in hierarchies() {
            descend(&hierarchy.join(&self.cgroup_parent[1..]), &mut found);
        }
        found
    }

    /// The cgroups of pods: those below the parent, which the daemon may keep.
    fn cgroups(&self) -> Vec<PathBuf> {
        let parents: Vec<_> = hierarchies().iter().map(|path| path.join(&self.cgroup_parent[1..])).collect();
        self.all_cgroups().into_iter().filter(|path| !parents.contains(path)).collect()
    }

    /// Those of pods; a daemon that runs may have some for pods to come.
    fn ports(&self, daemon_runs: bool) -> Vec<String> {
        let directory = Path::new("/sys/class/net").join(&self.bridge).join("brif");
        fs::read_dir(directory)
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .filter(|name| !(daemon_runs && name.starts_with("stvready")))
            .collect()
    }

    /// Files and directories that have one of the words in their path, or, small ones, in their content.
    fn named(&self, words: &[String]) -> Vec<String> {
        let mut found = Vec::new();
        if words.is_empty() {
            return found;
        }
        for top in ["root", "state"] {
            let mut queue = vec![self.directory.join(top)];
            while let Some(path) = queue.pop() {
                let Ok(meta) = fs::symlink_metadata(&path) else { continue };
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if let Some(word) = words.iter().find(|word| contains_word(&name, word)) {
                    found.push(format!("path {} ({word})", path.display()));
                } else if meta.is_dir() {
                    // The content of layers is the images' own.
                    if !matches!(name.as_str(), "layers" | "blobs" | "images") {
                        queue.extend(
                            fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()),
                        );
                    }
                } else if meta.is_file() && meta.len() < 1 << 20 {
                    let content = fs::read(&path).unwrap_or_default();
                    let content = String::from_utf8_lossy(&content);
                    if let Some(word) = words.iter().find(|word| contains_word(&content, word)) {
                        found.push(format!("{word} in the file {}", path.display()));
                    }
                }
            }
        }
        found
    }
}

/// The node's end of a pod's veth on the built-in bridge has the beginning of the pod's id in its name, and rules name it.
fn link_of(word: &str) -> Option<String> {
    let is_id = word.len() == 64 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_id.then(|| format!("stv{}", &word[..11]))
}

/// Whether `word` is in `text` and no longer word goes on at either end: 10.0.0.1 is not in 10.0.0.12.
fn contains_word(text: &str, word: &str) -> bool {
    let part = |c: char| c.is_ascii_alphanumeric();
    text.match_indices(word).any(|(start, _)| {
        !text[..start].chars().next_back().is_some_and(part)
            && !text[start + word.len()..].chars().next().is_some_and(part)
    })
}

/// Where the hierarchies of cgroups are mounted.
pub(crate) fn hierarchies() -> Vec<PathBuf> {
    let content = fs::read_to_string("/proc/mounts").expect("/proc/mounts");
    content
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (path, kind) = (fields.next()?, fields.next()?);
            matches!(kind, "cgroup" | "cgroup2").then(|| PathBuf::from(path))
        })
        .collect()
}

fn descend(directory: &Path, found: &mut Vec<PathBuf>) {
    if !directory.is_dir() {
        return;
    }
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            descend(&entry.path(), found);
        }
    }
    found.push(directory.to_owned());
}

fn command_of(pid: i32) -> String {
    let content = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&content).replace('\0', " ")
}

#[cfg(test)]
mod tests {
    use super::{contains_word, link_of};

    #[test]
    fn links_are_of_ids_alone() {
        assert_eq!(link_of(&"0123456789abcdef".repeat(4)).as_deref(), Some("stv0123456789a"));
        assert_eq!(link_of("10.0.0.1"), None);
    }

    #[test]
    fn words_end_where_they_end() {
        assert!(contains_word("ip 10.0.0.1, next", "10.0.0.1"));
        assert!(!contains_word("ip 10.0.0.12", "10.0.0.1"));
        assert!(contains_word("containers/abc/rootfs", "abc"));
        assert!(!contains_word("abcdef", "abc"));
    }
}
