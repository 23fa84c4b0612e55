//! apparmor_parser(8), which alone knows how profiles are written and what the kernel is given for them.

use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::apparmor::AppArmorError;

/// Where it is looked for, after PATH.
const DIRECTORIES: [&str; 2] = ["/sbin", "/usr/sbin"];

/// More than an emulated machine needs.
const TIME: Duration = Duration::from_secs(60);

/// Most bytes of its output that are kept.
const OUTPUT_MAX: u64 = 64 << 10;

/// Bytes of a message in an error.
const MESSAGE_MAX: usize = 1000;

/// With this there are rules that older parsers and kernels know; without it each parser takes a default of its own.
const ABI: &str = "/etc/apparmor.d/abi/3.0";

/// The program.
pub(crate) fn find() -> Result<PathBuf, AppArmorError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places: Vec<PathBuf> =
        std::env::split_paths(&path).chain(DIRECTORIES.iter().map(PathBuf::from)).collect();
    let found = places.iter().map(|dir| dir.join("apparmor_parser")).find(|program| program.is_file());
    found.ok_or_else(|| {
        let places: Vec<String> = places.iter().map(|dir| dir.display().to_string()).collect();
        AppArmorError::NoParser(places.join(":"))
    })
}

/// Runs it on `text` and gives what it prints.
pub(crate) fn run(options: &[&str], text: &str, origin: &str) -> Result<String, AppArmorError> {
    // On the line of the first rule, so that line numbers in errors stay those of the text.
    let abi = if Path::new(ABI).exists() && !text.contains("abi <") { "abi <abi/3.0>, " } else { "" };
    let program = find()?;
    let (status, stdout, stderr) =
        feed(Command::new(program).args(options).env("LC_ALL", "C"), &format!("{abi}{text}"))
            .map_err(AppArmorError::Run)?;
    if status {
        Ok(stdout)
    } else {
        Err(AppArmorError::Refused { origin: origin.to_owned(), message: message(&stderr) })
    }
}

/// Success, standard output, standard error.
fn feed(command: &mut Command, input: &str) -> io::Result<(bool, String, String)> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        // A parser that fails early does not read to the end.
        scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(input.as_bytes())));
        let stdout = scope.spawn(move || read(stdout));
        let stderr = scope.spawn(move || read(stderr));
        let end = Instant::now() + TIME;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if Instant::now() >= end {
                child.kill()?;
                child.wait()?;
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("did not end within {TIME:?}")));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let text = |thread: std::thread::ScopedJoinHandle<'_, String>| thread.join().unwrap_or_default();
        Ok((status.success(), text(stdout), text(stderr)))
    })
}

fn read(stream: Option<impl io::Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        // What can't be read is missing in a message, no more.
        let _ = stream.take(OUTPUT_MAX).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What it says of its surroundings, whatever becomes of the profile.
fn is_noise(line: &str) -> bool {
    line.is_empty() || line.starts_with("Warning") || line.starts_with("Cache read/write disabled")
}

/// On one line, without warnings, and not too long.
fn message(stderr: &str) -> String {
    let lines = stderr.lines().map(str::trim).filter(|line| !is_noise(line));
    let text = lines.collect::<Vec<_>>().join("; ");
    let text = if text.is_empty() { "without a message".to_owned() } else { text };
    match text.char_indices().nth(MESSAGE_MAX) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_one_line() {
        assert_eq!(
            message("Warning from stdin: x\n  AppArmor parser error at line 3: no\n\n"),
            "AppArmor parser error at line 3: no"
        );
        assert_eq!(message("\n"), "without a message");
        assert!(message(&"é".repeat(5000)).len() < 2100);
    }

    #[test]
    fn programs_are_fed_and_read() {
        let (ok, out, err) =
            feed(Command::new("sh").args(["-c", "cat; echo no >&2; exit 1"]), "text").unwrap();
        assert_eq!((ok, out.as_str(), err.as_str()), (false, "text", "no\n"));
        // It ends before it has read everything.
        let (ok, ..) = feed(&mut Command::new("true"), &"x".repeat(1 << 20)).unwrap();
        assert!(ok);
        assert!(feed(&mut Command::new("/nonexistent"), "").is_err());
    }
}
