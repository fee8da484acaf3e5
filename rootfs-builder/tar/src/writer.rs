//! Writes archives in PAX form: a ustar header, before it an extended header for what a ustar header cannot say.

use std::io::{self, Write};

use super::{
    Entry,
    header::{BLOCK, Kind},
    pax::XATTR,
};

/// What octal digits hold in a header's fields: 7 digits of ids, 11 of sizes and times.
const MAX_ID: u64 = 0o7_777_777;
const MAX_SIZE: u64 = 0o77_777_777_777;

/// The name of an extended header, which extractors that know no PAX make a file of.
const PAX_NAME: &[u8] = b"PaxHeaders.0/";

/// Writes an archive entry by entry. After [`Writer::entry`] come exactly as many bytes of [`Writer::data`] as it
/// was told; what is missing at the next entry is made up with zeros.
pub struct Writer<W> {
    out: W,
    /// Bytes of the present entry's data that are still to come, and of padding after them.
    data: u64,
    padding: u64,
}

impl<W: Write> Writer<W> {
    /// At an archive's beginning.
    pub fn new(out: W) -> Self {
        Self { out, data: 0, padding: 0 }
    }

    /// Begins an entry; `size` counts for files alone. Times are cut to seconds, as Docker's are.
    ///
    /// # Errors
    /// Writing failed; a name, a link or an attribute's name has a NUL or is too long to be said.
    pub fn entry(&mut self, entry: &Entry, size: u64) -> io::Result<()> {
        self.fill()?;
        let size = if entry.kind == Kind::File { size } else { 0 };
        let (flag, link, device): (u8, &[u8], _) = match &entry.kind {
            Kind::File => (b'0', b"", None),
            Kind::HardLink(target) => (b'1', target, None),
            Kind::Symlink(target) => (b'2', target, None),
            Kind::CharDevice(device) => (b'3', b"", Some(*device)),
            Kind::BlockDevice(device) => (b'4', b"", Some(*device)),
            Kind::Directory => (b'5', b"", None),
            Kind::Fifo => (b'6', b"", None),
        };
        if entry.name.contains(&0) || link.contains(&0) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a NUL in a name"));
        }
        let mut records = Vec::new();
        if entry.name.len() > 100 {
            record(&mut records, b"path", &entry.name);
        }
        if link.len() > 100 {
            record(&mut records, b"linkpath", link);
        }
        for (key, id) in [(&b"uid"[..], entry.uid), (b"gid", entry.gid)] {
            if u64::from(id) > MAX_ID {
                record(&mut records, key, id.to_string().as_bytes());
            }
        }
        if size > MAX_SIZE {
            record(&mut records, b"size", size.to_string().as_bytes());
        }
        let seconds = u64::try_from(entry.mtime.0).ok().filter(|seconds| *seconds <= MAX_SIZE);
        if seconds.is_none() {
            record(&mut records, b"mtime", entry.mtime.0.to_string().as_bytes());
        }
        for (name, value) in &entry.xattrs {
            if name.contains(&b'=') || name.contains(&0) {
                // No PAX record can say it; no file system of ours has it.
                continue;
            }
            record(&mut records, &[XATTR, name].concat(), value);
        }
        if !records.is_empty() {
            let name = [PAX_NAME, &entry.name[..entry.name.len().min(100 - PAX_NAME.len())]].concat();
            let length = records.len() as u64;
            self.header(&Fields { name: &name, flag: b'x', size: length, mode: 0o644, ..Fields::default() })?;
            self.padding = padding(length);
            self.out.write_all(&records)?;
            self.fill()?;
        }
        self.header(&Fields {
            name: &entry.name,
            flag,
            link,
            mode: entry.mode & 0o7777,
            uid: u64::from(entry.uid),
            gid: u64::from(entry.gid),
            size,
            mtime: seconds.unwrap_or(0),
            device: device.map(|device| (device.major, device.minor)),
        })?;
        (self.data, self.padding) = (size, padding(size));
        Ok(())
    }

    /// Data of the present entry. What is over its size is left out: a file may grow while it is read.
    ///
    /// # Errors
    /// Writing failed.
    pub fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        let count = usize::try_from(self.data).map_or(bytes.len(), |left| left.min(bytes.len()));
        self.out.write_all(&bytes[..count])?;
        self.data -= count as u64;
        Ok(())
    }

    /// Ends the archive.
    ///
    /// # Errors
    /// Writing failed.
    pub fn finish(mut self) -> io::Result<W> {
        self.fill()?;
        self.out.write_all(&[0; 2 * BLOCK])?;
        self.out.flush()?;
        Ok(self.out)
    }

    /// Makes up for data that did not come, and pads.
    fn fill(&mut self) -> io::Result<()> {
        let zeros = [0; 8 * BLOCK];
        let mut left = self.data + self.padding;
        while left > 0 {
            let count = usize::try_from(left).map_or(zeros.len(), |left| left.min(zeros.len()));
            self.out.write_all(&zeros[..count])?;
            left -= count as u64;
        }
        (self.data, self.padding) = (0, 0);
        Ok(())
    }

    fn header(&mut self, fields: &Fields<'_>) -> io::Result<()> {
        self.out.write_all(&fields.block())
    }
}

/// A header's content; what does not fit stands in the extended header before it.
#[derive(Default)]
struct Fields<'a> {
    name: &'a [u8],
    flag: u8,
    link: &'a [u8],
    mode: u32,
    uid: u64,
    gid: u64,
    size: u64,
    mtime: u64,
    device: Option<(u32, u32)>,
}

impl Fields<'_> {
    fn block(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        let mut put = |at: usize, room: usize, bytes: &[u8]| {
            for (to, from) in block[at..at + room].iter_mut().zip(bytes) {
                *to = *from;
            }
        };
        put(0, 100, self.name);
        put(100, 8, octal(7, u64::from(self.mode)).as_bytes());
        put(108, 8, octal(7, self.uid.min(MAX_ID)).as_bytes());
        put(116, 8, octal(7, self.gid.min(MAX_ID)).as_bytes());
        put(124, 12, octal(11, self.size.min(MAX_SIZE)).as_bytes());
        put(136, 12, octal(11, self.mtime).as_bytes());
        put(148, 8, b"        ");
        put(156, 1, &[self.flag]);
        put(157, 100, self.link);
        put(257, 8, b"ustar\x0000");
        if let Some((major, minor)) = self.device {
            put(329, 8, octal(7, u64::from(major)).as_bytes());
            put(337, 8, octal(7, u64::from(minor)).as_bytes());
        }
        let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        let checksum = format!("{sum:06o}\0 ");
        block[148..156].copy_from_slice(checksum.as_bytes());
        block
    }
}

fn octal(digits: usize, number: u64) -> String {
    format!("{number:0digits$o}")
}

fn padding(size: u64) -> u64 {
    let block = BLOCK as u64;
    (block - size % block) % block
}

/// `<length> <key>=<value>\n`, the length counting itself.
fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + decimal_digits(length) {
        length = rest + decimal_digits(length);
    }
    records.extend(length.to_string().as_bytes());
    records.push(b' ');
    records.extend(key);
    records.push(b'=');
    records.extend(value);
    records.push(b'\n');
}

fn decimal_digits(number: usize) -> usize {
    number.checked_ilog10().map_or(1, |log| log as usize + 1)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, option, prelude::*};

    use super::*;
    use crate::{Device, Reader};

    fn entry() -> impl Strategy<Value = (Entry, Vec<u8>)> {
        let name = || vec(1_u8..=255, 1..300);
        let device = || (0_u32..=0xfff, 0_u32..=0xf_ffff).prop_map(|(major, minor)| Device { major, minor });
        let kind = prop_oneof![
            Just(Kind::File),
            Just(Kind::Directory),
            Just(Kind::Fifo),
            name().prop_map(Kind::Symlink),
            name().prop_map(Kind::HardLink),
            device().prop_map(Kind::CharDevice),
            device().prop_map(Kind::BlockDevice),
        ];
        let xattr = option::of(("[a-z.]{1,120}", vec(any::<u8>(), 0..200)));
        (
            name(),
            kind,
            0_u32..=0o7777,
            any::<u32>(),
            any::<u32>(),
            any::<i32>(),
            xattr,
            vec(any::<u8>(), 0..1500),
        )
            .prop_map(|(name, kind, mode, uid, gid, seconds, xattr, data)| {
                let xattrs = xattr.into_iter().map(|(name, value)| (name.into_bytes(), value)).collect();
                let data = if kind == Kind::File { data } else { Vec::new() };
                let mtime = (i64::from(seconds), 0);
                (Entry { name, kind, mode, uid, gid, mtime, xattrs }, data)
            })
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(entries in vec(entry(), 0..6)) {
            let mut writer = Writer::new(Vec::new());
            for (entry, data) in &entries {
                writer.entry(entry, data.len() as u64).unwrap();
                writer.data(data).unwrap();
            }
            let bytes = writer.finish().unwrap();
            prop_assert_eq!(bytes.len() % BLOCK, 0);
            let mut reader = Reader::new(&bytes[..]);
            for (entry, data) in &entries {
                let read = reader.next().unwrap().unwrap();
                prop_assert_eq!(&read, entry);
                let (mut content, mut buffer) = (Vec::<u8>::new(), [0; 700]);
                loop {
                    let count = reader.read_data(&mut buffer).unwrap();
                    if count == 0 { break }
                    content.extend(&buffer[..count]);
                }
                prop_assert_eq!(&content, data);
            }
            prop_assert!(reader.next().unwrap().is_none());
        }
    }

    #[test]
    fn others_read_it_too() {
        let entry = Entry {
            name: b"d/".repeat(80),
            kind: Kind::File,
            mode: 0o4755,
            uid: 3_000_000,
            gid: 5,
            mtime: (1_700_000_000, 0),
            xattrs: vec![(b"user.x".to_vec(), b"a=b".to_vec())],
        };
        let mut writer = Writer::new(Vec::new());
        writer.entry(&entry, 3).unwrap();
        // A file that shrank, and one that grew.
        writer.data(b"ab").unwrap();
        writer.entry(&Entry { name: b"b".to_vec(), xattrs: vec![], ..entry.clone() }, 1).unwrap();
        writer.data(b"xyz").unwrap();
        let bytes = writer.finish().unwrap();
        let mut archive = tar::Archive::new(&bytes[..]);
        let mut entries = archive.entries().unwrap();
        let mut first = entries.next().unwrap().unwrap();
        assert_eq!(first.path_bytes().as_ref(), &entry.name[..]);
        let mut content = Vec::new();
        io::Read::read_to_end(&mut first, &mut content).unwrap();
        assert_eq!(content, b"ab\0");
        let pax: Vec<_> =
            first.pax_extensions().unwrap().unwrap().map(|r| r.unwrap().key().unwrap().to_owned()).collect();
        assert_eq!(pax, ["path", "uid", "SCHILY.xattr.user.x"]);
        let mut second = entries.next().unwrap().unwrap();
        let mut content = Vec::new();
        io::Read::read_to_end(&mut second, &mut content).unwrap();
        assert_eq!((content.as_slice(), second.header().mode().unwrap()), (&b"x"[..], 0o4755));
        assert!(entries.next().is_none());
    }
}
