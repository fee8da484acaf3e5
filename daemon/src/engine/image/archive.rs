//! An image archive (`docker save`'s tar) on disk, as an index of its members. Nothing of it is unpacked:
//! members are read where they lie, and its links lead to other members only.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
};

const BLOCK: u64 = 512;
/// Members that are indexed.
const MAX_MEMBERS: usize = 200_000;
/// The longest name record, in bytes.
const MAX_META: u64 = 1 << 20;
/// Bytes of all names and links together: they are kept in memory.
const MAX_NAMES: usize = 64 << 20;
/// Links that lead to links.
const MAX_LINKS: usize = 16;

/// An indexed archive.
#[derive(Debug)]
pub(super) struct Archive {
    file: File,
    members: BTreeMap<String, Member>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Member {
    File {
        offset: u64,
        size: u64,
    },
    /// To another member.
    Link(String),
}

/// What meta records say of the next member.
#[derive(Default)]
struct Overrides {
    name: Option<String>,
    link: Option<String>,
    size: Option<u64>,
}

impl Archive {
    /// Indexes the archive in `file`.
    ///
    /// # Errors
    /// It is no tar archive, ends early, or is made to exhaust memory.
    pub(super) fn index(file: File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        let mut members = BTreeMap::new();
        let mut next = Overrides::default();
        let mut names = 0_usize;
        let mut position = 0;
        while position + BLOCK <= length {
            let mut header = [0_u8; BLOCK as usize];
            file.read_exact_at(&mut header, position)?;
            if header.iter().all(|byte| *byte == 0) {
                break;
            }
            let stored = checked_size(&header).ok_or_else(|| invalid("archive/tar: invalid tar header"))?;
            let kind = header[156];
            let meta = matches!(kind, b'L' | b'K' | b'x' | b'g');
            let size = next.size.filter(|_| !meta).unwrap_or(stored);
            let offset = position + BLOCK;
            let end = offset
                .checked_add(size)
                .filter(|end| *end <= length)
                .ok_or_else(|| invalid("unexpected EOF"))?;
            if meta {
                meta_record(&file, kind, offset, size, &mut next)?;
            } else {
                let said = std::mem::take(&mut next);
                let name = normalise(&said.name.unwrap_or_else(|| name_of(&header)));
                let link = said.link.unwrap_or_else(|| text(&header[157..257]));
                let member = match kind {
                    b'0' | 0 | b'7' => Some(Member::File { offset, size }),
                    b'1' => Some(Member::Link(normalise(&link))),
                    b'2' => Some(Member::Link(relative(&name, &link))),
                    _ => None,
                };
                names = names.saturating_add(name.len()).saturating_add(link.len());
                members.extend(member.map(|member| (name, member)));
                if members.len() > MAX_MEMBERS || names > MAX_NAMES {
                    return Err(invalid("the archive has too many members"));
                }
            }
            position = end.div_ceil(BLOCK) * BLOCK;
        }
        Ok(Self { file, members })
    }

    /// Whether there is a file of that name.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// A whole file of at most `cap` bytes.
    ///
    /// # Errors
    /// There is none, or it is larger.
    pub(super) fn read(&self, name: &str, cap: usize) -> io::Result<Vec<u8>> {
        let mut part = self.open(name)?;
        if part.size() > cap as u64 {
            return Err(invalid(&format!("{name:.200} has more than {cap} bytes")));
        }
        let mut bytes = Vec::new();
        part.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// A file, to be read from its beginning.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn open(&self, name: &str) -> io::Result<Part<'_>> {
        let (offset, size) = self.find(name).ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("open {name:.200}: no such file or directory"))
        })?;
        Ok(Part { file: &self.file, offset, end: offset + size, size })
    }

    fn find(&self, name: &str) -> Option<(u64, u64)> {
        let mut name = normalise(name);
        for _ in 0..MAX_LINKS {
            match self.members.get(&name)? {
                Member::File { offset, size } => return Some((*offset, *size)),
                Member::Link(target) => name.clone_from(target),
            }
        }
        None
    }
}

/// A file of the archive.
#[derive(Debug)]
pub(super) struct Part<'a> {
    file: &'a File,
    offset: u64,
    end: u64,
    size: u64,
}

impl Part<'_> {
    /// Bytes in all.
    pub(super) fn size(&self) -> u64 {
        self.size
    }
}

impl Read for Part<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.offset).unwrap_or(usize::MAX).min(buffer.len());
        if left == 0 {
            return Ok(0);
        }
        let count = self.file.read_at(&mut buffer[..left], self.offset)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.offset += count as u64;
        Ok(count)
    }
}

fn meta_record(file: &File, kind: u8, offset: u64, size: u64, next: &mut Overrides) -> io::Result<()> {
    if size > MAX_META {
        return Err(invalid("archive/tar: header field too long"));
    }
    let mut bytes = vec![0; usize::try_from(size).unwrap_or_default()];
    file.read_exact_at(&mut bytes, offset)?;
    match kind {
        b'L' => next.name = Some(text(&bytes)),
        b'K' => next.link = Some(text(&bytes)),
        b'x' => {
            for (key, value) in
                pax_records(&bytes).ok_or_else(|| invalid("archive/tar: invalid tar header"))?
            {
                match key {
                    "path" => next.name = Some(value.to_owned()),
                    "linkpath" => next.link = Some(value.to_owned()),
                    "size" => {
                        let size = value.parse().map_err(|_| invalid("archive/tar: invalid tar header"))?;
                        next.size = Some(size);
                    }
                    _ => {}
                }
            }
        }
        _ => {}
    }
    Ok(())
}

/// `<length> key=value\n`, the length in decimal and of the whole record. Values that are no text are left
/// out: no name that matters here has one.
fn pax_records(bytes: &[u8]) -> Option<Vec<(&str, &str)>> {
    let mut records = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let space = rest.iter().take(20).position(|byte| *byte == b' ')?;
        let length: usize = std::str::from_utf8(&rest[..space]).ok()?.parse().ok()?;
        let record = rest.get(space + 1..length)?.strip_suffix(b"\n")?;
        rest = rest.get(length..)?;
        if let Ok(record) = std::str::from_utf8(record) {
            records.push(record.split_once('=')?);
        }
    }
    Some(records)
}

/// The size field of a header whose checksum is right.
fn checked_size(header: &[u8; BLOCK as usize]) -> Option<u64> {
    let sum: u64 = header
        .iter()
        .enumerate()
        .map(|(at, byte)| if (148..156).contains(&at) { u64::from(b' ') } else { u64::from(*byte) })
        .sum();
    (number(&header[148..156])? == sum).then(|| number(&header[124..136])).flatten()
}

/// Octal digits, or GNU's base 256.
fn number(field: &[u8]) -> Option<u64> {
    match field.split_first()? {
        (0x80, rest) => {
            rest.iter().try_fold(0_u64, |sum, byte| sum.checked_mul(256)?.checked_add(u64::from(*byte)))
        }
        (first, _) if first & 0x80 != 0 => None,
        _ => {
            let text = text(field);
            let digits = text.trim_matches([' ', '\0']);
            if digits.is_empty() { Some(0) } else { u64::from_str_radix(digits, 8).ok() }
        }
    }
}

fn name_of(header: &[u8; BLOCK as usize]) -> String {
    let name = text(&header[..100]);
    let prefix = if &header[257..262] == b"ustar" && header[263..265] == *b"00" {
        text(&header[345..500])
    } else {
        String::new()
    };
    if prefix.is_empty() { name } else { format!("{prefix}/{name}") }
}

fn text(field: &[u8]) -> String {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

/// A name without `.`, `..` and double slashes; nothing is above the archive's root.
fn normalise(name: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// Where a symbolic link at `name` leads.
fn relative(name: &str, target: &str) -> String {
    if target.starts_with('/') {
        return normalise(target);
    }
    let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
    normalise(&format!("{directory}/{target}"))
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.to_owned())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn indexed(bytes: &[u8]) -> io::Result<Archive> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Archive::index(file)
    }

    fn add(tar: &mut tar::Builder<Vec<u8>>, name: &str, data: &[u8]) {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        tar.append_data(&mut header, name, data).unwrap();
    }

    fn link(tar: &mut tar::Builder<Vec<u8>>, name: &str, target: &str) {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        tar.append_link(&mut header, name, target).unwrap();
    }

    #[test]
    fn members_are_found_through_long_names_and_links() {
        let mut tar = tar::Builder::new(Vec::new());
        let long = format!("{}/layer.tar", "d".repeat(150));
        add(&mut tar, "./manifest.json", b"[]");
        add(&mut tar, &long, b"data");
        link(&mut tar, "a/layer.tar", &format!("../{long}"));
        link(&mut tar, "loop", "loop");
        link(&mut tar, "out", "../../../manifest.json");
        let archive = indexed(&tar.into_inner().unwrap()).unwrap();
        assert_eq!(archive.read("manifest.json", 2).unwrap(), b"[]");
        assert_eq!(archive.read("a/layer.tar", 10).unwrap(), b"data");
        assert_eq!(archive.read("out", 10).unwrap(), b"[]");
        assert!(!archive.contains("loop") && !archive.contains("nosuch"));
        assert!(archive.read("manifest.json", 1).is_err());
    }

    #[test]
    fn pax_names_and_sizes_count() {
        let mut tar = tar::Builder::new(Vec::new());
        tar.append_pax_extensions([("path", "x/\u{e4}".as_bytes()), ("size", b"3")]).unwrap();
        add(&mut tar, "other", b"abc");
        let archive = indexed(&tar.into_inner().unwrap()).unwrap();
        assert_eq!(archive.read("x/\u{e4}", 9).unwrap(), b"abc");
    }

    #[test]
    fn damage_is_an_error() {
        let mut tar = tar::Builder::new(Vec::new());
        add(&mut tar, "a", &[7; 2000]);
        let whole = tar.into_inner().unwrap();
        assert!(indexed(&whole[..1500]).is_err());
        let mut broken = whole.clone();
        broken[0] ^= 1;
        assert!(indexed(&broken).is_err());
        assert!(indexed(&[0; 1024]).unwrap().members.is_empty());
    }

    proptest! {
        #[test]
        fn any_bytes_are_indexed_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 512..2048), kind in any::<u8>()) {
            // With a right checksum, so that what lies behind it is reached.
            bytes[156] = kind;
            bytes[148..156].copy_from_slice(b"        ");
            let sum: u64 = bytes[..512].iter().map(|byte| u64::from(*byte)).sum();
            bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            let _ = indexed(&bytes);
        }

        #[test]
        fn normal_names_stay_below_the_root(name in "[a./]{0,20}") {
            let normal = normalise(&name);
            prop_assert!(normal.split('/').all(|part| part != ".."));
            prop_assert_eq!(normalise(&normal), normal);
        }
    }

    #[test]
    fn names_cannot_exhaust_memory() {
        let mut tar = tar::Builder::new(Vec::new());
        let name = "n".repeat(1 << 19);
        for number in 0..=MAX_NAMES / name.len() {
            add(&mut tar, &format!("{number}{name}"), b"");
        }
        let error = indexed(&tar.into_inner().unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "the archive has too many members");
    }
}
