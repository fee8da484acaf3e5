//! Every path and socket of the daemon, named once.
//!
//! ```text
//! data_root/                    0700; survives a reboot
//!   id                          the daemon's own id
//!   lock                        held while a daemon runs
//!   images/                     metadata and blobs of the image store
//!   layers/                     the layer store (bulkhead-rootfs)
//!   template.img                the formatted disk that writable layers are clones of
//!   networks/ID.json            networks
//!   templates/KEY/              0700: a saved idle machine, see `sandbox::saved`
//!   forks/                      0700: machines being forked, gone when their clones run
//!   volumes/NAME/_data          0701: a volume
//!   containers/ID/              0700
//!     container.json            what it is and its state
//!     ID-json.log               its log
//!     disk.img                  its writable layer
//!     end.json                  why its last microVM died, if it did not end in order
//!     checkpoints/NAME/         a saved machine, its disk and checkpoint.json
//! exec_root/                    0711; gone after a reboot
//!   bulkheadd.pid
//!   s/ID/                       0700: one sandbox (`sandbox::dir` names what is in it)
//!     control.sock vsock.sock   what its VMM listens on
//!     report.json               what its VMM wrote last
//!     identity jail.json        what a restarted daemon needs to adopt it and to clear up after it
//!   u/UID                       a user id that a VMM has, and the sandbox's name
//! ```

use std::path::PathBuf;

/// The two roots. Ids given to its methods are 64 hexadecimal digits: the caller made or checked them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// `--data-root`, absolute.
    pub data_root: PathBuf,
    /// `--exec-root`, absolute.
    pub exec_root: PathBuf,
}

impl Layout {
    /// The daemon's own id, kept for good.
    pub fn daemon_id(&self) -> PathBuf {
        self.data_root.join("id")
    }

    /// Locked while a daemon uses the data root.
    pub fn lock(&self) -> PathBuf {
        self.data_root.join("lock")
    }

    /// The image store.
    pub fn images(&self) -> PathBuf {
        self.data_root.join("images")
    }

    /// The layer store.
    pub fn layers(&self) -> PathBuf {
        self.data_root.join("layers")
    }

    /// The formatted disk that writable layers are clones of.
    pub fn disk_template(&self) -> PathBuf {
        self.data_root.join("template.img")
    }

    /// All networks.
    pub fn networks(&self) -> PathBuf {
        self.data_root.join("networks")
    }

    /// Machines that new ones are clones of.
    pub fn templates(&self) -> PathBuf {
        self.data_root.join("templates")
    }

    /// Machines that are being forked.
    pub fn forks(&self) -> PathBuf {
        self.data_root.join("forks")
    }

    /// A container's checkpoints.
    pub fn checkpoints(&self, id: &str) -> PathBuf {
        self.container(id).join("checkpoints")
    }

    /// All volumes.
    pub fn volumes(&self) -> PathBuf {
        self.data_root.join("volumes")
    }

    /// All containers.
    pub fn containers(&self) -> PathBuf {
        self.data_root.join("containers")
    }

    /// A container's directory.
    pub fn container(&self, id: &str) -> PathBuf {
        self.containers().join(id)
    }

    /// What a container is, and its state.
    pub fn container_record(&self, id: &str) -> PathBuf {
        self.container(id).join("container.json")
    }

    /// A container's log.
    pub fn container_log(&self, id: &str) -> PathBuf {
        self.container(id).join(format!("{id}-json.log"))
    }

    /// A container's writable layer.
    pub fn container_disk(&self, id: &str) -> PathBuf {
        self.container(id).join("disk.img")
    }

    /// Why a container's last microVM died.
    pub fn container_last_end(&self, id: &str) -> PathBuf {
        self.container(id).join("end.json")
    }

    /// The daemon's pid, unless `--pidfile` says otherwise.
    pub fn pidfile(&self) -> PathBuf {
        self.exec_root.join("bulkheadd.pid")
    }

    /// All sandboxes. A short name: socket paths end at 107 bytes.
    pub fn sandboxes(&self) -> PathBuf {
        self.exec_root.join("s")
    }

    /// The user ids that VMMs have.
    pub fn uids(&self) -> PathBuf {
        self.exec_root.join("u")
    }

    /// A sandbox's directory.
    pub fn sandbox(&self, id: &str) -> PathBuf {
        self.sandboxes().join(id)
    }
}
