//! PAX extended headers: `<length> <key>=<value>\n`, the length counting itself.

use super::Error;

pub(super) const XATTR: &[u8] = b"SCHILY.xattr.";

/// The most extended attributes of one entry, and the most bytes of all their names and values: far more
/// than a file of a layer can have. An archive may put any number of extended headers before an entry, so
/// what they add up to is bounded here and not by the length of one.
const MAX_XATTRS: usize = 256;
const MAX_XATTR_BYTES: usize = 64 << 10;

/// The records that matter. A later record of a key replaces an earlier one; an empty value removes it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link_path: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: bool,
}

impl Pax {
    /// Adds the records of one extended header.
    pub(super) fn extend(&mut self, mut content: &[u8]) -> Result<(), Error> {
        while !content.is_empty() {
            let (key, value, rest) =
                split_record(content).ok_or_else(|| Error::Archive("a PAX record is malformed".into()))?;
            content = rest;
            self.record(key, value).ok_or_else(|| {
                let key = String::from_utf8_lossy(key).chars().take(100).collect::<String>();
                Error::Archive(format!("the value of PAX record {key:?} is not valid"))
            })?;
            let bytes: usize = self.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
            if self.xattrs.len() > MAX_XATTRS || bytes > MAX_XATTR_BYTES {
                return Err(Error::Archive(format!(
                    "an entry has over {MAX_XATTRS} extended attributes or {MAX_XATTR_BYTES} bytes of them"
                )));
            }
        }
        Ok(())
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        match key {
            b"path" => self.path = text(value)?,
            b"linkpath" => self.link_path = text(value)?,
            b"size" => self.size = number(value)?,
            b"uid" => self.uid = number(value)?,
            b"gid" => self.gid = number(value)?,
            b"mtime" => self.mtime = if value.is_empty() { None } else { Some(time(value)?) },
            _ if key.starts_with(b"GNU.sparse.") => self.sparse = true,
            _ => {
                if let Some(name) = key.strip_prefix(XATTR) {
                    self.xattrs.retain(|(other, _)| other != name);
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Some(())
    }
}

/// The first record's key and value, and what follows it.
fn split_record(content: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = content.iter().take(20).position(|&byte| byte == b' ')?;
    let length = usize::try_from(decimal(&content[..space])?).ok()?;
    let (record, rest) = content.split_at_checked(length)?;
    let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|&byte| byte == b'=')?;
    let (key, value) = (&record[..equals], &record[equals + 1..]);
    (!key.is_empty() && !key.contains(&0)).then_some((key, value, rest))
}

fn text(value: &[u8]) -> Option<Option<Vec<u8>>> {
    (!value.contains(&0)).then(|| (!value.is_empty()).then(|| value.to_vec()))
}

fn number(value: &[u8]) -> Option<Option<u64>> {
    if value.is_empty() { Some(None) } else { decimal(value).map(Some) }
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |number, byte| match byte {
        b'0'..=b'9' => number.checked_mul(10)?.checked_add(u64::from(byte - b'0')),
        _ => None,
    })
}

/// `[-]seconds[.fraction]`, rounded down to a nanosecond.
fn time(value: &[u8]) -> Option<(i64, u32)> {
    let (negative, value) = value.strip_prefix(b"-").map_or((false, value), |value| (true, value));
    let (seconds, fraction) = match value.iter().position(|&byte| byte == b'.') {
        Some(dot) => (&value[..dot], &value[dot + 1..]),
        None => (value, &b""[..]),
    };
    let seconds = i64::try_from(decimal(seconds)?).ok()?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanos = digits.fold(0, |number, digit| number * 10 + u32::from(digit - b'0'));
    match (negative, nanos) {
        (false, nanos) => Some((seconds, nanos)),
        (true, 0) => Some((-seconds, 0)),
        (true, nanos) => Some((-seconds - 1, 1_000_000_000 - nanos)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let rest = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
        let mut length = rest.len();
        while length != rest.len() + length.to_string().len() {
            length = rest.len() + length.to_string().len();
        }
        [length.to_string().as_bytes(), &rest].concat()
    }

    #[test]
    fn records_are_read() {
        let mut pax = Pax::default();
        let content = [
            record("path", b"a/b"),
            record("size", b"68719476736"),
            record("mtime", b"-1.25"),
            record("SCHILY.xattr.user.x", b"a=\0\nb"),
            record("comment", b"ignored"),
        ];
        pax.extend(&content.concat()).unwrap();
        assert_eq!(pax.path.as_deref(), Some(&b"a/b"[..]));
        assert_eq!(pax.size, Some(64 << 30));
        assert_eq!(pax.mtime, Some((-2, 750_000_000)));
        assert_eq!(pax.xattrs, [(b"user.x".to_vec(), b"a=\0\nb".to_vec())]);
    }

    #[test]
    fn later_records_win_and_empty_ones_remove() {
        let mut pax = Pax::default();
        pax.extend(&[record("path", b"a"), record("path", b"b"), record("uid", b"1")].concat()).unwrap();
        pax.extend(&record("uid", b"")).unwrap();
        assert_eq!((pax.path.as_deref(), pax.uid), (Some(&b"b"[..]), None));
    }

    #[test]
    fn what_many_headers_add_up_to_is_bounded() {
        let mut pax = Pax::default();
        let many =
            (0..100_000).find(|at| pax.extend(&record(&format!("SCHILY.xattr.user.{at}"), b"")).is_err());
        assert_eq!(many, Some(MAX_XATTRS));
        let mut pax = Pax::default();
        let value = vec![b'v'; 1000];
        let long =
            (0..100_000).find(|at| pax.extend(&record(&format!("SCHILY.xattr.{at}"), &value)).is_err());
        assert!(long.is_some_and(|count| count <= MAX_XATTR_BYTES / 1000));
        // The same one again and again takes no more room.
        let mut pax = Pax::default();
        assert!((0..1000).all(|_| pax.extend(&record("SCHILY.xattr.user.x", &value)).is_ok()));
    }

    #[test]
    fn malformed_records_are_refused() {
        let wrong: [&[u8]; 10] = [
            b"x",
            b"5",
            b"0 a=b\n",
            b"3 a=b\n",
            b"99 a=b\n",
            b"6 a=b\0",
            b"6 ab \n",
            b"5 =b\n",
            b"99999999999999999999999 a=b\n",
            b"-6 a=b\n",
        ];
        for content in wrong {
            assert!(Pax::default().extend(content).is_err(), "{}", content.escape_ascii());
        }
        for (key, value) in [("size", "-1"), ("uid", "a"), ("mtime", "1.x"), ("mtime", "--1"), ("path", "\0")]
        {
            assert!(Pax::default().extend(&record(key, value.as_bytes())).is_err(), "{key}={value}");
        }
    }
}
