//! Seccomp profiles, compiled to the classic BPF programs that seccomp(2) takes.
//!
//! Profiles are in the JSON form of the OCI runtime specification, with Docker's `archMap`, `includes` and
//! `excludes`. [`runtime_default`] is the profile behind `RuntimeDefault`; it is the file `default.json`.
//!
//! The compiler is our own and not libseccomp: what has to be built is a search over some 400 numbers and a few
//! comparisons, it can be tested instruction by instruction with an interpreter, and nothing has to be
//! linked. Besides, a distribution's libseccomp knows only the system calls of its day, so that a profile
//! that allows a newer one would silently not.
//!
//! # What a profile means
//!
//! - A rule without `args` always matches; one with `args` matches when all of them do. Where an index comes up
//!   more than once, each of the `args` is a rule of its own, as in runc.
//! - Of all rules that match a call the most restrictive one wins, and the first one of equals; `defaultAction` is for calls that none
//!   matches. A rule without `args` that says the same as the default says nothing.
//! - A call newer than all that the profile names gets ENOSYS where the default would refuse it: a libc then tries the
//!   older call. So does runc.
//! - Calls of an architecture that the profile doesn't name kill the process. The native one is always in.
//! - On 32-bit architectures only the lower half of the values counts. On i386 a rule for a call that can go through
//!   `socketcall` or `ipc` holds there as well, unless the profile has rules for these themselves. Their arguments are in
//!   memory, where no filter can look: `args` never allow a call there, and always refuse it.
//! - Unknown names of calls are skipped and reported ([`Filter::unknown`]), everything else unknown is an error.
#![forbid(unsafe_code)]

mod arch;
mod assembler;
mod cache;
mod default_profile;
mod error;
mod filter;
mod oci;
mod parse;
mod profile;
mod rules;
mod syscalls;

pub use arch::Arch;
pub use cache::Cache;
pub use default_profile::runtime_default;
pub use error::SeccompError;
pub use filter::{Filter, Target, compile, compile_for};
pub use parse::{PROFILE_MAX, parse, read};
pub use profile::{Action, Argument, Conditions, Operator, Profile, Rule};
