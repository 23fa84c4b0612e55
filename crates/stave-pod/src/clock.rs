//! Wall-clock time and its text form.

use rustix::time::{ClockId, clock_gettime};

/// Length of [`timestamp`].
pub(crate) const TIMESTAMP_LEN: usize = 30;

/// Unix time in ns.
pub(crate) fn unix_nanos() -> i64 {
    let now = clock_gettime(ClockId::Realtime);
    now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec)
}

/// RFC 3339 in UTC with nine digits of fraction: `2026-02-03T04:05:06.000000007Z`. Years outside
/// 0 to 9999, which no clock shows, wrap.
pub(crate) fn timestamp(unix_nanos: i64) -> [u8; TIMESTAMP_LEN] {
    let seconds = unix_nanos.div_euclid(1_000_000_000);
    let nanos = unix_nanos.rem_euclid(1_000_000_000);
    let (year, month, day) = civil(seconds.div_euclid(86_400));
    let of_day = seconds.rem_euclid(86_400);
    let mut text = *b"0000-00-00T00:00:00.000000000Z";
    digits(&mut text[0..4], year.rem_euclid(10_000));
    digits(&mut text[5..7], month);
    digits(&mut text[8..10], day);
    digits(&mut text[11..13], of_day / 3600);
    digits(&mut text[14..16], of_day / 60 % 60);
    digits(&mut text[17..19], of_day % 60);
    digits(&mut text[20..29], nanos);
    text
}

fn digits(place: &mut [u8], mut value: i64) {
    for digit in place.iter_mut().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
    }
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar. Counts in eras
/// of 400 years that start on 1 March, so that the leap day is the last of its year.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468; // from 0000-03-01
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(unix_nanos: i64) -> String {
        String::from_utf8_lossy(&timestamp(unix_nanos)).into_owned()
    }

    #[test]
    fn known_times() {
        assert_eq!(text(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(text(1), "1970-01-01T00:00:00.000000001Z");
        assert_eq!(text(-1), "1969-12-31T23:59:59.999999999Z");
        assert_eq!(text(951_782_399_123_456_789), "2000-02-28T23:59:59.123456789Z");
        assert_eq!(text(951_782_400_000_000_000), "2000-02-29T00:00:00.000000000Z");
        assert_eq!(text(951_868_800_000_000_000), "2000-03-01T00:00:00.000000000Z");
        assert_eq!(text(1_709_210_096_000_000_000), "2024-02-29T12:34:56.000000000Z");
        assert_eq!(text(4_107_542_399_999_999_999), "2100-02-28T23:59:59.999999999Z");
        assert_eq!(text(4_107_542_400_000_000_000), "2100-03-01T00:00:00.000000000Z");
        assert_eq!(text(i64::MAX), "2262-04-11T23:47:16.854775807Z");
    }

    #[test]
    fn each_day_follows_the_one_before() {
        let mut last = civil(-200_000);
        for day in -199_999..200_000 {
            let next = civil(day);
            let same_month = next.0 == last.0 && next.1 == last.1 && next.2 == last.2 + 1;
            let next_month = next.0 == last.0 && next.1 == last.1 + 1 && next.2 == 1 && last.2 >= 28;
            let next_year =
                next.0 == last.0 + 1 && next.1 == 1 && next.2 == 1 && last.1 == 12 && last.2 == 31;
            assert!(same_month || next_month || next_year, "{last:?} {next:?}");
            last = next;
        }
    }

    #[test]
    fn now_is_after_this_was_written() {
        assert!(unix_nanos() > 1_760_000_000_000_000_000);
    }
}
