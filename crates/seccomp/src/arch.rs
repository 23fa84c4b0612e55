//! The architectures whose processes can run on ours.

/// An architecture, as the system call interface has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arch {
    /// 64-bit x86.
    X86_64,
    /// i386.
    X86,
    /// 32-bit pointers on 64-bit x86: the architecture of [`Arch::X86_64`], with bit 30 in the numbers.
    X32,
    /// 64-bit ARM.
    Aarch64,
    /// 32-bit ARM, EABI.
    Arm,
    /// Known, and never run by the hosts that we run on.
    Foreign,
}

/// `__X32_SYSCALL_BIT`.
pub(crate) const X32_BIT: u32 = 0x4000_0000;

/// `SCMP_ARCH_` names that are not ours.
const FOREIGN: &[&str] = &[
    "LOONGARCH64",
    "M68K",
    "MIPS",
    "MIPS64",
    "MIPS64N32",
    "MIPSEL",
    "MIPSEL64",
    "MIPSEL64N32",
    "PARISC",
    "PARISC64",
    "PPC",
    "PPC64",
    "PPC64LE",
    "RISCV64",
    "S390",
    "S390X",
    "SH",
    "SHEB",
];

impl Arch {
    /// That of this program.
    #[cfg(target_arch = "x86_64")]
    pub const NATIVE: Arch = Arch::X86_64;
    /// That of this program.
    #[cfg(target_arch = "aarch64")]
    pub const NATIVE: Arch = Arch::Aarch64;

    /// From `SCMP_ARCH_…`.
    pub(crate) fn from_scmp(name: &str) -> Option<Arch> {
        Some(match name.strip_prefix("SCMP_ARCH_")? {
            "NATIVE" => Arch::NATIVE,
            "X86_64" => Arch::X86_64,
            "X86" => Arch::X86,
            "X32" => Arch::X32,
            "AARCH64" => Arch::Aarch64,
            "ARM" => Arch::Arm,
            name if FOREIGN.contains(&name) => Arch::Foreign,
            _ => return None,
        })
    }

    /// Whether `name` of `includes.arches` is this one. Those are Go's names.
    pub(crate) fn is_go(self, name: &str) -> bool {
        match self {
            Arch::X86_64 => name == "amd64",
            Arch::X86 => matches!(name, "386" | "x86"),
            Arch::X32 => name == "x32",
            Arch::Aarch64 => matches!(name, "arm64" | "aarch64"),
            Arch::Arm => name == "arm",
            Arch::Foreign => false,
        }
    }

    /// `AUDIT_ARCH_…`: what the kernel tells a filter.
    pub(crate) fn audit(self) -> Option<u32> {
        match self {
            Arch::X86_64 | Arch::X32 => Some(0xc000_003e),
            Arch::X86 => Some(0x4000_0003),
            Arch::Aarch64 => Some(0xc000_00b7),
            Arch::Arm => Some(0x4000_0028),
            Arch::Foreign => None,
        }
    }

    /// Registers of 64 bits.
    pub(crate) fn is_64_bit(self) -> bool {
        // x32 has 64-bit registers and 32-bit pointers.
        matches!(self, Arch::X86_64 | Arch::X32 | Arch::Aarch64)
    }

    /// Whether a kernel of architecture `self` can run programs of `other`.
    pub(crate) fn runs(self, other: Arch) -> bool {
        match self {
            Arch::X86_64 => matches!(other, Arch::X86_64 | Arch::X86 | Arch::X32),
            Arch::Aarch64 => matches!(other, Arch::Aarch64 | Arch::Arm),
            Arch::X86 | Arch::X32 | Arch::Arm | Arch::Foreign => self == other,
        }
    }
}
