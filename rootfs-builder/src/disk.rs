//! Disks for containers' writable layers: one formatted *template*, and sparse clones of it.
//!
//! ```text
//!  template(path, size)   mkfs.ext4 once   ──▶  a sparse image, about 0.2 MB of blocks at any size
//!  clone(template, dest)  for a container  ──▶  FICLONE, or else only the template's data is copied
//! ```
//!
//! The host formats the template while it is empty and never reads a disk again: what a guest has written
//! is for guests only. Formatting is done by e2fsprogs as a separate program, with every choice spelled
//! out here, so that the machine's `mke2fs.conf` has no say.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, FileExt},
    path::{Path, PathBuf},
    process::Command,
};

use rustix::fs::SeekFrom;

/// The smallest disk in bytes: below, there is no room for the journal and some files.
pub const MIN_SIZE: u64 = 32 << 20;

/// The largest disk in bytes: block numbers are kept 32 bits wide, which halves the group descriptors.
pub const MAX_SIZE: u64 = 8 << 40;

/// The file system's block size; a disk's size is a multiple of it.
pub const BLOCK: u64 = 4096;

/// Why a disk could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The size is out of bounds or not a multiple of [`BLOCK`].
    #[error("a disk of {0} bytes: the size must be a multiple of {BLOCK} from {MIN_SIZE} to {MAX_SIZE}")]
    Size(u64),
    /// A system call failed.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// mkfs.ext4 is not installed or cannot be started.
    #[error("mkfs.ext4 (Debian package e2fsprogs) cannot be run: {0}")]
    NoMkfs(io::Error),
    /// mkfs.ext4 ended with an error.
    #[error("mkfs.ext4 failed ({status}): {stderr}")]
    Mkfs {
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it said.
        stderr: String,
    },
}

/// How [`clone`] made its copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cloned {
    /// The host's file system shares the blocks.
    Reflink,
    /// The template's data was copied, its holes were not.
    Sparse,
}

/// The file system's features, complete (`none` clears the defaults). Left out on purpose: `64bit` and
/// `resize_inode` (bigger descriptors, reserved blocks), backup superblocks (nobody repairs these disks).
const FEATURES: &str = "none,has_journal,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super2,\
                        large_file,huge_file,dir_nlink,extra_isize,metadata_csum";

/// Metadata side by side at the start; neither inode tables nor the journal written, since the file is
/// known to read as zeros; no discard of a file that is all hole.
const EXTENDED: &str = "packed_meta_blocks=1,num_backup_sb=0,lazy_itable_init=1,lazy_journal_init=1,\
                        assume_storage_prezeroed=1,nodiscard";

/// What a disk is for, and so the directories that it has from the beginning: no guest spends its start on making
/// them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// An overlay's writable layer.
    WritableLayer,
    /// A volume: its files are below a directory of their own, beside what belongs to the file system.
    Volume,
}

/// The directory of a [`Purpose::Volume`] that containers see.
pub const VOLUME_DATA: &str = "_data";

impl Purpose {
    /// Names and modes.
    fn directories(self) -> &'static [(&'static str, u32)] {
        match self {
            Self::WritableLayer => &[("upper", 0o755), ("work", 0o700)],
            Self::Volume => &[(VOLUME_DATA, 0o755)],
        }
    }
}

/// Makes a sparse ext4 image of `size` bytes at `path`, replacing what is there only when it is complete
/// and on disk.
///
/// # Errors
/// [`DiskError`]; nothing is left behind.
pub fn template(path: &Path, size: u64, purpose: Purpose) -> Result<(), DiskError> {
    check_size(size)?;
    let unfinished = Unfinished::beside(path);
    let file = create_new(&unfinished.path)?;
    file.set_len(size).map_err(failed("cannot size", &unfinished.path))?;
    let content = Content::beside(&unfinished.path, purpose)?;
    format(&unfinished.path, &content.0)?;
    file.sync_all().map_err(failed("cannot flush", &unfinished.path))?;
    unfinished.rename_to(path)
}

/// Makes `dest`, which must not exist, a copy of the template: same bytes, same apparent size, on disk when
/// this returns. Costs no more blocks than the template has.
///
/// # Errors
/// [`DiskError::Io`]; nothing is left behind.
pub fn clone(template: &Path, dest: &Path) -> Result<Cloned, DiskError> {
    let source = File::open(template).map_err(failed("cannot open", template))?;
    let target = create_new(dest)?;
    let unfinished = Unfinished { path: dest.to_owned(), done: false };
    let how = match rustix::fs::ioctl_ficlone(&target, &source) {
        Ok(()) => Cloned::Reflink,
        Err(_) => {
            copy_sparse(&source, &target).map_err(failed("cannot copy the template to", dest))?;
            Cloned::Sparse
        }
    };
    target.sync_all().map_err(failed("cannot flush", dest))?;
    sync_parent(dest)?;
    unfinished.keep();
    Ok(how)
}

fn check_size(size: u64) -> Result<(), DiskError> {
    if (MIN_SIZE..=MAX_SIZE).contains(&size) && size.is_multiple_of(BLOCK) {
        Ok(())
    } else {
        Err(DiskError::Size(size))
    }
}

fn format(path: &Path, content: &Path) -> Result<(), DiskError> {
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-m", "0", "-b", "4096", "-I", "256", "-i", "16384", "-J", "size=8", "-G", "4096"])
        .args(["-O", FEATURES, "-E", EXTENDED, "-d"])
        .arg(content)
        .arg(path)
        .env("PATH", search_path())
        .env("LC_ALL", "C")
        .output()
        .map_err(DiskError::NoMkfs)?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(DiskError::Mkfs { status: output.status, stderr })
}

/// mkfs lies in `/sbin`, which the PATH of a user who is not root may lack.
fn search_path() -> std::ffi::OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    path
}

/// Copies data and leaves holes: walks the source by SEEK_DATA and SEEK_HOLE. A file system that knows
/// neither reports the whole file as data, and zeros are copied: correct, only bigger.
fn copy_sparse(source: &File, target: &File) -> io::Result<()> {
    let size = source.metadata()?.len();
    target.set_len(size)?;
    let mut position = 0;
    while position < size {
        let data = match rustix::fs::seek(source, SeekFrom::Data(position)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(source, SeekFrom::Hole(data))?.min(size);
        copy_range(source, target, data, hole)?;
        position = hole;
    }
    Ok(())
}

fn copy_range(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut from, mut to) = (start, start);
    while from < end {
        let length = usize::try_from(end - from).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), length) {
            // The template shrank under us: the copy would be a different disk.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(_) => return copy_by_reading(source, target, from, end),
        }
    }
    Ok(())
}

/// For where copy_file_range does not work: across file systems on old kernels, some network mounts.
fn copy_by_reading(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; 128 << 10];
    let mut position = start;
    while position < end {
        let length = usize::try_from(end - position).unwrap_or(usize::MAX).min(buffer.len());
        source.read_exact_at(&mut buffer[..length], position)?;
        target.write_all_at(&buffer[..length], position)?;
        position += length as u64;
    }
    Ok(())
}

fn create_new(path: &Path) -> Result<File, DiskError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(failed("cannot create", path))
}

fn sync_parent(path: &Path) -> Result<(), DiskError> {
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    File::open(parent).and_then(|directory| directory.sync_all()).map_err(failed("cannot flush", parent))
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
    move |source| DiskError::Io { action, path: path.to_owned(), source }
}

/// A directory of what a template holds, for mkfs to copy; removed when dropped.
struct Content(PathBuf);

impl Content {
    fn beside(path: &Path, purpose: Purpose) -> Result<Self, DiskError> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".content");
        let content = Self(path.with_file_name(name));
        // A process of this number that died may have left it.
        let _ = std::fs::remove_dir_all(&content.0);
        make_directory(&content.0, 0o700)?;
        // Owners are copied too, and a container's root belongs to root: elsewhere guests make them.
        if rustix::process::geteuid().is_root() {
            for (name, mode) in purpose.directories() {
                make_directory(&content.0.join(name), *mode)?;
            }
        }
        Ok(content)
    }
}

impl Drop for Content {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn make_directory(path: &Path, mode: u32) -> Result<(), DiskError> {
    DirBuilder::new()
        .mode(mode)
        .create(path)
        .and_then(|()| std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)))
        .map_err(failed("cannot make", path))
}

/// A file that is removed unless it was finished.
struct Unfinished {
    path: PathBuf,
    done: bool,
}

impl Unfinished {
    fn beside(path: &Path) -> Self {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.unfinished", std::process::id()));
        Self { path: path.with_file_name(name), done: false }
    }

    fn keep(mut self) {
        self.done = true;
    }

    fn rename_to(self, path: &Path) -> Result<(), DiskError> {
        std::fs::rename(&self.path, path).map_err(failed("cannot rename to", path))?;
        self.keep();
        sync_parent(path)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.done {
            // Nothing more can be done when even this fails.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const SIZE: u64 = 10 << 30;

    #[test]
    fn a_template_is_sparse_and_an_ext4() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("template");
        template(&path, SIZE, Purpose::WritableLayer).unwrap();
        let metadata = path.metadata().unwrap();
        assert_eq!(metadata.len(), SIZE);
        assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
        let mut magic = [0; 2];
        File::open(&path).unwrap().read_exact_at(&mut magic, 1024 + 0x38).unwrap();
        assert_eq!(u16::from_le_bytes(magic), 0xef53);
        assert_eq!(directory.path().read_dir().unwrap().count(), 1);
    }

    #[test]
    fn e2fsck_finds_no_fault_in_a_template() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("template");
        template(&path, MIN_SIZE, Purpose::WritableLayer).unwrap();
        let output =
            Command::new("e2fsck").args(["-f", "-n"]).arg(&path).env("PATH", search_path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }

    #[test]
    fn a_template_has_the_directories_of_a_writable_layer() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("template");
        template(&path, MIN_SIZE, Purpose::WritableLayer).unwrap();
        let debugfs = |request: &str| {
            let mut command = Command::new("debugfs");
            command.args(["-R", request]).arg(&path).env("PATH", search_path());
            String::from_utf8(command.output().unwrap().stdout).unwrap()
        };
        if !rustix::process::geteuid().is_root() {
            assert!(!debugfs("ls -l /").contains("upper"), "it would not belong to root");
            return;
        }
        for (name, mode) in Purpose::WritableLayer.directories() {
            let stat = debugfs(&format!("stat {name}"));
            assert!(
                stat.contains("Type: directory") && stat.contains(&format!("Mode:  {mode:04o}")),
                "{stat}"
            );
            assert!(stat.contains("User:     0   Group:     0"), "{stat}");
        }
    }

    #[test]
    fn a_clone_has_the_same_bytes_and_no_more_blocks() {
        let directory = tempfile::tempdir().unwrap();
        let (source, dest) = (directory.path().join("template"), directory.path().join("clone"));
        template(&source, MIN_SIZE, Purpose::WritableLayer).unwrap();
        clone(&source, &dest).unwrap();
        assert_eq!(std::fs::read(&source).unwrap(), std::fs::read(&dest).unwrap());
        let (from, to) = (source.metadata().unwrap(), dest.metadata().unwrap());
        assert_eq!(from.len(), to.len());
        assert!(to.blocks() <= from.blocks() + 64, "{} > {}", to.blocks(), from.blocks());
    }

    #[test]
    fn the_sparse_copy_keeps_data_between_holes() {
        let directory = tempfile::tempdir().unwrap();
        let (source, dest) = (directory.path().join("source"), directory.path().join("dest"));
        let file = create_new(&source).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(b"first", 0).unwrap();
        file.write_all_at(b"middle", (4 << 20) + 7).unwrap();
        let target = create_new(&dest).unwrap();
        copy_sparse(&file, &target).unwrap();
        assert_eq!(std::fs::read(&source).unwrap(), std::fs::read(&dest).unwrap());
        assert!(dest.metadata().unwrap().blocks() * 512 < 1 << 20);
        copy_by_reading(&file, &target, 0, 8 << 20).unwrap();
        assert_eq!(std::fs::read(&source).unwrap(), std::fs::read(&dest).unwrap());
    }

    #[test]
    fn an_existing_clone_is_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let (source, dest) = (directory.path().join("template"), directory.path().join("clone"));
        template(&source, MIN_SIZE, Purpose::WritableLayer).unwrap();
        std::fs::write(&dest, "precious").unwrap();
        assert!(matches!(clone(&source, &dest), Err(DiskError::Io { .. })));
        assert_eq!(std::fs::read(&dest).unwrap(), b"precious");
    }

    #[test]
    fn sizes_out_of_bounds_are_refused() {
        for size in [0, BLOCK, MIN_SIZE - BLOCK, MIN_SIZE + 1, MAX_SIZE + BLOCK] {
            assert!(
                matches!(
                    template(Path::new("/nonexistent/x"), size, Purpose::Volume),
                    Err(DiskError::Size(_))
                ),
                "{size}"
            );
        }
    }
}
