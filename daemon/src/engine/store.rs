//! Containers on disk: their directories, and what is found in them when a daemon starts.
//!
//! A container's directory is made first and its record last, and goes the other way round: a directory without
//! a record is what a creation or a removal left when the daemon died, and is removed. A record that cannot be
//! read is set aside with its directory, for people.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt,
    path::Path,
};

use super::container::record::{Record, RecordError};
use crate::layout::Layout;

/// What a damaged container's directory is renamed to.
const DAMAGED: &str = "damaged";

/// Makes a container's directory, on disk when this returns.
///
/// # Errors
/// The disk's.
pub(crate) fn create(layout: &Layout, id: &str) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(layout.container(id))?;
    sync(&layout.containers())
}

/// Removes a container from disk, its record first and for good: not even a loss of power brings it back.
///
/// # Errors
/// The disk's; then some of it is left.
pub(crate) fn delete(layout: &Layout, id: &str) -> io::Result<()> {
    absent_is_fine(fs::remove_file(layout.container_record(id)))?;
    absent_is_fine(sync(&layout.container(id)))?;
    absent_is_fine(fs::remove_dir_all(layout.container(id)))
}

fn sync(directory: &Path) -> io::Result<()> {
    fs::File::open(directory)?.sync_all()
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// All containers on disk.
///
/// # Errors
/// The directory itself cannot be read or made.
pub(crate) fn load(layout: &Layout) -> io::Result<Vec<Record>> {
    let parent = layout.containers();
    DirBuilder::new().recursive(true).mode(0o700).create(&parent)?;
    let mut records = Vec::new();
    for entry in fs::read_dir(&parent)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(id) = name.to_str().filter(|name| is_id(name)) else { continue };
        match Record::read(&layout.container_record(id)) {
            Ok(record) if record.id == id => records.push(record),
            Ok(_) => set_aside(&parent, id, "the record is another container's"),
            Err(RecordError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                tracing::info!(
                    container = id,
                    "what is left of a half-made or half-removed container is removed"
                );
                if let Err(error) = fs::remove_dir_all(entry.path()) {
                    tracing::error!(container = id, %error, "it could not be removed");
                }
            }
            Err(error) => set_aside(&parent, id, &error.to_string()),
        }
    }
    records.sort_by(|a, b| a.created.cmp(&b.created).then_with(|| a.id.cmp(&b.id)));
    Ok(records)
}

fn is_id(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|digit| digit.is_ascii_hexdigit())
}

fn set_aside(parent: &Path, id: &str, reason: &str) {
    tracing::warn!(container = id, reason, "a container's record is damaged; it is set aside");
    let from = parent.join(id);
    if let Err(error) = fs::rename(&from, from.with_extension(DAMAGED)) {
        tracing::error!(container = id, %error, "it could not be set aside");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::container::record::sample;

    #[test]
    fn good_records_are_loaded_damaged_ones_set_aside_and_halves_removed() {
        let base = tempfile::tempdir().unwrap();
        let layout = Layout { data_root: base.path().to_owned(), exec_root: base.path().join("exec") };
        assert_eq!(load(&layout).unwrap(), []);
        let ids: Vec<String> = ["a1", "b2", "c3", "d4"].iter().map(|part| part.repeat(32)).collect();
        for id in &ids {
            create(&layout, id).unwrap();
        }
        let good = sample("a1");
        good.write(&layout.container_record(&ids[0])).unwrap();
        fs::write(layout.container_record(&ids[1]), "{").unwrap();
        // The third has no record; the fourth has another's.
        good.write(&layout.container_record(&ids[3])).unwrap();

        assert_eq!(load(&layout).unwrap(), [good]);
        let mut left: Vec<_> = fs::read_dir(layout.containers())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, [ids[0].clone(), format!("{}.damaged", ids[1]), format!("{}.damaged", ids[3])]);

        delete(&layout, &ids[0]).unwrap();
        delete(&layout, &ids[0]).unwrap();
        assert_eq!(load(&layout).unwrap(), []);
    }
}
