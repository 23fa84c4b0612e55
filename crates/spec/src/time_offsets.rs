//! The annotation that asks for a time namespace, since the CRI has no field for one.

use stave_cri_proto::v1::PodSandboxConfig;
use stave_supervisor_proto::v1 as plan;

use crate::SpecError;

/// `boottime=86400s,monotonic=-1h30m`: offsets to the node's CLOCK_BOOTTIME and CLOCK_MONOTONIC.
pub const TIME_OFFSETS: &str = "stave.dev/time-offsets";

/// Units and their nanoseconds. "ms" comes before "m" and "s".
const UNITS: [(&str, i64); 7] = [
    ("ns", 1),
    ("us", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
    ("d", 86_400_000_000_000),
];
/// Longest value.
const MAX: usize = 256;

/// The time namespace that a pod asks for; `None`: the node's.
pub fn time_namespace(config: &PodSandboxConfig) -> Result<Option<plan::TimeNamespace>, SpecError> {
    let Some(value) = config.annotations.get(TIME_OFFSETS) else { return Ok(None) };
    let invalid =
        |message: String| SpecError::invalid(format!("config.annotations[{TIME_OFFSETS:?}]"), value, message);
    if value.len() > MAX {
        return Err(invalid(format!("is longer than {MAX} bytes")));
    }
    let (mut boottime, mut monotonic) = (None, None);
    for part in value.split(',') {
        let part = part.trim();
        let (clock, offset) =
            part.split_once('=').ok_or_else(|| invalid(format!("{part:?} is not CLOCK=OFFSET")))?;
        let place = match clock {
            "boottime" => &mut boottime,
            "monotonic" => &mut monotonic,
            _ => return Err(invalid(format!("clock {clock:?} is neither \"boottime\" nor \"monotonic\""))),
        };
        if place.is_some() {
            return Err(invalid(format!("clock {clock:?} is given twice")));
        }
        let offset = duration(offset).ok_or_else(|| {
            invalid(format!("offset {offset:?} is not a duration as \"86400s\" or \"-1h30m\""))
        })?;
        *place = Some(offset);
    }
    Ok(Some(plan::TimeNamespace {
        boottime: boottime.unwrap_or_default(),
        monotonic: monotonic.unwrap_or_default(),
    }))
}

/// Whole numbers with units, in nanoseconds; `None` also where it does not fit (292 years).
fn duration(text: &str) -> Option<i64> {
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let mut total: i64 = 0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, tail) = rest.split_at_checked(digits)?;
        let (unit, nanos) = UNITS.iter().find(|(unit, _)| tail.starts_with(unit))?;
        total = number.parse::<i64>().ok()?.checked_mul(*nanos)?.checked_add(total)?;
        rest = tail.get(unit.len()..)?;
    }
    total.checked_mul(sign)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Code;

    fn of(value: &str) -> Result<Option<plan::TimeNamespace>, SpecError> {
        let annotations = [(TIME_OFFSETS.to_owned(), value.to_owned())].into();
        time_namespace(&PodSandboxConfig { annotations, ..Default::default() })
    }

    #[test]
    fn offsets() {
        assert_eq!(time_namespace(&PodSandboxConfig::default()).unwrap(), None);
        for (value, boottime, monotonic) in [
            ("boottime=86400s", 86_400_000_000_000, 0),
            ("boottime=86400s,monotonic=1h", 86_400_000_000_000, 3_600_000_000_000),
            ("monotonic=-1h30m, boottime=1d", 86_400_000_000_000, -5_400_000_000_000),
            ("monotonic=2ms3us4ns", 0, 2_003_004),
            ("boottime=0s", 0, 0),
            ("boottime=+1m", 60_000_000_000, 0),
        ] {
            let wanted = plan::TimeNamespace { boottime, monotonic };
            assert_eq!(of(value).unwrap(), Some(wanted), "{value}");
        }
    }

    #[test]
    fn bad_offsets_are_refused() {
        let long = format!("boottime={}s", "1".repeat(300));
        for value in [
            "",
            "boottime",
            "boottime=",
            "boottime=-",
            "boottime=5",
            "boottime=s",
            "boottime=1.5h",
            "boottime=1 s",
            "boottime=1x",
            "boottime=1s,",
            "boottime=1s,boottime=2s",
            "realtime=1s",
            "BOOTTIME=1s",
            "boottime=9223372037s",
            "boottime=106752d",
            "boottime=1sé",
            "boottime=--1s",
            &long,
        ] {
            let error = of(value).unwrap_err();
            assert_eq!(error.code, Code::InvalidArgument, "{value}");
            assert!(error.field.contains(TIME_OFFSETS), "{error}");
        }
    }
}
