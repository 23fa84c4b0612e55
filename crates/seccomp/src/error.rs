//! What can be wrong with a profile.

use stave_paths::PathError;

/// A profile that no filter can be made from.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SeccompError {
    /// The profile can't be read as a file.
    #[error(transparent)]
    Read(#[from] PathError),
    /// It is not JSON, or not a profile.
    #[error("{source_name}: line {line}, column {column}: {message}")]
    Syntax {
        /// Where the profile comes from, for people.
        source_name: String,
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
        /// Why.
        message: String,
    },
    /// It is larger than a filter can be.
    #[error("the profile needs {needed} {what} on {arch:?}, and at most {max} are possible")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// The architecture that it was compiled for when that was found.
        arch: crate::Arch,
        /// How many the profile needs.
        needed: usize,
        /// How many are possible.
        max: usize,
    },
}

impl SeccompError {
    /// There is no such file.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Read(error) if error.is_not_found())
    }
}
