use std::path::Path;

/// A line of a CRI log file: `<RFC 3339 time> <stream> <P|F> <text>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// The time, as it is written.
    pub time: String,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// Whether the line goes on in the next entry (tag `P`).
    pub partial: bool,
    /// What the process wrote, without the newline.
    pub text: String,
}

/// Parses a CRI log; panics on what is no line of one.
pub fn parse_log(content: &str) -> Vec<LogLine> {
    assert!(content.is_empty() || content.ends_with('\n'), "the log ends in the middle of a line");
    content
        .lines()
        .map(|line| {
            let mut fields = line.splitn(4, ' ');
            let mut next =
                || fields.next().unwrap_or_else(|| panic!("no line of a CRI log: {line:?}")).to_owned();
            let (time, stream, tag, text) = (next(), next(), next(), next());
            let (date, clock) =
                time.split_once('T').unwrap_or_else(|| panic!("no RFC 3339 time in {line:?}"));
            assert!(date.len() == 10 && clock.len() >= 9, "no RFC 3339 time in {line:?}");
            assert!(
                clock.ends_with('Z') || clock[8..].contains(['+', '-']),
                "a time without a zone in {line:?}"
            );
            assert!(stream == "stdout" || stream == "stderr", "unknown stream in {line:?}");
            assert!(tag == "P" || tag == "F", "unknown tag in {line:?}");
            LogLine { time, stream, partial: tag == "P", text }
        })
        .collect()
}

/// The log file at `path`, parsed.
pub fn read_log(path: impl AsRef<Path>) -> Vec<LogLine> {
    let path = path.as_ref();
    let content = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("log {}: {e}", path.display()));
    parse_log(&content)
}
