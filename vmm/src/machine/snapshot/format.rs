//! The state file's form: a header, then sections, all covered by one checksum.
//!
//! ```text
//!  0   "BLKHSNAP"
//!  8   format version, u32          all numbers little-endian
//! 12   architecture, u32 (ELF's e_machine)
//! 16   length of the sections, u64
//! 24   SHA-256 of bytes 0..24 and of the sections
//! 56   sections: kind u32, length u32, content (postcard)
//! ```
//!
//! The file comes back from a disk: nothing in it is believed. It is refused when its version, architecture
//! or a section's kind is unknown, when anything is longer than it may be, and when the checksum differs,
//! which is what tells a damaged file from a bug.

use std::{fs::File, os::unix::fs::FileExt};

use sha2::{Digest, Sha256};

const MAGIC: [u8; 8] = *b"BLKHSNAP";
/// Changes with every change to a section or to what a section holds.
pub const VERSION: u32 = 1;
/// EM_X86_64.
const ARCHITECTURE: u32 = 62;
const CHECKED_HEADER: usize = 24;
const HEADER: usize = 56;
const SECTION_HEADER: usize = 8;

/// The longest state file in bytes. Most of it is what a guest knows of its file systems: 64 bytes a file.
pub const MAX_SIZE: usize = 64 << 20;

/// What a section holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Section {
    /// What the machine is and where its memory lies; one, the first.
    Machine = 1,
    /// A vCPU; one each, in order.
    Vcpu = 2,
    /// Interrupt controllers, timer, clock; one.
    Chips = 3,
    /// The serial port; one.
    Serial = 4,
    /// A virtio device; one each, in bus order.
    Device = 5,
}

impl Section {
    fn of(kind: u32) -> Option<Self> {
        [Self::Machine, Self::Vcpu, Self::Chips, Self::Serial, Self::Device]
            .into_iter()
            .find(|section| *section as u32 == kind)
    }

    /// The longest content in bytes.
    fn limit(self) -> usize {
        match self {
            Self::Machine => 1 << 20,
            Self::Vcpu => 256 << 10,
            Self::Chips | Self::Serial => 16 << 10,
            Self::Device => 48 << 20,
        }
    }
}

/// Why a state file is refused, or cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[from] std::io::Error),
    /// It is longer than [`MAX_SIZE`].
    #[error("is longer than {MAX_SIZE} bytes")]
    TooLong,
    /// It does not begin as one.
    #[error("is not the state of a machine")]
    NotState,
    /// It is of another format version.
    #[error("is of format version {found}, this is {VERSION}")]
    Version {
        /// The file's.
        found: u32,
    },
    /// It is of another architecture.
    #[error("is of architecture {found}, this is {ARCHITECTURE}")]
    Architecture {
        /// The file's.
        found: u32,
    },
    /// It ends early, or goes on after its end.
    #[error("has {found} bytes and says that it has {said}")]
    Length {
        /// As read.
        found: usize,
        /// As its header says.
        said: u64,
    },
    /// The checksum differs.
    #[error("is damaged: its checksum is wrong")]
    Checksum,
    /// There is a section of a kind that this version has not.
    #[error("has a section of unknown kind {0}")]
    UnknownSection(u32),
    /// A section is longer than its kind may be.
    #[error("{section:?}: {length} bytes, at most {limit} are taken")]
    SectionTooLong {
        /// Its kind.
        section: Section,
        /// Its length.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// A section is not there, or not where it belongs, or there are too many.
    #[error("{0:?}: not the sections that a state has")]
    Order(Section),
    /// A section's content is not what its kind says.
    #[error("{section:?}: {message}")]
    Content {
        /// Its kind.
        section: Section,
        /// What is wrong.
        message: String,
    },
}

/// A state file on its way out.
#[derive(Debug, Default)]
pub struct Encoder(Vec<u8>);

impl Encoder {
    /// Adds a section.
    ///
    /// # Errors
    /// It is longer than its kind may be, or cannot be encoded.
    pub fn add(&mut self, section: Section, content: &impl serde::Serialize) -> Result<(), FormatError> {
        let content = postcard::to_stdvec(content)
            .map_err(|error| FormatError::Content { section, message: error.to_string() })?;
        let (length, limit) = (content.len(), section.limit());
        let Some(short) = u32::try_from(length).ok().filter(|_| length <= limit) else {
            return Err(FormatError::SectionTooLong { section, length, limit });
        };
        self.0.extend((section as u32).to_le_bytes());
        self.0.extend(short.to_le_bytes());
        self.0.extend(content);
        Ok(())
    }

    /// The whole file.
    ///
    /// # Errors
    /// It is longer than [`MAX_SIZE`].
    pub fn finish(self) -> Result<Vec<u8>, FormatError> {
        if self.0.len() > MAX_SIZE - HEADER {
            return Err(FormatError::TooLong);
        }
        let mut file = Vec::with_capacity(HEADER + self.0.len());
        file.extend(MAGIC);
        file.extend(VERSION.to_le_bytes());
        file.extend(ARCHITECTURE.to_le_bytes());
        file.extend((self.0.len() as u64).to_le_bytes());
        let digest = checksum(&file, &self.0);
        file.extend(digest);
        file.extend(self.0);
        Ok(file)
    }
}

fn checksum(header: &[u8], sections: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update(header).chain_update(sections).finalize().into()
}

/// A state file whose form was checked: its sections, to be taken in their order.
#[derive(Debug)]
pub struct Decoder<'a> {
    sections: std::iter::Peekable<std::vec::IntoIter<(Section, &'a [u8])>>,
}

/// Reads a state file into memory.
///
/// # Errors
/// It cannot be read or is too long.
pub fn read(file: &File) -> Result<Vec<u8>, FormatError> {
    let length = usize::try_from(file.metadata()?.len()).map_err(|_| FormatError::TooLong)?;
    if length > MAX_SIZE {
        return Err(FormatError::TooLong);
    }
    let mut bytes = vec![0; length];
    // By offset: several machines may be given one open file at once, and with it one position.
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

impl<'a> Decoder<'a> {
    /// Checks a file's form.
    ///
    /// # Errors
    /// See [`FormatError`].
    pub fn new(file: &'a [u8]) -> Result<Self, FormatError> {
        let word = |at: usize| {
            let bytes = file.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            bytes.map(u32::from_le_bytes).ok_or(FormatError::NotState)
        };
        if file.get(..MAGIC.len()) != Some(&MAGIC) {
            return Err(FormatError::NotState);
        }
        // Before the rest: that of another version may look like anything.
        match word(8)? {
            VERSION => {}
            found => return Err(FormatError::Version { found }),
        }
        match word(12)? {
            ARCHITECTURE => {}
            found => return Err(FormatError::Architecture { found }),
        }
        let said = u64::from(word(16)?) | u64::from(word(20)?) << 32;
        let (Some(checked), Some(digest), Some(body)) =
            (file.get(..CHECKED_HEADER), file.get(CHECKED_HEADER..HEADER), file.get(HEADER..))
        else {
            return Err(FormatError::NotState);
        };
        if body.len() as u64 != said {
            return Err(FormatError::Length { found: body.len(), said });
        }
        if checksum(checked, body) != digest {
            return Err(FormatError::Checksum);
        }
        Ok(Self { sections: split(body)?.into_iter().peekable() })
    }

    /// The next section, which must be of that kind.
    ///
    /// # Errors
    /// It is of another, or its content is not what the kind says.
    pub fn take<T: serde::de::DeserializeOwned>(&mut self, section: Section) -> Result<T, FormatError> {
        match self.sections.next_if(|(found, _)| *found == section) {
            Some((_, content)) => decode(section, content),
            None => Err(FormatError::Order(section)),
        }
    }

    /// All sections of that kind that come next.
    ///
    /// # Errors
    /// A content is not what the kind says.
    pub fn take_all<T: serde::de::DeserializeOwned>(
        &mut self,
        section: Section,
    ) -> Result<Vec<T>, FormatError> {
        let mut all = Vec::new();
        while let Some((_, content)) = self.sections.next_if(|(found, _)| *found == section) {
            all.push(decode(section, content)?);
        }
        Ok(all)
    }

    /// Nothing more may come.
    ///
    /// # Errors
    /// There is a section left.
    pub fn end(mut self) -> Result<(), FormatError> {
        self.sections.next().map_or(Ok(()), |(section, _)| Err(FormatError::Order(section)))
    }
}

fn split(mut body: &[u8]) -> Result<Vec<(Section, &[u8])>, FormatError> {
    let mut sections = Vec::new();
    while !body.is_empty() {
        let cut = || FormatError::Length { found: body.len(), said: SECTION_HEADER as u64 };
        let (kind, rest) = body.split_first_chunk::<4>().ok_or_else(cut)?;
        let (length, rest) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
        let kind = u32::from_le_bytes(*kind);
        let section = Section::of(kind).ok_or(FormatError::UnknownSection(kind))?;
        let (length, limit) = (u32::from_le_bytes(*length) as usize, section.limit());
        if length > limit {
            return Err(FormatError::SectionTooLong { section, length, limit });
        }
        let (content, rest) = rest
            .split_at_checked(length)
            .ok_or(FormatError::Length { found: rest.len(), said: length as u64 })?;
        sections.push((section, content));
        body = rest;
    }
    Ok(sections)
}

fn decode<T: serde::de::DeserializeOwned>(section: Section, content: &[u8]) -> Result<T, FormatError> {
    let error = |message: String| FormatError::Content { section, message };
    let (value, rest) = postcard::take_from_bytes(content).map_err(|e| error(e.to_string()))?;
    if rest.is_empty() { Ok(value) } else { Err(error(format!("{} bytes too many", rest.len()))) }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// A file of any sections.
    pub(in super::super) fn framed(sections: &[(Section, Vec<u8>)]) -> Vec<u8> {
        let mut encoder = Encoder::default();
        for (section, content) in sections {
            encoder.0.extend((*section as u32).to_le_bytes());
            encoder.0.extend((content.len() as u32).to_le_bytes());
            encoder.0.extend(content);
        }
        encoder.finish().unwrap()
    }

    fn file(devices: &[Vec<u8>]) -> Vec<u8> {
        let mut encoder = Encoder::default();
        encoder.add(Section::Machine, &(7u32, "name")).unwrap();
        for device in devices {
            encoder.add(Section::Device, device).unwrap();
        }
        encoder.finish().unwrap()
    }

    fn parse(file: &[u8]) -> Result<Vec<Vec<u8>>, FormatError> {
        let mut decoder = Decoder::new(file)?;
        decoder.take::<(u32, String)>(Section::Machine)?;
        let devices = decoder.take_all(Section::Device)?;
        decoder.end()?;
        Ok(devices)
    }

    /// The file with a header's field changed and a checksum that is right.
    fn forged(at: usize, word: u32) -> Vec<u8> {
        let mut bytes = file(&[vec![1]]);
        bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        let digest = checksum(&bytes[..CHECKED_HEADER], &bytes[HEADER..]);
        bytes[CHECKED_HEADER..HEADER].copy_from_slice(&digest);
        bytes
    }

    #[test]
    fn what_is_unknown_is_refused_by_its_name() {
        assert!(matches!(parse(&forged(0, 0)), Err(FormatError::NotState)));
        assert!(matches!(parse(&forged(8, 99)), Err(FormatError::Version { found: 99 })));
        assert!(matches!(parse(&forged(12, 183)), Err(FormatError::Architecture { found: 183 })));
        assert!(matches!(parse(&forged(16, 1)), Err(FormatError::Length { said: 1, .. })));
        assert!(matches!(parse(&forged(HEADER, 77)), Err(FormatError::UnknownSection(77))));
        assert!(matches!(parse(&forged(HEADER + 4, u32::MAX)), Err(FormatError::SectionTooLong { .. })));
        assert!(matches!(parse(&forged(HEADER + 4, 1000)), Err(FormatError::Length { .. })));
        assert!(matches!(parse(&forged(HEADER, 2)), Err(FormatError::Order(Section::Machine))));
    }

    #[test]
    fn sections_have_their_order_and_their_content() {
        let mut encoder = Encoder::default();
        encoder.add(Section::Device, &1u8).unwrap();
        encoder.add(Section::Machine, &(7u32, "name")).unwrap();
        let swapped = encoder.finish().unwrap();
        assert!(matches!(parse(&swapped), Err(FormatError::Order(Section::Machine))));

        let mut encoder = Encoder::default();
        encoder.add(Section::Machine, &(7u32, "name", 9u8)).unwrap();
        let longer = encoder.finish().unwrap();
        assert!(matches!(parse(&longer), Err(FormatError::Content { section: Section::Machine, .. })));

        let too_long = vec![0u8; Section::Serial.limit()];
        let refused = Encoder::default().add(Section::Serial, &too_long);
        assert!(matches!(refused, Err(FormatError::SectionTooLong { .. })));
    }

    #[test]
    fn a_file_that_is_too_long_is_not_read() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MAX_SIZE as u64 + 1).unwrap();
        assert!(matches!(read(&file), Err(FormatError::TooLong)));
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(devices in vec(vec(any::<u8>(), 0..200), 0..6)) {
            prop_assert_eq!(parse(&file(&devices)).unwrap(), devices);
        }

        #[test]
        fn a_changed_byte_is_noticed(at in any::<prop::sample::Index>(), bits in 1..=255u8) {
            let mut bytes = file(&[vec![1, 2, 3], vec![]]);
            let at = at.index(bytes.len());
            bytes[at] ^= bits;
            prop_assert!(parse(&bytes).is_err());
        }

        #[test]
        fn a_cut_file_is_noticed(length in any::<prop::sample::Index>()) {
            let bytes = file(&[vec![1, 2, 3], vec![]]);
            prop_assert!(parse(&bytes[..length.index(bytes.len())]).is_err());
        }

        #[test]
        fn anything_with_a_right_checksum_is_parsed_or_refused(body in vec(any::<u8>(), 0..300)) {
            let mut bytes = Vec::new();
            bytes.extend(MAGIC);
            bytes.extend(VERSION.to_le_bytes());
            bytes.extend(ARCHITECTURE.to_le_bytes());
            bytes.extend((body.len() as u64).to_le_bytes());
            let digest = checksum(&bytes, &body);
            bytes.extend(digest);
            bytes.extend(body);
            let _ = parse(&bytes);
        }
    }
}
