use std::fmt;
use std::io;
use std::path::PathBuf;

/// Where a value was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A file, and the line in it (from 1).
    File {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
    },
    /// An option of the command line, as `--root`.
    Option(&'static str),
    /// The built-in default.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File { path, line } => write!(f, "{}:{line}", path.display()),
            Origin::Option(option) => f.write_str(option),
            Origin::Default => f.write_str("default"),
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file or the directory of drop-ins can't be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's answer, or what is wrong with the content.
        source: io::Error,
    },
    /// A file is no TOML.
    #[error("{origin}: {message}")]
    Syntax {
        /// File and line.
        origin: Origin,
        /// What the parser says.
        message: String,
    },
    /// A key that Stave does not know.
    #[error("{origin}: unknown key {key}; {hint}")]
    UnknownKey {
        /// File and line.
        origin: Origin,
        /// The full dotted path.
        key: String,
        /// The keys that there are.
        hint: String,
    },
    /// A value of the wrong type or with a bad content, or one that is missing.
    #[error("{origin}: {key} = {value} {reason}")]
    Value {
        /// File and line, or the option.
        origin: Origin,
        /// The full dotted path.
        key: String,
        /// The value as it was written.
        value: String,
        /// What is wrong: reads on after the value ("is no absolute path").
        reason: String,
    },
    /// A table lacks a key that it must have.
    #[error("{origin}: {key} is missing: {reason}")]
    Missing {
        /// The table's file and line.
        origin: Origin,
        /// The full dotted path.
        key: String,
        /// Why it must be there.
        reason: String,
    },
}
