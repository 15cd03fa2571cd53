//! When a certificate ends: the one thing that is read in it here. Whether it proves anything is for others to say.

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

/// From when on it is said of a certificate that it ends, in days before.
const SAID_BEFORE_DAYS: i64 = 14;
const DAY_SECONDS: i64 = 24 * 3600;

/// What is to be said at a moment, in seconds since 1970, of when the first of these certificates ends, which are PEM: nothing
/// as long as there is much time, or where none can be read.
pub fn ends_soon(certificates: &str, now: i64) -> Option<String> {
    let all = CertificateDer::pem_slice_iter(certificates.as_bytes()).filter_map(Result::ok);
    let left = all.filter_map(|certificate| end(&certificate)).min()? - now;
    match left {
        ..=0 => Some("has ended".to_owned()),
        left if left < DAY_SECONDS => Some(format!("ends in {} hours", left / 3600)),
        left if left < SAID_BEFORE_DAYS * DAY_SECONDS => Some(format!("ends in {} days", left / DAY_SECONDS)),
        _ => None,
    }
}

/// Tags of DER (X.690) that a certificate has before its end.
mod tag {
    pub(super) const INTEGER: u8 = 0x02;
    pub(super) const UTC_TIME: u8 = 0x17;
    pub(super) const GENERALIZED_TIME: u8 = 0x18;
    pub(super) const SEQUENCE: u8 = 0x30;
    pub(super) const VERSION: u8 = 0xa0;
}

/// The first element of some bytes, and what stands behind it.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (tag, rest) = bytes.split_first()?;
    let (first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        // So many bytes of a length follow.
        0x81..=0x84 => {
            let (length, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (length.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)), rest)
        }
        short @ ..=0x7f => (usize::from(*short), rest),
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((*tag, content, rest))
}

/// The first element, if it is of this kind.
fn expect(bytes: &[u8], expected: u8) -> Option<(&[u8], &[u8])> {
    element(bytes).filter(|(tag, ..)| *tag == expected).map(|(_, content, rest)| (content, rest))
}

/// When a certificate ends (`notAfter`, RFC 5280, 4.1.2.5), in seconds since 1970.
fn end(certificate: &[u8]) -> Option<i64> {
    let (certificate, _) = expect(certificate, tag::SEQUENCE)?;
    let (signed, _) = expect(certificate, tag::SEQUENCE)?;
    // The first version does not say which it is.
    let rest = expect(signed, tag::VERSION).map_or(signed, |(_, rest)| rest);
    let (_serial, rest) = expect(rest, tag::INTEGER)?;
    let (_algorithm, rest) = expect(rest, tag::SEQUENCE)?;
    let (_issuer, rest) = expect(rest, tag::SEQUENCE)?;
    let (validity, _) = expect(rest, tag::SEQUENCE)?;
    let (_, _start, rest) = element(validity)?;
    let (kind, end, _) = element(rest)?;
    let text = std::str::from_utf8(end).ok()?.strip_suffix('Z')?;
    let is_digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let (year, rest) = match (kind, text.len()) {
        // Two digits of a year between 1950 and 2049.
        (tag::UTC_TIME, 12) if is_digits => {
            let year: i64 = text[..2].parse().ok()?;
            (if year < 50 { 2000 + year } else { 1900 + year }, &text[2..])
        }
        (tag::GENERALIZED_TIME, 14) if is_digits => (text[..4].parse().ok()?, &text[4..]),
        _ => return None,
    };
    let two = |place: usize| rest[2 * place..2 * place + 2].parse::<i64>().ok();
    let (month, day, hour, minute, second) = (two(0)?, two(1)?, two(2)?, two(3)?, two(4)?);
    Some(days(year, month, day) * DAY_SECONDS + hour * 3600 + minute * 60 + second)
}

/// Days from 1970 to a date of the Gregorian calendar. Years are taken to begin in March, so that a leap day is their last.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    365 * year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) + (153 * month + 2) / 5 + day
        - 719_469
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_counted_by_the_calendar() {
        let known = [
            ((1970, 1, 1), 0),
            ((1970, 3, 1), 59),
            ((2000, 2, 29), 11_016),
            ((2038, 1, 19), 24_855),
            ((1969, 12, 31), -1),
        ];
        for ((year, month, day), expected) in known {
            assert_eq!(days(year, month, day), expected, "{year}-{month}-{day}");
        }
        assert_eq!(days(2100, 3, 1) - days(2100, 2, 28), 1);
    }

    /// A certificate of which nothing is right but what stands before its end.
    fn certificate(version: &[u8], end: &[u8]) -> Vec<u8> {
        let of = |tag: u8, content: &[u8]| {
            [&[tag, 0x82], &u16::try_from(content.len()).unwrap().to_be_bytes()[..], content].concat()
        };
        let validity = [of(tag::UTC_TIME, b"200101000000Z"), end.to_vec()].concat();
        let signed = [
            version.to_vec(),
            of(tag::INTEGER, &[1; 200]),
            of(tag::SEQUENCE, &[]),
            of(tag::SEQUENCE, b"issuer"),
            of(tag::SEQUENCE, &validity),
        ];
        of(tag::SEQUENCE, &of(tag::SEQUENCE, &signed.concat()))
    }

    #[test]
    fn an_end_is_read_in_both_forms() {
        let short = [&[tag::UTC_TIME, 13], &b"380119031408Z"[..]].concat();
        let long = [&[tag::GENERALIZED_TIME, 15], &b"20380119031408Z"[..]].concat();
        let old = [&[tag::UTC_TIME, 13], &b"700101000000Z"[..]].concat();
        let version = [tag::VERSION, 3, 2, 1, 2];
        for (bytes, expected) in [(&short, 1 << 31), (&long, 1 << 31), (&old, 0)] {
            assert_eq!(end(&certificate(&version, bytes)), Some(expected));
            assert_eq!(end(&certificate(&[], bytes)), Some(expected));
        }
        // Whatever is cut or changed is not read, and nothing worse.
        let whole = certificate(&version, &short);
        for n in 0..whole.len() {
            assert_eq!(end(&whole[..n]), None, "the first {n} bytes");
        }
        for at in 0..whole.len() {
            for byte in [0, 0x17, 0x30, 0x7f, 0x80, 0x84, 0xff] {
                let mut changed = whole.clone();
                changed[at] = byte;
                let _ = end(&changed);
            }
        }
    }

    #[test]
    fn what_is_no_certificate_says_nothing() {
        for text in ["", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
            assert_eq!(ends_soon(text, 0), None);
        }
    }
}
