//! From an archive's entries to a layer's tree.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use bulkhead_layer_format::{Meta, OVERLAY_PREFIX, Xattr};
use bulkhead_tar::{self as tar, Entry, EntryPath, Kind, MAX_NAME, MAX_PATH};

use super::{
    DiffId, LayerError, Limits,
    name::Name,
    split::{SplitWriter, keep_replaced},
    stream::Stream,
    tree::{Tree, TreeError},
};

const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFBLK: u32 = 0o060_000;
const S_IFIFO: u32 = 0o010_000;

/// What was unpacked.
pub(super) struct Unpacked {
    pub(super) diff_id: DiffId,
    pub(super) size: u64,
    pub(super) entries: u64,
    pub(super) stream_bytes: u64,
}

/// Why unpacking failed: the layer's fault, or the store's (then what was being done).
#[derive(Debug)]
pub(super) enum UnpackError {
    Layer(LayerError),
    Store(String, std::io::Error),
}

impl From<LayerError> for UnpackError {
    fn from(error: LayerError) -> Self {
        Self::Layer(error)
    }
}

/// Where things go, all on one file system.
pub(super) struct Places {
    /// The tree: an empty directory.
    pub(super) root: PathBuf,
    /// What entries replace: an empty directory, gone afterwards.
    pub(super) trash: PathBuf,
    /// The archive, split: made.
    pub(super) split: PathBuf,
    /// Replaced files that the split needs: made when there are any.
    pub(super) kept: PathBuf,
}

/// Unpacks a whole stream.
pub(super) fn unpack<R: Read>(reader: R, limits: &Limits, places: &Places) -> Result<Unpacked, UnpackError> {
    let split =
        SplitWriter::create(&places.split).map_err(|error| store_error("writing the archive down", error))?;
    let mut archive = tar::Reader::new(Stream::new(reader, limits.stream_bytes, split));
    let open = |path: &Path| {
        File::open(path).map(OwnedFd::from).map_err(|error| store_error("opening a new directory", error))
    };
    let tree =
        Tree::new(open(&places.root)?, open(&places.trash)?).map_err(|error| tree_error(b".", error))?;
    let mut unpacker = Unpacker { tree, buffer: vec![0; 128 << 10], size: 0 };
    let mut entries = 0;
    while let Some(entry) = archive.next().map_err(LayerError::from)? {
        entries += 1;
        unpacker.entry(&entry, &mut archive)?;
        if entries + unpacker.tree.implied() > limits.entries {
            return Err(LayerError::Limit { what: "entries", limit: limits.entries }.into());
        }
    }
    unpacker.tree.finish().map_err(|error| tree_error(b".", error))?;
    let (diff_id, stream_bytes) = archive.into_source().finish()?;
    keep_replaced(&places.trash, &places.kept)
        .map_err(|error| store_error("removing replaced entries", error))?;
    Ok(Unpacked { diff_id, size: unpacker.size, entries, stream_bytes })
}

struct Unpacker {
    tree: Tree,
    buffer: Vec<u8>,
    size: u64,
}

impl Unpacker {
    fn entry<R: Read>(
        &mut self,
        entry: &Entry,
        archive: &mut tar::Reader<Stream<R>>,
    ) -> Result<(), UnpackError> {
        let refused = |problem: String| entry_error(&entry.name, problem);
        let failed = |error| tree_error(&entry.name, error);
        let path = EntryPath::clean(&entry.name).map_err(refused)?;
        match what_it_means(&path).map_err(refused)? {
            Meaning::Ignored => return Ok(()),
            Meaning::Opaque(directory) => return self.tree.opaque(&directory).map_err(failed),
            Meaning::Whiteout(hidden) => return self.tree.whiteout(&hidden).map_err(failed),
            Meaning::File => {}
        }
        let meta = |kind: u32, rdev: u32| {
            let (uid, gid) = (entry.uid, entry.gid);
            Ok(Meta { mode: kind | entry.mode, uid, gid, rdev, xattrs: kept_xattrs(entry)? })
        };
        let special = |kind, rdev| meta(kind, rdev).map_err(refused);
        match &entry.kind {
            Kind::Directory => self.tree.directory(&path, special(S_IFDIR, 0)?, entry.mtime).map_err(failed),
            Kind::File => self.regular(entry, &path, &special(S_IFREG, 0)?, archive),
            Kind::Symlink(target) => {
                check_target(target).map_err(refused)?;
                self.small(entry, &path, &special(S_IFLNK, 0)?, target)
            }
            Kind::HardLink(target) => {
                let target = EntryPath::clean(target)
                    .map_err(|problem| refused(format!("its hard link target is not valid: {problem}")))?;
                self.tree.hard_link(&path, &target).map_err(failed)
            }
            Kind::CharDevice(device) => self.small(entry, &path, &special(S_IFCHR, device.encode())?, b""),
            Kind::BlockDevice(device) => self.small(entry, &path, &special(S_IFBLK, device.encode())?, b""),
            Kind::Fifo => self.small(entry, &path, &special(S_IFIFO, 0)?, b""),
        }
    }

    /// A regular file: its content comes from the archive.
    fn regular<R: Read>(
        &mut self,
        entry: &Entry,
        path: &EntryPath,
        meta: &Meta,
        archive: &mut tar::Reader<Stream<R>>,
    ) -> Result<(), UnpackError> {
        let (buffer, size) = (&mut self.buffer, &mut self.size);
        let fill = |file: &mut File, path: &EntryPath| -> Result<(), FillError> {
            if archive.left() > 0 {
                let begun = archive.source_mut().split().begin_content(path.as_bytes(), file);
                begun.map_err(|error| FillError::Tree(TreeError::Io("writing the archive down", error)))?;
            }
            loop {
                let count = archive.read_data(buffer).map_err(|error| FillError::Archive(error.into()))?;
                if count == 0 {
                    archive.source_mut().split().end_content();
                    return Ok(());
                }
                file.write_all(&buffer[..count])
                    .map_err(|error| FillError::Tree(TreeError::Io("writing a file", error)))?;
                *size += count as u64;
            }
        };
        self.tree.file(path, meta, entry.mtime, fill).map_err(|error| match error {
            FillError::Archive(error) => error.into(),
            FillError::Tree(error) => tree_error(&entry.name, error),
        })
    }

    /// A file whose content is known: a symbolic link's target, a device's nothing.
    fn small(
        &mut self,
        entry: &Entry,
        path: &EntryPath,
        meta: &Meta,
        content: &[u8],
    ) -> Result<(), UnpackError> {
        let fill = |file: &mut File, _: &EntryPath| {
            file.write_all(content).map_err(|error| TreeError::Io("writing a symbolic link", error))
        };
        self.tree.file(path, meta, entry.mtime, fill).map_err(|error| tree_error(&entry.name, error))
    }
}

enum FillError {
    Archive(LayerError),
    Tree(TreeError),
}

impl From<TreeError> for FillError {
    fn from(error: TreeError) -> Self {
        Self::Tree(error)
    }
}

enum Meaning {
    File,
    Whiteout(EntryPath),
    Opaque(EntryPath),
    Ignored,
}

/// What an entry of that path stands for.
fn what_it_means(path: &EntryPath) -> Result<Meaning, String> {
    let Some((parent, name)) = path.split() else { return Ok(Meaning::File) };
    for component in parent.components() {
        if Name::read(component) == Ok(Name::Ignored) {
            return Ok(Meaning::Ignored);
        }
    }
    Ok(match Name::read(&name)? {
        Name::Plain(_) => Meaning::File,
        Name::Ignored => Meaning::Ignored,
        Name::Opaque => Meaning::Opaque(parent),
        Name::Whiteout(hidden) => {
            let mut path = parent;
            path.push(&hidden)?;
            Meaning::Whiteout(path)
        }
    })
}

/// The entry's extended attributes but for `trusted.overlay.*`: those are the bookkeeping of the overlay mount
/// that wrote them, and in another they would redirect and hide what they please.
fn kept_xattrs(entry: &Entry) -> Result<Vec<Xattr>, String> {
    let kept = entry.xattrs.iter().filter(|(name, _)| !name.starts_with(OVERLAY_PREFIX));
    kept.map(|(name, value)| {
        if name.is_empty() || name.len() > MAX_NAME || name.contains(&0) {
            return Err(format!(
                "its extended attribute {:?} has no valid name",
                String::from_utf8_lossy(name)
            ));
        }
        Ok((name.clone(), value.clone()))
    })
    .collect()
}

fn check_target(target: &[u8]) -> Result<(), String> {
    if target.is_empty() {
        return Err("it is a symbolic link to nothing".into());
    }
    if target.len() > MAX_PATH {
        return Err(format!("its symbolic link target is longer than {MAX_PATH} bytes"));
    }
    Ok(())
}

fn store_error(action: impl Into<String>, error: std::io::Error) -> UnpackError {
    UnpackError::Store(action.into(), error)
}

fn tree_error(name: &[u8], error: TreeError) -> UnpackError {
    match error {
        TreeError::Refused(problem) => entry_error(name, problem).into(),
        TreeError::Io(action, error) => {
            let name = String::from_utf8_lossy(name).chars().take(200).collect::<String>();
            store_error(format!("{action} for layer entry {name:?}"), error)
        }
    }
}

fn entry_error(name: &[u8], problem: impl Into<String>) -> LayerError {
    tar::Error::of_entry(name, problem).into()
}
