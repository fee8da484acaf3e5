//! A container's root directory, as the process of a transfer has it.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use bulkhead_agent_api::files::PathStat;
use nix::sched::CloneFlags;
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, Stat},
    io::Errno,
};

use super::About;
use crate::{
    child,
    error::{Context, Result, conflict},
    rootfs::Mounted,
    spec::Checked,
};

/// Symbolic links that a path may lead through, as Docker has it.
const MAX_LINKS: usize = 255;

/// Whose view of the files it is.
#[derive(Clone, Copy)]
pub(super) enum Place<'a> {
    /// The agent's own.
    Agent,
    /// That of a running container, by its first process.
    Running(&'a OwnedFd),
    /// That of a container in which nothing runs: its root file system and what is bound into it.
    Resting,
}

/// The root directory.
pub(super) struct Root {
    dir: OwnedFd,
    /// `/proc/self/fd` of the agent's own `/proc`: where a file that is open without rights is opened again.
    descriptors: OwnedFd,
}

impl Root {
    /// Goes there: from now on this process's root is the container's. (The agent's, the agent's.)
    pub(super) fn enter(place: Place<'_>, container: &Checked, mounted: &Mounted) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open =
            |path: &str| rustix::fs::open(path, flags, Mode::empty()).context(format_args!("open {path}"));
        let descriptors = open("/proc/self/fd")?;
        match place {
            Place::Agent => {}
            Place::Running(init) => {
                nix::sched::setns(init, CloneFlags::CLONE_NEWNS).map_err(|error| match error {
                    nix::errno::Errno::ESRCH => conflict("the container has ended"),
                    error => crate::error::internal(format!("enter the container's mounts: {error}")),
                })?;
            }
            Place::Resting => {
                nix::sched::unshare(CloneFlags::CLONE_NEWNS).context("unshare the mounts")?;
                child::enter_at_rest(container, &mounted.root())?;
            }
        }
        rustix::process::chdir("/").context("chdir /")?;
        Ok(Self { dir: open("/")?, descriptors })
    }

    /// A root for tests: a directory.
    #[cfg(test)]
    pub(super) fn of(path: &std::path::Path) -> Self {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |path: &std::path::Path| rustix::fs::open(path, flags, Mode::empty()).unwrap();
        Self { dir: open(path), descriptors: open(std::path::Path::new("/proc/self/fd")) }
    }

    /// Opens by path, every link of which leads somewhere below the root.
    pub(super) fn open(&self, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
        self.open_from(&self.dir, path, flags)
    }

    fn open_from(&self, dir: impl AsFd, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let path = if path.is_empty() { b"." } else { path };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        loop {
            match rustix::fs::openat2(&dir, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                // Something was renamed while the path was walked.
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other,
            }
        }
    }

    /// Opens a file anew that is open without rights: the same, whatever its path leads to by now.
    pub(super) fn reopen(&self, file: &OwnedFd, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let number = file.as_raw_fd().to_string();
        rustix::fs::openat(&self.descriptors, number, flags | OFlags::CLOEXEC, Mode::empty())
    }

    /// What is at a path, and how Docker tells of it. A last link is followed only before a slash.
    pub(super) fn look(&self, path: &str) -> Result<(OwnedFd, PathStat)> {
        let file =
            self.open(path.as_bytes(), OFlags::PATH | OFlags::NOFOLLOW).about("lstat", path.as_bytes())?;
        let found = rustix::fs::fstat(&file).about("lstat", path.as_bytes())?;
        let link = FileType::from_raw_mode(found.st_mode) == FileType::Symlink;
        let link_target = if link { self.resolve(path.as_bytes())? } else { Vec::new() };
        let stat = PathStat {
            name: base(path).to_owned(),
            size: u64::try_from(found.st_size).unwrap_or(0),
            mode: found.st_mode,
            mtime: found.st_mtime,
            mtime_nsec: u32::try_from(found.st_mtime_nsec).unwrap_or(0),
            link_target: String::from_utf8_lossy(&link_target).into_owned(),
        };
        Ok((file, stat))
    }

    /// Where a path leads with all links followed, the last too; what is not there is taken as it is written. For
    /// people and programs to read: nothing is opened by it.
    pub(super) fn resolve(&self, path: &[u8]) -> Result<Vec<u8>> {
        let mut todo: Vec<Vec<u8>> = parts(path).rev().map(<[u8]>::to_vec).collect();
        let mut done: Vec<u8> = Vec::new();
        let mut links = 0;
        while let Some(part) = todo.pop() {
            if part == b".." {
                done.truncate(done.iter().rposition(|&byte| byte == b'/').unwrap_or(0));
                continue;
            }
            let here = [&done[..], b"/", &part].concat();
            let target = self
                .open(&here, OFlags::PATH | OFlags::NOFOLLOW)
                .and_then(|file| rustix::fs::readlinkat(file, c"", Vec::new()));
            match target {
                Ok(target) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(super::failed("readlink", path, &Errno::LOOP.into()));
                    }
                    let target = target.into_bytes();
                    if target.starts_with(b"/") {
                        done.clear();
                    }
                    todo.extend(parts(&target).rev().map(<[u8]>::to_vec));
                }
                // No link, or nothing.
                Err(_) => done = here,
            }
        }
        Ok(if done.is_empty() { b"/".to_vec() } else { done })
    }
}

/// A path's parts, without those that say nothing.
fn parts(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".")
}

/// The last part of a path, as Go's `filepath.Base` has it: `/` of the root, `.` of what ends so.
fn base(path: &str) -> &str {
    let path = path.trim_end_matches('/');
    match path.rsplit_once('/') {
        None if path.is_empty() => "/",
        None => path,
        Some((_, name)) => name,
    }
}

/// A file in an open directory, opened without rights and without following it; with what it is. None: it is no
/// longer there.
pub(super) fn look_at(dir: impl AsFd, name: &[u8]) -> rustix::io::Result<Option<(OwnedFd, Stat)>> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(dir, name, flags, Mode::empty()) {
        Ok(file) => {
            let found = rustix::fs::fstat(&file)?;
            Ok(Some((file, found)))
        }
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A directory that is open without rights, opened to be read.
pub(super) fn open_directory(dir: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, c".", flags, Mode::empty())
}

/// Opens one of the agent's own directories.
pub(super) fn open_own(path: &std::path::Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty()).context(format_args!("open {}", path.display()))
}

/// As the standard library's file.
pub(super) fn file(descriptor: OwnedFd) -> File {
    File::from(descriptor)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn bases_are_those_of_go() {
        for (path, expected) in
            [("/", "/"), ("//", "/"), ("/a", "a"), ("/a/", "a"), ("/a/b//", "b"), ("/a/.", "."), ("/.", ".")]
        {
            assert_eq!(base(path), expected, "{path}");
        }
    }

    #[test]
    fn links_lead_nowhere_but_below_the_root() {
        let outside = tempfile::tempdir().unwrap();
        let inside = outside.path().join("root");
        std::fs::create_dir_all(inside.join("etc/deep")).unwrap();
        std::fs::write(outside.path().join("secret"), "host").unwrap();
        std::fs::write(inside.join("secret"), "guest").unwrap();
        symlink("../../../../secret", inside.join("etc/up")).unwrap();
        symlink("/secret", inside.join("etc/deep/absolute")).unwrap();
        symlink("/etc/deep", inside.join("dir")).unwrap();
        symlink("loop", inside.join("loop")).unwrap();
        symlink("/nothing/../gone/x", inside.join("dangling")).unwrap();
        let root = Root::of(&inside);
        for path in ["/etc/up", "/etc/deep/absolute", "/dir/absolute"] {
            let (file, stat) = root.look(path).unwrap();
            assert_eq!(stat.link_target, "/secret", "{path}");
            drop(file);
            let opened = root.open(path.as_bytes(), OFlags::RDONLY).unwrap();
            assert_eq!(std::io::read_to_string(super::file(opened)).unwrap(), "guest");
        }
        let (_, stat) = root.look("/dir/").unwrap();
        assert_eq!((stat.name.as_str(), stat.mode & 0o170_000), ("dir", 0o040_000));
        assert_eq!(root.look("/dangling").unwrap().1.link_target, "/gone/x");
        assert!(root.look("/loop").is_err());
        assert_eq!(root.look("/no").unwrap_err().kind, bulkhead_agent_api::ErrorKind::NotFound);
        assert!(root.look("/secret/x").is_err() && root.look("/secret/").is_err());
    }
}
