//! A profile in the terms of the OCI runtime specification.

use oci_spec::runtime::{
    Arch as OciArch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompFilterFlag, LinuxSeccompOperator, LinuxSyscall,
};

use crate::Arch;
use crate::profile::{Action, Argument, Operator, Profile, Rule};
use crate::syscalls::is_known;

/// The rules that apply, with the names that exist.
pub(crate) fn seccomp(profile: &Profile, rules: &[&Rule], arches: &[Arch]) -> LinuxSeccomp {
    let (action, errno) = action(profile.default_action);
    let mut flags = Vec::new();
    if profile.flags & 2 != 0 {
        flags.push(LinuxSeccompFilterFlag::SeccompFilterFlagLog);
    }
    if profile.flags & 4 != 0 {
        flags.push(LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow);
    }
    let mut seccomp = LinuxSeccomp::default();
    seccomp
        .set_default_action(action)
        .set_default_errno_ret(errno)
        .set_architectures(Some(arches.iter().filter_map(|a| arch(*a)).collect()))
        .set_flags((!flags.is_empty()).then_some(flags))
        .set_syscalls(Some(rules.iter().filter_map(|rule| syscall(rule)).collect()));
    seccomp
}

fn syscall(rule: &Rule) -> Option<LinuxSyscall> {
    let names: Vec<String> = rule.names.iter().filter(|name| is_known(name)).cloned().collect();
    if names.is_empty() {
        return None;
    }
    let (action, errno) = action(rule.action);
    let args: Vec<LinuxSeccompArg> = rule.args.iter().filter_map(argument).collect();
    let mut syscall = LinuxSyscall::default();
    syscall
        .set_names(names)
        .set_action(action)
        .set_errno_ret(errno)
        .set_args((!args.is_empty()).then_some(args));
    Some(syscall)
}

fn argument(arg: &Argument) -> Option<LinuxSeccompArg> {
    let operator = match arg.operator {
        Operator::NotEqual => LinuxSeccompOperator::ScmpCmpNe,
        Operator::Less => LinuxSeccompOperator::ScmpCmpLt,
        Operator::LessOrEqual => LinuxSeccompOperator::ScmpCmpLe,
        Operator::Equal => LinuxSeccompOperator::ScmpCmpEq,
        Operator::GreaterOrEqual => LinuxSeccompOperator::ScmpCmpGe,
        Operator::Greater => LinuxSeccompOperator::ScmpCmpGt,
        Operator::MaskedEqual => LinuxSeccompOperator::ScmpCmpMaskedEq,
    };
    LinuxSeccompArgBuilder::default()
        .index(usize::from(arg.index))
        .value(arg.value)
        .value_two(arg.value_two)
        .op(operator)
        .build()
        .ok()
}

fn action(action: Action) -> (LinuxSeccompAction, Option<u32>) {
    match action {
        Action::KillProcess => (LinuxSeccompAction::ScmpActKillProcess, None),
        Action::KillThread => (LinuxSeccompAction::ScmpActKillThread, None),
        Action::Trap => (LinuxSeccompAction::ScmpActTrap, None),
        Action::Errno(errno) => (LinuxSeccompAction::ScmpActErrno, Some(errno.into())),
        Action::Trace(data) => (LinuxSeccompAction::ScmpActTrace, Some(data.into())),
        Action::Log => (LinuxSeccompAction::ScmpActLog, None),
        Action::Allow => (LinuxSeccompAction::ScmpActAllow, None),
    }
}

fn arch(arch: Arch) -> Option<OciArch> {
    match arch {
        Arch::X86_64 => Some(OciArch::ScmpArchX86_64),
        Arch::X86 => Some(OciArch::ScmpArchX86),
        Arch::X32 => Some(OciArch::ScmpArchX32),
        Arch::Aarch64 => Some(OciArch::ScmpArchAarch64),
        Arch::Arm => Some(OciArch::ScmpArchArm),
        Arch::Foreign => None,
    }
}
