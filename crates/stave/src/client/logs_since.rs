//! Times of log lines: RFC 3339, and a duration before now.

use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds since 1970, of any year that four digits can say.
pub(crate) type Nanos = i128;

const SECOND: Nanos = 1_000_000_000;

/// Parses what --since takes: a duration as Go writes it (`1h30m`, `1.5h`, `10s`), which is before now, or an
/// RFC 3339 time.
pub(crate) fn since(text: &str) -> Result<Nanos, String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as Nanos);
    rfc3339(text).or_else(|| duration(text).map(|before| now - before)).ok_or_else(|| {
        "neither a duration such as 10s or 1h30m, nor a time such as 2026-01-02T03:04:05Z".to_owned()
    })
}

/// A duration in units of ns, us, ms, s, m and h.
fn duration(text: &str) -> Option<Nanos> {
    const UNITS: &[(&str, Nanos)] = &[
        ("ns", 1),
        ("us", 1_000),
        ("µs", 1_000),
        ("ms", 1_000_000),
        ("s", SECOND),
        ("m", 60 * SECOND),
        ("h", 3600 * SECOND),
    ];
    let mut rest = text;
    let mut sum: Nanos = 0;
    while !rest.is_empty() {
        let (whole, after) = digits(rest);
        let (fraction, after) = match after.strip_prefix('.') {
            Some(after) => digits(after),
            None => ("", after),
        };
        let end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        let unit = UNITS.iter().find(|(name, _)| *name == unit)?.1;
        if (whole.is_empty() && fraction.is_empty()) || whole.len() > 15 || fraction.len() > 15 {
            return None;
        }
        // Empty is 0.
        let number = |digits: &str| digits.parse::<Nanos>().unwrap_or(0);
        sum += number(whole) * unit + number(fraction) * unit / 10_i128.pow(fraction.len() as u32);
        rest = after;
    }
    (!text.is_empty()).then_some(sum)
}

fn digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

/// An RFC 3339 time.
pub(crate) fn rfc3339(text: &str) -> Option<Nanos> {
    let bytes = text.as_bytes();
    let number = |from: usize, to: usize| {
        bytes.get(from..to)?.iter().try_fold(0, |value: i64, byte| {
            byte.is_ascii_digit().then(|| value * 10 + i64::from(byte - b'0'))
        })
    };
    let is = |at: usize, wanted: &[u8]| bytes.get(at).is_some_and(|byte| wanted.contains(byte));
    if !(is(4, b"-") && is(7, b"-") && is(10, b"Tt ") && is(13, b":") && is(16, b":")) {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    // A second may be a leap second.
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let mut zone = text.get(19..)?;
    let mut nanos = 0;
    if let Some(after) = zone.strip_prefix('.') {
        let (fraction, after) = digits(after);
        if fraction.is_empty() {
            return None;
        }
        let kept = &fraction[..fraction.len().min(9)];
        nanos = kept.parse::<Nanos>().ok()? * 10_i128.pow(9 - kept.len() as u32);
        zone = after;
    }
    let of_day = hour * 3600 + minute * 60 + second;
    let seconds = days(year, month, day) * 86_400 + of_day - offset(zone)?;
    Some(Nanos::from(seconds) * SECOND + nanos)
}

/// Seconds east of UTC.
fn offset(zone: &str) -> Option<i64> {
    if zone == "Z" || zone == "z" {
        return Some(0);
    }
    let (sign, rest) = match zone.strip_prefix('+') {
        Some(rest) => (1, rest),
        None => (-1, zone.strip_prefix('-')?),
    };
    let (hours, minutes) = rest.split_once(':')?;
    let two = |text: &str| match digits(text) {
        (number, "") if number.len() == 2 => number.parse::<i64>().ok(),
        _ => None,
    };
    Some(sign * (two(hours)? * 3600 + two(minutes)? * 60))
}

/// Days since 1970-01-01 in the Gregorian calendar. The year starts on 1 March here, so that the leap day is its last.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_times() {
        for (text, nanos) in [
            ("1970-01-01T00:00:00Z", 0),
            ("1970-01-01T00:00:00.000000001Z", 1),
            ("1969-12-31T23:59:59.999999999Z", -1),
            ("2000-02-29T00:00:00Z", 951_782_400 * SECOND),
            ("2000-03-01T00:00:00.5z", 951_868_800 * SECOND + SECOND / 2),
            ("2024-02-29T12:34:56Z", 1_709_210_096 * SECOND),
            ("2024-02-29T14:34:56+02:00", 1_709_210_096 * SECOND),
            ("2024-02-29T07:04:56.1234567899-05:30", 1_709_210_096 * SECOND + 123_456_789),
            ("2100-02-28T23:59:59Z", 4_107_542_399 * SECOND),
        ] {
            assert_eq!(rfc3339(text), Some(nanos), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_none() {
        for bad in [
            "",
            "yesterday",
            "2024-02-29",
            "2024-02-29T12:34:56",
            "2024-02-29T12:34Z",
            "2024-13-29T12:34:56Z",
            "2024-02-32T12:34:56Z",
            "2024-02-29T24:34:56Z",
            "2024-02-29T12:34:56.Z",
            "2024-02-29T12:34:56+2",
            "2024-02-29T12:34:56+02:xx",
            "2024-02-29T12:34:56Zx",
            "2024-02-29T12:34:5ä",
            "+024-02-29T12:34:56Z",
        ] {
            assert_eq!(rfc3339(bad), None, "{bad}");
        }
    }

    #[test]
    fn durations_as_go_writes_them() {
        for (text, nanos) in [
            ("10s", 10 * SECOND),
            ("1h30m", 5400 * SECOND),
            ("1.5h", 5400 * SECOND),
            (".5s", SECOND / 2),
            ("300ms", 300_000_000),
            ("1m2s3ms4us5ns", 62 * SECOND + 3_004_005),
        ] {
            assert_eq!(duration(text), Some(nanos), "{text}");
        }
        for bad in ["", "10", "s", ".s", "1d", "1h30", "-1s", "1s ", "9999999999999999h"] {
            assert_eq!(duration(bad), None, "{bad}");
        }
    }

    #[test]
    fn since_is_before_now_or_a_time() {
        let between = since("1h").unwrap() - since("2h").unwrap();
        assert!((between - 3600 * SECOND).abs() < 60 * SECOND, "{between}");
        assert_eq!(since("2024-02-29T12:34:56Z"), Ok(1_709_210_096 * SECOND));
        assert!(since("soon").unwrap_err().contains("10s"));
    }
}
