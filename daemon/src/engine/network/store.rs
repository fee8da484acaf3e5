//! Networks on disk: a file each. One that cannot be read is set aside, for people.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use super::record::{Network, VERSION};
use crate::layout::Layout;

fn path(layout: &Layout, id: &str) -> PathBuf {
    layout.networks().join(format!("{id}.json"))
}

/// All networks on disk.
///
/// # Errors
/// The directory cannot be read or made.
pub(super) fn load(layout: &Layout) -> io::Result<Vec<Network>> {
    let directory = layout.networks();
    DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
    let mut networks = Vec::new();
    for entry in fs::read_dir(&directory)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        match read(&path) {
            Ok(network) => networks.push(network),
            Err(reason) => {
                tracing::warn!(path = %path.display(), reason, "a network's record is damaged; it is set aside");
                fs::rename(&path, path.with_extension("damaged"))?;
            }
        }
    }
    Ok(networks)
}

fn read(path: &Path) -> Result<Network, String> {
    let text = fs::read(path).map_err(|error| error.to_string())?;
    let network: Network = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    if network.version > VERSION {
        return Err(format!("version {} is not known", network.version));
    }
    let is_id = network.id.len() == 64 && network.id.bytes().all(|digit| digit.is_ascii_hexdigit());
    if !is_id || path.file_stem().and_then(|stem| stem.to_str()) != Some(&network.id) {
        return Err("the record is another network's".into());
    }
    Ok(network)
}

/// Writes one so that after a crash the file is there whole or not at all, and on disk when this returns.
///
/// # Errors
/// The disk's.
pub(super) fn write(layout: &Layout, network: &Network) -> io::Result<()> {
    let path = path(layout, &network.id);
    let new = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&serde_json::to_vec(network)?)?;
    file.sync_all()?;
    fs::rename(&new, &path)?;
    File::open(layout.networks())?.sync_all()
}

/// Removes one; that it is gone already is no error.
///
/// # Errors
/// The disk's.
pub(super) fn delete(layout: &Layout, id: &str) -> io::Result<()> {
    match fs::remove_file(path(layout, id)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => File::open(layout.networks())?.sync_all(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::network::{bare, record::Driver};

    #[test]
    fn networks_are_read_as_they_were_written_and_damage_is_set_aside() {
        let base = tempfile::tempdir().unwrap();
        let layout = Layout { data_root: base.path().to_owned(), exec_root: base.path().join("exec") };
        assert_eq!(load(&layout).unwrap(), []);
        let network = bare("none", Driver::Null);
        write(&layout, &network).unwrap();
        fs::write(layout.networks().join("00.json"), "{").unwrap();
        fs::copy(path(&layout, &network.id), path(&layout, &"ab".repeat(32))).unwrap();
        assert_eq!(load(&layout).unwrap(), std::slice::from_ref(&network));
        assert!(layout.networks().join("00.damaged").exists());
        delete(&layout, &network.id).unwrap();
        delete(&layout, &network.id).unwrap();
        assert_eq!(load(&layout).unwrap(), []);
    }
}
