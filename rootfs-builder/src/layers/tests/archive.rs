//! Archives made byte by byte, honest and hostile.

/// An archive under construction.
#[derive(Clone, Default)]
pub(super) struct Archive(Vec<u8>);

impl Archive {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn file(self, name: &str, content: &[u8]) -> Self {
        self.entry(b'0', name, "", content)
    }

    pub(super) fn dir(self, name: &str) -> Self {
        self.entry(b'5', name, "", b"")
    }

    pub(super) fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(b'2', name, target, b"")
    }

    pub(super) fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(b'1', name, target, b"")
    }

    pub(super) fn entry(self, kind: u8, name: &str, link: &str, data: &[u8]) -> Self {
        self.custom(kind, name.as_bytes(), link.as_bytes(), data, |_| {})
    }

    /// An entry whose header `change` alters before its checksum is made.
    pub(super) fn custom(
        mut self,
        kind: u8,
        name: &[u8],
        link: &[u8],
        data: &[u8],
        change: impl FnOnce(&mut tar::GnuHeader),
    ) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_mode(if kind == b'5' { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header.set_size(data.len() as u64);
        let gnu = header.as_gnu_mut().unwrap();
        gnu.name[..name.len()].copy_from_slice(name);
        gnu.linkname[..link.len()].copy_from_slice(link);
        change(gnu);
        header.set_cksum();
        self.0.extend(header.as_bytes());
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(super) fn device(self, kind: u8, name: &str, major: u32, minor: u32) -> Self {
        self.custom(kind, name.as_bytes(), b"", b"", |header| {
            header.dev_major.copy_from_slice(format!("{major:07o}\0").as_bytes());
            header.dev_minor.copy_from_slice(format!("{minor:07o}\0").as_bytes());
        })
    }

    /// PAX records for the next entry.
    pub(super) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut content = Vec::new();
        for (key, value) in records {
            let rest = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
            let mut length = rest.len();
            while length != rest.len() + length.to_string().len() {
                length = rest.len() + length.to_string().len();
            }
            content.extend(length.to_string().as_bytes());
            content.extend(rest);
        }
        self.entry(b'x', "PaxHeaders/x", "", &content)
    }

    pub(super) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// The whole archive, its end included.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }

    /// The archive without its end.
    pub(super) fn unfinished(self) -> Vec<u8> {
        self.0
    }
}
