//! Templates: idle machines that were booted once and saved, of which new sandboxes are clones.
//!
//! ```text
//!                    first use of a shape
//!   (absent) ──────────────────────────────▶ Building ──▶ Ready ──┬── used: restore ──▶ a clone
//!      ▲  ▲                                     │ failed          ├── a restore fails, a file is not what
//!      │  └───── after a growing delay ─ Failed ◀─────────────────┘   was written: removed, and told
//!      └──────────────── room is needed: the one used longest ago
//! ```
//!
//! One directory each, named by its key: the digest of everything that must be equal ([`Shape`]) and of the
//! tenant's domain. A template is built in the background while its first user boots cold, by one builder at a
//! time, in a directory that gets its name when all of it is on disk. It holds a guest kernel and an agent and
//! nothing of anybody's container, so one can serve all; where even the page cache must not be shared (a clone
//! can tell by timing which pages others have read), each tenant's domain has its own.
//!
//! **What is checked when.** When the daemon starts, and when a template is finished, every byte is read, in the
//! background. At each use: size, time of change and inode. A template that fails is removed with an event; the
//! sandbox at hand boots cold.

mod build;

use std::{
    collections::HashMap,
    fs::{DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::saved::{self, Check, Digests, MachineSpec, OpenMachine, SavedError, SavedMachine, Shape};

/// What an unfinished one's directory begins with.
const UNFINISHED: &str = "new-";

/// After the first failure of a shape, until it is tried again; each further failure doubles it.
const FIRST_PAUSE: Duration = Duration::from_secs(30);
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

/// How much may lie on disk.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Templates.
    pub count: usize,
    /// Bytes on disk, all together.
    pub bytes: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { count: 16, bytes: 8 << 30 }
    }
}

/// What happens to templates, for logs and events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// One is ready.
    Built,
    /// One could not be made.
    Failed(String),
    /// One was not what had been written, or could not be restored, and is removed.
    Discarded(String),
    /// One made room for another.
    Pruned,
}

type Listener = Arc<dyn Fn(&str, &News) + Send + Sync>;

/// What a sandbox wants of the templates.
#[derive(Debug, Clone)]
pub struct TemplateUse {
    /// The store.
    pub store: Arc<Templates>,
    /// Whose templates alone are good; None: everybody's.
    pub domain: Option<String>,
}

/// The templates of one data root.
pub struct Templates {
    path: PathBuf,
    sandboxes: PathBuf,
    bounds: Bounds,
    digests: Arc<Digests>,
    entries: Mutex<HashMap<String, Entry>>,
    building: Semaphore,
    tasks: TaskTracker,
    stop: CancellationToken,
    listener: Listener,
}

enum Entry {
    Building,
    Ready { machine: Box<SavedMachine>, used: SystemTime, bytes: u64 },
    Failed { until: Instant, pause: Duration },
}

/// A template at hand.
pub(super) struct Ready {
    pub(super) key: String,
    pub(super) files: OpenMachine,
}

impl std::fmt::Debug for Templates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Templates").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Templates {
    /// Opens the directory and takes what is whole in it; begins to read all of it in the background. Builders'
    /// sandboxes are made below `sandboxes`.
    ///
    /// # Errors
    /// The directory cannot be made or read.
    pub fn open(
        path: PathBuf,
        sandboxes: PathBuf,
        bounds: Bounds,
        digests: Arc<Digests>,
        listener: impl Fn(&str, &News) + Send + Sync + 'static,
    ) -> io::Result<Arc<Self>> {
        DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700))?;
        let store = Arc::new(Self {
            path,
            sandboxes,
            bounds,
            digests,
            entries: Mutex::default(),
            building: Semaphore::new(1),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            listener: Arc::new(listener),
        });
        for entry in std::fs::read_dir(&store.path)? {
            let entry = entry?;
            store.take_up(&entry.file_name().to_string_lossy(), entry.metadata().and_then(|m| m.modified()));
        }
        store.prune("");
        let verifier = Arc::clone(&store);
        store.in_background(async move {
            let _ = tokio::task::spawn_blocking(move || verifier.verify_all()).await;
        });
        Ok(store)
    }

    /// Reads the files that every machine is made of, so that the first one finds its template. In the
    /// background.
    pub fn warm_up(self: &Arc<Self>, files: [PathBuf; 3]) {
        let digests = Arc::clone(&self.digests);
        self.in_background(async move {
            let read = tokio::task::spawn_blocking(move || Shape::warm_up(&files, &digests));
            if let Ok(Err(error)) = read.await {
                tracing::debug!(%error, "the machine's files cannot be read yet");
            }
        });
    }

    /// Ends what goes on in the background.
    pub async fn close(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// The template for a machine, if it is ready. Costs a few system calls.
    pub(super) fn find(&self, machine: &MachineSpec, domain: Option<&str>) -> Option<Ready> {
        let key = Shape::known(machine, &self.digests)?.key(domain);
        let saved = self.with(|entries| match entries.get_mut(&key) {
            Some(Entry::Ready { machine, used, .. }) => {
                *used = SystemTime::now();
                Some(machine.clone())
            }
            _ => None,
        })?;
        match saved.open(Check::Fingerprint) {
            Ok(files) => {
                self.mark_used(&key);
                Some(Ready { key, files })
            }
            Err(error) => {
                self.discard(&key, &error.to_string());
                None
            }
        }
    }

    /// Begins to build the template for a machine, unless there is one, one is being built, or building it has
    /// failed a short while ago.
    pub(super) fn want(self: &Arc<Self>, machine: MachineSpec, domain: Option<String>) {
        let store = Arc::clone(self);
        self.in_background(async move {
            let (reader, spec) = (Arc::clone(&store), machine.clone());
            let shape = tokio::task::spawn_blocking(move || Shape::read(&spec, &reader.digests)).await;
            match shape.unwrap_or_else(|error| Err(io::Error::other(error))) {
                Ok(shape) => store.build(machine, shape, domain.as_deref()).await,
                Err(error) => tracing::warn!(%error, "no template: a file of the machine cannot be read"),
            }
        });
    }

    /// A clone did not come up: its template is not used again.
    pub(super) fn discard(&self, key: &str, why: &str) {
        let pause = FIRST_PAUSE;
        let removed = self.with(|entries| {
            // Not one that was built anew in the meantime by another.
            matches!(entries.get(key), Some(Entry::Ready { .. })).then(|| {
                let failed = Entry::Failed { until: Instant::now() + pause, pause };
                entries.insert(key.to_owned(), failed)
            })
        });
        if let Some(Some(Entry::Ready { machine, .. })) = removed {
            self.remove(&machine);
            self.tell(key, &News::Discarded(why.to_owned()));
        }
    }

    async fn build(&self, machine: MachineSpec, shape: Shape, domain: Option<&str>) {
        let key = shape.key(domain);
        let Some(pause) = self.claim(&key) else { return };
        // One after the other: each is a whole boot and hundreds of megabytes of writes.
        let Ok(_turn) = self.building.acquire().await else { return };
        let unfinished = self.path.join(format!("{UNFINISHED}{}", super::new_id()));
        let place = self.path.join(&key);
        let built = async {
            let writing = build::build(&machine, &self.sandboxes, unfinished).await?;
            // The machine that wrote the files is gone by now: nobody holds them open.
            let commit = move || {
                saved::remove(&place)?;
                writing.commit(shape, &place)
            };
            let committed = tokio::task::spawn_blocking(commit).await;
            committed.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(build::BuildError::Store)
        };
        match built.await {
            Ok(machine) => {
                let bytes = machine.disk_usage();
                let ready = Entry::Ready { machine: Box::new(machine), used: SystemTime::now(), bytes };
                self.with(|entries| entries.insert(key.clone(), ready));
                self.tell(&key, &News::Built);
                self.prune(&key);
            }
            Err(error) => {
                let failed = Entry::Failed { until: Instant::now() + pause, pause };
                self.with(|entries| entries.insert(key.clone(), failed));
                self.tell(&key, &News::Failed(error.to_string()));
            }
        }
    }

    /// Claims the building of a key; how long to wait should it fail.
    fn claim(&self, key: &str) -> Option<Duration> {
        self.with(|entries| {
            let pause = match entries.get(key) {
                None => FIRST_PAUSE,
                Some(Entry::Failed { until, pause }) if *until <= Instant::now() => {
                    (*pause * 2).min(LONGEST_PAUSE)
                }
                Some(_) => return None,
            };
            entries.insert(key.to_owned(), Entry::Building);
            Some(pause)
        })
    }

    /// Takes what an earlier daemon left.
    fn take_up(&self, name: &str, used: io::Result<SystemTime>) {
        let path = self.path.join(name);
        let is_key = name.len() == 64 && name.bytes().all(|digit| digit.is_ascii_hexdigit());
        let opened = is_key.then(|| {
            let machine = SavedMachine::read(&path)?;
            machine.open(Check::Fingerprint)?;
            Ok::<_, SavedError>(machine)
        });
        match opened {
            Some(Ok(machine)) => {
                let bytes = machine.disk_usage();
                let used = used.unwrap_or(SystemTime::UNIX_EPOCH);
                let ready = Entry::Ready { machine: Box::new(machine), used, bytes };
                self.with(|entries| entries.insert(name.to_owned(), ready));
            }
            other => {
                if let Some(Err(error)) = other {
                    self.tell(name, &News::Discarded(error.to_string()));
                }
                if let Err(error) = saved::remove(&path) {
                    tracing::error!(path = %path.display(), %error, "what is left of a template stays behind");
                }
            }
        }
    }

    /// Reads every template. Blocks for long.
    fn verify_all(&self) {
        let ready: Vec<_> = self.with(|entries| {
            let ready = entries.iter().filter_map(|(key, entry)| match entry {
                Entry::Ready { machine, .. } => Some((key.clone(), machine.clone())),
                _ => None,
            });
            ready.collect()
        });
        for (key, machine) in ready {
            if self.stop.is_cancelled() {
                return;
            }
            if let Err(error) = machine.open(Check::Digest) {
                self.discard(&key, &error.to_string());
            }
        }
    }

    /// Makes room: those used longest ago go first, `keep` never.
    fn prune(&self, keep: &str) {
        let gone = self.with(|entries| {
            let mut ready: Vec<(SystemTime, String, u64)> = entries
                .iter()
                .filter_map(|(key, entry)| match entry {
                    Entry::Ready { used, bytes, .. } => Some((*used, key.clone(), *bytes)),
                    _ => None,
                })
                .collect();
            ready.sort();
            let excess = excess(&ready, self.bounds, keep);
            excess.into_iter().filter_map(|key| Some((entries.remove(&key)?, key))).collect::<Vec<_>>()
        });
        for (entry, key) in gone {
            if let Entry::Ready { machine, .. } = entry {
                self.remove(&machine);
                self.tell(&key, &News::Pruned);
            }
        }
    }

    fn remove(&self, machine: &SavedMachine) {
        if let Err(error) = machine.remove() {
            tracing::error!(path = %machine.path().display(), %error, "a template stays behind");
        }
    }

    /// So that a later daemon knows which was used last; that it fails does no harm.
    fn mark_used(&self, key: &str) {
        let now = SystemTime::now();
        let _ = File::open(self.path.join(key)).and_then(|directory| directory.set_modified(now));
    }

    fn with<R>(&self, f: impl FnOnce(&mut HashMap<String, Entry>) -> R) -> R {
        f(&mut self.entries.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn tell(&self, key: &str, news: &News) {
        (self.listener)(key, news);
    }

    fn in_background(self: &Arc<Self>, work: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            let _ = stop.run_until_cancelled(work).await;
        });
    }
}

/// Which of those sorted by their last use go, so that the rest is within bounds.
fn excess(ready: &[(SystemTime, String, u64)], bounds: Bounds, keep: &str) -> Vec<String> {
    let mut count = ready.len();
    let mut bytes = ready.iter().fold(0_u64, |sum, (.., bytes)| sum.saturating_add(*bytes));
    let mut gone = Vec::new();
    for (_, key, size) in ready.iter().filter(|(_, key, _)| key != keep) {
        if count <= bounds.count && bytes <= bounds.bytes {
            break;
        }
        count -= 1;
        bytes = bytes.saturating_sub(*size);
        gone.push(key.clone());
    }
    gone
}

#[cfg(test)]
mod tests;
