//! What is on disk of a container: one JSON document, replaced as a whole.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use bulkhead_rootfs::layers::DiffId;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::state::{Lifecycle, Policy, Rules};
use crate::{
    api::types::container::{Config, Health, HostConfig, LogConfig, RestartPolicy},
    engine::{image::Digest, logs, mounts::Mount, network::record::Attachment},
};

/// Version of the document. A later version's is not read.
const VERSION: u32 = 1;

/// A container: what it is and where it is in its life.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// [`VERSION`].
    pub version: u32,
    /// 64 hexadecimal digits.
    pub id: String,
    /// Without a `/`.
    pub name: String,
    /// When it was created.
    pub created: Timestamp,
    /// The image's id.
    pub image: Digest,
    /// The image's layers, bottom first; they stay while the container does, whatever becomes of the image.
    pub layers: Vec<DiffId>,
    /// The config, merged with the image's.
    pub config: Config,
    /// The host config.
    pub host_config: HostConfig,
    /// What is mounted of the host.
    #[serde(default)]
    pub mounts: Vec<Mount>,
    /// Its places in networks, by their names.
    #[serde(default)]
    pub networks: BTreeMap<String, Attachment>,
    /// Its life.
    pub life: Lifecycle,
    /// Its health, once it was started with a health check.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<Health>,
}

/// Why a record could not be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It is not there, or the disk fails.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is not what it should be.
    #[error("{0}")]
    Damaged(String),
}

impl Record {
    /// A new container.
    pub fn new(id: String, name: String, image: Digest, created: Timestamp) -> Self {
        Self {
            version: VERSION,
            id,
            name,
            created,
            image,
            layers: Vec::new(),
            config: Config::default(),
            host_config: HostConfig::default(),
            mounts: Vec::new(),
            networks: BTreeMap::new(),
            life: Lifecycle::default(),
            health: None,
        }
    }

    /// What decides about its restarts.
    pub fn rules(&self) -> Rules {
        Rules { policy: policy(&self.host_config.restart_policy), auto_remove: self.host_config.auto_remove }
    }

    /// Where its output is logged.
    ///
    /// # Errors
    /// Its options are not valid, which create would have told.
    pub fn log_settings(&self) -> crate::engine::Result<logs::Settings> {
        let (labels, options) = (BTreeMap::new(), BTreeMap::new());
        let LogConfig { kind, config } = &self.host_config.log_config;
        let subject = logs::Subject {
            id: &self.id,
            name: &self.name,
            image: &self.config.image,
            image_id: &self.image.to_string(),
            labels: self.config.labels.as_ref().unwrap_or(&labels),
            env: self.config.env.as_deref().unwrap_or_default(),
        };
        logs::Settings::of(kind, config.as_ref().unwrap_or(&options), &subject)
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn read(path: &Path) -> Result<Self, RecordError> {
        let text = std::fs::read(path)?;
        let record: Self =
            serde_json::from_slice(&text).map_err(|error| RecordError::Damaged(error.to_string()))?;
        if record.version > VERSION {
            return Err(RecordError::Damaged(format!("version {} is not known", record.version)));
        }
        Ok(record)
    }

    /// Writes it so that after a crash the file is the old or the new one, whole, and that it is on disk when
    /// this returns.
    ///
    /// # Errors
    /// The disk's.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let text = serde_json::to_vec(self)?;
        let new = path.with_extension("json.new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&text)?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        match path.parent() {
            Some(parent) => File::open(parent)?.sync_all(),
            None => Ok(()),
        }
    }
}

fn policy(policy: &RestartPolicy) -> Policy {
    match policy.name.as_str() {
        "always" => Policy::Always,
        "unless-stopped" => Policy::UnlessStopped,
        "on-failure" => Policy::OnFailure(match u32::try_from(policy.maximum_retry_count) {
            Ok(0) | Err(_) => None,
            Ok(limit) => Some(limit),
        }),
        _ => Policy::Never,
    }
}

/// A record for tests, its id a pair of digits repeated.
#[cfg(test)]
pub(crate) fn sample(digits: &str) -> Record {
    let id = digits.repeat(64 / digits.len());
    Record::new(id, "quiet_otter".into(), Digest::of(b""), Timestamp::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_it_was_written_and_damage_is_told() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("container.json");
        let mut record = sample("ab");
        record.config.cmd = Some(vec!["true".into()]);
        record.write(&path).unwrap();
        record.name = "loud_otter".into();
        record.write(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap(), record);
        assert_eq!(std::fs::read_dir(base.path()).unwrap().count(), 1, "no file is left beside it");

        std::fs::write(&path, "{\"version\":1").unwrap();
        assert!(matches!(Record::read(&path), Err(RecordError::Damaged(_))));
        Record { version: VERSION + 1, ..record }.write(&path).unwrap();
        assert!(matches!(Record::read(&path), Err(RecordError::Damaged(_))));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(Record::read(&path), Err(RecordError::Io(_))));
    }
}
