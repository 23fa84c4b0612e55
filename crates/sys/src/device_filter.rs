//! Which devices the processes of a cgroup may use: a BPF program of type `BPF_PROG_TYPE_CGROUP_DEVICE`
//! on a cgroup2 directory (kernel: Documentation/admin-guide/cgroup-v2.rst, "Device controller"). Works on
//! hybrid hosts too, where the cgroup2 mount has no controllers.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

/// Make a node (`m` of the OCI specification).
pub const ACCESS_MKNOD: u32 = 1;
/// Open for reading (`r`).
pub const ACCESS_READ: u32 = 2;
/// Open for writing (`w`).
pub const ACCESS_WRITE: u32 = 4;

const TYPE_BLOCK: i32 = 1;
const TYPE_CHAR: i32 = 2;

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// Programs of the ancestors run as well, and all must allow.
const BPF_F_ALLOW_MULTI: u32 = 2;

/// One line of a device list; `None` matches all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceRule {
    /// Allow, or deny.
    pub allow: bool,
    /// True: block devices; false: character devices.
    pub block: Option<bool>,
    /// Major number.
    pub major: Option<u32>,
    /// Minor number.
    pub minor: Option<u32>,
    /// `ACCESS_*` bits: one that allows matches what asks for no other, one that denies what asks for any of them.
    pub access: u32,
}

/// A loaded program.
#[derive(Debug)]
pub struct DeviceFilter(OwnedFd);

impl DeviceFilter {
    /// Compiles and loads a list. The last rule that matches wins; what no rule matches is denied.
    ///
    /// Errors: EPERM without CAP_BPF or CAP_SYS_ADMIN; E2BIG for lists of more than some hundred rules.
    pub fn load(rules: &[DeviceRule]) -> io::Result<Self> {
        let program = compile(rules);
        let attr = ProgLoad {
            prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
            insn_cnt: u32::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
            insns: program.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            name: *b"stave_devices\0\0\0",
            expected_attach_type: BPF_CGROUP_DEVICE,
            ..ProgLoad::default()
        };
        let fd = bpf(BPF_PROG_LOAD, &attr)?;
        // SAFETY: BPF_PROG_LOAD returned a new descriptor (close-on-exec) that nothing else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Puts the filter on a cgroup2 directory. It stays until the directory goes.
    pub fn attach(&self, cgroup: BorrowedFd<'_>) -> io::Result<()> {
        let attr = ProgAttach {
            target_fd: cgroup.as_raw_fd(),
            attach_bpf_fd: self.0.as_raw_fd(),
            attach_type: BPF_CGROUP_DEVICE,
            attach_flags: BPF_F_ALLOW_MULTI,
        };
        bpf(BPF_PROG_ATTACH, &attr).map(drop)
    }
}

/// `struct bpf_insn`: opcode, registers, offset, immediate.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Insn {
    code: u8,
    /// Destination in the low half, source in the high half.
    registers: u8,
    off: i16,
    imm: i32,
}

/// The part of `union bpf_attr` for BPF_PROG_LOAD, as far as it is used.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    name: [u8; 16],
    ifindex: u32,
    expected_attach_type: u32,
}

/// The part of `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C)]
struct ProgAttach {
    target_fd: RawFd,
    attach_bpf_fd: RawFd,
    attach_type: u32,
    attach_flags: u32,
}

fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<RawFd> {
    // SAFETY: `attr` is a valid, fully initialised prefix of union bpf_attr of the size given; the kernel
    // takes missing bytes as zero. What it points to outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    RawFd::try_from(result).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)
}

// Opcodes of linux/bpf_common.h and bpf.h, with an immediate operand (K) or a register (X).
const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const MOVE: u8 = 0xbf; // BPF_ALU64 | BPF_MOV | BPF_X
const MOVE_IMM: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const AND_IMM: u8 = 0x57; // BPF_ALU64 | BPF_AND | BPF_K
const SHIFT_RIGHT_IMM: u8 = 0x77; // BPF_ALU64 | BPF_RSH | BPF_K
const JUMP_EQUAL_IMM: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_NOT_EQUAL: u8 = 0x5d; // BPF_JMP | BPF_JNE | BPF_X
const JUMP_NOT_EQUAL_IMM: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> Insn {
    Insn { code, registers: dst | (src << 4), off, imm }
}

/// r1: struct bpf_cgroup_dev_ctx { u32 access_type /* access << 16 | type */, major, minor }.
fn compile(rules: &[DeviceRule]) -> Vec<Insn> {
    let mut program = vec![
        insn(LOAD_WORD, 2, 1, 0, 0),
        insn(MOVE, 3, 2, 0, 0),
        insn(AND_IMM, 2, 0, 0, 0xffff),
        insn(SHIFT_RIGHT_IMM, 3, 0, 0, 16),
        insn(LOAD_WORD, 4, 1, 4, 0),
        insn(LOAD_WORD, 5, 1, 8, 0),
    ];
    // The first match ends the program, so the last rule comes first.
    for rule in rules.iter().rev() {
        let rule = compile_rule(rule);
        // A rule that matches all ends the list: the verifier refuses what can't be reached.
        let last = !rule.iter().any(is_test);
        program.extend(rule);
        if last {
            return program;
        }
    }
    program.extend([insn(MOVE_IMM, 0, 0, 0, 0), insn(EXIT, 0, 0, 0, 0)]);
    program
}

fn is_test(insn: &Insn) -> bool {
    matches!(insn.code, JUMP_EQUAL_IMM | JUMP_NOT_EQUAL | JUMP_NOT_EQUAL_IMM)
}

fn compile_rule(rule: &DeviceRule) -> Vec<Insn> {
    let mut tests = Vec::new();
    if let Some(block) = rule.block {
        tests.push(insn(JUMP_NOT_EQUAL_IMM, 2, 0, 0, if block { TYPE_BLOCK } else { TYPE_CHAR }));
    }
    if rule.access != ACCESS_MKNOD | ACCESS_READ | ACCESS_WRITE {
        // r6 = what is asked for and the rule speaks of. To be allowed it must be all, to be denied any of it.
        tests.push(insn(MOVE, 6, 3, 0, 0));
        tests.push(insn(AND_IMM, 6, 0, 0, rule.access.cast_signed()));
        tests.push(match rule.allow {
            true => insn(JUMP_NOT_EQUAL, 6, 3, 0, 0),
            false => insn(JUMP_EQUAL_IMM, 6, 0, 0, 0),
        });
    }
    for (register, number) in [(4, rule.major), (5, rule.minor)] {
        if let Some(number) = number {
            // Numbers have at most 20 bits (dev_t in the kernel), so the sign extension does no harm.
            tests.push(insn(JUMP_NOT_EQUAL_IMM, register, 0, 0, number.cast_signed()));
        }
    }
    tests.extend([insn(MOVE_IMM, 0, 0, 0, i32::from(rule.allow)), insn(EXIT, 0, 0, 0, 0)]);
    // A test that fails jumps behind the rule. At most nine instructions: the offset fits.
    let end = tests.len();
    for (at, test) in tests.iter_mut().enumerate() {
        if is_test(test) {
            test.off = (end - at - 1) as i16;
        }
    }
    tests
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::os::fd::AsFd as _;

    const NULL: DeviceRule = DeviceRule {
        allow: true,
        block: Some(false),
        major: Some(1),
        minor: Some(3),
        access: ACCESS_READ | ACCESS_WRITE,
    };
    const DENY_ALL: DeviceRule =
        DeviceRule { allow: false, block: None, major: None, minor: None, access: 7 };

    struct Cgroup(std::path::PathBuf);

    impl Drop for Cgroup {
        fn drop(&mut self) {
            let _ = fs::remove_dir(&self.0);
        }
    }

    /// Runs `sh -c script` in a new cgroup with the filter.
    fn run(rules: &[DeviceRule], name: &str, script: &str) -> bool {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).unwrap();
        let path = std::path::Path::new(mount.split(' ').nth(1).unwrap())
            .join(format!("stave-test-devices-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        let cgroup = Cgroup(path);
        let dir = File::open(&cgroup.0).unwrap();
        DeviceFilter::load(rules).unwrap().attach(dir.as_fd()).unwrap();
        let script = format!("echo $$ > {} && {script}", cgroup.0.join("cgroup.procs").display());
        let mut command = std::process::Command::new("sh");
        command.arg("-c").arg(script);
        command.status().unwrap().success()
    }

    #[test]
    fn what_is_listed_can_be_used_and_nothing_else() {
        assert!(run(&[DENY_ALL, NULL], "listed", "echo x > /dev/null"));
        assert!(!run(&[DENY_ALL, NULL], "unlisted", "head -c1 /dev/zero > /dev/null"));
        assert!(!run(&[DENY_ALL], "none", "echo x > /dev/null"));
    }

    #[test]
    fn access_is_part_of_a_rule() {
        let read_only = DeviceRule { access: ACCESS_READ, ..NULL };
        assert!(run(&[DENY_ALL, read_only], "read", "cat < /dev/null"));
        assert!(!run(&[DENY_ALL, read_only], "write", "echo x > /dev/null"));
    }

    #[test]
    fn a_partial_denial_binds() {
        let allow_all = DeviceRule { allow: true, ..DENY_ALL };
        let no_writing = DeviceRule { allow: false, access: ACCESS_WRITE, ..NULL };
        assert!(run(&[allow_all, no_writing], "deny-r", "cat < /dev/null"));
        assert!(!run(&[allow_all, no_writing], "deny-w", "echo x > /dev/null"));
        assert!(!run(&[allow_all, no_writing], "deny-rw", "true <> /dev/null"));
    }

    #[test]
    fn the_last_rule_that_matches_wins() {
        let allow_all = DeviceRule { allow: true, ..DENY_ALL };
        assert!(run(&[DENY_ALL, allow_all], "last", "echo x > /dev/null"));
        assert!(!run(&[allow_all, DeviceRule { allow: false, ..NULL }], "denied", "echo x > /dev/null"));
    }
}
