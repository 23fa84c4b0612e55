//! Classic BPF, assembled from its end: the target of a jump is there before the jump.

/// An instruction by its distance from the end of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Label(usize);

/// `struct sock_filter`.
#[derive(Clone, Copy, Debug)]
struct Instruction {
    code: u16,
    if_true: u8,
    if_false: u8,
    k: u32,
}

const LD_W_ABS: u16 = 0x20;
const ALU_AND_K: u16 = 0x54;
const JMP_JA: u16 = 0x05;
const RET_K: u16 = 0x06;

/// A comparison of the accumulator with a constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Jump {
    Equal = 0x15,
    Greater = 0x25,
    GreaterOrEqual = 0x35,
}

/// A program that grows at its front.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    /// The last one first.
    instructions: Vec<Instruction>,
}

impl Assembler {
    /// How many instructions there are.
    pub(crate) fn len(&self) -> usize {
        self.instructions.len()
    }

    fn push(&mut self, code: u16, if_true: u8, if_false: u8, k: u32) -> Label {
        self.instructions.push(Instruction { code, if_true, if_false, k });
        Label(self.len())
    }

    /// Ends the program with a `SECCOMP_RET_…`.
    pub(crate) fn ret(&mut self, value: u32) -> Label {
        self.push(RET_K, 0, 0, value)
    }

    /// Loads the word of `struct seccomp_data` at `offset`, and goes on at `next`.
    pub(crate) fn load(&mut self, offset: u32, next: Label) -> Label {
        self.fall_to(next);
        self.push(LD_W_ABS, 0, 0, offset)
    }

    /// Keeps only the accumulator's bits `mask`, and goes on at `next`.
    pub(crate) fn and(&mut self, mask: u32, next: Label) -> Label {
        self.fall_to(next);
        self.push(ALU_AND_K, 0, 0, mask)
    }

    /// Goes to one of two places.
    pub(crate) fn branch(&mut self, jump: Jump, k: u32, then: Label, otherwise: Label) -> Label {
        // A jump that has to be relayed moves the start one back, so look again.
        let otherwise = self.within_reach(otherwise, 1);
        let then = self.within_reach(then, 0);
        let distance = |label| u8::try_from(self.distance(label)).unwrap_or(u8::MAX);
        let (if_true, if_false) = (distance(then), distance(otherwise));
        self.push(jump as u16, if_true, if_false, k)
    }

    /// A label that a branch, up to `more` instructions from here, can jump to.
    fn within_reach(&mut self, label: Label, more: usize) -> Label {
        if self.distance(label) + more <= usize::from(u8::MAX) {
            return label;
        }
        self.jump(label)
    }

    fn jump(&mut self, label: Label) -> Label {
        // Programs are far below 2^32 instructions: see `PROGRAM_MAX`.
        let distance = u32::try_from(self.distance(label)).unwrap_or(u32::MAX);
        self.push(JMP_JA, 0, 0, distance)
    }

    fn fall_to(&mut self, next: Label) {
        if self.distance(next) > 0 {
            self.jump(next);
        }
    }

    /// Whether a branch soon to come can reach it.
    pub(crate) fn is_near(&self, label: Label) -> bool {
        self.distance(label) < 200
    }

    /// Instructions between the next one to be pushed and `label`.
    fn distance(&self, label: Label) -> usize {
        self.len() - label.0
    }

    /// `struct sock_filter[]` in memory order.
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.len() * 8);
        for instruction in self.instructions.iter().rev() {
            bytes.extend_from_slice(&instruction.code.to_ne_bytes());
            bytes.extend_from_slice(&[instruction.if_true, instruction.if_false]);
            bytes.extend_from_slice(&instruction.k.to_ne_bytes());
        }
        bytes
    }
}
