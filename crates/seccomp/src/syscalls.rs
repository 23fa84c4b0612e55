//! Names and numbers of system calls.

use std::collections::HashMap;
use std::sync::LazyLock;

use crate::Arch;

/// A line a call: name, then numbers on x86_64, x86, x32, aarch64 and arm, "-" where there is none.
const TABLE: &str = include_str!("syscalls.txt");

/// Numbers from here on are not in sequence: `__ARM_NR_BASE`.
pub(crate) const ARM_PRIVATE: u32 = 0x0f_0000;

/// Calls that go through `socketcall` on i386, with the first argument that says so (linux/net.h).
const SOCKETCALL: &[(&str, u32)] = &[
    ("socket", 1),
    ("bind", 2),
    ("connect", 3),
    ("listen", 4),
    ("accept", 5),
    ("getsockname", 6),
    ("getpeername", 7),
    ("socketpair", 8),
    ("send", 9),
    ("recv", 10),
    ("sendto", 11),
    ("recvfrom", 12),
    ("shutdown", 13),
    ("setsockopt", 14),
    ("getsockopt", 15),
    ("sendmsg", 16),
    ("recvmsg", 17),
    ("accept4", 18),
    ("recvmmsg", 19),
    ("sendmmsg", 20),
];

/// The same for `ipc` (linux/ipc.h). A version may be in the upper 16 bits.
const IPC: &[(&str, u32)] = &[
    ("semop", 1),
    ("semget", 2),
    ("semctl", 3),
    ("semtimedop", 4),
    ("msgsnd", 11),
    ("msgrcv", 12),
    ("msgget", 13),
    ("msgctl", 14),
    ("shmat", 21),
    ("shmdt", 22),
    ("shmget", 23),
    ("shmctl", 24),
];

type Numbers = [Option<u32>; 5];

static NUMBERS: LazyLock<HashMap<&'static str, Numbers>> = LazyLock::new(|| {
    let lines = TABLE.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let name = fields.next()?;
            Some((name, std::array::from_fn(|_| fields.next()?.parse().ok())))
        })
        .collect()
});

/// Whether any of our architectures has the call.
pub(crate) fn is_known(name: &str) -> bool {
    NUMBERS.contains_key(name)
}

/// The number of a call.
pub(crate) fn number(arch: Arch, name: &str) -> Option<u32> {
    let [x86_64, x86, x32, aarch64, arm] = *NUMBERS.get(name)?;
    match arch {
        Arch::X86_64 => x86_64,
        Arch::X86 => x86,
        Arch::X32 => x32,
        Arch::Aarch64 => aarch64,
        Arch::Arm => arm,
        Arch::Foreign => None,
    }
}

/// A call that does the work of many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Multiplexed {
    /// Its name.
    pub(crate) name: &'static str,
    /// The bits of its first argument that say which.
    pub(crate) mask: u32,
    /// Their value.
    pub(crate) value: u32,
}

/// The call by which `name` can be reached as well.
pub(crate) fn multiplexed(arch: Arch, name: &str) -> Option<Multiplexed> {
    if arch != Arch::X86 {
        return None;
    }
    let find = |table: &[(&str, u32)]| table.iter().find(|(n, _)| *n == name).map(|(_, value)| *value);
    find(SOCKETCALL)
        .map(|value| Multiplexed { name: "socketcall", mask: u32::MAX, value })
        .or_else(|| find(IPC).map(|value| Multiplexed { name: "ipc", mask: 0xffff, value }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_whole() {
        assert_eq!(NUMBERS.len(), TABLE.lines().filter(|l| !l.starts_with('#')).count());
        for line in TABLE.lines().filter(|l| !l.starts_with('#')) {
            let fields: Vec<&str> = line.split(' ').collect();
            assert_eq!(fields.len(), 6, "{line}");
            assert!(fields[1..].iter().all(|f| *f == "-" || f.parse::<u32>().is_ok()), "{line}");
            assert!(fields[1..].iter().any(|f| *f != "-"), "{line}");
        }
        // No number twice; arm has two names for one call.
        for arch in [Arch::X86_64, Arch::X86, Arch::X32, Arch::Aarch64, Arch::Arm] {
            let mut seen = HashMap::new();
            for name in NUMBERS.keys().filter(|name| **name != "arm_sync_file_range") {
                if let Some(other) = number(arch, name).and_then(|nr| seen.insert(nr, name)) {
                    panic!("{arch:?}: {name} and {other}");
                }
            }
        }
    }

    #[test]
    fn numbers_are_those_of_libc() {
        let native = [
            ("read", libc::SYS_read),
            ("clone3", libc::SYS_clone3),
            ("socket", libc::SYS_socket),
            ("mseal", libc::SYS_mseal),
            ("fchmodat2", libc::SYS_fchmodat2),
            ("execveat", libc::SYS_execveat),
            ("personality", libc::SYS_personality),
            ("renameat2", libc::SYS_renameat2),
        ];
        for (name, want) in native {
            assert_eq!(number(Arch::NATIVE, name).map(i64::from), Some(want), "{name}");
        }
        // Others from the kernel's tables.
        assert_eq!(number(Arch::X86, "mkdir"), Some(39));
        assert_eq!(number(Arch::X86, "socketcall"), Some(102));
        assert_eq!(number(Arch::X32, "read"), Some(0x4000_0000));
        assert_eq!(number(Arch::X32, "execve"), Some(0x4000_0208));
        assert_eq!(number(Arch::Aarch64, "mkdir"), None);
        assert_eq!(number(Arch::Aarch64, "mkdirat"), Some(34));
        assert_eq!(number(Arch::Arm, "set_tls"), Some(0x0f_0005));
        assert!(!is_known("frobnicate") && is_known("cacheflush"));
    }

    #[test]
    fn only_i386_multiplexes() {
        let found = multiplexed(Arch::X86, "shmget").unwrap();
        assert_eq!(found, Multiplexed { name: "ipc", mask: 0xffff, value: 23 });
        assert_eq!(multiplexed(Arch::X86, "socket").unwrap().name, "socketcall");
        assert_eq!(multiplexed(Arch::X86_64, "socket"), None);
        assert_eq!(multiplexed(Arch::X86, "read"), None);
    }
}
