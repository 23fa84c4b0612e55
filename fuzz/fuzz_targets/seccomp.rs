//! Any seccomp profile: a program that the kernel would load, or an error with its line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stave_seccomp::{Arch, SeccompError, Target, compile_for, parse};

/// Of the opcodes of linux/bpf_common.h: a jump without a condition, the class of all jumps, and the return of a constant.
const JA: u16 = 0x05;
const CLASS: u16 = 0x07;
const JMP: u16 = 0x05;
const RET: u16 = 0x06;

/// What bpf_check_classic of net/core/filter.c asks of jumps and of the end.
fn check(program: &[u8]) {
    assert!(!program.is_empty() && program.len() % 8 == 0 && program.len() / 8 <= 4096);
    let instructions: Vec<(u16, usize, usize, usize)> = program
        .chunks_exact(8)
        .map(|bytes| {
            let code = u16::from_ne_bytes([bytes[0], bytes[1]]);
            let k = u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
            (code, usize::from(bytes[2]), usize::from(bytes[3]), k as usize)
        })
        .collect();
    for (at, (code, on_true, on_false, k)) in instructions.iter().enumerate() {
        if code & CLASS == JMP {
            let furthest = if *code == JA { *k } else { *on_true.max(on_false) };
            assert!(at + 1 + furthest < instructions.len(), "a jump out of the program");
        }
    }
    assert_eq!(instructions.last().expect("one at least").0, RET);
}

fuzz_target!(|data: (&str, u64, u8, u8)| {
    let (text, caps, major, minor) = data;
    let profile = match parse(text, "profile.json") {
        Ok(profile) => profile,
        Err(SeccompError::Syntax { line, .. }) => {
            // An empty document ends before its first line.
            assert!(line <= text.lines().count().max(1) + 1, "line {line} of {text:?}");
            return;
        }
        Err(_) => return,
    };
    for native in [Arch::X86_64, Arch::Aarch64, Arch::X86] {
        let target = Target { caps, kernel: (u32::from(major), u32::from(minor)), native };
        if let Ok(filter) = compile_for(&profile, &target) {
            check(&filter.program);
        }
    }
});
