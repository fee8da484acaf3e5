//! A user id for each VMM: no two that run at once have the same, whichever daemon started them.
//!
//! An id in use is a file named by it, which holds the sandbox's name. Making the file is taking the id. The
//! first try is a random number of the range: daemons that do not know of each other do not meet.

use std::{
    fs::{self, File},
    io::{self, Write},
    ops::Range,
    path::{Path, PathBuf},
};

/// How many ids are tried before the range is called full.
const TRIES: u32 = 10_000;

/// The ids that VMMs may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uids {
    /// The numbers, as user and as group ids. Nobody else's.
    pub range: Range<u32>,
    /// Where those in use stand.
    pub directory: PathBuf,
}

impl Uids {
    /// Takes an id for the sandbox.
    ///
    /// # Errors
    /// The directory cannot be written, or all that were tried are in use.
    pub(crate) fn take(&self, sandbox: &str) -> io::Result<u32> {
        fs::create_dir_all(&self.directory)?;
        let count = self.range.end.saturating_sub(self.range.start);
        let mut random = [0; 4];
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        let first = u32::from_ne_bytes(random);
        for next in 0..TRIES.min(count) {
            let uid = self.range.start + first.wrapping_add(next) % count;
            match File::create_new(self.file(uid)) {
                Ok(mut file) => {
                    file.write_all(sandbox.as_bytes())?;
                    return Ok(uid);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other(format!("no user id from {} on is free", self.range.start)))
    }

    /// Gives an id back; that nobody has it is no error.
    pub(crate) fn give_back(&self, uid: u32) -> io::Result<()> {
        remove(&self.file(uid))
    }

    fn file(&self, uid: u32) -> PathBuf {
        self.directory.join(uid.to_string())
    }
}

/// Gives back the ids below `directory` whose sandbox has none among `sandboxes`, where each is a directory.
/// To be called while no sandbox is being made.
///
/// # Errors
/// The directory cannot be read.
pub(crate) fn sweep(directory: &Path, sandboxes: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        let sandbox = fs::read_to_string(&path)?;
        if sandbox.is_empty() || !sandboxes.join(sandbox).is_dir() {
            remove(&path)?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn uids(base: &Path, range: Range<u32>) -> Uids {
        Uids { range, directory: base.join("u") }
    }

    #[test]
    fn each_id_is_given_out_once_until_it_is_given_back() {
        let base = tempfile::tempdir().unwrap();
        let uids = uids(base.path(), 1000..1016);
        let taken: BTreeSet<u32> = (0..16).map(|_| uids.take("s").unwrap()).collect();
        assert_eq!(taken, (1000..1016).collect());
        assert!(uids.take("s").unwrap_err().to_string().contains("1000"));
        uids.give_back(1007).unwrap();
        uids.give_back(1007).unwrap();
        assert_eq!(uids.take("s").unwrap(), 1007);
    }

    #[test]
    fn ids_of_sandboxes_that_are_no_more_are_free_again() {
        let base = tempfile::tempdir().unwrap();
        let uids = uids(base.path(), 1000..1003);
        fs::create_dir(base.path().join("alive")).unwrap();
        let kept = uids.take("alive").unwrap();
        let dead = uids.take("dead").unwrap();
        let free = (1000..1003).find(|uid| ![kept, dead].contains(uid)).unwrap();
        // One that was taken, and nothing more.
        fs::write(uids.directory.join(free.to_string()), "").unwrap();
        sweep(&uids.directory, base.path()).unwrap();
        let left: Vec<_> =
            fs::read_dir(&uids.directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, [std::ffi::OsString::from(kept.to_string())]);
        sweep(&base.path().join("nosuch"), base.path()).unwrap();
    }
}
