//! The control group of one VMM on the host, version 2: a guest may use so much of the host and no more.
//!
//! ```text
//!   /sys/fs/cgroup                  + cpu cpuset io memory pids   (cgroup.subtree_control)
//!     └── bulkhead                  + the same                    `--cgroup-parent`
//!           ├── 5f3a…  one VMM: cloned into it, so that no page of it is ever charged elsewhere
//!           └── 90c1…
//! ```
//!
//! Not below the daemon's own group: its service is stopped without its containers. A group goes with its
//! sandbox's directory, which is made before it and names it, so none is left behind by a daemon that died.

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags};

/// What limits and figures need.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// What a VMM may use of the host. None: as much as there is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostLimits {
    /// Bytes of memory: guest memory, the VMM's own, and the page cache it causes. No swap beyond it.
    pub memory_bytes: Option<u64>,
    /// Microseconds of CPU time in every so many microseconds: (quota, period).
    pub cpu_quota: Option<(u64, u64)>,
    /// Its share of CPU time when others want some too, 1 to 10,000; 100 is everybody's.
    pub cpu_weight: Option<u64>,
    /// The CPUs it may run on, as `0-3,7`.
    pub cpuset: Option<String>,
    /// The memory nodes it may use, as `0,2`.
    pub mems: Option<String>,
    /// Threads and processes.
    pub pids: Option<u64>,
}

impl HostLimits {
    /// Whether its CPUs are limited.
    pub(crate) fn has_cpu_limits(&self) -> bool {
        let bounds = Self { memory_bytes: self.memory_bytes, pids: self.pids, ..Self::default() };
        *self != bounds
    }

    /// The files that say it, and which controller each belongs to. A limit that is not there is written as the
    /// kernel's word for none.
    fn files(&self) -> [(&'static str, &'static str, String, bool); 7] {
        let number = |value: Option<u64>| value.map_or_else(|| "max".to_owned(), |value| value.to_string());
        let quota = |(quota, period)| format!("{quota} {period}");
        let swap = if self.memory_bytes.is_some() { "0" } else { "max" };
        let weight = self.cpu_weight.unwrap_or(DEFAULT_WEIGHT);
        let set = |set: &Option<String>| format!("{}\n", set.as_deref().unwrap_or_default());
        [
            ("memory", "memory.max", number(self.memory_bytes), self.memory_bytes.is_some()),
            // A kernel without swap has no such file.
            ("memory", "memory.swap.max", swap.to_owned(), false),
            ("cpu", "cpu.max", self.cpu_quota.map_or_else(|| "max".into(), quota), self.cpu_quota.is_some()),
            ("cpu", "cpu.weight", weight.to_string(), self.cpu_weight.is_some()),
            ("cpuset", "cpuset.cpus", set(&self.cpuset), self.cpuset.is_some()),
            ("cpuset", "cpuset.mems", set(&self.mems), self.mems.is_some()),
            ("pids", "pids.max", number(self.pids), self.pids.is_some()),
        ]
    }
}

/// cpu.weight of a group that nobody has set.
const DEFAULT_WEIGHT: u64 = 100;

/// Why there is no group, or why a limit does not hold.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// There is no cgroup v2, or it cannot be written to.
    #[error("control groups (version 2) cannot be used at {}: {source}", path.display())]
    Unavailable {
        /// Where one was to be made.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A limit was wanted whose controller this host does not give.
    #[error("the host gives no {controller} controller to {}: {file} cannot be set", path.display())]
    Controller {
        /// The controller.
        controller: &'static str,
        /// The file that is missing.
        file: &'static str,
        /// The group.
        path: PathBuf,
    },
    /// The kernel refuses a value.
    #[error("{file} cannot be {value:?}: {source}")]
    Value {
        /// The file.
        file: &'static str,
        /// What was written.
        value: String,
        /// Why not.
        source: io::Error,
    },
    /// A figure cannot be read.
    #[error("{file}: {source}")]
    Figure {
        /// The file.
        file: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// CPU time that a VMM has used, guest and all (`cpu.stat`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuUsage {
    /// Microseconds in all.
    pub usage_us: u64,
    /// Of them outside of the kernel; a guest's own time counts here.
    pub user_us: u64,
    /// Of them in the kernel.
    pub system_us: u64,
    /// Periods in which it wanted CPU time while a quota was set.
    pub periods: u64,
    /// Of them those in which the quota was used up.
    pub throttled_periods: u64,
    /// Microseconds that it had to wait for the next.
    pub throttled_us: u64,
}

/// Memory of a VMM, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryUsage {
    /// All that it is charged for (`memory.current`).
    pub current: u64,
    /// The most that ever was; None on kernels before 5.19.
    pub peak: Option<u64>,
    /// Pages of its own: guest memory that was touched, heap, stacks.
    pub anonymous: u64,
    /// Page cache: its own of files it was the first to read, and written pages of disks.
    pub file: u64,
    /// How often the kernel killed in it because its limit was reached.
    pub oom_kills: u64,
}

/// A group that exists.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    handle: OwnedFd,
}

impl Cgroup {
    /// Makes the group `name` below `parent`, which is made too, with these limits.
    ///
    /// # Errors
    /// [`CgroupError`]; then nothing is left behind but an empty `parent`.
    pub fn create(parent: &Path, name: &str, limits: &HostLimits) -> Result<Self, CgroupError> {
        let path = parent.join(name);
        let unavailable = |source| CgroupError::Unavailable { path: path.clone(), source };
        prepare(parent).map_err(unavailable)?;
        fs::create_dir(&path).map_err(unavailable)?;
        let made = Self::open(path.clone()).and_then(|group| group.update(limits).map(|()| group));
        made.inspect_err(|_| {
            let _ = remove(&path);
        })
    }

    /// The group at `path`, which exists.
    ///
    /// # Errors
    /// It does not.
    pub fn open(path: PathBuf) -> Result<Self, CgroupError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(handle) => Ok(Self { path, handle }),
            Err(error) => Err(CgroupError::Unavailable { path, source: error.into() }),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sets all limits; one that is None is lifted. The order of raising and lowering does not matter, since no
    /// limit depends on another.
    ///
    /// # Errors
    /// The first limit that cannot be had. Those before it hold.
    pub fn update(&self, limits: &HostLimits) -> Result<(), CgroupError> {
        self.update_some(limits, |_| true)
    }

    /// Sets the limits of CPUs alone, as [`Cgroup::update`] does.
    ///
    /// # Errors
    /// The first limit that cannot be had. Those before it hold.
    pub fn update_cpus(&self, limits: &HostLimits) -> Result<(), CgroupError> {
        self.update_some(limits, |controller| matches!(controller, "cpu" | "cpuset"))
    }

    /// Sets the limit of memory alone.
    ///
    /// # Errors
    /// It cannot be had.
    pub fn update_memory(&self, bytes: u64) -> Result<(), CgroupError> {
        let limits = HostLimits { memory_bytes: Some(bytes), ..HostLimits::default() };
        self.update_some(&limits, |controller| controller == "memory")
    }

    fn update_some(&self, limits: &HostLimits, which: fn(&str) -> bool) -> Result<(), CgroupError> {
        for (controller, file, value, wanted) in limits.files() {
            if !which(controller) {
                continue;
            }
            match self.write(file, &value) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    if wanted {
                        let path = self.path.clone();
                        return Err(CgroupError::Controller { controller, file, path });
                    }
                }
                Err(source) => return Err(CgroupError::Value { file, value, source }),
            }
        }
        Ok(())
    }

    /// Bytes of memory that it is charged for.
    ///
    /// # Errors
    /// There is no memory controller, or the group is gone.
    pub fn memory_current(&self) -> Result<u64, CgroupError> {
        self.number("memory.current")
    }

    /// Memory in more detail.
    ///
    /// # Errors
    /// There is no memory controller, or the group is gone.
    pub fn memory(&self) -> Result<MemoryUsage, CgroupError> {
        let stat = self.read("memory.stat")?;
        let events = self.read("memory.events")?;
        Ok(MemoryUsage {
            current: self.memory_current()?,
            peak: self.number("memory.peak").ok(),
            anonymous: field(&stat, "anon"),
            file: field(&stat, "file"),
            oom_kills: field(&events, "oom_kill"),
        })
    }

    /// CPU time.
    ///
    /// # Errors
    /// The group is gone.
    pub fn cpu(&self) -> Result<CpuUsage, CgroupError> {
        let stat = self.read("cpu.stat")?;
        Ok(CpuUsage {
            usage_us: field(&stat, "usage_usec"),
            user_us: field(&stat, "user_usec"),
            system_us: field(&stat, "system_usec"),
            periods: field(&stat, "nr_periods"),
            throttled_periods: field(&stat, "nr_throttled"),
            throttled_us: field(&stat, "throttled_usec"),
        })
    }

    /// Threads in it.
    ///
    /// # Errors
    /// There is no pids controller, or the group is gone.
    pub fn pids_current(&self) -> Result<u64, CgroupError> {
        self.number("pids.current")
    }

    /// Removes it; its processes have ended. That it is gone already is no error.
    ///
    /// # Errors
    /// A process in it has not ended.
    pub fn remove(&self) -> io::Result<()> {
        remove(&self.path)
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        fs::write(self.path.join(file), value)
    }

    fn read(&self, file: &'static str) -> Result<String, CgroupError> {
        fs::read_to_string(self.path.join(file)).map_err(|source| CgroupError::Figure { file, source })
    }

    fn number(&self, file: &'static str) -> Result<u64, CgroupError> {
        let text = self.read(file)?;
        let invalid = || io::Error::new(io::ErrorKind::InvalidData, format!("{text:?} is no number"));
        text.trim().parse().map_err(|_| CgroupError::Figure { file, source: invalid() })
    }
}

impl AsFd for Cgroup {
    /// Its directory, into which a process can be cloned.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

/// Removes the group at `path`; that there is none is no error.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Makes `parent` and lets it, as those above it, give its children every controller that it can. Controllers
/// that it lacks are missed when a limit needs them.
///
/// # Errors
/// `parent` is on no cgroup v2, or cannot be made.
pub(crate) fn prepare(parent: &Path) -> io::Result<()> {
    let above = parent.ancestors().skip(1);
    let mount = above.take_while(|path| path.join(GIVEN).is_file() || !path.exists()).last();
    let mount = mount.filter(|mount| mount.exists()).ok_or(io::ErrorKind::NotFound)?;
    let path: Vec<_> = parent.ancestors().take_while(|path| path.starts_with(mount)).collect();
    // From the top: a group can hand on only what it has itself.
    for group in path.into_iter().rev() {
        match fs::create_dir(group) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let given = fs::read_to_string(group.join(GIVEN))?;
        for controller in missing(&given) {
            // Refused where it is not there, or where processes are in the group.
            let _ = fs::write(group.join(GIVEN), format!("+{controller}"));
        }
    }
    Ok(())
}

/// What a group gives its children.
const GIVEN: &str = "cgroup.subtree_control";

/// Which of [`CONTROLLERS`] a list of controllers lacks.
pub(crate) fn missing(list: &str) -> Vec<&'static str> {
    let has = |controller: &&str| list.split_ascii_whitespace().any(|found| found == *controller);
    CONTROLLERS.into_iter().filter(|controller| !has(controller)).collect()
}

/// The number behind a key in a file of `key number` lines; 0 when there is none.
fn field(text: &str, key: &str) -> u64 {
    let value = |line: &str| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok();
    text.lines().find_map(value).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(limits: &HostLimits, file: &str) -> String {
        limits.files().into_iter().find(|entry| entry.1 == file).unwrap().2
    }

    #[test]
    fn limits_are_written_in_the_kernels_words() {
        let limits = HostLimits {
            memory_bytes: Some(64 << 20),
            cpu_quota: Some((50_000, 100_000)),
            cpu_weight: Some(39),
            cpuset: Some("0-3,7".into()),
            mems: None,
            pids: Some(32),
        };
        for (file, expected) in [
            ("memory.max", "67108864"),
            ("memory.swap.max", "0"),
            ("cpu.max", "50000 100000"),
            ("cpu.weight", "39"),
            ("cpuset.cpus", "0-3,7\n"),
            ("cpuset.mems", "\n"),
            ("pids.max", "32"),
        ] {
            assert_eq!(value(&limits, file), expected, "{file}");
        }
        let none = HostLimits::default();
        for (file, expected) in
            [("memory.max", "max"), ("memory.swap.max", "max"), ("cpu.max", "max"), ("cpu.weight", "100")]
        {
            assert_eq!(value(&none, file), expected, "{file}");
        }
    }

    /// A directory tree that looks like cgroup v2, with the files of some controllers.
    fn tree(files: &[&str]) -> (tempfile::TempDir, PathBuf) {
        let base = tempfile::tempdir().unwrap();
        let group = base.path().join("g");
        fs::create_dir(&group).unwrap();
        for file in files {
            fs::write(group.join(file), "").unwrap();
        }
        (base, group)
    }

    #[test]
    fn a_limit_without_its_controller_is_an_error_that_names_it() {
        // Files cannot appear in a cgroup by being written to, unlike here: so the write is refused by a directory.
        let (_base, group) = tree(&[]);
        let group = Cgroup::open(group).unwrap();
        fs::remove_dir(group.path()).unwrap();
        let limits = HostLimits { pids: Some(1), ..HostLimits::default() };
        let error = group.update(&limits).unwrap_err();
        assert!(matches!(&error, CgroupError::Controller { controller: "pids", .. }), "{error}");
        group.update(&HostLimits::default()).unwrap();
    }

    #[test]
    fn a_host_without_version_2_is_told_from_a_limit_that_cannot_be() {
        let base = tempfile::tempdir().unwrap();
        let error = Cgroup::create(&base.path().join("p"), "g", &HostLimits::default()).unwrap_err();
        assert!(matches!(error, CgroupError::Unavailable { .. }), "{error}");
        assert!(!base.path().join("p").exists());
    }

    #[test]
    fn figures_are_read() {
        let (_base, path) = tree(&[]);
        fs::write(path.join("memory.current"), "4096\n").unwrap();
        fs::write(path.join("memory.stat"), "anon 100\nanon_thp 7\nfile 200\n").unwrap();
        fs::write(path.join("memory.events"), "oom 3\noom_kill 2\n").unwrap();
        fs::write(path.join("cpu.stat"), "usage_usec 12\nuser_usec 5\nsystem_usec 7\n").unwrap();
        fs::write(path.join("pids.current"), "nonsense").unwrap();
        let group = Cgroup::open(path).unwrap();
        let memory = group.memory().unwrap();
        assert_eq!((memory.current, memory.anonymous, memory.file), (4096, 100, 200));
        assert_eq!((memory.peak, memory.oom_kills), (None, 2));
        assert_eq!(group.cpu().unwrap().usage_us, 12);
        assert_eq!(group.cpu().unwrap().periods, 0);
        assert!(group.pids_current().unwrap_err().to_string().contains("pids.current"));
    }

    #[test]
    fn controllers_that_are_not_given_are_found() {
        assert_eq!(missing("cpuset cpu io memory hugetlb pids\n"), Vec::<&str>::new());
        assert_eq!(missing("cpu memory_x"), ["cpuset", "io", "memory", "pids"]);
    }
}
