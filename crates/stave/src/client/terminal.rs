//! The user's terminal.

use anyhow::Context as _;
use rustix::termios::{OptionalActions, Termios};

/// The terminal in raw mode: every key goes to the other side. Dropping this restores it, so it must be dropped
/// before the process exits, whatever the reason.
#[derive(Debug)]
pub(crate) struct RawTerminal {
    saved: Termios,
}

impl RawTerminal {
    /// Switches the terminal that is our standard input.
    pub(crate) fn enter() -> anyhow::Result<Self> {
        let stdin = rustix::stdio::stdin();
        let saved = rustix::termios::tcgetattr(stdin)
            .context("--tty with --stdin needs a terminal as standard input")?;
        let mut raw = saved.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(stdin, OptionalActions::Now, &raw).context("raw terminal")?;
        Ok(Self { saved })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // EIO: the terminal has hung up.
        let _ = rustix::termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.saved);
    }
}

/// Columns and rows of the terminal on our standard input or output.
pub(crate) fn size() -> Option<(u16, u16)> {
    [rustix::stdio::stdin(), rustix::stdio::stdout()]
        .into_iter()
        .find_map(|fd| rustix::termios::tcgetwinsize(fd).ok())
        .map(|size| (size.ws_col, size.ws_row))
        .filter(|(width, height)| *width != 0 && *height != 0)
}
