//! Checkpoints: a running container saved, to go on from there later.
//!
//! ```text
//!   containers/ID/checkpoints/NAME/
//!     state memory manifest.json    the saved machine (`sandbox::SavedMachine`)
//!     disk.img                      its writable layer at that moment
//!     checkpoint.json               what it is a checkpoint of
//!
//!   create:  quiesce ▶ pause ▶ save, copy the disk ▶ resume ▶ thaw            (--leave-running)
//!                                                          ╲▶ commit ▶ kill   (else: frozen until then)
//!   start --checkpoint:  clone the disk ▶ restore ▶ the clone's disk becomes the container's
//! ```
//! A checkpoint is complete or not there: it gets its name when all of it is on disk. A start from one that
//! fails leaves the container as it was.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use bulkhead_agent_api::{ContainerIdentity, KnownOutput};
use bulkhead_rootfs::{disk, layers::DiffId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    Engine, Error, Name, Result, Shared,
    container::{Command, Container, names, record::Record, resume::Resumption, state::State},
    logs::Log,
};
use crate::sandbox::{self, Leave, SaveOptions, SavedMachine};

/// Version of [`Checkpoint`].
const VERSION: u32 = 1;

const MAX_DOCUMENT: u64 = 1 << 20;

/// How many a container may have.
const MAX_CHECKPOINTS: usize = 64;

const DOCUMENT: &str = "checkpoint.json";
const DISK: &str = "disk.img";

/// The names of unfinished ones begin with this, which no checkpoint's does.
const UNFINISHED: &str = ".new-";

/// What a checkpoint is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Checkpoint {
    version: u32,
    created: Timestamp,
    /// The container's name in its guest.
    guest: String,
    /// Where the saved run begins in the container's log.
    log_start: u64,
    /// The layers below, bottom first.
    layers: Vec<DiffId>,
    /// Bytes of the disk.
    disk_size: u64,
}

impl Engine {
    /// Saves a running container; with `exit` it ends there, as if killed.
    ///
    /// # Errors
    /// The name is not valid or in use; the container does not run; it could not be saved, and runs on.
    pub async fn checkpoint_create(&self, name: Name<'_>, checkpoint: &str, exit: bool) -> Result<()> {
        let checkpoint = check_name(checkpoint)?;
        let container = self.shared.registry.find(name)?;
        let failed = |error: String| Error::internal(format!("Cannot checkpoint container {name}: {error}"));
        let view = container.view();
        let workload = Arc::clone(view.awake("its checkpoint")?);
        super::container::network::check_order(&view.record)?;
        let State::Running(running) = &view.record.life.state else {
            return Err(Error::conflict(format!("container {} is not running", view.record.id)));
        };
        let Ok(_saving) = workload.saving.try_lock() else {
            return Err(Error::conflict(format!(
                "cannot checkpoint container {name}: it is being saved already"
            )));
        };
        let place = self.shared.layout().checkpoints(&view.record.id);
        let (target, unfinished) = make_room(&place, checkpoint, name)?;

        let shape = self.shared.shape_of(&workload.sandbox, &view.record).await?;
        let disk_path = self.shared.layout().container_disk(&view.record.id);
        let copy = unfinished.join(DISK);
        let options =
            SaveOptions { into: unfinished, leave: if exit { Leave::Frozen } else { Leave::Running } };
        let copied = workload.sandbox.save(options, move || {
            disk::clone(&disk_path, &copy).map_err(io::Error::other)?;
            Ok(fs::metadata(&copy)?.len())
        });
        let (writing, disk_size) = copied.await.map_err(|error| failed(error.to_string()))?;
        let document = Checkpoint {
            version: VERSION,
            created: Timestamp::now(),
            guest: workload.guest().to_owned(),
            log_start: running.log_start,
            layers: view.record.layers.clone(),
            disk_size,
        };
        let commit = move || {
            write_document(&writing.path().join(DOCUMENT), &document)?;
            writing.commit(shape, &target)
        };
        let committed = tokio::task::spawn_blocking(commit).await;
        if let Err(error) = committed.unwrap_or_else(|error| Err(io::Error::other(error))) {
            if exit {
                workload.sandbox.thaw().await.map_err(|error| failed(error.to_string()))?;
            }
            return Err(failed(error.to_string()));
        }
        self.shared.publish(&view.record, "checkpoint", []);
        if exit {
            // Frozen as it is, it dies of the signal before it runs on.
            container.ask(|reply| Command::Kill(libc::SIGKILL, reply)).await??;
        }
        Ok(())
    }

    /// The names of a container's checkpoints.
    ///
    /// # Errors
    /// No such container.
    pub fn checkpoint_list(&self, name: Name<'_>) -> Result<Vec<String>> {
        let container = self.shared.registry.find(name)?;
        Ok(list(&self.shared.layout().checkpoints(container.id()))?)
    }

    /// Removes a checkpoint.
    ///
    /// # Errors
    /// There is none of that name.
    pub async fn checkpoint_delete(&self, name: Name<'_>, checkpoint: &str) -> Result<()> {
        let checkpoint = check_name(checkpoint)?;
        let container = self.shared.registry.find(name)?;
        let path = existing(&self.shared, &container, checkpoint, name)?;
        let removed = tokio::task::spawn_blocking(move || fs::remove_dir_all(path)).await;
        Ok(removed.unwrap_or_else(|error| Err(io::Error::other(error)))?)
    }

    /// Starts a container that does not run from one of its checkpoints; returns when it runs.
    ///
    /// # Errors
    /// There is none of that name; it is damaged, or of another machine; what hinders the start.
    pub async fn container_start_from(&self, name: Name<'_>, checkpoint: &str) -> Result<()> {
        let checkpoint = check_name(checkpoint)?;
        let container = self.shared.registry.find(name)?;
        let path = existing(&self.shared, &container, checkpoint, name)?;
        let (shared, record) = (Arc::clone(&self.shared), container.view().record);
        let prepared = tokio::task::spawn_blocking(move || resumption(&shared, &record, &path)).await;
        let resumption = prepared.unwrap_or_else(|error| Err(Error::internal(error.to_string())))?;
        container.ask(|reply| Command::Resume(Box::new(resumption), reply)).await?
    }
}

/// The names that Docker takes, less those that could be taken for something else on disk.
fn check_name(name: &str) -> Result<&str> {
    let valid = names::check(name).is_ok_and(|checked| checked == name) && !name.ends_with('.');
    if valid && name.len() <= 128 {
        return Ok(name);
    }
    Err(Error::invalid(format!("invalid checkpoint ID {name:?}, only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")))
}

/// Where a new one is to be, and where it is made.
fn make_room(place: &Path, checkpoint: &str, container: &str) -> Result<(PathBuf, PathBuf)> {
    DirBuilder::new().recursive(true).mode(0o700).create(place)?;
    // What a daemon that died half-way has left: nobody else is at work here.
    for entry in fs::read_dir(place)?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    let existing = list(place)?;
    if existing.iter().any(|name| name == checkpoint) {
        return Err(Error::conflict(format!(
            "cannot checkpoint container {container}: checkpoint with name {checkpoint} already exists for \
             container {container}"
        )));
    }
    if existing.len() >= MAX_CHECKPOINTS {
        return Err(Error::conflict(format!(
            "cannot checkpoint container {container}: it has {MAX_CHECKPOINTS} checkpoints, which is the most"
        )));
    }
    Ok((place.join(checkpoint), place.join(format!("{UNFINISHED}{}", sandbox::new_id()))))
}

fn list(place: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(place) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| check_name(name).is_ok())
        .collect();
    found.sort();
    Ok(found)
}

fn existing(shared: &Shared, container: &Container, checkpoint: &str, name: &str) -> Result<PathBuf> {
    let path = shared.layout().checkpoints(container.id()).join(checkpoint);
    if fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir()) {
        return Ok(path);
    }
    Err(Error::not_found(format!("checkpoint {checkpoint} does not exist for container {name}")))
}

/// Checks a checkpoint whole and prepares a start from it. Blocks for long: every byte of it is read.
fn resumption(shared: &Shared, record: &Record, path: &Path) -> Result<Resumption> {
    let bad = |error: &dyn std::fmt::Display| {
        Error::conflict(format!("cannot start container {} from the checkpoint: {error}", record.name))
    };
    let document = read_document(&path.join(DOCUMENT)).map_err(|error| bad(&error))?;
    if document.layers != record.layers {
        return Err(bad(&"its image has other layers"));
    }
    let disk_path = path.join(DISK);
    let size = fs::symlink_metadata(&disk_path)?;
    if !size.is_file() || size.len() != document.disk_size {
        return Err(bad(&"its disk is damaged"));
    }
    let saved = SavedMachine::read(path).map_err(|error| bad(&error))?;
    let machine = saved.open(sandbox::Check::Digest).map_err(|error| bad(&error))?;
    let known = known_output(shared, record, document.log_start)?;
    let identity = ContainerIdentity {
        container: document.guest.clone(),
        end_execs: true,
        known: Some(known),
        ..ContainerIdentity::default()
    };
    Ok(Resumption {
        machine,
        shape: saved.shape().clone(),
        guest: document.guest,
        identity,
        disk: Some(disk_path),
    })
}

/// What the log has of the run that was saved: it comes once, whether the run went on after the checkpoint or
/// was cut off before all of its output was taken.
fn known_output(shared: &Shared, record: &Record, log_start: u64) -> Result<KnownOutput> {
    let settings = record.log_settings()?;
    // Of a log that loses its oldest lines nobody can tell how much of that run it has had.
    if !settings.keeps() || settings.rotates() {
        return Ok(KnownOutput { stdout: u64::MAX, stderr: u64::MAX });
    }
    let (_, durable) = Log::resume(&settings, &shared.layout().container_log(&record.id), log_start)?;
    Ok(KnownOutput { stdout: durable.stdout, stderr: durable.stderr })
}

fn write_document(path: &Path, document: &Checkpoint) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o400).open(path)?;
    file.write_all(&serde_json::to_vec_pretty(document)?)?;
    file.sync_all()
}

fn read_document(path: &Path) -> io::Result<Checkpoint> {
    let mut text = Vec::new();
    let file: File = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
    file.take(MAX_DOCUMENT).read_to_end(&mut text)?;
    let document: Checkpoint = serde_json::from_slice(&text)?;
    if document.version != VERSION {
        return Err(io::Error::other(format!("its version {} is not known", document.version)));
    }
    Ok(document)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dockers_and_stay_in_their_directory() {
        for name in ["c1", "a.b-c_d", "0x"] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in
            ["", ".", "..", "a", ".new-1", "a/b", "../ab", "a b", "ab.", "/ab", "a\0b", &"x".repeat(129)]
        {
            assert!(check_name(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn room_is_made_once_for_a_name_and_what_was_left_is_removed() {
        let base = tempfile::tempdir().unwrap();
        let place = base.path().join("checkpoints");
        assert_eq!(list(&place).unwrap(), Vec::<String>::new());
        let (target, unfinished) = make_room(&place, "c1", "web").unwrap();
        fs::create_dir(&unfinished).unwrap();
        fs::create_dir(place.join("stray.")).unwrap();
        fs::write(place.join("file"), "").unwrap();
        fs::create_dir(&target).unwrap();
        assert_eq!(list(&place).unwrap(), ["c1"]);
        let error = make_room(&place, "c1", "web").unwrap_err();
        assert!(error.message.ends_with("checkpoint with name c1 already exists for container web"));
        assert!(!unfinished.exists());
        for number in 2..=MAX_CHECKPOINTS {
            fs::create_dir(place.join(format!("c{number}"))).unwrap();
        }
        assert!(make_room(&place, "one-more", "web").unwrap_err().message.contains("the most"));
    }

    #[test]
    fn a_document_is_read_as_it_was_written_and_others_are_refused() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join(DOCUMENT);
        let document = Checkpoint {
            version: VERSION,
            created: Timestamp::UNIX_EPOCH,
            guest: "ab".into(),
            log_start: 7,
            layers: Vec::new(),
            disk_size: 1 << 30,
        };
        write_document(&path, &document).unwrap();
        assert_eq!(read_document(&path).unwrap(), document);
        let other = base.path().join("other");
        write_document(&other, &Checkpoint { version: VERSION + 1, ..document }).unwrap();
        assert!(read_document(&other).is_err());
        let link = base.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(read_document(&link).is_err());
    }
}
