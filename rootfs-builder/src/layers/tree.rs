//! The confined writer of one layer's tree.
//!
//! Every operation resolves the entry's parent directory below the root's descriptor with
//! `openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV)` and then works
//! on one name in it. The disk holds no symbolic link, so there is nothing to follow; an entry whose name
//! leads *through* a symbolic link of this layer is resolved here, by reading the target and beginning again
//! at the root, which is what Docker's extraction in a chroot comes to.
//!
//! Making or removing a name changes its directory's modification time. The directory being worked in is
//! therefore kept open ([`Current`]) and gets its time back when the next one is entered, which needs no
//! memory that grows with the layer.

use std::{fs::File, io::Read};

use bulkhead_layer_format::{FormatError, Meta, OPAQUE, XATTR};
use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, XattrFlags},
    io::Errno,
};
use std::os::fd::OwnedFd;

use bulkhead_tar::{EntryPath, MAX_PATH};

/// How many symbolic links a name may lead through, as Linux has it.
const MAX_LINKS: u32 = 40;

/// How many components a name may lead through, those of its links counted in: it bounds the work that one
/// entry can cause.
const MAX_STEPS: u32 = 1024;

const S_IFMT: u32 = 0o170_000;
const S_IFLNK: u32 = 0o120_000;

/// Modification time: seconds and nanoseconds since the Unix epoch.
pub(super) type Time = (i64, u32);

/// Why an operation failed.
#[derive(Debug)]
pub(super) enum TreeError {
    /// The layer asks for what cannot be: for people.
    Refused(String),
    /// The store's filesystem failed.
    Io(&'static str, std::io::Error),
}

impl From<String> for TreeError {
    fn from(problem: String) -> Self {
        Self::Refused(problem)
    }
}

impl From<FormatError> for TreeError {
    fn from(error: FormatError) -> Self {
        Self::Refused(error.to_string())
    }
}

type Result<T> = std::result::Result<T, TreeError>;

/// A layer's tree while it is written.
pub(super) struct Tree {
    root: OwnedFd,
    /// Where replaced entries go, out of the layer's reach; emptied by whoever made it.
    trash: OwnedFd,
    trashed: u64,
    implied: u64,
    current: Option<Current>,
}

/// The directory that is being worked in.
struct Current {
    path: EntryPath,
    /// Where it is: not below the symbolic links that its path may lead through.
    real: EntryPath,
    dir: OwnedFd,
    times: Timestamps,
}

impl Tree {
    /// Begins a tree in an empty directory; `trash` is another empty directory of the same filesystem.
    pub(super) fn new(root: OwnedFd, trash: OwnedFd) -> Result<Self> {
        let tree = Self { root, trash, trashed: 0, implied: 0, current: None };
        set_up_directory(&tree.root, &implied_directory(false), (0, 0))?;
        Ok(tree)
    }

    /// How many directories were made that the archive did not name.
    pub(super) fn implied(&self) -> u64 {
        self.implied
    }

    /// Makes a directory, or gives one that is there this metadata.
    pub(super) fn directory(&mut self, path: &EntryPath, mut meta: Meta, mtime: Time) -> Result<()> {
        let Some((parent, name)) = path.split() else {
            self.leave()?;
            keep_opaque(&self.root, &mut meta)?;
            return set_up_directory(&self.root, &meta, mtime);
        };
        self.enter(&parent)?;
        let parent = self.current_dir();
        let made = rustix::fs::mkdirat(parent, &name[..], Mode::from_raw_mode(0o755));
        match made {
            Ok(()) => {}
            Err(Errno::EXIST) => match open_beneath(parent, &name, OFlags::RDONLY | OFlags::DIRECTORY) {
                Ok(dir) => {
                    keep_opaque(&dir, &mut meta)?;
                    return set_up_directory(&dir, &meta, mtime);
                }
                Err(Errno::NOTDIR) => {
                    // What the whiteout hid stays hidden below the directory that takes its place.
                    if read_meta(parent, &name)?.1.is_whiteout() && !meta.is_opaque() {
                        meta.xattrs.push((OPAQUE.to_vec(), b"y".to_vec()));
                    }
                    self.vacate(&name)?;
                    rustix::fs::mkdirat(self.current_dir(), &name[..], Mode::from_raw_mode(0o755))
                        .map_err(io("making a directory"))?;
                }
                Err(errno) => return Err(io("opening a directory")(errno)),
            },
            Err(errno) => return Err(io("making a directory")(errno)),
        }
        let dir = open_beneath(self.current_dir(), &name, OFlags::RDONLY | OFlags::DIRECTORY)
            .map_err(io("opening a directory"))?;
        set_up_directory(&dir, &meta, mtime)
    }

    /// Makes a file, in the place of whatever is there; `fill` writes its content, and is told where it is.
    pub(super) fn file<E: From<TreeError>>(
        &mut self,
        path: &EntryPath,
        meta: &Meta,
        mtime: Time,
        fill: impl FnOnce(&mut File, &EntryPath) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let encoded = meta.encode().map_err(TreeError::from)?;
        let (mut file, real) = self.create(path)?;
        fill(&mut file, &real)?;
        set_meta(&file, &encoded)?;
        set_mtime(&file, mtime)?;
        Ok(())
    }

    /// Makes a hard link to a file of this layer, in the place of whatever is there.
    pub(super) fn hard_link(&mut self, path: &EntryPath, target: &EntryPath) -> Result<()> {
        let shown = String::from_utf8_lossy(target.as_bytes()).chars().take(200).collect::<String>();
        let missing = || TreeError::Refused(format!("its hard link target {shown:?} is not in this layer"));
        let is_directory = || TreeError::Refused(format!("its hard link target {shown:?} is a directory"));
        let (Some((parent, name)), Some((target_parent, target_name))) = (path.split(), target.split())
        else {
            return Err(is_directory());
        };
        self.enter(&parent)?;
        let target_dir = self.open_existing(&target_parent)?.ok_or_else(missing)?;
        let found = match rustix::fs::statat(&target_dir, &target_name[..], AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => found,
            Err(Errno::NOENT) => return Err(missing()),
            Err(errno) => return Err(io("looking up a hard link's target")(errno)),
        };
        if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
            return Err(is_directory());
        }
        match rustix::fs::statat(self.current_dir(), &name[..], AtFlags::SYMLINK_NOFOLLOW) {
            Ok(there) if there.st_ino == found.st_ino => return Ok(()),
            Ok(_) => self.vacate(&name)?,
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(io("looking up a name")(errno)),
        }
        let linked = rustix::fs::linkat(
            &target_dir,
            &target_name[..],
            self.current_dir(),
            &name[..],
            AtFlags::empty(),
        );
        match linked {
            Err(Errno::MLINK) => Err(TreeError::Refused(format!(
                "its target {shown:?} has more hard links than can be stored"
            ))),
            other => other.map_err(io("making a hard link")),
        }
    }

    /// Hides a name of the layers below. What this layer itself has under the name stays (OCI image
    /// specification: a whiteout applies to lower layers only), a directory then becoming opaque.
    pub(super) fn whiteout(&mut self, path: &EntryPath) -> Result<()> {
        let Some((parent, name)) = path.split() else { return Ok(()) };
        self.enter(&parent)?;
        match rustix::fs::statat(self.current_dir(), &name[..], AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                let dir = open_beneath(self.current_dir(), &name, OFlags::RDONLY | OFlags::DIRECTORY)
                    .map_err(io("opening a directory"))?;
                make_opaque(&dir)
            }
            Ok(_) => Ok(()),
            Err(Errno::NOENT) => self.file(path, &Meta::whiteout(), (0, 0), |_, _| Ok(())),
            Err(errno) => Err(io("looking up a name")(errno)),
        }
    }

    /// Hides everything that the layers below have in a directory, which is made when it is missing.
    pub(super) fn opaque(&mut self, path: &EntryPath) -> Result<()> {
        self.enter(path)?;
        make_opaque(self.current_dir())
    }

    /// Ends the writing.
    pub(super) fn finish(mut self) -> Result<()> {
        self.leave()
    }

    /// A new empty file, and where it is; what had its name goes.
    fn create(&mut self, path: &EntryPath) -> Result<(File, EntryPath)> {
        let Some((parent, name)) = path.split() else {
            return Err(TreeError::Refused("the layer's root must be a directory".into()));
        };
        self.enter(&parent)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let made = match open_beneath(self.current_dir(), &name, flags) {
            Err(Errno::EXIST) => {
                self.vacate(&name)?;
                open_beneath(self.current_dir(), &name, flags)
            }
            other => other,
        };
        let file = made.map(File::from).map_err(io("making a file"))?;
        let mut real = self.current.as_ref().map_or_else(EntryPath::default, |current| current.real.clone());
        real.push(&name)?;
        Ok((file, real))
    }

    /// Moves what has the name in the current directory out of the tree.
    fn vacate(&mut self, name: &[u8]) -> Result<()> {
        self.trashed += 1;
        rustix::fs::renameat(self.current_dir(), name, &self.trash, self.trashed.to_string())
            .map_err(io("replacing an entry"))
    }

    /// Makes `path` the current directory, and it and its parents where they are missing.
    fn enter(&mut self, path: &EntryPath) -> Result<()> {
        if self.current.as_ref().is_some_and(|current| current.path == *path) {
            return Ok(());
        }
        self.leave()?;
        let (dir, real) = match open_beneath(&self.root, path.as_bytes(), OFlags::RDONLY | OFlags::DIRECTORY)
        {
            Ok(dir) => (dir, path.clone()),
            Err(Errno::NOENT | Errno::NOTDIR) => {
                self.walk(path, true)?.ok_or_else(|| not_a_directory(path))?
            }
            Err(errno) => return Err(io("opening a directory")(errno)),
        };
        let times = times_of(&dir)?;
        self.current = Some(Current { path: path.clone(), real, dir, times });
        Ok(())
    }

    /// Gives the current directory its modification time back.
    fn leave(&mut self) -> Result<()> {
        match self.current.take() {
            Some(current) => {
                rustix::fs::futimens(&current.dir, &current.times).map_err(io("setting a directory's time"))
            }
            None => Ok(()),
        }
    }

    fn current_dir(&self) -> &OwnedFd {
        self.current.as_ref().map_or(&self.root, |current| &current.dir)
    }

    fn open_existing(&mut self, path: &EntryPath) -> Result<Option<OwnedFd>> {
        match open_beneath(&self.root, path.as_bytes(), OFlags::RDONLY | OFlags::DIRECTORY) {
            Ok(dir) => Ok(Some(dir)),
            Err(Errno::NOENT) => Ok(None),
            Err(Errno::NOTDIR) => Ok(self.walk(path, false)?.map(|(dir, _)| dir)),
            Err(errno) => Err(io("opening a directory")(errno)),
        }
    }

    /// Opens a directory component by component, reading the symbolic links on the way; where it is in the end,
    /// too. A missing one is made when `create` is set, else the answer is None.
    fn walk(&mut self, path: &EntryPath, create: bool) -> Result<Option<(OwnedFd, EntryPath)>> {
        let mut todo: Vec<Vec<u8>> = path.components().rev().map(<[u8]>::to_vec).collect();
        let mut done = EntryPath::default();
        let (mut links, mut steps) = (0, 0);
        let directory = OFlags::RDONLY | OFlags::DIRECTORY;
        let open = |path: &EntryPath| open_beneath(&self.root, path.as_bytes(), directory);
        let mut dir = open(&done).map_err(io("opening the root"))?;
        while let Some(name) = todo.pop() {
            steps += 1;
            if steps > MAX_STEPS {
                return Err("its name leads through too many symbolic links".to_owned().into());
            }
            match &name[..] {
                b"" | b"." => continue,
                b".." => {
                    done = done.split().map_or_else(EntryPath::default, |(parent, _)| parent);
                    dir = open(&done).map_err(io("opening a directory"))?;
                    continue;
                }
                _ => {}
            }
            match open_beneath(&dir, &name, directory) {
                Ok(next) => dir = next,
                Err(Errno::NOENT) if !create => return Ok(None),
                Err(Errno::NOENT) => {
                    self.implied += 1;
                    dir = make_implied(&dir, &name, false)?;
                }
                Err(Errno::NOTDIR) => {
                    let (file, meta) = read_meta(&dir, &name)?;
                    if meta.mode & S_IFMT == S_IFLNK {
                        links += 1;
                        if links > MAX_LINKS {
                            return Err("its name leads through too many symbolic links".to_owned().into());
                        }
                        let target = read_target(file)?;
                        if target.starts_with(b"/") {
                            done = EntryPath::default();
                            dir = open(&done).map_err(io("opening the root"))?;
                        }
                        todo.extend(target.split(|&byte| byte == b'/').rev().map(<[u8]>::to_vec));
                        continue;
                    }
                    if !create {
                        return Ok(None);
                    }
                    if !meta.is_whiteout() {
                        done.push(&name)?;
                        return Err(not_a_directory(&done));
                    }
                    self.implied += 1;
                    let times = times_of(&dir)?;
                    rustix::fs::unlinkat(&dir, &name[..], AtFlags::empty())
                        .map_err(io("replacing a whiteout"))?;
                    rustix::fs::futimens(&dir, &times).map_err(io("setting a directory's time"))?;
                    dir = make_implied(&dir, &name, true)?;
                }
                Err(errno) => return Err(io("opening a directory")(errno)),
            }
            done.push(&name)?;
        }
        Ok(Some((dir, done)))
    }
}

fn io(action: &'static str) -> impl Fn(Errno) -> TreeError {
    move |errno| TreeError::Io(action, errno.into())
}

fn not_a_directory(path: &EntryPath) -> TreeError {
    let path = String::from_utf8_lossy(path.as_bytes()).chars().take(200).collect::<String>();
    TreeError::Refused(format!("its name leads through {path:?}, which is not a directory in this layer"))
}

/// Opens below a directory, following nothing and leaving neither it nor its filesystem.
fn open_beneath(dir: &OwnedFd, path: &[u8], flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let mode = if flags.contains(OFlags::CREATE) { Mode::from_raw_mode(0o644) } else { Mode::empty() };
    rustix::fs::openat2(dir, path, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, mode, resolve)
}

/// A directory that the archive does not name: root's, 0755, as old as the epoch, so that one archive always
/// gives one tree.
fn implied_directory(opaque: bool) -> Meta {
    let xattrs = if opaque { vec![(OPAQUE.to_vec(), b"y".to_vec())] } else { Vec::new() };
    Meta { mode: 0o040_755, uid: 0, gid: 0, rdev: 0, xattrs }
}

fn make_implied(parent: &OwnedFd, name: &[u8], opaque: bool) -> Result<OwnedFd> {
    let times = times_of(parent)?;
    rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)).map_err(io("making a directory"))?;
    let dir =
        open_beneath(parent, name, OFlags::RDONLY | OFlags::DIRECTORY).map_err(io("opening a directory"))?;
    set_up_directory(&dir, &implied_directory(opaque), (0, 0))?;
    rustix::fs::futimens(parent, &times).map_err(io("setting a directory's time"))?;
    Ok(dir)
}

fn set_up_directory(dir: &OwnedFd, meta: &Meta, mtime: Time) -> Result<()> {
    let encoded = meta.encode()?;
    rustix::fs::fchmod(dir, Mode::from_raw_mode(0o755)).map_err(io("setting a directory's mode"))?;
    rustix::fs::fsetxattr(dir, XATTR, &encoded, XattrFlags::empty())
        .map_err(io("setting an extended attribute (user attributes must be supported)"))?;
    rustix::fs::futimens(dir, &timestamps(mtime)).map_err(io("setting a directory's time"))
}

fn set_meta(file: &File, encoded: &[u8]) -> Result<()> {
    rustix::fs::fchmod(file, Mode::from_raw_mode(0o644)).map_err(io("setting a file's mode"))?;
    rustix::fs::fsetxattr(file, XATTR, encoded, XattrFlags::empty())
        .map_err(io("setting an extended attribute (user attributes must be supported)"))
}

fn set_mtime(file: &File, mtime: Time) -> Result<()> {
    rustix::fs::futimens(file, &timestamps(mtime)).map_err(io("setting a file's time"))
}

fn make_opaque(dir: &OwnedFd) -> Result<()> {
    let mut meta = meta_of(dir)?;
    if !meta.is_opaque() {
        meta.xattrs.push((OPAQUE.to_vec(), b"y".to_vec()));
        rustix::fs::fsetxattr(dir, XATTR, &meta.encode()?, XattrFlags::empty())
            .map_err(io("setting an extended attribute"))?;
    }
    Ok(())
}

/// An opaque directory stays so when an entry gives it new metadata.
fn keep_opaque(dir: &OwnedFd, meta: &mut Meta) -> Result<()> {
    if meta_of(dir)?.is_opaque() && !meta.is_opaque() {
        meta.xattrs.push((OPAQUE.to_vec(), b"y".to_vec()));
    }
    Ok(())
}

fn read_meta(dir: &OwnedFd, name: &[u8]) -> Result<(OwnedFd, Meta)> {
    let file = open_beneath(dir, name, OFlags::RDONLY).map_err(io("opening a file"))?;
    let meta = meta_of(&file)?;
    Ok((file, meta))
}

fn meta_of(file: &OwnedFd) -> Result<Meta> {
    let mut buffer = [0; bulkhead_layer_format::MAX_ENCODED];
    let length =
        rustix::fs::fgetxattr(file, XATTR, &mut buffer[..]).map_err(io("reading an extended attribute"))?;
    Meta::decode(&buffer[..length])
        .map_err(|error| TreeError::Io("reading a file's metadata", std::io::Error::other(error)))
}

fn read_target(file: OwnedFd) -> Result<Vec<u8>> {
    let mut target = Vec::new();
    File::from(file)
        .take(MAX_PATH as u64)
        .read_to_end(&mut target)
        .map_err(|error| TreeError::Io("reading a symbolic link", error))?;
    Ok(target)
}

fn times_of(dir: &OwnedFd) -> Result<Timestamps> {
    let stat = rustix::fs::fstat(dir).map_err(io("reading a directory's time"))?;
    let nanos = u32::try_from(stat.st_mtime_nsec).unwrap_or(0);
    Ok(timestamps((stat.st_mtime, nanos)))
}

fn timestamps((seconds, nanos): Time) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: seconds, tv_nsec: nanos.into() },
    }
}
