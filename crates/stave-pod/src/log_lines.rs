//! The lines of a CRI log: `<RFC 3339 time> stdout|stderr P|F <bytes>\n`.
//!
//! As containerd writes them, since log shippers and `kubectl logs` know that: at most 16 KiB of
//! content a record; a longer line is records with tag P, then one with F; a carriage return before
//! the newline is dropped; what follows the last newline when the output ends is a P record.

use crate::clock::TIMESTAMP_LEN;

/// Most bytes of content in a record.
pub(crate) const MAX_CONTENT: usize = 16 << 10;
/// Length of a record before its content.
pub(crate) const PREFIX_LEN: usize = TIMESTAMP_LEN + " stdout F ".len();

/// The two outputs of a container. A terminal's output is all `Stdout`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OutputKind {
    /// Descriptor 1.
    Stdout,
    /// Descriptor 2.
    Stderr,
}

/// Whether a record ends its line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tag {
    /// P: the line goes on in the next record of the same output.
    Partial,
    /// F: the line ends here.
    Full,
}

/// Appends one record; its content is `head` and then `tail`.
pub(crate) fn append_record(
    out: &mut Vec<u8>,
    timestamp: &[u8; TIMESTAMP_LEN],
    kind: OutputKind,
    tag: Tag,
    head: &[u8],
    tail: &[u8],
) {
    // At once, and not in five steps each of which looks whether there is room.
    out.reserve(PREFIX_LEN + head.len() + tail.len() + 1);
    out.extend_from_slice(timestamp);
    out.extend_from_slice(match (kind, tag) {
        (OutputKind::Stdout, Tag::Full) => b" stdout F ",
        (OutputKind::Stdout, Tag::Partial) => b" stdout P ",
        (OutputKind::Stderr, Tag::Full) => b" stderr F ",
        (OutputKind::Stderr, Tag::Partial) => b" stderr P ",
    });
    out.extend_from_slice(head);
    out.extend_from_slice(tail);
    out.push(b'\n');
}

/// Cuts one output into records.
#[derive(Debug, Default)]
pub(crate) struct LineSplitter {
    /// The start of a line that has not ended: at most [`MAX_CONTENT`] bytes, and perhaps a
    /// carriage return of which the next byte decides.
    pending: Vec<u8>,
}

impl LineSplitter {
    /// Takes the next bytes; `emit` gets each record that is complete, its content in two parts.
    pub(crate) fn push(&mut self, mut data: &[u8], mut emit: impl FnMut(Tag, &[u8], &[u8])) {
        while let Some(newline) = memchr::memchr(b'\n', data) {
            let (line, rest) = data.split_at(newline);
            self.end_line(line, &mut emit);
            data = rest.get(1..).unwrap_or_default();
        }
        if !data.is_empty() {
            self.continue_line(data, &mut emit);
        } else if self.pending.is_empty() {
            self.pending = Vec::new(); // An idle output holds no memory.
        }
    }

    /// The output has ended: what is left becomes a partial record.
    pub(crate) fn finish(&mut self, mut emit: impl FnMut(Tag, &[u8], &[u8])) {
        self.continue_line(&[], &mut emit);
        let pending = std::mem::take(&mut self.pending);
        for part in pending.chunks(MAX_CONTENT) {
            emit(Tag::Partial, part, &[]);
        }
    }

    fn end_line(&mut self, mut line: &[u8], emit: &mut impl FnMut(Tag, &[u8], &[u8])) {
        let mut left = self.pending.len() + line.len();
        let carriage_return = self.ends_in_carriage_return(line);
        if carriage_return {
            left -= 1;
        }
        while left > MAX_CONTENT {
            self.take_piece(&mut line, emit);
            left -= MAX_CONTENT;
        }
        if carriage_return {
            match line.split_last() {
                Some((_, content)) => line = content,
                None => drop(self.pending.pop()),
            }
        }
        emit(Tag::Full, &self.pending, line);
        self.pending.clear();
    }

    fn continue_line(&mut self, mut data: &[u8], emit: &mut impl FnMut(Tag, &[u8], &[u8])) {
        let mut left = self.pending.len() + data.len();
        let undecided = usize::from(self.ends_in_carriage_return(data));
        while left > MAX_CONTENT + undecided {
            self.take_piece(&mut data, emit);
            left -= MAX_CONTENT;
        }
        self.pending.extend_from_slice(data);
    }

    fn ends_in_carriage_return(&self, data: &[u8]) -> bool {
        data.last().or(self.pending.last()) == Some(&b'\r')
    }

    /// One record of the longest length from `pending` and the front of `data`, which together
    /// have more.
    fn take_piece(&mut self, data: &mut &[u8], emit: &mut impl FnMut(Tag, &[u8], &[u8])) {
        match MAX_CONTENT.checked_sub(self.pending.len()) {
            Some(missing) => {
                let (piece, rest) = data.split_at(missing.min(data.len()));
                emit(Tag::Partial, &self.pending, piece);
                self.pending.clear();
                *data = rest;
            }
            None => {
                emit(Tag::Partial, &self.pending[..MAX_CONTENT], &[]);
                self.pending.drain(..MAX_CONTENT);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Records of an output that arrives in these chunks: (tag, content).
    fn records(chunks: &[&[u8]]) -> Vec<(Tag, Vec<u8>)> {
        let mut splitter = LineSplitter::default();
        let mut records = Vec::new();
        let mut emit = |tag, head: &[u8], tail: &[u8]| records.push((tag, [head, tail].concat()));
        for chunk in chunks {
            splitter.push(chunk, &mut emit);
            assert!(splitter.pending.len() <= MAX_CONTENT + 1);
        }
        splitter.finish(&mut emit);
        records
    }

    fn full(content: &[u8]) -> (Tag, Vec<u8>) {
        (Tag::Full, content.to_vec())
    }

    fn partial(content: &[u8]) -> (Tag, Vec<u8>) {
        (Tag::Partial, content.to_vec())
    }

    #[test]
    fn lines_and_leftovers() {
        assert_eq!(records(&[b"a\nb\n"]), [full(b"a"), full(b"b")]);
        assert_eq!(records(&[b"\n\n"]), [full(b""), full(b"")]);
        assert_eq!(records(&[b"hel", b"lo\nwor", b"ld"]), [full(b"hello"), partial(b"world")]);
        assert_eq!(records(&[b"hello", b"\n"]), [full(b"hello")]);
        assert_eq!(records(&[]), []);
        assert_eq!(records(&[b"a\0b\xff\n"]), [full(b"a\0b\xff")]);
    }

    #[test]
    fn carriage_returns() {
        assert_eq!(records(&[b"a\r\nb\r", b"\n"]), [full(b"a"), full(b"b")]);
        assert_eq!(records(&[b"a\rb\n\r\n"]), [full(b"a\rb"), full(b"")]);
        assert_eq!(records(&[b"a\r\r\n"]), [full(b"a\r")]);
        assert_eq!(records(&[b"a\r"]), [partial(b"a\r")]);
    }

    #[test]
    fn long_lines() {
        let long = vec![b'x'; MAX_CONTENT];
        let with = |tail: &[u8]| [&long[..], tail].concat();
        assert_eq!(records(&[&with(b"\n")]), [full(&long)]);
        assert_eq!(records(&[&long, b"\n"]), [full(&long)]);
        assert_eq!(records(&[&with(b"\r\n")]), [full(&long)]);
        assert_eq!(records(&[&with(b"\r"), b"\n"]), [full(&long)]);
        assert_eq!(records(&[&with(b"\r"), b"y\n"]), [partial(&long), full(b"\ry")]);
        assert_eq!(records(&[&with(b"\r")]), [partial(&long), partial(b"\r")]);
        assert_eq!(records(&[&with(b"y\n")]), [partial(&long), full(b"y")]);
        assert_eq!(
            records(&[&with(&with(b"y\nz\n"))]),
            [partial(&long), partial(&long), full(b"y"), full(b"z")]
        );
        assert_eq!(records(&[&long]), [partial(&long)]);
    }

    /// However the bytes are cut on their way, the records are the same.
    #[test]
    fn chunks_do_not_matter() {
        let mut text = Vec::new();
        for length in [0, 1, 5, MAX_CONTENT - 1, MAX_CONTENT, MAX_CONTENT + 1, 2 * MAX_CONTENT, 40_000] {
            text.extend(std::iter::repeat_n(b'a' + (length % 26) as u8, length));
            text.extend_from_slice(if length % 2 == 0 { b"\n" } else { b"\r\n" });
        }
        text.extend_from_slice(b"the rest\r");
        let whole = records(&[&text]);
        for size in [1, 2, 3, 1000, MAX_CONTENT - 1, MAX_CONTENT, MAX_CONTENT + 1, 65_536] {
            let chunks: Vec<&[u8]> = text.chunks(size).collect();
            assert!(records(&chunks) == whole, "chunks of {size} bytes");
        }
    }

    #[test]
    fn the_record_s_form() {
        let mut out = Vec::new();
        let timestamp = crate::clock::timestamp(0);
        append_record(&mut out, &timestamp, OutputKind::Stdout, Tag::Full, b"", b"");
        append_record(&mut out, &timestamp, OutputKind::Stderr, Tag::Partial, b"he", b"llo");
        let expected = "1970-01-01T00:00:00.000000000Z stdout F \n\
                        1970-01-01T00:00:00.000000000Z stderr P hello\n";
        assert_eq!(String::from_utf8_lossy(&out), expected);
        assert_eq!(PREFIX_LEN, expected.find('\n').expect("a line"));
    }
}
