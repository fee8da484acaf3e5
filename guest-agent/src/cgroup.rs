//! A container's cgroup (version 2): limits, membership, killing, and news of the OOM killer.
//!
//! ```text
//!   /sys/fs/cgroup            the agent
//!   └── bulkhead              controllers handed down
//!       └── <container>       limits; every process of the container; the root of its cgroup namespace
//! ```

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};
use rustix::fs::{Mode, OFlags};

use crate::{
    devices,
    error::{Context, Result, internal, invalid},
    log,
    sys::{self, CgroupHook},
};

mod freezer;
mod memory;
mod stats;

pub use memory::{set_room, total_memory};

/// Where the hierarchy is mounted.
pub const MOUNT: &str = "/sys/fs/cgroup";

const PARENT: &str = "/sys/fs/cgroup/bulkhead";

/// Handed down as far as the kernel has them.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "io", "memory", "pids", "hugetlb"];

/// A container's cgroup. Dropping it changes nothing; see [`Cgroup::remove`].
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
}

/// Makes the parent of all containers' cgroups and hands the controllers down to it.
pub fn prepare() -> Result<()> {
    fs::create_dir_all(PARENT).context(format_args!("mkdir {PARENT}"))?;
    for directory in [MOUNT, PARENT] {
        delegate(Path::new(directory))?;
    }
    Ok(())
}

/// Has the kernel set up its memory for compiled BPF programs, for as long as the answer is kept: the first program
/// makes it fill 2 MiB. Done in a machine that is to be a template, it is shared by all clones and none waits for it.
///
/// # Errors
/// Of `bpf`.
pub fn prepare_programs() -> Result<OwnedFd> {
    let program = devices::program(&devices::rules(&[])?);
    sys::load_program(CgroupHook::Device, &program).context("load the device rules")
}

fn delegate(directory: &Path) -> Result<()> {
    let available = fs::read_to_string(directory.join("cgroup.controllers")).context("cgroup.controllers")?;
    let wanted = available.split_whitespace().filter(|name| CONTROLLERS.contains(name));
    let line: Vec<String> = wanted.map(|name| format!("+{name}")).collect();
    let path = directory.join("cgroup.subtree_control");
    fs::write(&path, line.join(" ")).context(format_args!("write {}", path.display()))
}

impl Cgroup {
    /// Makes a container's cgroup with its limits and device rules; nothing remains after an error.
    pub fn create(container: &str, resources: Option<&LinuxResources>) -> Result<Self> {
        let path = Path::new(PARENT).join(container);
        fs::create_dir(&path).context(format_args!("mkdir {}", path.display()))?;
        let made = Self::open(&path).and_then(|cgroup| cgroup.apply(resources).map(|()| cgroup));
        if made.is_err() {
            let _ = fs::remove_dir(&path);
        }
        made
    }

    fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty()).context("open a cgroup")?;
        Ok(Self { path: path.to_owned(), directory })
    }

    /// For `clone3`.
    pub fn directory(&self) -> &OwnedFd {
        &self.directory
    }

    fn apply(&self, resources: Option<&LinuxResources>) -> Result<()> {
        for (file, value) in settings(resources)? {
            self.write(&file, &value)?;
        }
        let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
        let program = devices::program(&devices::rules(rules)?);
        sys::attach_program(&self.directory, CgroupHook::Device, &program).context("attach the device rules")
    }

    /// Sets the limits that are given and leaves all others. When one cannot be set, those before it are put
    /// back.
    ///
    /// # Errors
    /// Invalid: a limit that the kernel does not have or does not take.
    pub fn update(&self, resources: &LinuxResources) -> Result<()> {
        let mut before: Vec<(String, String)> = Vec::new();
        for (file, value) in settings(Some(resources))? {
            let old = fs::read_to_string(self.path.join(&file)).unwrap_or_default();
            if let Err(error) = self.write(&file, &value) {
                for (file, value) in before.iter().rev() {
                    self.write(file, value.trim()).unwrap_or_else(log::warn);
                }
                return Err(error);
            }
            before.push((file, old));
        }
        Ok(())
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.path.join(file);
        fs::write(&path, value).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => invalid(format!("the guest kernel has no limit {file}")),
            _ => invalid(format!("the limit {file} cannot be set to {value:?}: {error}")),
        })
    }

    /// Kills every process in it.
    pub fn kill(&self) -> Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1").context("cgroup.kill")
    }

    /// Whether any process, zombies excepted, is left.
    pub fn is_populated(&self) -> bool {
        counter(&self.events(), "populated") > 0
    }

    fn events(&self) -> String {
        fs::read_to_string(self.path.join("cgroup.events")).unwrap_or_default()
    }

    /// A file that signals changes of [`Cgroup::oom_kills`].
    pub fn memory_events(&self) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        rustix::fs::openat(&self.directory, "memory.events", flags, Mode::empty()).context("memory.events")
    }

    /// How often the OOM killer struck.
    pub fn oom_kills(&self) -> u64 {
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        counter(&events, "oom_kill")
    }

    /// Pids of all processes, those in cgroups that the container has made below its own too.
    pub fn pids(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        let mut directories = vec![self.path.clone()];
        while let Some(directory) = directories.pop() {
            let list = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            pids.extend(list.lines().filter_map(|line| line.parse::<i32>().ok()));
            directories.extend(below(&directory));
        }
        pids.sort_unstable();
        pids
    }

    /// Removes it and all below; it must be empty.
    pub fn remove(&self) -> Result<()> {
        remove_tree(&self.path).map_err(|error| internal(format!("rmdir {}: {error}", self.path.display())))
    }
}

fn below(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let is_directory = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    entries.flatten().filter(is_directory).map(|entry| entry.path()).collect()
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    // Depth first and without recursion: a workload may nest deeply.
    let mut order = vec![directory.to_owned()];
    let mut at = 0;
    while let Some(path) = order.get(at) {
        let children = below(path);
        order.extend(children);
        at += 1;
    }
    order.iter().rev().try_for_each(fs::remove_dir)
}

fn counter(events: &str, name: &str) -> u64 {
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok();
    events.lines().find_map(value).unwrap_or(0)
}

/// Files and values for a spec's resources.
fn settings(resources: Option<&LinuxResources>) -> Result<Vec<(String, String)>> {
    let mut settings = Vec::new();
    let Some(resources) = resources else { return Ok(settings) };
    let mut set = |file: &str, value: String| settings.push((file.to_owned(), value));
    if let Some(memory) = resources.memory() {
        set_memory(memory, &mut set)?;
    }
    if let Some(cpu) = resources.cpu() {
        set_cpu(cpu, &mut set)?;
    }
    if let Some(pids) = resources.pids() {
        set("pids.max", limit(if pids.limit() == 0 { -1 } else { pids.limit() }));
    }
    if let Some(io) = resources.block_io() {
        set_io(io, &mut set)?;
    }
    for huge in resources.hugepage_limits().as_deref().unwrap_or_default() {
        let size = huge.page_size();
        if !size.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(invalid(format!("the huge page size {size:?} is not valid")));
        }
        set(&format!("hugetlb.{size}.max"), limit(huge.limit()));
    }
    for (file, value) in resources.unified().iter().flatten() {
        if file.contains('/') || !file.contains('.') || file.starts_with("cgroup.") {
            return Err(invalid(format!("the cgroup setting {file:?} is not a limit")));
        }
        set(file, value.clone());
    }
    if resources.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()) || resources.network().is_some() {
        return Err(invalid("rdma and network limits are not supported"));
    }
    Ok(settings)
}

/// A number, or all for a negative one.
fn limit(value: i64) -> String {
    if value < 0 { "max".into() } else { value.to_string() }
}

fn set_memory(memory: &LinuxMemory, set: &mut dyn FnMut(&str, String)) -> Result<()> {
    let given = |value: Option<i64>| value.filter(|value| *value != 0);
    let hard = given(memory.limit());
    if let Some(reservation) = given(memory.reservation()) {
        set("memory.low", limit(reservation));
    }
    if let Some(hard) = hard {
        set("memory.max", limit(hard));
    }
    // The spec counts memory and swap together, cgroup v2 counts swap alone.
    match (given(memory.swap()), hard) {
        (Some(both), _) if both < 0 => set("memory.swap.max", limit(-1)),
        (Some(both), Some(hard)) if hard >= 0 && both >= hard => set("memory.swap.max", limit(both - hard)),
        (Some(_), _) => return Err(invalid("a limit of memory and swap needs a smaller limit of memory")),
        (None, _) => {}
    }
    if memory.disable_oom_killer() == Some(true) {
        return Err(invalid("the OOM killer cannot be disabled with cgroup v2"));
    }
    Ok(())
}

fn set_cpu(cpu: &LinuxCpu, set: &mut dyn FnMut(&str, String)) -> Result<()> {
    const PERIOD: u64 = 100_000;
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        // From 2 to 262144 to 1 to 10000, linear, as every runtime converts.
        let weight = 1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142;
        set("cpu.weight", weight.to_string());
    }
    let quota = cpu.quota().filter(|quota| *quota != 0);
    if quota.is_some() || cpu.period().is_some() {
        let quota = quota.map_or_else(|| "max".into(), limit);
        set("cpu.max", format!("{quota} {}", cpu.period().unwrap_or(PERIOD)));
    }
    if let Some(burst) = cpu.burst() {
        set("cpu.max.burst", burst.to_string());
    }
    if let Some(idle) = cpu.idle() {
        set("cpu.idle", idle.to_string());
    }
    for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
            set(file, list.clone());
        }
    }
    let realtime = |value: bool| if value { Err(invalid("real-time limits need cgroup v1")) } else { Ok(()) };
    realtime(cpu.realtime_runtime().is_some_and(|runtime| runtime != 0))?;
    realtime(cpu.realtime_period().is_some_and(|period| period != 0))
}

fn set_io(io: &LinuxBlockIo, set: &mut dyn FnMut(&str, String)) -> Result<()> {
    if io.weight().is_some_and(|weight| weight != 0) || io.weight_device().iter().flatten().next().is_some() {
        return Err(invalid("block I/O weights are not supported: a microVM has one disk"));
    }
    let kinds: [(&str, &Option<Vec<LinuxThrottleDevice>>); 4] = [
        ("rbps", io.throttle_read_bps_device()),
        ("wbps", io.throttle_write_bps_device()),
        ("riops", io.throttle_read_iops_device()),
        ("wiops", io.throttle_write_iops_device()),
    ];
    for (name, devices) in kinds {
        for device in devices.iter().flatten() {
            set("io.max", format!("{}:{} {name}={}", device.major(), device.minor(), device.rate()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Result<Vec<(String, String)>> {
        settings(Some(&serde_json::from_str(json).unwrap()))
    }

    fn pairs(json: &str) -> Vec<(String, String)> {
        of(json).unwrap()
    }

    fn expect(json: &str, expected: &[(&str, &str)]) {
        let expected: Vec<_> = expected.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        assert_eq!(pairs(json), expected);
    }

    #[test]
    fn memory_and_swap_are_told_apart() {
        expect(
            r#"{"memory":{"limit":1000,"swap":1500,"reservation":10}}"#,
            &[("memory.low", "10"), ("memory.max", "1000"), ("memory.swap.max", "500")],
        );
        expect(
            r#"{"memory":{"limit":1000,"swap":-1}}"#,
            &[("memory.max", "1000"), ("memory.swap.max", "max")],
        );
        expect(
            r#"{"memory":{"limit":1000,"swap":1000}}"#,
            &[("memory.max", "1000"), ("memory.swap.max", "0")],
        );
        expect(r#"{"memory":{"limit":0,"swap":0}}"#, &[]);
        assert!(of(r#"{"memory":{"limit":1000,"swap":999}}"#).is_err());
        assert!(of(r#"{"memory":{"disableOOMKiller":true}}"#).is_err());
    }

    #[test]
    fn processor_limits_become_a_weight_and_a_quota() {
        expect(r#"{"cpu":{"shares":1024}}"#, &[("cpu.weight", "39")]);
        expect(r#"{"cpu":{"shares":262144}}"#, &[("cpu.weight", "10000")]);
        expect(r#"{"cpu":{"shares":1}}"#, &[("cpu.weight", "1")]);
        expect(r#"{"cpu":{"quota":150000,"period":100000}}"#, &[("cpu.max", "150000 100000")]);
        expect(r#"{"cpu":{"quota":-1}}"#, &[("cpu.max", "max 100000")]);
        expect(r#"{"cpu":{"cpus":"0-1","mems":""}}"#, &[("cpuset.cpus", "0-1")]);
    }

    #[test]
    fn pids_and_unified_settings_are_passed_on() {
        expect(r#"{"pids":{"limit":7}}"#, &[("pids.max", "7")]);
        expect(r#"{"pids":{"limit":-1}}"#, &[("pids.max", "max")]);
        expect(r#"{"unified":{"memory.high":"5"}}"#, &[("memory.high", "5")]);
        for file in ["cgroup.procs", "../x.y", "procs"] {
            assert!(of(&format!(r#"{{"unified":{{"{file}":"1"}}}}"#)).is_err(), "{file}");
        }
    }

    #[test]
    fn what_is_not_supported_is_refused() {
        for json in [r#"{"blockIO":{"weight":500}}"#, r#"{"cpu":{"realtimeRuntime":5}}"#, r#"{"network":{}}"#]
        {
            assert!(of(json).is_err(), "{json}");
        }
    }

    #[test]
    fn counters_are_found_by_their_whole_name() {
        let events = "low 0\noom 3\noom_kill 2\noom_group_kill 9\n";
        assert_eq!((counter(events, "oom_kill"), counter(events, "oom"), counter("", "oom")), (2, 3, 0));
    }
}
