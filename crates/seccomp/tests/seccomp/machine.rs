//! The kernel's BPF machine, as far as seccomp filters may use it. Written from the kernel's documentation
//! (networking/filter.rst), knows nothing of the compiler, and panics on what the kernel would refuse.

use stave_seccomp::{Action, Filter, Target, compile_for, parse};

pub(crate) const X86_64: u32 = 0xc000_003e;
pub(crate) const I386: u32 = 0x4000_0003;
pub(crate) const AARCH64: u32 = 0xc000_00b7;
pub(crate) const ARM: u32 = 0x4000_0028;

/// A system call, as a filter sees it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Call {
    pub(crate) arch: u32,
    pub(crate) nr: u32,
    pub(crate) args: [u64; 6],
}

impl Call {
    /// `struct seccomp_data`.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.nr.to_le_bytes());
        bytes.extend(self.arch.to_le_bytes());
        // The instruction pointer: must play no part.
        bytes.extend(0xdead_beef_dead_beef_u64.to_le_bytes());
        bytes.extend(self.args.iter().flat_map(|arg| arg.to_le_bytes()));
        bytes
    }
}

/// What the filter answers.
pub(crate) fn run(program: &[u8], call: Call) -> u32 {
    let (instructions, rest) = program.as_chunks::<8>();
    assert!(rest.is_empty() && !instructions.is_empty() && instructions.len() <= 4096);
    let data = call.bytes();
    let mut accumulator = 0_u32;
    let mut at = 0;
    loop {
        let [c0, c1, jt, jf, k @ ..] = instructions[at];
        let (code, k) = (u16::from_ne_bytes([c0, c1]), u32::from_ne_bytes(k));
        at += 1;
        let mut branch = |taken: bool| at += usize::from(if taken { jt } else { jf });
        match code {
            0x20 => {
                assert_eq!(k % 4, 0, "unaligned load");
                accumulator = u32::from_le_bytes(data[k as usize..k as usize + 4].try_into().unwrap());
            }
            0x54 => accumulator &= k,
            0x05 => at += k as usize,
            0x15 => branch(accumulator == k),
            0x25 => branch(accumulator > k),
            0x35 => branch(accumulator >= k),
            0x06 => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

/// As the kernel encodes it.
pub(crate) fn code(action: Action) -> u32 {
    match action {
        Action::KillProcess => 0x8000_0000,
        Action::KillThread => 0,
        Action::Trap => 0x0003_0000,
        Action::Errno(errno) => 0x0005_0000 + u32::from(errno),
        Action::Trace(data) => 0x7ff0_0000 + u32::from(data),
        Action::Log => 0x7ffc_0000,
        Action::Allow => 0x7fff_0000,
    }
}

pub(crate) const ALLOW: u32 = 0x7fff_0000;
pub(crate) const KILL: u32 = 0x8000_0000;

pub(crate) const fn errno(number: i32) -> u32 {
    0x0005_0000 + number.cast_unsigned()
}

pub(crate) fn target(caps: u64, native: stave_seccomp::Arch) -> Target {
    Target { caps, kernel: (6, 12), native }
}

/// Compiles for x86_64.
pub(crate) fn filter(json: &str) -> Filter {
    filter_for(json, &target(0, stave_seccomp::Arch::X86_64))
}

pub(crate) fn filter_for(json: &str, target: &Target) -> Filter {
    let filter = compile_for(&parse(json, "test").unwrap(), target).unwrap();
    // Each target of each jump is inside: the kernel would refuse it otherwise.
    let (instructions, _) = filter.program.as_chunks::<8>();
    for (at, [c0, c1, jt, jf, k @ ..]) in instructions.iter().enumerate() {
        let left = instructions.len() - at - 1;
        match u16::from_ne_bytes([*c0, *c1]) {
            0x05 => assert!((u32::from_ne_bytes(*k) as usize) < left),
            0x15 | 0x25 | 0x35 => assert!(usize::from(*jt).max(usize::from(*jf)) < left),
            0x06 => {}
            _ => assert!(left > 0),
        }
    }
    filter
}
