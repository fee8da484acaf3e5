//! What a container has changed: its writable layer against its image.
//!
//! ```text
//!   upper: the writable layer alone, as overlayfs keeps it     lower: the image alone, all of its layers as one
//!   | in upper                          | in lower     | it is                          |
//!   | character device 0:0 (a whiteout) | something    | deleted                        |
//!   | a file                            | nothing      | added                          |
//!   |                                   | something    | modified, unless it is the same|
//!   | a directory                       | nothing      | added                          |
//!   |                                   | a directory  | modified if something below is, or its owner or mode |
//!   | … that is opaque                  | a directory  | and what it does not have is deleted |
//! ```
//! What the agent itself has put into the writable layer is no change: empty files and directories for things to be
//! mounted on, which Docker keeps in a layer of their own.

use std::{collections::BTreeSet, io::Write, os::fd::OwnedFd};

use bulkhead_agent_api::files::{Change, ChangeKind};
use rustix::fs::{Dir, FileType, Stat};

use super::{
    About, Failure,
    pack::MAX_DEPTH,
    root::{look_at, open_directory, open_own},
    xattrs,
};
use crate::{
    error::{Result, internal},
    rootfs::Mounted,
    spec::Checked,
};

/// Overlayfs's mark of a directory below which nothing of the layers below shows.
const OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// The two trees.
pub(super) struct Trees {
    upper: OwnedFd,
    lower: OwnedFd,
    /// What the agent may have made, and the directories that it lies in; without a slash before them.
    made: BTreeSet<Vec<u8>>,
}

/// Who is told of differences, each directory before what is in it. Paths have no slash before them.
pub(super) trait Visit {
    /// Whether a file of the writable layer counts that looks the same as the image's.
    const ALL_FILES: bool;

    /// It was added or modified. `file` is open, a directory for reading, all else without rights.
    fn differs(
        &mut self,
        path: &[u8],
        kind: ChangeKind,
        file: &OwnedFd,
        found: &Stat,
    ) -> std::result::Result<(), Failure>;

    /// It was deleted; `found` is what stands for that.
    fn deleted(&mut self, path: &[u8], found: &Stat) -> std::result::Result<(), Failure>;

    /// Nothing of the image shows below the directory; true: what it no longer has is told of one by one.
    fn opaque(&mut self, path: &[u8], found: &Stat) -> std::result::Result<bool, Failure>;
}

impl Trees {
    /// Opens both.
    pub(super) fn open(mounted: &Mounted, container: &Checked) -> Result<Self> {
        let mut made = BTreeSet::new();
        let mounts = container.spec.mounts().iter().flatten();
        // A volume's directory is a change in Docker's eyes.
        let mounts = mounts.filter(|mount| mount.typ().as_deref() != Some("bind"));
        let paths = mounts.map(|mount| mount.destination().as_os_str().as_encoded_bytes());
        for path in paths.chain(mounted.injected().iter().map(String::as_bytes)) {
            let mut path = path.strip_prefix(b"/").unwrap_or(path);
            made.insert(path.to_vec());
            while let Some(slash) = path.iter().rposition(|&byte| byte == b'/') {
                path = &path[..slash];
                made.insert(path.to_vec());
            }
        }
        Ok(Self { upper: open_own(&mounted.upper())?, lower: mounted.image()?, made })
    }

    /// Writes every difference, a line of JSON each.
    pub(super) fn list(&self, out: impl Write) -> std::result::Result<(), Failure> {
        self.walk(&mut List(out))
    }

    /// Tells of every difference.
    pub(super) fn walk(&self, visit: &mut impl Visit) -> std::result::Result<(), Failure> {
        let upper = open_directory(&self.upper).about("open", b"/")?;
        let lower = open_directory(&self.lower).about("open", b"/")?;
        Walk { trees: self, visit, pending: Vec::new() }.directory(upper, Some(&lower), &mut Vec::new(), 0)
    }
}

/// A directory that is told of when something in it is.
struct Pending {
    path: Vec<u8>,
    kind: ChangeKind,
    dir: OwnedFd,
    found: Stat,
}

struct Walk<'a, V> {
    trees: &'a Trees,
    visit: &'a mut V,
    /// From the outermost inwards.
    pending: Vec<Pending>,
}

impl<V: Visit> Walk<'_, V> {
    fn directory(
        &mut self,
        upper: OwnedFd,
        lower: Option<&OwnedFd>,
        path: &mut Vec<u8>,
        depth: usize,
    ) -> std::result::Result<(), Failure> {
        if depth > MAX_DEPTH {
            return Err(internal(format!("{}: directories lie too deep", bulkhead_tar::shown(path))).into());
        }
        let length = path.len();
        let mut dir = Dir::new(upper).about("read", path)?;
        while let Some(item) = dir.read() {
            let item = item.about("read", path)?;
            let name = item.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            let looked = dir.fd().and_then(|dir| look_at(dir, name)).about("lstat", path)?;
            let Some((file, found)) = looked else { continue };
            let below = match lower {
                Some(lower) => look_at(lower, name).about("lstat", path)?,
                None => None,
            };
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend(name);
            self.one(&file, &found, below, path, depth)?;
            path.truncate(length);
        }
        Ok(())
    }

    fn one(
        &mut self,
        file: &OwnedFd,
        found: &Stat,
        below: Option<(OwnedFd, Stat)>,
        path: &mut Vec<u8>,
        depth: usize,
    ) -> std::result::Result<(), Failure> {
        let made = self.trees.made.contains(path.as_slice()) && below.is_none();
        match FileType::from_raw_mode(found.st_mode) {
            FileType::Directory => self.changed_directory(file, found, below, path, depth),
            FileType::CharacterDevice if found.st_rdev == 0 => {
                if below.is_some() {
                    self.flush()?;
                    self.visit.deleted(path, found)?;
                }
                Ok(())
            }
            FileType::RegularFile if made && found.st_size == 0 => Ok(()),
            _ => {
                let kind = match &below {
                    None => ChangeKind::Added,
                    Some((_, old)) if !V::ALL_FILES && same_file(old, found) => return Ok(()),
                    Some(_) => ChangeKind::Modified,
                };
                self.flush()?;
                self.visit.differs(path, kind, file, found)
            }
        }
    }

    fn changed_directory(
        &mut self,
        file: &OwnedFd,
        found: &Stat,
        below: Option<(OwnedFd, Stat)>,
        path: &mut Vec<u8>,
        depth: usize,
    ) -> std::result::Result<(), Failure> {
        let dir = open_directory(file).about("open", path)?;
        let (kind, told) = match &below {
            None => (ChangeKind::Added, !self.trees.made.contains(path.as_slice())),
            Some((_, old)) => (ChangeKind::Modified, !same_directory(old, found)),
        };
        let is_directory =
            |(_, old): &(OwnedFd, Stat)| FileType::from_raw_mode(old.st_mode) == FileType::Directory;
        let below = below.filter(is_directory).map(|(below, _)| open_directory(&below)).transpose();
        let below = below.about("open", path)?;
        let opaque = xattrs::value(&dir, OPAQUE).about("getxattr", path)?.as_deref() == Some(b"y");
        let again = dir.try_clone().about("dup", path)?;
        self.pending.push(Pending { path: path.clone(), kind, dir: again, found: *found });
        if told || opaque {
            self.flush()?;
        }
        if opaque
            && let Some(below) = &below
            && self.visit.opaque(path, found)?
        {
            self.hidden(&dir, below, path, found)?;
        }
        self.directory(dir, below.as_ref(), path, depth + 1)?;
        self.pending.pop_if(|pending| pending.path == *path);
        Ok(())
    }

    /// Tells what an opaque directory no longer has.
    fn hidden(
        &mut self,
        upper: &OwnedFd,
        lower: &OwnedFd,
        path: &[u8],
        found: &Stat,
    ) -> std::result::Result<(), Failure> {
        let mut dir = Dir::read_from(lower).about("read", path)?;
        while let Some(item) = dir.read() {
            let item = item.about("read", path)?;
            let name = item.file_name().to_bytes();
            if matches!(name, b"." | b"..") || look_at(upper, name).about("lstat", path)?.is_some() {
                continue;
            }
            self.visit.deleted(&[path, b"/", name].concat(), found)?;
        }
        Ok(())
    }

    /// Tells of the directories that what comes lies in.
    fn flush(&mut self) -> std::result::Result<(), Failure> {
        for Pending { path, kind, dir, found } in self.pending.drain(..) {
            self.visit.differs(&path, kind, &dir, &found)?;
        }
        Ok(())
    }
}

/// Directories change their times and sizes with every file in them: that says nothing.
fn same_directory(old: &Stat, new: &Stat) -> bool {
    old.st_mode == new.st_mode && old.st_uid == new.st_uid && old.st_gid == new.st_gid
}

fn same_file(old: &Stat, new: &Stat) -> bool {
    same_directory(old, new)
        && old.st_size == new.st_size
        && old.st_rdev == new.st_rdev
        && (old.st_mtime, old.st_mtime_nsec) == (new.st_mtime, new.st_mtime_nsec)
}

/// Writes lines.
struct List<W>(W);

impl<W: Write> List<W> {
    fn line(&mut self, path: &[u8], kind: ChangeKind) -> std::result::Result<(), Failure> {
        let change = Change { path: format!("/{}", String::from_utf8_lossy(path)), kind };
        let mut line = serde_json::to_vec(&change).map_err(|error| internal(error.to_string()))?;
        line.push(b'\n');
        self.0.write_all(&line).map_err(Failure::Peer)
    }
}

impl<W: Write> Visit for List<W> {
    const ALL_FILES: bool = false;

    fn differs(
        &mut self,
        path: &[u8],
        kind: ChangeKind,
        _file: &OwnedFd,
        _found: &Stat,
    ) -> std::result::Result<(), Failure> {
        self.line(path, kind)
    }

    fn deleted(&mut self, path: &[u8], _found: &Stat) -> std::result::Result<(), Failure> {
        self.line(path, ChangeKind::Deleted)
    }

    fn opaque(&mut self, _path: &[u8], _found: &Stat) -> std::result::Result<bool, Failure> {
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, symlink},
        path::Path,
    };

    use super::*;

    fn trees(base: &Path, made: &[&str]) -> Trees {
        Trees {
            upper: open_own(&base.join("upper")).unwrap(),
            lower: open_own(&base.join("lower")).unwrap(),
            made: made.iter().map(|path| path.as_bytes().to_vec()).collect(),
        }
    }

    fn listed(trees: &Trees) -> Vec<(String, ChangeKind)> {
        let mut out = Vec::new();
        trees.list(&mut out).unwrap();
        let lines = out.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
        let mut changes: Vec<_> = lines
            .map(|line| serde_json::from_slice::<Change>(line).unwrap())
            .map(|change| (change.path, change.kind))
            .collect();
        // Of one directory's files the order is the file system's.
        changes.sort_by(|a, b| a.0.cmp(&b.0));
        changes
    }

    #[test]
    fn differences_are_told_with_the_directories_they_lie_in() {
        let base = tempfile::tempdir().unwrap();
        let (upper, lower) = (base.path().join("upper"), base.path().join("lower"));
        for path in ["etc/deep", "same/sub", "var"] {
            fs::create_dir_all(upper.join(path)).unwrap();
            fs::create_dir_all(lower.join(path)).unwrap();
        }
        fs::write(lower.join("etc/deep/a"), "old").unwrap();
        fs::write(upper.join("etc/deep/a"), "newer").unwrap();
        fs::write(upper.join("var/new"), "").unwrap();
        symlink("x", upper.join("link")).unwrap();
        fs::create_dir(upper.join("added")).unwrap();
        fs::set_permissions(upper.join("same/sub"), fs::Permissions::from_mode(0o700)).unwrap();
        let (added, modified) = (ChangeKind::Added, ChangeKind::Modified);
        let expected = [
            ("/added", added),
            ("/etc", modified),
            ("/etc/deep", modified),
            ("/etc/deep/a", modified),
            ("/link", added),
            ("/same", modified),
            ("/same/sub", modified),
            ("/var", modified),
            ("/var/new", added),
        ];
        assert_eq!(listed(&trees(base.path(), &[])), expected.map(|(path, kind)| (path.to_owned(), kind)));
    }

    #[test]
    fn what_is_there_to_be_mounted_on_is_no_change() {
        let base = tempfile::tempdir().unwrap();
        let (upper, lower) = (base.path().join("upper"), base.path().join("lower"));
        fs::create_dir_all(&lower).unwrap();
        fs::create_dir_all(upper.join("etc")).unwrap();
        fs::create_dir_all(upper.join("proc")).unwrap();
        fs::write(upper.join("etc/hosts"), "").unwrap();
        let made = ["etc", "etc/hosts", "proc"];
        assert_eq!(listed(&trees(base.path(), &made)), []);
        fs::write(upper.join("etc/passwd"), "").unwrap();
        let expected = ["/etc", "/etc/passwd"].map(|path| (path.to_owned(), ChangeKind::Added));
        assert_eq!(listed(&trees(base.path(), &made)), expected);
    }
}
