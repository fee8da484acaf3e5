//! The configuration: read from its file descriptor, checked whole, and every descriptor it names taken.
//!
//! After this nothing refers to a descriptor by its number. Each is what it has to be (a listening socket of
//! the right kind, a writable empty file), is closed when another program is executed, and has one owner.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read},
    ops::Range,
    os::{
        fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::net::UnixListener,
    },
};

use bulkhead_vmm_api::{
    BlockConfig, DeviceConfig, FdNumber, FsConfig, FsServer, Jail, MEMORY_BLOCK_MIB, NetConfig, Start,
    VERSION, VmConfig,
};
use rustix::{
    fs::{FileType, OFlags, fcntl_getfl, fstat},
    io::{FdFlags, fcntl_getfd, fcntl_setfd},
    net::{AddressFamily, SocketType, sockopt},
};

use crate::{arch::x86_64::layout, window};

/// The longest configuration in bytes.
const MAX_SIZE: u64 = 64 * 1024;
const MAX_NAME: usize = 64;
const MAX_VCPUS: u8 = 64;
const MIN_MEMORY_MIB: u32 = 32;
/// A guest may boot with this much, and have as much plugged; more would reach beyond what processors with 40
/// address bits have.
const MAX_MEMORY_MIB: u32 = 512 * 1024;
/// Each granule of a window is a mapping, of which a process may have 65530.
const MAX_WINDOW_MIB: u32 = 32 * 1024;
const MAX_BLOCK_ID: usize = 20;
const MAX_TAG: usize = 36;
/// Context ids 0 to 2 have meanings of their own; all ones is "any" (virtio 1.3, 5.10.4).
const CIDS: Range<u64> = 3..0xffff_ffff;

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read the configuration: {0}")]
    Read(#[source] io::Error),
    /// It is no configuration.
    #[error("the configuration is malformed: {0}")]
    Malformed(#[from] serde_json::Error),
    /// A value is outside what the contract allows.
    #[error("{field}: {message}")]
    Value {
        /// The configuration's field.
        field: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// A file descriptor is not what it should be.
    #[error("{field}: file descriptor {number} {message}")]
    Descriptor {
        /// The configuration's field.
        field: &'static str,
        /// Its number.
        number: FdNumber,
        /// What is wrong with it.
        message: String,
    },
}

/// A machine's configuration, ready to build from.
#[derive(Debug)]
pub struct Config {
    /// [`VmConfig::name`].
    pub name: String,
    /// [`VmConfig::vcpus`].
    pub vcpus: u8,
    /// Guest memory in bytes.
    pub memory: u64,
    /// [`VmConfig::start`].
    pub start: StartFiles,
    /// [`VmConfig::control`].
    pub control: OwnedFd,
    /// [`VmConfig::kvm`].
    pub kvm: OwnedFd,
    /// [`VmConfig::jail`].
    pub jail: Jail,
    /// [`VmConfig::console`].
    pub console: Option<File>,
    /// [`VmConfig::devices`].
    pub devices: Devices,
}

/// Where the machine begins: [`Start`], with the files themselves.
#[derive(Debug)]
pub enum StartFiles {
    /// [`Start::Boot`].
    Boot {
        /// The kernel.
        kernel: File,
        /// The initramfs.
        initramfs: Option<File>,
        /// The command line.
        cmdline: String,
    },
    /// [`Start::Restore`].
    Restore {
        /// The state file.
        state: File,
        /// The memory file.
        memory: File,
    },
}

/// The devices to build.
#[derive(Debug, Default)]
pub struct Devices {
    /// [`DeviceConfig::block`].
    pub block: Vec<BlockConfig>,
    /// [`DeviceConfig::fs`].
    pub fs: Vec<FsConfig>,
    /// Context id and listening socket.
    pub vsock: Option<(u64, UnixListener)>,
    /// [`DeviceConfig::net`].
    pub net: Vec<NetConfig>,
    /// [`DeviceConfig::rng`].
    pub rng: bool,
    /// [`DeviceConfig::balloon`].
    pub balloon: bool,
    /// The guest addresses at which virtio-mem plugs memory, where there is one.
    pub region: Option<Range<u64>>,
    /// The guest addresses of the window of the one file system device that has one.
    pub window: Option<Range<u64>>,
}

/// The file descriptors that the process was started with, each to be taken once.
#[derive(Debug, Default)]
pub struct Inherited {
    taken: BTreeSet<FdNumber>,
}

impl Inherited {
    /// Takes a descriptor.
    ///
    /// # Errors
    /// It is a standard stream, was taken before, or is not open.
    pub fn take(&mut self, field: &'static str, number: FdNumber) -> Result<OwnedFd, ConfigError> {
        let error = |message: &str| ConfigError::Descriptor { field, number, message: message.to_owned() };
        if number <= 2 {
            return Err(error("is a standard stream or negative"));
        }
        if !self.taken.insert(number) {
            return Err(error("is named twice"));
        }
        // SAFETY: a number that is not open makes the call fail, and then it is not used any further.
        let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
        let flags = fcntl_getfd(borrowed).map_err(|_| error("is not open"))?;
        fcntl_setfd(borrowed, flags | FdFlags::CLOEXEC).map_err(|_| error("is not open"))?;
        // SAFETY: the descriptor is open, was inherited for this use, and is taken only here and only once.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    }

    /// The numbers of all that were taken.
    #[must_use]
    pub fn numbers(&self) -> &BTreeSet<FdNumber> {
        &self.taken
    }

    fn take_file(&mut self, field: &'static str, number: FdNumber) -> Result<File, ConfigError> {
        let file = File::from(self.take(field, number)?);
        match fstat(&file).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
            Ok(FileType::RegularFile) => Ok(file),
            _ => Err(descriptor_error(field, number, "is not a regular file")),
        }
    }

    fn take_listener(
        &mut self,
        field: &'static str,
        number: FdNumber,
        kind: SocketType,
    ) -> Result<OwnedFd, ConfigError> {
        let socket = self.take(field, number)?;
        let fits = sockopt::socket_domain(&socket).is_ok_and(|domain| domain == AddressFamily::UNIX)
            && sockopt::socket_type(&socket).is_ok_and(|found| found == kind)
            && sockopt::socket_acceptconn(&socket).unwrap_or(false);
        if fits {
            Ok(socket)
        } else {
            Err(descriptor_error(field, number, "is not a listening Unix socket of the right type"))
        }
    }
}

fn descriptor_error(field: &'static str, number: FdNumber, message: &str) -> ConfigError {
    ConfigError::Descriptor { field, number, message: message.to_owned() }
}

fn value_error(field: &'static str, message: impl Into<String>) -> ConfigError {
    ConfigError::Value { field, message: message.into() }
}

/// Reads the configuration from descriptor `number`.
///
/// # Errors
/// It cannot be read, is too long, malformed, or of another version.
pub fn read(number: FdNumber, inherited: &mut Inherited) -> Result<VmConfig, ConfigError> {
    let file = File::from(inherited.take("config", number)?);
    let mut text = Vec::new();
    file.take(MAX_SIZE + 1).read_to_end(&mut text).map_err(ConfigError::Read)?;
    if text.len() as u64 > MAX_SIZE {
        return Err(value_error("config", format!("longer than {MAX_SIZE} bytes")));
    }
    Ok(serde_json::from_slice(&text)?)
}

/// Takes the file for the report. First of all, so that whatever else is wrong can be written to it.
///
/// # Errors
/// It is not a writable, empty, regular file.
pub fn take_report(config: &VmConfig, inherited: &mut Inherited) -> Result<File, ConfigError> {
    let (field, number) = ("report", config.report);
    let file = inherited.take_file(field, number)?;
    if !writable(file.as_fd()) {
        return Err(descriptor_error(field, number, "is not writable"));
    }
    if file.metadata().map_or(u64::MAX, |metadata| metadata.len()) != 0 {
        return Err(descriptor_error(field, number, "is not empty"));
    }
    Ok(file)
}

/// Checks the rest of the configuration and takes its descriptors.
///
/// # Errors
/// The first thing that is not as the contract says.
pub fn check(config: VmConfig, inherited: &mut Inherited) -> Result<Config, ConfigError> {
    if config.version != VERSION {
        return Err(value_error("version", format!("{}, this is {VERSION}", config.version)));
    }
    if config.name.is_empty() || config.name.len() > MAX_NAME {
        return Err(value_error("name", format!("not 1 to {MAX_NAME} bytes")));
    }
    if !(1..=MAX_VCPUS).contains(&config.vcpus) {
        return Err(value_error("vcpus", format!("{} is not 1 to {MAX_VCPUS}", config.vcpus)));
    }
    if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&config.memory_mib) {
        let message = format!("{} is not {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}", config.memory_mib);
        return Err(value_error("memory_mib", message));
    }
    let start = take_start(config.start, inherited)?;
    let console = config.console.map(|number| take_console(number, inherited)).transpose()?;
    let memory = u64::from(config.memory_mib) << 20;
    Ok(Config {
        name: config.name,
        vcpus: config.vcpus,
        memory,
        start,
        control: inherited.take_listener("control", config.control, SocketType::SEQPACKET)?,
        kvm: take_kvm(config.kvm, inherited)?,
        jail: config.jail,
        console,
        devices: check_devices(config.devices, memory, inherited)?,
    })
}

/// Any character device passes: that it is KVM's is found out by its API version.
fn take_kvm(number: FdNumber, inherited: &mut Inherited) -> Result<OwnedFd, ConfigError> {
    let kvm = inherited.take("kvm", number)?;
    match fstat(&kvm).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
        Ok(FileType::CharacterDevice) if writable(kvm.as_fd()) => Ok(kvm),
        _ => Err(descriptor_error("kvm", number, "is not a writable character device")),
    }
}

fn take_start(start: Start, inherited: &mut Inherited) -> Result<StartFiles, ConfigError> {
    Ok(match start {
        Start::Boot { kernel, initramfs, cmdline } => StartFiles::Boot {
            kernel: inherited.take_file("kernel", kernel)?,
            initramfs: initramfs.map(|number| inherited.take_file("initramfs", number)).transpose()?,
            cmdline,
        },
        Start::Restore { state, memory } => StartFiles::Restore {
            state: inherited.take_file("state", state)?,
            memory: inherited.take_file("memory", memory)?,
        },
    })
}

fn take_console(number: FdNumber, inherited: &mut Inherited) -> Result<File, ConfigError> {
    let file = File::from(inherited.take("console", number)?);
    let kind = fstat(&file).map(|stat| FileType::from_raw_mode(stat.st_mode));
    if !matches!(kind, Ok(FileType::RegularFile | FileType::Fifo)) || !writable(file.as_fd()) {
        return Err(descriptor_error("console", number, "is not a writable file or pipe"));
    }
    Ok(file)
}

fn writable(fd: BorrowedFd<'_>) -> bool {
    fcntl_getfl(fd).is_ok_and(|flags| flags.intersects(OFlags::WRONLY | OFlags::RDWR))
}

fn check_devices(
    config: DeviceConfig,
    memory: u64,
    inherited: &mut Inherited,
) -> Result<Devices, ConfigError> {
    check_names("block", config.block.iter().map(|block| block.id.as_str()), MAX_BLOCK_ID)?;
    check_names("fs", config.fs.iter().map(|fs| fs.tag.as_str()), MAX_TAG)?;
    if let Some(fs) = config.fs.iter().find(|fs| fs.late && fs.server == FsServer::Vmm) {
        let message = format!("{:?} is late, which only a device with a share server can be", fs.tag);
        return Err(value_error("fs", message));
    }
    check_names("net", config.net.iter().map(|net| net.id.as_str()), MAX_NAME)?;
    let vsock = match config.vsock {
        Some(vsock) if !CIDS.contains(&vsock.cid) => {
            return Err(value_error("vsock", format!("context id {} is reserved", vsock.cid)));
        }
        Some(vsock) => {
            let socket = inherited.take_listener("vsock", vsock.listener, SocketType::STREAM)?;
            Some((vsock.cid, UnixListener::from(socket)))
        }
        None => None,
    };
    let region = config.memory.map(|device| check_region(memory, device.region_mib)).transpose()?;
    let window = check_window(&config.fs, memory, region.as_ref())?;
    let (block, fs, rng, balloon) = (config.block, config.fs, config.rng, config.balloon);
    Ok(Devices { block, fs, vsock, net: config.net, rng, balloon, region, window })
}

fn check_window(
    fs: &[FsConfig],
    memory: u64,
    region: Option<&Range<u64>>,
) -> Result<Option<Range<u64>>, ConfigError> {
    let mut with_window = fs.iter().filter(|fs| fs.window_mib > 0);
    let Some(fs) = with_window.next() else { return Ok(None) };
    let size = u64::from(fs.window_mib) << 20;
    if with_window.next().is_some() || fs.server != FsServer::Vmm {
        return Err(value_error("fs.window_mib", "one device that the VMM serves may have a window"));
    }
    if fs.window_mib > MAX_WINDOW_MIB || !size.is_multiple_of(window::GRANULE) {
        let message = format!("{} is not a multiple of 2 up to {MAX_WINDOW_MIB}", fs.window_mib);
        return Err(value_error("fs.window_mib", message));
    }
    let start = layout::dax_base(memory, region.map_or(0, |region| region.end - region.start));
    Ok(Some(start..start + size))
}

fn check_region(memory: u64, mib: u32) -> Result<Range<u64>, ConfigError> {
    if !(MEMORY_BLOCK_MIB..=MAX_MEMORY_MIB).contains(&mib) || !mib.is_multiple_of(MEMORY_BLOCK_MIB) {
        let message =
            format!("{mib} is not {MEMORY_BLOCK_MIB} to {MAX_MEMORY_MIB} in steps of {MEMORY_BLOCK_MIB}");
        return Err(value_error("memory.region_mib", message));
    }
    Ok(layout::hotplug_range(memory, u64::from(mib) << 20))
}

/// Names address devices in requests: each is there once and has 1 to `limit` bytes.
fn check_names<'a>(
    field: &'static str,
    names: impl Iterator<Item = &'a str>,
    limit: usize,
) -> Result<(), ConfigError> {
    let mut seen = BTreeSet::new();
    for name in names {
        if name.is_empty() || name.len() > limit {
            return Err(value_error(field, format!("{name:?} is not 1 to {limit} bytes")));
        }
        if !seen.insert(name) {
            return Err(value_error(field, format!("{name:?} is there twice")));
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
