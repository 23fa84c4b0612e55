//! SELinux: labels of processes and files, and the levels that keep pods apart.

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

/// Categories of a level are 0 to 1023.
const CATEGORIES: u16 = 1024;
/// Most bytes of the policy's files that are read.
const MAX: usize = 64 << 10;

/// "user:role:type:level"; the level may have colons in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// Such as system_u.
    pub user: String,
    /// Such as system_r.
    pub role: String,
    /// Such as container_t.
    pub kind: String,
    /// Such as s0:c1,c2; empty in a policy without levels.
    pub level: String,
}

impl Label {
    /// Reads a label; none where a part is missing.
    pub fn parse(text: &str) -> Option<Label> {
        let mut parts = text.splitn(4, ':').map(str::to_owned);
        let label = Label {
            user: parts.next()?,
            role: parts.next()?,
            kind: parts.next()?,
            level: parts.next().unwrap_or_default(),
        };
        let good = [&label.user, &label.role, &label.kind].iter().all(|part| !part.is_empty());
        (good && !text.contains(|c: char| c.is_control() || c == '"' || c == ' ')).then_some(label)
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.user, self.role, self.kind)?;
        if self.level.is_empty() { Ok(()) } else { write!(f, ":{}", self.level) }
    }
}

/// What the policy of the host has for containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Of processes.
    pub process: Label,
    /// Of files.
    pub file: Label,
    /// The type of privileged processes.
    pub privileged: String,
}

impl Default for Policy {
    /// The names of the reference policy's container module.
    fn default() -> Self {
        let label = |role: &str, kind: &str| Label {
            user: "system_u".to_owned(),
            role: role.to_owned(),
            kind: kind.to_owned(),
            level: "s0".to_owned(),
        };
        Policy {
            process: label("system_r", "container_t"),
            file: label("object_r", "container_file_t"),
            privileged: "spc_t".to_owned(),
        }
    }
}

impl Policy {
    /// That of the host: `contexts/lxc_contexts` of the policy that /etc/selinux/config names. What is missing there is as
    /// in the reference policy.
    pub fn of_host() -> Policy {
        Policy::of(Path::new("/etc/selinux"))
    }

    fn of(dir: &Path) -> Policy {
        let mut policy = Policy::default();
        let read = |path: PathBuf| {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            text.get(..MAX).map(str::to_owned).unwrap_or(text)
        };
        let config = read(dir.join("config"));
        let Some(kind) = value(&config, "SELINUXTYPE").filter(|kind| !kind.contains('/')) else {
            return policy;
        };
        let contexts = read(dir.join(kind).join("contexts/lxc_contexts"));
        for (key, label) in [("process", &mut policy.process), ("file", &mut policy.file)] {
            if let Some(found) = value(&contexts, key).and_then(Label::parse) {
                *label = found;
            }
        }
        policy
    }
}

/// Of a file with lines "KEY = VALUE", the value perhaps in quotes.
fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (found, value) = line.split_once('=')?;
        (found.trim() == key).then(|| value.trim().trim_matches('"')).filter(|value| !value.is_empty())
    })
}

/// A label as the loaded policy writes it: a type by its first name, categories in order and as ranges. None: the policy
/// has no such user, role, type or level, or does not let them go together.
///
/// Errors: SELinux is off, or the policy does not let the caller ask.
pub fn canonical(label: &str) -> io::Result<Option<String>> {
    let mut file = std::fs::File::options().read(true).write(true).open("/sys/fs/selinux/context")?;
    match file.write_all(label.as_bytes()) {
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => return Ok(None),
        other => other?,
    }
    let mut text = String::new();
    file.take(MAX as u64).read_to_string(&mut text)?;
    Ok(Some(text.trim_end_matches('\0').to_owned()))
}

/// A level of two categories that no pod has: 523776 of them, so that two pods can't reach each other's files.
pub fn new_level(taken: impl Fn(&str) -> bool) -> io::Result<String> {
    const ATTEMPTS: usize = 10_000;
    for _ in 0..ATTEMPTS {
        let mut bytes = [0_u8; 4];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        let [a, b, c, d] = bytes;
        let (one, two) = (u16::from_ne_bytes([a, b]) % CATEGORIES, u16::from_ne_bytes([c, d]) % CATEGORIES);
        let level = format!("s0:c{},c{}", one.min(two), one.max(two));
        if one != two && !taken(&level) {
            return Ok(level);
        }
    }
    Err(io::Error::other("no free SELinux level was found"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_read_and_written() {
        for good in ["system_u:system_r:container_t:s0:c1,c2", "a:b:c", "u:r:t:s0-s0:c0.c1023"] {
            assert_eq!(Label::parse(good).unwrap().to_string(), good);
        }
        for bad in ["", "a", "a:b", "a::c", ":b:c", "a:b:c:s0\n", "a:b:c d", "a:b:\"c"] {
            assert_eq!(Label::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn the_policy_of_the_host() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Policy::of(dir.path()), Policy::default());
        let contexts = dir.path().join("targeted/contexts");
        std::fs::create_dir_all(&contexts).unwrap();
        std::fs::write(dir.path().join("config"), "# x\nSELINUX=enforcing\nSELINUXTYPE=targeted\n").unwrap();
        let text =
            "process = \"system_u:system_r:svirt_lxc_net_t:s0\"\nfile = \"nonsense\"\ncontent = \"x\"\n";
        std::fs::write(contexts.join("lxc_contexts"), text).unwrap();
        let policy = Policy::of(dir.path());
        assert_eq!(policy.process.kind, "svirt_lxc_net_t");
        assert_eq!(policy.file, Policy::default().file);
    }

    #[test]
    fn levels_are_two_categories_and_free() {
        let mut seen = std::collections::HashSet::new();
        for _ in 0..1000 {
            let level = new_level(|level| seen.contains(level)).unwrap();
            let list = level.strip_prefix("s0:").unwrap();
            let numbers: Vec<u16> = list.split(',').map(|c| c[1..].parse().unwrap()).collect();
            assert!(numbers.len() == 2 && numbers[0] < numbers[1] && numbers[1] < 1024, "{level}");
            assert!(seen.insert(level));
        }
        assert!(new_level(|_| true).is_err());
    }
}
