//! From a profile to a BPF program.

use std::collections::HashMap;
use std::sync::LazyLock;

use crate::arch::X32_BIT;
use crate::assembler::{Assembler, Jump, Label};
use crate::oci;
use crate::profile::{Action, Argument, Operator, Profile, Rule};
use crate::rules::{self, Calls, Chain, Step};
use crate::{Arch, SeccompError};

/// BPF_MAXINSNS.
const PROGRAM_MAX: usize = 4096;
const ENOSYS: Action = Action::Errno(38);

/// Offsets in `struct seccomp_data`.
const NR: u32 = 0;
const ARCH: u32 = 4;
const ARGS: u32 = 16;

/// A compiled profile.
#[derive(Clone, Debug, PartialEq)]
pub struct Filter {
    /// `struct sock_filter[]` in memory order.
    pub program: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_…`.
    pub flags: u32,
    /// Names of calls in the profile that don't exist; they were skipped.
    pub unknown: Vec<String>,
    /// The same as a runtime specification has it: conditions on capabilities and the like are resolved.
    pub oci: oci_spec::runtime::LinuxSeccomp,
}

/// What a profile is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Capability bits for `includes` and `excludes`: the bounding set, since a program may gain all of it.
    pub caps: u64,
    /// The kernel's version, major and minor.
    pub kernel: (u32, u32),
    /// The native architecture.
    pub native: Arch,
}

impl Target {
    /// This host.
    pub fn here(caps: u64) -> Self {
        static KERNEL: LazyLock<(u32, u32)> = LazyLock::new(|| {
            let uname = rustix::system::uname();
            let release = uname.release().to_string_lossy();
            let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
            (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
        });
        Self { caps, kernel: *KERNEL, native: Arch::NATIVE }
    }
}

/// Compiles a profile for this host. `caps`: the capability bits of the process's bounding set.
pub fn compile(profile: &Profile, caps: u64) -> Result<Filter, SeccompError> {
    compile_for(profile, &Target::here(caps))
}

/// Compiles a profile.
pub fn compile_for(profile: &Profile, target: &Target) -> Result<Filter, SeccompError> {
    let rules: Vec<&Rule> = profile.rules.iter().filter(|rule| rules::applies(rule, target)).collect();
    let arches = rules::arches(profile, target.native);
    let default = profile.default_action;
    let mut code = Code::default();

    // An architecture that the profile has nothing to say about.
    let mut dispatch = code.ret(Action::KillProcess);
    for arch in arches.iter().rev().filter(|arch| **arch != Arch::X32) {
        let Some(audit) = arch.audit() else { continue };
        let calls = rules::calls(&rules, default, *arch)?;
        let mut ranges = ranges(calls, default, 0);
        if *arch == Arch::X86_64 {
            // x32 shares the architecture; the highest number, -1, is what a tracer makes of a call to skip.
            ranges.retain(|(start, _)| *start < X32_BIT);
            if arches.contains(&Arch::X32) {
                let calls = rules::calls(&rules, default, Arch::X32)?;
                ranges.extend(self::ranges(calls, default, X32_BIT));
            } else {
                ranges.push((X32_BIT, vec![Step { args: Vec::new(), action: Action::KillProcess }]));
            }
            let last = if refuses(default) { ENOSYS } else { default };
            ranges.push((u32::MAX, vec![Step { args: Vec::new(), action: last }]));
        }
        code.chains.clear();
        let labels: Vec<(u32, Label)> =
            ranges.iter().map(|(start, chain)| (*start, code.chain(chain, arch.is_64_bit()))).collect();
        let search = code.search(&labels, dispatch);
        let start = code.assembler.load(NR, search);
        // The accumulator holds the architecture when control comes here.
        dispatch = code.assembler.branch(Jump::Equal, audit, start, dispatch);
        if code.assembler.len() > PROGRAM_MAX {
            break;
        }
    }
    code.assembler.load(ARCH, dispatch);
    let needed = code.assembler.len();
    if needed > PROGRAM_MAX {
        let what = "instructions";
        return Err(SeccompError::TooLarge { what, arch: target.native, needed, max: PROGRAM_MAX });
    }
    Ok(Filter {
        program: code.assembler.into_bytes(),
        flags: profile.flags,
        unknown: rules::unknown(&rules),
        oci: oci::seccomp(profile, &rules, &arches),
    })
}

/// Calls that the default refuses are refused with ENOSYS where the profile can't have known them.
fn refuses(default: Action) -> bool {
    matches!(default, Action::Errno(_) | Action::Trap | Action::KillThread | Action::KillProcess)
}

/// The numbers from `first` on, as ranges that are treated alike: where they start, and how.
fn ranges(calls: Calls, default: Action, first: u32) -> Vec<(u32, Chain)> {
    let plain = |action| vec![Step { args: Vec::new(), action }];
    let mut ranges: Vec<(u32, Chain)> = Vec::new();
    let mut add = |start: u32, chain: Chain| {
        if ranges.last().is_none_or(|(_, last)| *last != chain) {
            ranges.push((start, chain));
        }
    };
    let mut next = Some(first);
    let newest = calls.newest.filter(|_| refuses(default));
    let gap = |from: u32, to: Option<u32>, add: &mut dyn FnMut(u32, Chain)| {
        // `to` is the first number after the gap.
        let Some(newest) = newest else { return add(from, plain(default)) };
        if from <= newest {
            add(from, plain(default));
        }
        let unknown = from.max(newest.saturating_add(1));
        if to.is_none_or(|to| unknown < to) {
            add(unknown, plain(ENOSYS));
        }
    };
    for (nr, chain) in calls.chains {
        if let Some(from) = next.filter(|from| *from < nr) {
            gap(from, Some(nr), &mut add);
        }
        add(nr, chain);
        next = nr.checked_add(1);
    }
    if let Some(from) = next {
        gap(from, None, &mut add);
    }
    ranges
}

/// The program, and what of it can be jumped to again.
#[derive(Default)]
struct Code {
    assembler: Assembler,
    returns: HashMap<u32, Label>,
    chains: HashMap<Chain, Label>,
}

impl Code {
    fn ret(&mut self, action: Action) -> Label {
        // A far one would be reached by a jump, which takes no less than another return.
        if let Some(label) = self.returns.get(&action.code()).filter(|label| self.assembler.is_near(**label))
        {
            return *label;
        }
        let label = self.assembler.ret(action.code());
        self.returns.insert(action.code(), label);
        label
    }

    /// The start of the range that the number, in the accumulator, is in. `otherwise`: there is none.
    fn search(&mut self, ranges: &[(u32, Label)], otherwise: Label) -> Label {
        match ranges {
            [] => otherwise,
            [(_, label)] => *label,
            _ => {
                let (low, high) = ranges.split_at(ranges.len() / 2);
                let Some((start, _)) = high.first() else { return otherwise };
                let below = self.search(low, otherwise);
                let above = self.search(high, otherwise);
                self.assembler.branch(Jump::GreaterOrEqual, *start, above, below)
            }
        }
    }

    fn chain(&mut self, chain: &Chain, wide: bool) -> Label {
        if let Some(label) = self.chains.get(chain) {
            return *label;
        }
        // The last step has no conditions: it is where the others fail to.
        let mut next = self.ret(chain.last().map_or(Action::KillProcess, |step| step.action));
        for step in chain.iter().rev().skip(1) {
            let mut then = self.ret(step.action);
            for arg in step.args.iter().rev() {
                then = self.compare(arg, wide, then, next);
            }
            next = then;
        }
        self.chains.insert(chain.clone(), next);
        next
    }

    fn compare(&mut self, arg: &Argument, wide: bool, yes: Label, no: Label) -> Label {
        let halves = |value: u64| ((value >> 32) as u32, value as u32);
        let (high, low) = halves(arg.value);
        // Both architectures are little-endian.
        let low_at = ARGS + 8 * u32::from(arg.index);
        let high_at = low_at + 4;
        let asm = &mut self.assembler;
        let ordered = |asm: &mut Assembler, last: Jump, yes, no| {
            let label = asm.branch(last, low, yes, no);
            let label = asm.load(low_at, label);
            if !wide {
                return label;
            }
            let label = asm.branch(Jump::Equal, high, label, no);
            let label = asm.branch(Jump::Greater, high, yes, label);
            asm.load(high_at, label)
        };
        let equal = |asm: &mut Assembler, yes, no| {
            let label = asm.branch(Jump::Equal, low, yes, no);
            let label = asm.load(low_at, label);
            if !wide {
                return label;
            }
            let label = asm.branch(Jump::Equal, high, label, no);
            asm.load(high_at, label)
        };
        match arg.operator {
            Operator::Equal => equal(asm, yes, no),
            Operator::NotEqual => equal(asm, no, yes),
            Operator::Greater => ordered(asm, Jump::Greater, yes, no),
            Operator::LessOrEqual => ordered(asm, Jump::Greater, no, yes),
            Operator::GreaterOrEqual => ordered(asm, Jump::GreaterOrEqual, yes, no),
            Operator::Less => ordered(asm, Jump::GreaterOrEqual, no, yes),
            Operator::MaskedEqual => {
                let (want_high, want_low) = halves(arg.value_two);
                let label = asm.branch(Jump::Equal, want_low, yes, no);
                let label = asm.and(low, label);
                let label = asm.load(low_at, label);
                if !wide || (high, want_high) == (0, 0) {
                    return label;
                }
                let label = asm.branch(Jump::Equal, want_high, label, no);
                let label = asm.and(high, label);
                asm.load(high_at, label)
            }
        }
    }
}
