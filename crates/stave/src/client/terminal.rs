//! The user's terminal.

use std::panic;
use std::sync::{Mutex, Once, PoisonError, TryLockError};

use anyhow::Context as _;
use rustix::termios::{OptionalActions, Termios};

/// The terminal as it was, while it is in raw mode: for the hook of panics, which may come on any thread.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);
static HOOK: Once = Once::new();

/// The terminal in raw mode: every key goes to the other side. Dropping this restores it, and so does a panic. It must be
/// dropped before the process exits for any other reason.
#[derive(Debug)]
pub(crate) struct RawTerminal {
    raw: Termios,
}

impl RawTerminal {
    /// Switches the terminal that is our standard input.
    pub(crate) fn enter() -> anyhow::Result<Self> {
        let saved = rustix::termios::tcgetattr(rustix::stdio::stdin())
            .context("--tty with --stdin needs a terminal as standard input")?;
        let mut raw = saved.clone();
        raw.make_raw();
        HOOK.call_once(|| {
            let previous = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                restore();
                previous(info);
            }));
        });
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        let terminal = Self { raw };
        terminal.set(&terminal.raw).context("raw terminal")?;
        Ok(terminal)
    }

    /// Stops this process, as Ctrl-Z would without raw mode, with the terminal as it was. Returns when somebody continues it.
    pub(crate) fn suspend(&self) {
        restore();
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP);
    }

    /// Back in raw mode: after a stop, before which a shell will have set the terminal to its own liking.
    pub(crate) fn resume(&self) {
        // EIO: the terminal has hung up.
        let _ = self.set(&self.raw);
    }

    fn set(&self, attributes: &Termios) -> rustix::io::Result<()> {
        let set = || rustix::termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, attributes);
        // A background process is stopped here until it is in the foreground.
        rustix::io::retry_on_intr(set)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn restore() {
    // Who panics may hold the lock; nobody holds it while the terminal is raw.
    let saved = match SAVED.try_lock() {
        Ok(saved) => saved,
        Err(TryLockError::Poisoned(saved)) => saved.into_inner(),
        Err(TryLockError::WouldBlock) => return,
    };
    if let Some(saved) = &*saved {
        // EIO: the terminal has hung up.
        let _ = rustix::termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, saved);
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

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use nix::pty::openpty;
    use nix::sys::termios::{LocalFlags, tcgetattr};

    use super::*;

    const CHILD: &str = "STAVE_TEST_PANICS_ON_A_TERMINAL";

    /// A panic on another thread, after which nothing is unwound here: as with `panic = "abort"`.
    #[test]
    fn a_panic_restores_the_terminal() {
        if std::env::var_os(CHILD).is_some() {
            let raw = RawTerminal::enter().unwrap();
            println!("raw");
            std::io::stdin().read_line(&mut String::new()).unwrap();
            let _ = std::thread::spawn(|| panic!("as the test wants it")).join();
            std::mem::forget(raw);
            std::process::exit(0);
        }
        let pty = openpty(None, None).unwrap();
        let is_raw = || !tcgetattr(&pty.slave).unwrap().local_flags.intersects(LocalFlags::ICANON);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "client::terminal::tests::a_panic_restores_the_terminal", "--nocapture"])
            .env(CHILD, "1")
            .stdin(Stdio::from(pty.slave.try_clone().unwrap()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while !is_raw() {
            assert!(child.try_wait().unwrap().is_none(), "it ended early");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        nix::unistd::write(&pty.master, b"\n").unwrap();
        assert!(child.wait().unwrap().success());
        assert!(!is_raw());
    }
}
