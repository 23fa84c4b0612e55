//! Lines for people, on stderr: a file that the daemon opened.

use std::fmt::Arguments;
use std::io::Write;

use crate::clock;

/// Writes one line. A log that can't be written must not stop a pod, so errors are dropped.
pub(crate) fn line(message: Arguments<'_>) {
    let mut line = Vec::with_capacity(160);
    line.extend_from_slice(&clock::timestamp(clock::unix_nanos()));
    let _ = writeln!(line, " {message}");
    let _ = std::io::stderr().write_all(&line);
}

macro_rules! report {
    ($($arg:tt)*) => { $crate::report::line(format_args!($($arg)*)) };
}
pub(crate) use report;
