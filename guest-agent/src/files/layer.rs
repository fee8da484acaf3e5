//! A container's writable layer as an image's: the changes as an archive, removals as the OCI image specification
//! writes them.

use std::{io::Write, os::fd::OwnedFd};

use bulkhead_agent_api::files::ChangeKind;
use rustix::fs::{FileType, Stat};

use super::{
    Failure,
    changes::{Trees, Visit},
    pack::Packer,
    root::Root,
};

/// Writes the archive.
pub(super) fn layer(root: &Root, trees: &Trees, out: impl Write) -> std::result::Result<(), Failure> {
    let mut layer = Layer(Packer::new(root, out));
    trees.walk(&mut layer)?;
    layer.0.finish()
}

struct Layer<'a, W>(Packer<'a, W>);

impl<W: Write> Visit for Layer<'_, W> {
    /// A file's content may be another although its times say the same.
    const ALL_FILES: bool = true;

    fn differs(
        &mut self,
        path: &[u8],
        _kind: ChangeKind,
        file: &OwnedFd,
        found: &Stat,
    ) -> std::result::Result<(), Failure> {
        match FileType::from_raw_mode(found.st_mode) {
            FileType::Directory => self.0.directory(file, found, path),
            _ => self.0.file(file, found, path),
        }
    }

    fn deleted(&mut self, path: &[u8], found: &Stat) -> std::result::Result<(), Failure> {
        let (parent, name) = match path.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => path.split_at(slash + 1),
            None => (&b""[..], path),
        };
        self.0.mark([parent, b".wh.", name].concat(), found)
    }

    fn opaque(&mut self, path: &[u8], found: &Stat) -> std::result::Result<bool, Failure> {
        self.0.mark([path, b"/.wh..wh..opq"].concat(), found)?;
        Ok(false)
    }
}
