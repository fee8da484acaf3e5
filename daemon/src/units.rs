//! Sizes as Docker's users write them.

/// A number with an optional unit (`64m`, `1.5GiB`, `1024`), in powers of 1024; None for anything else.
#[must_use]
pub fn size(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        "p" | "pb" | "pib" => 50,
        _ => return None,
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift);
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let size = number.parse::<f64>().ok().map(|n| n * (1_u64 << shift) as f64)?;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    (size < 9e18).then_some(size as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_dockers() {
        for (text, expected) in [
            ("0", Some(0)),
            ("64m", Some(64 << 20)),
            ("64MiB", Some(64 << 20)),
            ("1.5 g", Some(3 << 29)),
            ("18446744073709551615", Some(u64::MAX)),
            ("17179869184g", None),
            ("", None),
            ("m", None),
            ("-1", None),
            ("1x", None),
            ("1..5m", None),
        ] {
            assert_eq!(size(text), expected, "{text}");
        }
    }
}
