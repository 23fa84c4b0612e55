//! One line of a container's log, as the CRI writes it:
//! `2016-10-06T00:17:09.669794202Z stdout F text`; the tag is P where a longer line was cut.

/// Which stream a line was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// A line, borrowed from what was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LogLine<'a> {
    /// RFC 3339 with nanoseconds.
    pub(crate) timestamp: &'a str,
    pub(crate) stream: Stream,
    /// The next line of the stream goes on with it.
    pub(crate) partial: bool,
    /// What was written, without its newline.
    pub(crate) text: &'a [u8],
}

impl<'a> LogLine<'a> {
    /// Parses a line without its newline; `None` for what is no such line.
    pub(crate) fn parse(line: &'a [u8]) -> Option<Self> {
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let timestamp = std::str::from_utf8(parts.next()?).ok()?;
        if !timestamp.starts_with(|first: char| first.is_ascii_digit()) || !timestamp.contains('T') {
            return None;
        }
        let stream = match parts.next()? {
            b"stdout" => Stream::Stdout,
            b"stderr" => Stream::Stderr,
            _ => return None,
        };
        // More tags may follow after colons.
        let partial = match parts.next()?.split(|byte| *byte == b':').next()? {
            b"P" => true,
            b"F" => false,
            _ => return None,
        };
        Some(Self { timestamp, stream, partial, text: parts.next()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_both_streams_and_tags() {
        let line = LogLine::parse(b"2016-10-06T00:17:09.669794202Z stdout P a  b").unwrap();
        assert_eq!(line.timestamp, "2016-10-06T00:17:09.669794202Z");
        assert_eq!((line.stream, line.partial, line.text), (Stream::Stdout, true, &b"a  b"[..]));
        let line = LogLine::parse(b"2016-10-06T00:17:09.66+02:00 stderr F:x:y \xff").unwrap();
        assert_eq!((line.stream, line.partial, line.text), (Stream::Stderr, false, &b"\xff"[..]));
        assert_eq!(LogLine::parse(b"2016-10-06T00:17:09Z stdout F ").unwrap().text, b"");
    }

    #[test]
    fn what_is_no_line_is_none() {
        for bad in [
            &b""[..],
            b"text",
            b"2016-10-06T00:17:09Z",
            b"2016-10-06T00:17:09Z stdout",
            b"2016-10-06T00:17:09Z stdout F",
            b"2016-10-06T00:17:09Z stdin F x",
            b"2016-10-06T00:17:09Z stdout X x",
            b"yesterday stdout F x",
            b"\xff\xfe stdout F x",
        ] {
            assert_eq!(LogLine::parse(bad), None, "{bad:?}");
        }
    }
}
