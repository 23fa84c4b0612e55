//! Sizes, ages and ids as people read them.

use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes in powers of 1024, three digits at most before the unit.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: &[&str] = &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    // 1023.95 would be printed as 1024.0.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ if value >= 99.95 => format!("{value:.0} {}", UNITS[unit]),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

/// How long ago a time in nanoseconds since the epoch was; `-` for 0, which the CRI uses for never.
pub(crate) fn age(nanoseconds: i64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    match u64::try_from(nanoseconds) {
        Err(_) | Ok(0) => "-".to_owned(),
        Ok(then) => duration(now.saturating_sub(then / 1_000_000_000)),
    }
}

/// A number of seconds in its biggest unit, and the next one while that says something.
pub(crate) fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{minutes}m"),
        7200..36000 => match minutes % 60 {
            0 => format!("{hours}h"),
            rest => format!("{hours}h{rest}m"),
        },
        36000..172800 => format!("{hours}h"),
        _ if days < 730 => format!("{days}d"),
        _ => format!("{}y", days / 365),
    }
}

/// The first 12 digits of an id, without the name of its algorithm.
pub(crate) fn short_id(id: &str) -> &str {
    let digits = id.rsplit_once(':').map_or(id, |(_, digits)| digits);
    digits.get(..12).unwrap_or(digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_unit_that_reads_best() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (102 * 1024, "102 KiB"),
            (1024 * 1024 - 1, "1.0 MiB"),
            (4_500_000, "4.3 MiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(size(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn durations_have_one_or_two_units() {
        for (seconds, text) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (7199, "119m"),
            (7200, "2h"),
            (9000, "2h30m"),
            (36000, "10h"),
            (172_799, "47h"),
            (172_800, "2d"),
            (86400 * 800, "2y"),
        ] {
            assert_eq!(duration(seconds), text, "{seconds}");
        }
    }

    #[test]
    fn times_that_never_were_have_no_age() {
        assert_eq!(age(0), "-");
        assert_eq!(age(-5), "-");
        assert_eq!(age(i64::MAX), "0s");
    }

    #[test]
    fn ids_are_cut() {
        assert_eq!(short_id("sha256:0123456789abcdef"), "0123456789ab");
        assert_eq!(short_id("abc"), "abc");
        assert_eq!(short_id("ääääääääääää"), "ääääää");
    }
}
