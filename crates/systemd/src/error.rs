use std::time::Duration;

/// What can go wrong with systemd; the message names the step, and the unit where there is one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SystemdError {
    /// There is no bus, or systemd is not on it.
    #[error("{stage}: systemd can't be reached over D-Bus: {message}")]
    Unreachable {
        /// the step
        stage: String,
        /// what was tried, and the answer
        message: String,
    },
    /// No answer in time.
    #[error("{stage}: no answer from systemd within {deadline:?}")]
    Deadline {
        /// the step that was under way
        stage: String,
        /// for all steps
        deadline: Duration,
    },
    /// systemd has refused a call.
    #[error("{stage}: systemd refused it: {name}: {message}")]
    Refused {
        /// the step
        stage: String,
        /// the name of the D-Bus error
        name: String,
        /// systemd's words
        message: String,
    },
    /// A job of systemd has ended without success.
    #[error("{stage}: systemd's job ended with {result:?}; see `systemctl status {unit}`")]
    Job {
        /// the step
        stage: String,
        /// the unit
        unit: String,
        /// canceled, timeout, failed, dependency, skipped, or the state of the unit
        result: String,
    },
    /// An answer that can't be read.
    #[error("{stage}: an answer of systemd that can't be read: {message}")]
    Answer {
        /// the step
        stage: String,
        /// what is wrong with it
        message: String,
    },
}

impl SystemdError {
    /// True if another try may do better: systemd or the bus was not there, or did not answer.
    pub fn is_unavailable(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Deadline { .. })
    }
}
