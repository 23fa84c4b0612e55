use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// What went wrong between the daemon and the plugins, and where.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// There is no network that a pod could be put on. The text is for the node's status.
    #[error("{0}")]
    NotReady(String),
    /// What the pod asks for can't be told to a plugin.
    #[error("{field} {value:?}: {reason}")]
    Argument {
        /// The field of the pod's configuration.
        field: String,
        /// Its value.
        value: String,
        /// Why not.
        reason: String,
    },
    /// No such program.
    #[error("plugin type={plugin:?}: not found in {dirs}")]
    Missing {
        /// The plugin's type.
        plugin: String,
        /// Where it was looked for.
        dirs: String,
    },
    /// The program can't be started, or its pipes fail.
    #[error("plugin type={plugin:?} ({command}): {what}: {source}")]
    Spawn {
        /// The plugin's type.
        plugin: String,
        /// ADD, DEL, ...
        command: &'static str,
        /// The step.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The plugin says that it failed.
    #[error("plugin type={plugin:?} failed ({command}): {message}")]
    Failed {
        /// The plugin's type.
        plugin: String,
        /// ADD, DEL, ...
        command: &'static str,
        /// The code in its error, as the specification numbers them; 0: it gave none.
        code: u64,
        /// What it printed: its error, or whatever came instead, and its standard error.
        message: String,
    },
    /// It did not end in time, and was killed.
    #[error("plugin type={plugin:?} ({command}) did not end within {limit:?} and was killed{stderr}")]
    Timeout {
        /// The plugin's type.
        plugin: String,
        /// ADD, DEL, ...
        command: &'static str,
        /// How long it had.
        limit: Duration,
        /// "; it said: ...", or nothing.
        stderr: String,
    },
    /// It was killed because nobody wants its answer any more.
    #[error("plugin type={plugin:?} ({command}) was killed: the pod is taken off the network")]
    Unwanted {
        /// The plugin's type.
        plugin: String,
        /// CHECK.
        command: &'static str,
    },
    /// It ended well, but what it printed can't be used.
    #[error("plugin type={plugin:?} ({command}): its answer can't be used: {reason}")]
    Answer {
        /// The plugin's type.
        plugin: String,
        /// ADD, DEL, ...
        command: &'static str,
        /// What is wrong with it, and what the plugin wrote on its standard error.
        reason: String,
    },
    /// The result names no address for the pod.
    #[error("network {network:?}: the plugins gave the pod's interface {interface} no address{said}")]
    NoAddress {
        /// The network's name.
        network: String,
        /// The interface in the pod.
        interface: &'static str,
        /// "; standard error: ..." of the last plugin, or nothing.
        said: String,
    },
    /// The file of the network namespace.
    #[error("network namespace {}: {what}: {source}", path.display())]
    Netns {
        /// The file.
        path: PathBuf,
        /// The step.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The template of a configuration, or the file made from it.
    #[error("{}: {reason}", path.display())]
    Template {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A record.
    #[error(transparent)]
    State(#[from] stave_state::StateError),
    /// A thread that did the work is gone.
    #[error("worker: {0}")]
    Worker(String),
    /// Several plugins failed; each was tried.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Several(Vec<CniError>),
}

impl CniError {
    /// Nothing for none, the one, or several.
    pub(crate) fn gathered(mut errors: Vec<Self>) -> Result<(), Self> {
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(Self::Several(errors)),
        }
    }
}
