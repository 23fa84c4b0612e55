//! The profile behind RuntimeDefault, asked call by call.

use std::collections::HashMap;

use stave_seccomp::{Arch, Filter, compile_for, runtime_default};

use crate::machine::{AARCH64, ALLOW, ARM, Call, I386, KILL, X86_64, errno, run, target};

/// The 14 of a container that asks for none.
const DEFAULT_CAPS: u64 = 0xa804_25fb;

/// Columns of the table: where a call's number is.
fn numbers(column: usize) -> HashMap<&'static str, u32> {
    let lines = include_str!("../../src/syscalls.txt").lines().filter(|l| !l.starts_with('#'));
    lines
        .filter_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            Some((fields[0], fields[column].parse().ok()?))
        })
        .collect()
}

fn native(caps: u64) -> Filter {
    compile_for(runtime_default(), &target(caps, Arch::X86_64)).unwrap()
}

fn ask(filter: &Filter, arch: u32, nr: u32, args: [u64; 6]) -> u32 {
    run(&filter.program, Call { arch, nr, args })
}

#[test]
fn every_name_exists_and_the_filter_is_small() {
    for native in [Arch::X86_64, Arch::Aarch64] {
        for caps in [0, DEFAULT_CAPS, u64::MAX] {
            let filter = compile_for(runtime_default(), &target(caps, native)).unwrap();
            assert_eq!(filter.unknown, [""; 0]);
            assert!(filter.program.len() / 8 < 800, "{} instructions", filter.program.len() / 8);
        }
    }
}

/// What breaks out, spies, or uses old and large parts of the kernel: name, and the capability's number that
/// makes the kernel's own check enough.
const DANGEROUS: &[(&str, &[u32])] = &[
    ("acct", &[20]),
    ("add_key", &[]),
    ("bpf", &[21, 39]),
    ("chroot", &[18]),
    ("clock_settime", &[25]),
    ("clone3", &[21]),
    ("create_module", &[]),
    ("delete_module", &[16]),
    ("fanotify_init", &[21]),
    ("finit_module", &[16]),
    ("fsconfig", &[21]),
    ("fsmount", &[21]),
    ("fsopen", &[21]),
    ("fspick", &[21]),
    ("get_kernel_syms", &[]),
    ("get_mempolicy", &[23]),
    ("init_module", &[16]),
    ("io_uring_enter", &[]),
    ("io_uring_register", &[]),
    ("io_uring_setup", &[]),
    ("ioperm", &[17]),
    ("iopl", &[17]),
    ("kcmp", &[19]),
    ("kexec_file_load", &[]),
    ("kexec_load", &[]),
    ("keyctl", &[]),
    ("listmount", &[21]),
    ("lookup_dcookie", &[21]),
    ("lsm_get_self_attr", &[21]),
    ("lsm_list_modules", &[21]),
    ("lsm_set_self_attr", &[21]),
    ("mbind", &[23]),
    ("migrate_pages", &[]),
    ("mount", &[21]),
    ("mount_setattr", &[21]),
    ("move_mount", &[21]),
    ("move_pages", &[]),
    ("nfsservctl", &[]),
    ("open_by_handle_at", &[2]),
    ("open_tree", &[21]),
    ("open_tree_attr", &[21]),
    ("perf_event_open", &[21, 38]),
    ("pidfd_getfd", &[19]),
    ("pivot_root", &[]),
    ("process_madvise", &[19]),
    ("query_module", &[]),
    ("quotactl", &[21]),
    ("quotactl_fd", &[21]),
    ("reboot", &[22]),
    ("request_key", &[]),
    ("set_mempolicy", &[23]),
    ("set_mempolicy_home_node", &[23]),
    ("setdomainname", &[21]),
    ("sethostname", &[21]),
    ("setns", &[21]),
    ("settimeofday", &[25]),
    ("statmount", &[21]),
    ("swapoff", &[]),
    ("swapon", &[]),
    ("_sysctl", &[]),
    ("sysfs", &[]),
    ("syslog", &[21, 34]),
    ("umount2", &[21]),
    ("unshare", &[21]),
    ("uselib", &[]),
    ("userfaultfd", &[]),
    ("ustat", &[]),
    ("vhangup", &[26]),
];

#[test]
fn dangerous_calls_need_their_capability() {
    // chroot(2) has its capability in the default set.
    let without = native(DEFAULT_CAPS & !(1 << 18));
    let numbers = numbers(1);
    for (name, caps) in DANGEROUS {
        let nr = numbers[name];
        let refused = if *name == "clone3" { errno(libc::ENOSYS) } else { errno(libc::EPERM) };
        assert_eq!(ask(&without, X86_64, nr, [0; 6]), refused, "{name}");
        for cap in *caps {
            assert_eq!(ask(&native(1 << cap), X86_64, nr, [0; 6]), ALLOW, "{name} with capability {cap}");
        }
        // All others together don't help.
        let others = native(caps.iter().fold(u64::MAX, |all, cap| all & !(1 << cap)));
        assert_eq!(ask(&others, X86_64, nr, [0; 6]), refused, "{name}");
    }
}

#[test]
fn nothing_else_is_refused() {
    let filter = native(DEFAULT_CAPS);
    let conditional = ["clone", "personality", "socket", "chroot"];
    // Never implemented, or long gone from the kernel.
    let gone = [
        "afs_syscall",
        "epoll_ctl_old",
        "epoll_wait_old",
        "getpmsg",
        "putpmsg",
        "security",
        "tuxcall",
        "vserver",
    ];
    for (name, nr) in numbers(1) {
        if !conditional.contains(&name) && !gone.contains(&name) && !DANGEROUS.iter().any(|(n, _)| *n == name)
        {
            assert_eq!(ask(&filter, X86_64, nr, [0; 6]), ALLOW, "{name}");
        }
    }
    assert_eq!(ask(&filter, X86_64, 161, [0; 6]), ALLOW, "chroot");
    for newer in [470, 600, 0x3fff_ffff] {
        assert_eq!(ask(&filter, X86_64, newer, [0; 6]), errno(libc::ENOSYS));
    }
}

#[test]
fn address_families() {
    for (arch, nr, native) in [
        (X86_64, 41, Arch::X86_64),
        (I386, 359, Arch::X86_64),
        (AARCH64, 198, Arch::Aarch64),
        (ARM, 281, Arch::Aarch64),
    ] {
        // Not even with all capabilities.
        for caps in [DEFAULT_CAPS, u64::MAX] {
            let filter = compile_for(runtime_default(), &target(caps, native)).unwrap();
            for family in 0..100 {
                let want =
                    if family == 38 || family == 40 || family > 47 { errno(libc::EPERM) } else { ALLOW };
                assert_eq!(ask(&filter, arch, nr, [family, 1, 0, 0, 0, 0]), want, "{family}");
                // The kernel reads an int.
                assert_eq!(ask(&filter, arch, nr, [family | 1 << 32, 1, 0, 0, 0, 0]), want, "{family}");
            }
        }
    }
}

#[test]
fn no_new_namespaces() {
    for (arch, nr, native) in [
        (X86_64, 56, Arch::X86_64),
        (I386, 120, Arch::X86_64),
        (AARCH64, 220, Arch::Aarch64),
        (ARM, 120, Arch::Aarch64),
    ] {
        let filter = compile_for(runtime_default(), &target(DEFAULT_CAPS, native)).unwrap();
        // pthread_create(3), fork(3), vfork(3).
        for flags in [0x003d_0f00, 0x0120_0011, 0x4111] {
            assert_eq!(ask(&filter, arch, nr, [flags, 0, 0, 0, 0, 0]), ALLOW);
            // NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
            for flag in [0x2_0000, 0x200_0000, 0x400_0000, 0x800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000]
            {
                assert_eq!(
                    ask(&filter, arch, nr, [flags | flag, 0, 0, 0, 0, 0]),
                    errno(libc::EPERM),
                    "{flag:#x}"
                );
            }
        }
        let admin = compile_for(runtime_default(), &target(1 << 21, native)).unwrap();
        assert_eq!(ask(&admin, arch, nr, [0x1000_0000, 0, 0, 0, 0, 0]), ALLOW);
    }
}

#[test]
fn personalities() {
    let filter = native(u64::MAX);
    for (value, want) in [
        (0, true),
        (8, true),
        (0x20000, true),
        (0x20008, true),
        (0xffff_ffff, true),
        // ADDR_NO_RANDOMIZE, READ_IMPLIES_EXEC, MMAP_PAGE_ZERO.
        (0x4_0000, false),
        (0x40_0000, false),
        (0x10_0000, false),
        (1 << 32, false),
    ] {
        assert_eq!(ask(&filter, X86_64, 135, [value, 0, 0, 0, 0, 0]) == ALLOW, want, "{value:#x}");
    }
}

#[test]
fn tracing_is_safe_from_4_8_on() {
    for (kernel, caps, want) in [((4, 8), 0, ALLOW), ((4, 7), 0, errno(1)), ((4, 7), 1 << 19, ALLOW)] {
        let target = stave_seccomp::Target { kernel, ..target(caps, Arch::X86_64) };
        let filter = compile_for(runtime_default(), &target).unwrap();
        assert_eq!(ask(&filter, X86_64, 101, [0; 6]), want);
    }
}

#[test]
fn programs_of_32_bits() {
    let filter = native(DEFAULT_CAPS);
    let aarch64 = compile_for(runtime_default(), &target(DEFAULT_CAPS, Arch::Aarch64)).unwrap();
    for (filter, arch, column) in [(&filter, I386, 2), (&aarch64, AARCH64, 4), (&aarch64, ARM, 5)] {
        let numbers = numbers(column);
        for (name, _) in DANGEROUS.iter().filter(|(name, _)| *name != "chroot") {
            if let Some(nr) = numbers.get(name) {
                let refused = if *name == "clone3" { errno(libc::ENOSYS) } else { errno(libc::EPERM) };
                assert_eq!(ask(filter, arch, *nr, [0; 6]), refused, "{name} on {arch:#x}");
            }
        }
        for name in [
            "read",
            "execve",
            "openat",
            "fcntl64",
            "clock_gettime64",
            "mmap2",
            "set_tls",
            "cacheflush",
            "socketcall",
        ] {
            if let Some(nr) = numbers.get(name) {
                assert_eq!(ask(filter, arch, *nr, [0; 6]), ALLOW, "{name} on {arch:#x}");
            }
        }
        assert!(numbers.len() > 300);
    }
    for name in ["umount", "stime", "vm86", "vm86old", "clock_settime64"] {
        assert_eq!(ask(&filter, I386, numbers(2)[name], [0; 6]), errno(1), "{name}");
    }
    // x32, and what is no architecture of the host at all.
    for nr in numbers(3).into_values() {
        assert_eq!(ask(&filter, X86_64, nr, [0; 6]), KILL);
    }
    assert_eq!(ask(&filter, AARCH64, 0, [0; 6]), KILL);
    assert_eq!(ask(&aarch64, X86_64, 0, [0; 6]), KILL);
}

#[test]
fn as_the_runtime_specification_has_it() {
    let oci = native(DEFAULT_CAPS).oci;
    assert_eq!(oci.architectures().as_ref().unwrap().len(), 2);
    let rules = oci.syscalls().as_ref().unwrap();
    let about = |name: &str| rules.iter().filter(|r| r.names().iter().any(|n| n == name)).collect::<Vec<_>>();
    assert_eq!(about("mount").len(), 0);
    let [clone] = about("clone")[..] else { panic!("clone") };
    assert_eq!(clone.args().as_ref().unwrap()[0].value(), 0x7e02_0000);
    let json = serde_json::to_string(&oci).unwrap();
    // What is written is a profile, and means the same.
    let again = stave_seccomp::parse(&json, "config.json").unwrap();
    assert_eq!(
        compile_for(&again, &target(DEFAULT_CAPS, Arch::X86_64)).unwrap().program,
        native(DEFAULT_CAPS).program
    );
}
