//! The files of one log: the current one, and those before it that are full.
//!
//! ```text
//!  ID-json.log.7.gz   ID-json.log.8   ID-json.log          each number is one file for ever: readers that are slow
//!   oldest, goes first     ▲           current, the 9th     find what comes next by it, and nothing is renamed twice
//!                          └── full
//! ```
//! Beside them, `ID-json.log.had` counts what the present run has in full files: without it a restarted daemon
//! could not tell how many bytes of a stream are safe. It names the last full file by its inode, so that a crash
//! between its writing and the change of files is seen: then the current file still is that one.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use flate2::{Compression, read::MultiGzDecoder, write::GzEncoder};
use serde::{Deserialize, Serialize};

use super::writer::Durable;

/// What the present run has in files that are full.
#[derive(Debug, Serialize, Deserialize)]
struct Had {
    /// Inode of the last of them.
    inode: u64,
    stdout: u64,
    stderr: u64,
}

/// The most that is read of [`Had`], in bytes.
const MAX_HAD: u64 = 4096;

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path.as_os_str());
    name.push(suffix);
    PathBuf::from(name)
}

fn had_path(path: &Path) -> PathBuf {
    with_suffix(path, ".had")
}

/// Numbers of the full files, the oldest first.
///
/// # Errors
/// The directory cannot be read.
pub(super) fn numbers(path: &Path) -> io::Result<Vec<u64>> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Ok(Vec::new());
    };
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut numbers = Vec::new();
    for entry in entries {
        let file = entry?.file_name();
        let suffix = file.to_str().and_then(|file| file.strip_prefix(name)?.strip_prefix('.'));
        numbers.extend(suffix.and_then(|text| text.strip_suffix(".gz").unwrap_or(text).parse::<u64>().ok()));
    }
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}

/// A full file by its number, None when it has gone. A compressed one is unpacked into a nameless file.
///
/// # Errors
/// It cannot be read.
pub(super) fn open_full(path: &Path, number: u64) -> io::Result<Option<File>> {
    match File::open(with_suffix(path, &format!(".{number}"))) {
        Ok(file) => return Ok(Some(file)),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Err(_) => {}
    }
    let packed = match File::open(with_suffix(path, &format!(".{number}.gz"))) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut unpacked = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600)
        .open(directory)?;
    io::copy(&mut MultiGzDecoder::new(packed), &mut unpacked)?;
    Ok(Some(unpacked))
}

/// Makes the current file the full one of this number, and a new one the current. `durable` is what the run has
/// until here.
///
/// # Errors
/// The disk's. Then the current file is still the current one, or there is none and the next
/// [`current`] makes it.
pub(super) fn change(path: &Path, current_file: &File, number: u64, durable: Durable) -> io::Result<File> {
    let had = Had { inode: current_file.metadata()?.ino(), stdout: durable.stdout, stderr: durable.stderr };
    let (had_file, new) = (had_path(path), with_suffix(path, ".had.new"));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&serde_json::to_vec(&had)?)?;
    // A crash of the machine must not leave the change of files without it.
    file.sync_all()?;
    fs::rename(&new, &had_file)?;
    match fs::rename(path, with_suffix(path, &format!(".{number}"))) {
        // The attempt before this one came so far and no further.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        renamed => renamed?,
    }
    current(path)
}

/// The current file, made if it is not there.
///
/// # Errors
/// The disk's.
pub(super) fn current(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o640).open(path)
}

/// What the present run has in full files; None: all of it is in the current file.
///
/// # Errors
/// The disk's.
pub(super) fn had(path: &Path, current: &File) -> io::Result<Option<Durable>> {
    let file = match File::open(had_path(path)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut text = Vec::new();
    file.take(MAX_HAD).read_to_end(&mut text)?;
    let had: Had = serde_json::from_slice(&text)?;
    let changed = current.metadata()?.ino() != had.inode;
    Ok(changed.then_some(Durable { stdout: had.stdout, stderr: had.stderr }))
}

/// Forgets what an earlier run had.
///
/// # Errors
/// The disk's.
pub(super) fn forget_had(path: &Path) -> io::Result<()> {
    remove(&had_path(path))
}

/// Removes the oldest full files until so many are left.
///
/// # Errors
/// The disk's.
pub(super) fn discard(path: &Path, keep: usize) -> io::Result<()> {
    let numbers = numbers(path)?;
    let surplus = numbers.len().saturating_sub(keep);
    for number in numbers.into_iter().take(surplus) {
        for suffix in [format!(".{number}"), format!(".{number}.gz")] {
            remove(&with_suffix(path, &suffix))?;
        }
    }
    Ok(())
}

/// Compresses the full files. One that is discarded in the meantime is gone.
///
/// # Errors
/// The disk's.
pub(super) fn pack(path: &Path) -> io::Result<()> {
    for number in numbers(path)? {
        let plain = with_suffix(path, &format!(".{number}"));
        let file = match File::open(&plain) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let packed = with_suffix(path, &format!(".{number}.gz"));
        let new = with_suffix(path, ".packing");
        let target = OpenOptions::new().write(true).create(true).truncate(true).mode(0o640).open(&new)?;
        let mut encoder = GzEncoder::new(target, Compression::fast());
        io::copy(&mut { file }, &mut encoder)?;
        encoder.finish()?.sync_all()?;
        fs::rename(&new, &packed)?;
        match fs::remove_file(&plain) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => remove(&packed)?,
            removed => removed?,
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
    use super::*;

    fn text(path: &Path, number: u64) -> String {
        use std::io::Seek;
        let mut file = open_full(path, number).unwrap().unwrap();
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn full_files_keep_their_numbers_are_packed_and_go_in_their_order() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("x-json.log");
        let mut file = current(&path).unwrap();
        for number in 1..=4 {
            file.write_all(format!("file {number}").as_bytes()).unwrap();
            let durable = Durable { stdout: number * 10, stderr: 0 };
            file = change(&path, &file, number, durable).unwrap();
            discard(&path, 2).unwrap();
            pack(&path).unwrap();
            assert_eq!(had(&path, &file).unwrap(), Some(durable));
        }
        assert_eq!(numbers(&path).unwrap(), [3, 4]);
        assert_eq!((text(&path, 3), text(&path, 4)), ("file 3".into(), "file 4".into()));
        assert!(path.with_extension("log.4.gz").exists() && !path.with_extension("log.4").exists());
        assert!(open_full(&path, 1).unwrap().is_none());
        forget_had(&path).unwrap();
        assert_eq!(had(&path, &file).unwrap(), None);
        // Other logs' files are none of this one's.
        std::fs::write(base.path().join("x-json.log.extra.1"), "").unwrap();
        std::fs::write(base.path().join("xx-json.log.9"), "").unwrap();
        assert_eq!(numbers(&path).unwrap(), [3, 4]);
    }

    #[test]
    fn a_change_that_a_crash_cut_short_counts_as_none() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("x-json.log");
        let file = current(&path).unwrap();
        let had_before = Had { inode: file.metadata().unwrap().ino(), stdout: 5, stderr: 6 };
        std::fs::write(had_path(&path), serde_json::to_vec(&had_before).unwrap()).unwrap();
        assert_eq!(had(&path, &file).unwrap(), None);
    }
}
