//! The security modules of the kernel that give processes labels: AppArmor and SELinux.
//!
//! Knows profiles, labels and files of the host; containers and the CRI are for others.
#![forbid(unsafe_code)]

pub mod apparmor;
pub mod selinux;

mod parser;
mod relabel;

pub use relabel::relabel;
