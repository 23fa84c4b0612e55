//! What a runtime says about its failure.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// Bytes that are looked at, from the end of a log.
const TAIL: i64 = 16 << 10;
/// Longest message that is passed on, in bytes.
const MAX: usize = 2048;

/// The last error in the runtime's log (lines of JSON), else what it wrote to its standard error.
pub(super) fn of(log: &Path, stderr: &[u8]) -> String {
    let log = tail(log).unwrap_or_default();
    let message = from_log(&log).or_else(|| plain(&String::from_utf8_lossy(stderr)));
    // Rubbish in the log is better than nothing.
    message.or_else(|| plain(&log)).unwrap_or_else(|| "it did not say why".to_owned())
}

fn tail(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    // A shorter file is read from its start.
    if file.seek(SeekFrom::End(-TAIL)).is_err() {
        file.rewind()?;
    }
    let mut bytes = Vec::new();
    file.take(TAIL as u64).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn from_log(log: &str) -> Option<String> {
    let is_error = |line: &&str| line.contains(r#""level":"error""#) || line.contains(r#""level":"fatal""#);
    let with_message = |line: &str| string_after(line, r#""msg":"#);
    log.lines().rev().filter(is_error).find_map(with_message).and_then(|text| plain(&text))
}

/// The JSON string that follows `key`.
fn string_after(line: &str, key: &str) -> Option<String> {
    let rest = line.split_once(key)?.1.trim_start().strip_prefix('"')?;
    let mut text = String::new();
    let mut chars = rest.chars();
    loop {
        match chars.next()? {
            '"' => return Some(text),
            '\\' => match chars.next()? {
                'n' | 'r' | 't' | 'b' | 'f' => text.push(' '),
                'u' => {
                    let hex: String = chars.by_ref().take(4).collect();
                    let c = u32::from_str_radix(&hex, 16).ok().and_then(char::from_u32);
                    text.push(c.unwrap_or(char::REPLACEMENT_CHARACTER));
                }
                c => text.push(c),
            },
            c => text.push(c),
        }
    }
}

/// One line, not too long; none if there is nothing.
fn plain(text: &str) -> Option<String> {
    let words: Vec<&str> = text.split(|c: char| c.is_whitespace() || c.is_control()).collect();
    let mut text = words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ");
    if text.len() > MAX {
        let cut = (0..=MAX).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(cut);
        text.push_str("...");
    }
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_the_log_wins() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        assert_eq!(of(&log, b""), "it did not say why");
        assert_eq!(of(&log, b"  what\n\x1b[31m it \0said\n"), "what [31m it said");
        let lines = concat!(
            r#"{"level":"error","msg":"first","time":"t"}"#,
            "\n",
            r#"{"level":"error","msg":"exec: \"nope\": \u0041 not\nfound","time":"t"}"#,
            "\n",
            r#"{"level":"warning","msg":"later","time":"t"}"#,
            "\n"
        );
        std::fs::write(&log, lines).unwrap();
        assert_eq!(of(&log, b"stderr"), "exec: \"nope\": A not found");
        std::fs::write(&log, b"\xff\xferubbish \"level\":\"error\",\"msg\":\"cut").unwrap();
        assert_eq!(of(&log, b"stderr"), "stderr");
        assert!(of(&log, b"").contains("rubbish"));
    }

    #[test]
    fn long_texts_are_cut() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        std::fs::write(&log, format!("{{\"level\":\"error\",\"msg\":\"{}\"}}\n", "ä".repeat(5000))).unwrap();
        assert!(of(&log, b"").len() <= MAX + 3);
        std::fs::write(&log, "x".repeat(1 << 20)).unwrap();
        assert!(of(&log, b"").len() <= MAX + 3);
    }
}
