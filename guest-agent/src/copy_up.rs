//! What a volume gets when it is used first: a copy of what the image has at its place.
//!
//! Everything is done relative to descriptors and follows no link: the image's content is a stranger's.

use std::{
    collections::HashMap,
    fs::File,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use bulkhead_agent_api::CopyUp;
use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Stat, Timespec,
        Timestamps, Uid, XattrFlags,
    },
    io::Errno,
};

use crate::error::{Context, Result};

/// Deeper than any image: whatever is below stays behind, with an error.
const MAX_DEPTH: usize = 512;

/// The longest extended attribute, and list of their names.
const MAX_XATTR: usize = 64 << 10;

/// Where copies are made until they are whole.
const PARTIAL: &str = ".bulkhead-copy-up";

/// Copies the directory at the path of `root` into the share, if that is empty.
pub fn copy_up(root: &Path, shares: &Path, copy: &CopyUp) -> Result<()> {
    let failed = || format!("copy {} to its volume", copy.path);
    let open_root = open_directory(CWD, root).context(failed())?;
    let relative = Path::new(&copy.path).strip_prefix("/").unwrap_or(Path::new(&copy.path));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let source = match rustix::fs::openat2(&open_root, relative, flags, Mode::empty(), ResolveFlags::IN_ROOT)
    {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(()),
        source => source.context(failed())?,
    };
    let share = open_directory(CWD, &shares.join(&copy.share)).context(failed())?;
    let names = entries(&share).context(failed())?;
    match names.as_slice() {
        [] => {}
        // What an agent that was killed has left.
        [partial] if partial.as_bytes() == PARTIAL.as_bytes() => {
            remove_tree(&share, Path::new(PARTIAL)).context(failed())?;
        }
        _ => return Ok(()),
    }
    fill(&source, &share).context(failed())
}

/// First into a directory aside, so that a volume that was half filled is not taken for one in use.
fn fill(source: &OwnedFd, share: &OwnedFd) -> rustix::io::Result<()> {
    if !entries(source)?.is_empty() {
        rustix::fs::mkdirat(share, PARTIAL, Mode::from_raw_mode(0o700))?;
        let partial = open_directory(share, Path::new(PARTIAL))?;
        copy_content(source, &partial, &mut HashMap::new(), 0)?;
        rustix::fs::syncfs(&partial)?;
        for name in entries(&partial)? {
            rustix::fs::renameat_with(&partial, &name, share, &name, RenameFlags::NOREPLACE)?;
        }
        rustix::fs::unlinkat(share, PARTIAL, AtFlags::REMOVEDIR)?;
    }
    copy_attributes(source, share, &rustix::fs::fstat(source)?)
}

fn open_directory(at: impl AsFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, path, flags, Mode::empty())
}

fn entries(directory: &OwnedFd) -> rustix::io::Result<Vec<std::ffi::CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    Ok(names)
}

/// Files with several names that were copied already: their device and inode, and where the copy lies.
type Links = HashMap<(u64, u64), OwnedFd>;

fn copy_content(from: &OwnedFd, to: &OwnedFd, links: &mut Links, depth: usize) -> rustix::io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(Errno::NAMETOOLONG);
    }
    for name in entries(from)? {
        let name = name.as_c_str();
        let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let identity = (stat.st_dev, stat.st_ino);
        if kind != FileType::Directory
            && let Some(copied) = links.get(&identity)
        {
            link(copied, to, name)?;
            continue;
        }
        match kind {
            FileType::Directory => {
                rustix::fs::mkdirat(to, name, Mode::from_raw_mode(0o700))?;
                let path = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
                let (below, copy) = (open_directory(from, path)?, open_directory(to, path)?);
                copy_content(&below, &copy, links, depth + 1)?;
                copy_attributes(&below, &copy, &stat)?;
            }
            FileType::RegularFile => {
                let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let source = rustix::fs::openat(from, name, flags | OFlags::RDONLY, Mode::empty())?;
                let new = flags | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                let copy = rustix::fs::openat(to, name, new, Mode::from_raw_mode(0o600))?;
                let copied = std::io::copy(
                    &mut File::from(source.try_clone().map_err(|error| io(&error))?),
                    &mut file(&copy)?,
                );
                copied.map_err(|error| io(&error))?;
                copy_attributes(&source, &copy, &stat)?;
                // A bound on what is held open; beyond it names become files of their own.
                if stat.st_nlink > 1 && links.len() < 4096 {
                    links.insert(identity, copy);
                }
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(from, name, Vec::new())?;
                rustix::fs::symlinkat(&target, to, name)?;
                own(to, name, &stat)?;
            }
            FileType::Fifo | FileType::Socket => {
                rustix::fs::mknodat(to, name, kind, Mode::from_raw_mode(stat.st_mode & 0o777), 0)?;
                own(to, name, &stat)?;
            }
            // A share has no devices.
            _ => {}
        }
    }
    Ok(())
}

fn file(copy: &OwnedFd) -> rustix::io::Result<File> {
    copy.try_clone().map(File::from).map_err(|error| io(&error))
}

fn io(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

fn link(copied: &OwnedFd, to: &OwnedFd, name: &std::ffi::CStr) -> rustix::io::Result<()> {
    let path = format!("/proc/self/fd/{}", copied.as_raw_fd());
    rustix::fs::linkat(CWD, path, to, name, AtFlags::SYMLINK_FOLLOW)
}

fn own(at: &OwnedFd, name: &std::ffi::CStr, stat: &Stat) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::chownat(at, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    rustix::fs::utimensat(at, name, &times(stat), AtFlags::SYMLINK_NOFOLLOW)
}

fn times(stat: &Stat) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: stat.st_atime, tv_nsec: stat.st_atime_nsec as _ },
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ },
    }
}

/// Owner, extended attributes, permissions and times, in an order in which none takes another away.
fn copy_attributes(from: &OwnedFd, to: &OwnedFd, stat: &Stat) -> rustix::io::Result<()> {
    rustix::fs::fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    let mut names = vec![0; MAX_XATTR];
    let length = match rustix::fs::flistxattr(from, &mut names[..]) {
        Err(Errno::OPNOTSUPP) => 0,
        length => length?,
    };
    names.truncate(length);
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; MAX_XATTR];
        let length = rustix::fs::fgetxattr(from, name, &mut value[..])?;
        value.truncate(length);
        match rustix::fs::fsetxattr(to, name, &value, XattrFlags::empty()) {
            // What the share's host does not take of it: capabilities of files, say.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::PERM) => {}
            Err(error) => return Err(error),
        }
    }
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    rustix::fs::futimens(to, &times(stat))
}

fn remove_tree(at: &OwnedFd, name: &Path) -> rustix::io::Result<()> {
    let path = format!("/proc/self/fd/{}", at.as_raw_fd());
    std::fs::remove_dir_all(Path::new(&path).join(name)).map_err(|error| io(&error))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt, os::unix::fs::PermissionsExt, os::unix::fs::symlink};

    use super::*;

    fn copy(base: &Path, path: &str) {
        let copy = CopyUp { share: "0".into(), path: path.into() };
        copy_up(&base.join("root"), &base.join("shares"), &copy).unwrap();
    }

    #[test]
    fn an_empty_volume_gets_the_images_files_and_one_in_use_nothing() {
        let base = tempfile::tempdir().unwrap();
        let (data, volume) = (base.path().join("root/data"), base.path().join("shares/0"));
        fs::create_dir_all(data.join("sub")).unwrap();
        fs::create_dir_all(&volume).unwrap();
        fs::write(data.join("sub/a"), "content").unwrap();
        fs::hard_link(data.join("sub/a"), data.join("b")).unwrap();
        symlink("/etc/passwd", data.join("l")).unwrap();
        fs::set_permissions(data.join("sub/a"), fs::Permissions::from_mode(0o4711)).unwrap();
        fs::set_permissions(&data, fs::Permissions::from_mode(0o1770)).unwrap();
        copy(base.path(), "/data");
        assert_eq!(fs::read_to_string(volume.join("b")).unwrap(), "content");
        let (a, b) = (fs::metadata(volume.join("sub/a")).unwrap(), fs::metadata(volume.join("b")).unwrap());
        assert_eq!((a.ino(), a.mode() & 0o7777), (b.ino(), 0o4711));
        assert_eq!(fs::read_link(volume.join("l")).unwrap(), Path::new("/etc/passwd"));
        assert_eq!(fs::metadata(&volume).unwrap().mode() & 0o7777, 0o1770);

        fs::remove_file(volume.join("b")).unwrap();
        copy(base.path(), "/data");
        assert!(!volume.join("b").exists());
    }

    #[test]
    fn a_copy_that_was_cut_short_begins_anew_and_links_lead_nowhere_outside() {
        let base = tempfile::tempdir().unwrap();
        let (root, volume) = (base.path().join("root"), base.path().join("shares/0"));
        fs::create_dir_all(root.join("real")).unwrap();
        fs::create_dir_all(volume.join(PARTIAL).join("junk")).unwrap();
        fs::create_dir_all(base.path().join("outside")).unwrap();
        fs::write(base.path().join("outside/secret"), "").unwrap();
        fs::write(root.join("real/x"), "").unwrap();
        symlink("/real", root.join("link")).unwrap();
        symlink("../../outside", root.join("up")).unwrap();
        copy(base.path(), "/up");
        assert!(volume.join(PARTIAL).exists());
        copy(base.path(), "/missing");
        copy(base.path(), "/link");
        let names: Vec<_> = fs::read_dir(&volume).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["x"]);
    }
}
