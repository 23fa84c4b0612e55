//! A profile, as it was read.

use crate::Arch;

/// A seccomp profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// For calls that no rule matches.
    pub default_action: Action,
    /// The architectures beside the native one, if there is no `arch_map`.
    pub architectures: Vec<Arch>,
    /// Docker's form: an architecture, and those that its processes may use beside it.
    pub arch_map: Vec<(Arch, Vec<Arch>)>,
    /// The rules.
    pub rules: Vec<Rule>,
    /// `SECCOMP_FILTER_FLAG_…` for seccomp(2).
    pub flags: u32,
}

/// What happens to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// The process dies of SIGSYS.
    KillProcess,
    /// The thread dies of SIGSYS.
    KillThread,
    /// SIGSYS is sent.
    Trap,
    /// The call fails with this error number.
    Errno(u16),
    /// A tracer is told, with this number; without a tracer the call fails with ENOSYS.
    Trace(u16),
    /// The call is logged and made.
    Log,
    /// The call is made.
    Allow,
}

impl Action {
    /// `SECCOMP_RET_…` and its data.
    pub(crate) fn code(self) -> u32 {
        match self {
            Action::KillProcess => 0x8000_0000,
            Action::KillThread => 0,
            Action::Trap => 0x0003_0000,
            Action::Errno(errno) => 0x0005_0000 | u32::from(errno),
            Action::Trace(data) => 0x7ff0_0000 | u32::from(data),
            Action::Log => 0x7ffc_0000,
            Action::Allow => 0x7fff_0000,
        }
    }

    /// The smaller the more restrictive, as where the kernel has several filters to ask.
    pub(crate) fn rank(self) -> i32 {
        (self.code() & 0xffff_0000).cast_signed()
    }

    /// Lets the call through.
    pub(crate) fn permits(self) -> bool {
        matches!(self, Action::Allow | Action::Log)
    }
}

/// What happens to some calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Names of system calls.
    pub names: Vec<String>,
    /// What happens.
    pub action: Action,
    /// Only if the arguments are like this.
    pub args: Vec<Argument>,
    /// The rule is there if all of this is so.
    pub includes: Conditions,
    /// The rule is not there if any of this is so.
    pub excludes: Conditions,
}

/// What a rule can depend on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conditions {
    /// Capability bits.
    pub caps: u64,
    /// Go's names of native architectures.
    pub arches: Vec<String>,
    /// Oldest kernel: major and minor.
    pub min_kernel: Option<(u32, u32)>,
}

/// A condition on an argument of a call. Comparisons are unsigned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Argument {
    /// Which one: 0 to 5.
    pub index: u8,
    /// How it is compared.
    pub operator: Operator,
    /// With what; for [`Operator::MaskedEqual`] the mask.
    pub value: u64,
    /// The value under the mask.
    pub value_two: u64,
}

/// How an argument is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operator {
    /// It is not `value`.
    NotEqual,
    /// It is below `value`.
    Less,
    /// It is at most `value`.
    LessOrEqual,
    /// It is `value`.
    Equal,
    /// It is at least `value`.
    GreaterOrEqual,
    /// It is above `value`.
    Greater,
    /// Its bits `value` are `value_two`.
    MaskedEqual,
}
