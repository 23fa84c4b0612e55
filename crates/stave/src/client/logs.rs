//! `stave logs`

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use stave_cri_proto::v1::{ContainerState, ContainerStatus, ContainerStatusRequest};
use tonic::Code;

use super::connection::{Client, plain};
use super::log_file::LogFile;
use super::log_line::{LogLine, Stream};
use super::logs_rotated::Rotated;
use super::logs_since::{self, Nanos};
use super::resolve::Known;

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Go on with what is written until the container ends
    #[arg(short, long)]
    follow: bool,
    /// Start with what was written at a time (RFC 3339), or so long ago (10s, 1h30m)
    #[arg(long, value_name = "DURATION|TIME", value_parser = logs_since::since)]
    since: Option<Nanos>,
    /// Start with the last so many lines
    #[arg(long, value_name = "LINES")]
    tail: Option<usize>,
    /// Print when each line was written
    #[arg(long)]
    timestamps: bool,
    /// The container, or a pod that has only one
    container: String,
}

pub(crate) async fn run(mut client: Client, args: LogsArgs) -> anyhow::Result<()> {
    let container = Known::list(&mut client).await?.container(&args.container)?.id.clone();
    let Some(status) = status_of(&mut client, &container).await? else {
        bail!("container {} has just been removed", args.container);
    };
    if status.log_path.is_empty() {
        bail!("container {} writes no log: its pod has no log directory", args.container);
    }
    let path = PathBuf::from(status.log_path);
    let mut printer =
        Printer { timestamps: args.timestamps, filter: Filter::new(args.since), ..Printer::default() };
    let mut file = match LogFile::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && args.follow => {
            return follow(&mut client, &container, &path, printer).await;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            bail!("{}: not there: the container has not been started, or its log was removed", path.display())
        }
        opened => opened.with_context(|| path.display().to_string())?,
    };
    let mut rotated = match (args.since, args.tail) {
        // As kubectl: the log as it is now.
        (None, None) => Rotated::default(),
        _ => Rotated::open(&path, &file, args.since)?,
    };
    let whole = match args.tail {
        Some(wanted) => {
            let files = std::iter::once(&mut file).chain(&mut rotated.files);
            let (lines, whole) = last_lines(files, wanted, args.since)?;
            lines.iter().try_for_each(|line| printer.print(line))?;
            whole
        }
        None => {
            for older in rotated.files.iter_mut().rev() {
                older.read_lines(&mut |line| printer.print(line))?;
            }
            file.read_lines(&mut |line| printer.print(line))?;
            false
        }
    };
    if !whole {
        rotated.skipped.iter().for_each(|path| eprintln!("stave: not read: {}", path.display()));
    }
    printer.flush()?;
    if args.follow {
        return go_on(&mut client, &container, file, printer).await;
    }
    Ok(())
}

/// The container's status, or `None` if it is gone.
pub(crate) async fn status_of(client: &mut Client, id: &str) -> anyhow::Result<Option<ContainerStatus>> {
    let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
    match client.runtime.container_status(request).await {
        Ok(answer) => Ok(answer.into_inner().status),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(plain(status)),
    }
}

const POLL: Duration = Duration::from_millis(100);
/// The daemon is asked whether the container still runs once in so many polls.
const POLLS_A_STATUS: u32 = 5;

/// Prints what a container writes, from the first line to its end.
pub(crate) async fn follow(
    client: &mut Client,
    container: &str,
    path: &Path,
    printer: Printer,
) -> anyhow::Result<()> {
    loop {
        // In this order: a log that is made between the two is not missed.
        let runs = still_runs(client, container).await?;
        match LogFile::open(path) {
            Ok(file) => return go_on(client, container, file, printer).await,
            Err(error) if error.kind() == io::ErrorKind::NotFound && runs => tokio::time::sleep(POLL).await,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        }
    }
}

async fn still_runs(client: &mut Client, container: &str) -> anyhow::Result<bool> {
    // A container that is created is yet to be started.
    let ended = [ContainerState::ContainerExited, ContainerState::ContainerUnknown].map(i32::from);
    Ok(status_of(client, container).await?.is_some_and(|status| !ended.contains(&status.state)))
}

async fn go_on(
    client: &mut Client,
    container: &str,
    mut file: LogFile,
    mut printer: Printer,
) -> anyhow::Result<()> {
    let mut runs = true;
    let mut polls = 0u32;
    loop {
        if file.read_lines(&mut |line| printer.print(line))? {
            printer.flush()?;
            continue;
        }
        if file.is_rotated() {
            // The runtime may still write to the old file between making the new one and using it.
            tokio::time::sleep(POLL).await;
            file.read_lines(&mut |line| printer.print(line))?;
            file.reopen()?;
            continue;
        }
        // What was written before the end has been read since the end was seen.
        if !runs {
            return Ok(());
        }
        tokio::time::sleep(POLL).await;
        polls += 1;
        if polls.is_multiple_of(POLLS_A_STATUS) {
            runs = still_runs(client, container).await?;
        }
    }
}

/// The last lines of a log of several files, the newest file first; and whether there were more than that.
fn last_lines<'a>(
    files: impl Iterator<Item = &'a mut LogFile>,
    wanted: usize,
    since: Option<Nanos>,
) -> anyhow::Result<(VecDeque<Vec<u8>>, bool)> {
    let (mut all, mut left) = (VecDeque::new(), wanted);
    for (index, file) in files.enumerate() {
        let (mut last, mut filter) = (LastLines::new(left), Filter::new(since));
        file.read_lines(&mut |line| {
            if filter.passes(line) {
                last.push(line);
            }
            Ok(())
        })?;
        // An older file's goes on in the next.
        if index == 0 {
            last.count_unfinished();
        }
        left -= last.whole;
        last.lines.into_iter().rev().for_each(|line| all.push_front(line));
        if last.cut {
            return Ok((all, true));
        }
    }
    Ok((all, false))
}

/// Passes the lines that were written at or after a time.
#[derive(Debug)]
struct Filter {
    since: Option<Nanos>,
    /// What is no log line goes the way of the line before it, and is shown if there is none.
    last: bool,
}

impl Filter {
    fn new(since: Option<Nanos>) -> Self {
        Self { since, last: true }
    }

    fn passes(&mut self, line: &[u8]) -> bool {
        if let Some(since) = self.since
            && let Some(time) = LogLine::parse(line).and_then(|line| logs_since::rfc3339(line.timestamp))
        {
            self.last = time >= since;
        }
        self.last
    }
}

/// The last lines of a log; the parts of a cut line count as one.
struct LastLines {
    wanted: usize,
    whole: usize,
    /// There were more.
    cut: bool,
    lines: VecDeque<Vec<u8>>,
}

impl LastLines {
    fn new(wanted: usize) -> Self {
        Self { wanted, whole: 0, cut: false, lines: VecDeque::new() }
    }

    fn push(&mut self, line: &[u8]) {
        self.whole += usize::from(is_whole(line));
        self.lines.push_back(line.to_owned());
        self.keep(self.wanted);
    }

    fn keep(&mut self, wanted: usize) {
        while self.whole > wanted {
            self.cut = true;
            match self.lines.pop_front() {
                Some(first) => self.whole -= usize::from(is_whole(&first)),
                None => break,
            }
        }
    }

    /// A line that has not ended when all is read, such as a prompt, is one of the wanted as well.
    fn count_unfinished(&mut self) {
        if self.lines.back().is_none_or(|line| is_whole(line)) {
            return;
        }
        match self.wanted.checked_sub(1) {
            Some(others) => {
                self.keep(others);
                self.whole += 1;
            }
            None => {
                self.cut = true;
                self.lines.clear();
            }
        }
    }
}

fn is_whole(line: &[u8]) -> bool {
    LogLine::parse(line).is_none_or(|line| !line.partial)
}

/// Writes lines to the stream that they came from.
#[derive(Debug)]
pub(crate) struct Printer {
    timestamps: bool,
    filter: Filter,
    /// Per stream: the line that was begun has not ended.
    inside: [bool; 2],
}

impl Default for Printer {
    fn default() -> Self {
        Self { timestamps: false, filter: Filter::new(None), inside: [false; 2] }
    }
}

impl Printer {
    fn print(&mut self, line: &[u8]) -> anyhow::Result<()> {
        if !self.filter.passes(line) {
            return Ok(());
        }
        // What is no log line is shown as it is, rather than hidden.
        let bytes = match LogLine::parse(line) {
            Some(line) => self.format(&line),
            None => [line, b"\n"].concat(),
        };
        match LogLine::parse(line).map(|line| line.stream) {
            Some(Stream::Stderr) => io::stderr().lock().write_all(&bytes)?,
            _ => io::stdout().lock().write_all(&bytes)?,
        }
        Ok(())
    }

    fn format(&mut self, line: &LogLine<'_>) -> Vec<u8> {
        let inside = &mut self.inside[usize::from(line.stream == Stream::Stderr)];
        let mut bytes = Vec::with_capacity(line.text.len() + 40);
        if self.timestamps && !*inside {
            bytes.extend(line.timestamp.as_bytes());
            bytes.push(b' ');
        }
        bytes.extend(line.text);
        if !line.partial {
            bytes.push(b'\n');
        }
        *inside = line.partial;
        bytes
    }

    fn flush(&self) -> anyhow::Result<()> {
        Ok(io::stdout().lock().flush()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: &str = "2026-01-01T00:00:00.000000001Z";

    fn log(lines: &[(&str, &str, &str)]) -> Vec<Vec<u8>> {
        lines.iter().map(|(stream, tag, text)| format!("{T} {stream} {tag} {text}").into_bytes()).collect()
    }

    #[test]
    fn parts_of_a_line_are_joined_and_stamped_once() {
        let mut printer = Printer { timestamps: true, ..Printer::default() };
        let lines =
            log(&[("stdout", "P", "ab"), ("stderr", "F", "x"), ("stdout", "F", "cd"), ("stdout", "F", "e")]);
        let printed: Vec<String> = lines
            .iter()
            .map(|line| String::from_utf8(printer.format(&LogLine::parse(line).unwrap())).unwrap())
            .collect();
        assert_eq!(printed, [format!("{T} ab"), format!("{T} x\n"), "cd\n".to_owned(), format!("{T} e\n")]);
    }

    #[test]
    fn the_tail_counts_whole_lines() {
        let lines =
            log(&[("stdout", "F", "1"), ("stdout", "P", "2a"), ("stdout", "F", "2b"), ("stdout", "F", "3")]);
        for (wanted, left) in [(0, 0), (1, 1), (2, 3), (3, 4), (9, 4)] {
            let mut last = LastLines::new(wanted);
            lines.iter().for_each(|line| last.push(line));
            assert_eq!(last.lines.len(), left, "{wanted}");
        }
    }

    #[test]
    fn a_last_line_that_has_not_ended_is_one_of_the_tail() {
        let lines =
            log(&[("stdout", "F", "1"), ("stdout", "F", "2"), ("stdout", "P", "3a"), ("stdout", "P", "3b")]);
        for (wanted, left, cut) in [(0, 0, true), (1, 2, true), (2, 3, true), (3, 4, false), (4, 4, false)] {
            let mut last = LastLines::new(wanted);
            lines.iter().for_each(|line| last.push(line));
            last.count_unfinished();
            assert_eq!((last.lines.len(), last.cut), (left, cut), "{wanted}");
            assert_eq!(last.whole, wanted.min(3), "what is left for older files");
        }
    }

    fn at(second: u32, tag: &str, text: &str) -> String {
        format!("2026-01-01T00:00:{second:02}Z stdout {tag} {text}\n")
    }

    #[test]
    fn the_filter_takes_what_is_new_enough() {
        let mut filter = Filter::new(logs_since::rfc3339("2026-01-01T00:00:05Z"));
        let mut passes = |line: &str| filter.passes(line.trim_end().as_bytes());
        assert!(passes("what is no line"));
        assert!(!passes(&at(4, "F", "old")));
        assert!(!passes("goes the same way"));
        assert!(passes(&at(5, "F", "new")));
        assert!(passes("goes the same way"));
    }

    #[test]
    fn the_tail_reaches_into_rotated_files() {
        let dir = tempfile::tempdir().unwrap();
        let files = [
            at(7, "F", "3b") + &at(8, "F", "4"),
            at(4, "F", "1") + &at(5, "F", "2") + &at(6, "P", "3a"),
            at(1, "F", "0"),
        ];
        for (wanted, since, texts, whole) in [
            (0, 0, &[][..], true),
            (1, 0, &["4"], true),
            (2, 0, &["3a", "3b", "4"], true),
            (3, 0, &["2", "3a", "3b", "4"], true),
            (5, 0, &["0", "1", "2", "3a", "3b", "4"], false),
            (4, 5, &["2", "3a", "3b", "4"], false),
        ] {
            let mut open: Vec<LogFile> = (files.iter().enumerate())
                .map(|(index, text)| {
                    let path = dir.path().join(index.to_string());
                    std::fs::write(&path, text).unwrap();
                    LogFile::open(&path).unwrap()
                })
                .collect();
            let since = logs_since::rfc3339(&at(since, "", "")[..20]);
            let (lines, had_more) = last_lines(open.iter_mut(), wanted, since).unwrap();
            let got: Vec<String> = (lines.iter())
                .map(|line| String::from_utf8_lossy(LogLine::parse(line).unwrap().text).into_owned())
                .collect();
            assert_eq!(
                (got.iter().map(String::as_str).collect::<Vec<_>>(), had_more),
                (texts.to_vec(), whole)
            );
        }
    }
}
