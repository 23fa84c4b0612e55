//! Numbers with a suffix.

/// A quantity as the Kubernetes API writes it (`10M`, `1.5Gi`, `1e6`), rounded up to a whole number.
pub(crate) fn quantity(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at_checked(digits)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || number.len() > 18 {
        return None;
    }
    // Exactly, as a fraction: value * numerator / denominator.
    let value: u128 = format!("{whole}{fraction}").parse().ok()?;
    let decimals = 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let (numerator, denominator) = match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1_000),
        "k" => (10u128.pow(3), 1),
        "M" => (10u128.pow(6), 1),
        "G" => (10u128.pow(9), 1),
        "T" => (10u128.pow(12), 1),
        "P" => (10u128.pow(15), 1),
        "E" => (10u128.pow(18), 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            let power = 10u128.checked_pow(exponent.unsigned_abs()).filter(|_| exponent.abs() <= 18)?;
            if exponent < 0 { (1, power) } else { (power, 1) }
        }
    };
    let value = value.checked_mul(numerator)?.div_ceil(decimals.checked_mul(denominator)?);
    u64::try_from(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities() {
        for (text, bits) in [
            ("10M", 10_000_000),
            ("1.5k", 1_500),
            ("1Ki", 1_024),
            ("1.5Gi", 1_610_612_736),
            ("1e6", 1_000_000),
            ("2E3", 2_000),
            ("100", 100),
            ("1500m", 2),
            (".5M", 500_000),
            ("1E", 1_000_000_000_000_000_000),
        ] {
            assert_eq!(quantity(text), Some(bits), "{text}");
        }
        for bad in
            ["", "M", ".", "1.2.3", "-1", "1 M", "1Mb", "1e", "1e99", "99999999999999999999", "100E", "k1"]
        {
            assert_eq!(quantity(bad), None, "{bad}");
        }
    }
}
