//! The process: from its configuration to its end.

use std::{
    fs::File,
    io::Read,
    os::fd::{AsFd, OwnedFd},
    process::ExitCode,
    sync::Arc,
    thread,
};

use bulkhead_vmm_api::{
    FdNumber, Jail,
    share::{ShareConfig, VERSION},
};
use rustix::{
    fs::{CWD, Mode, OFlags},
    mount::OpenTreeFlags,
    process::{Resource, getrlimit},
    thread::CapabilitySet,
};

use super::{
    area::Area,
    server::{Server, Share},
    service::Service,
};
use crate::{
    config::Inherited,
    devices::virtio::fs::server::check_name,
    jail,
    seccomp::{self, Kind},
};

/// The rights that it keeps, over files: to give them away, to pass over their permissions, to do what their
/// owner may, and to leave set-group-id bits alone.
pub const RIGHTS: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID);

/// Threads that serve requests: as many may wait for the disk at a time.
const WORKERS: usize = 6;

/// Stacks of a thread, in bytes.
const STACK: usize = 512 << 10;

/// The longest configuration, in bytes.
const MAX_CONFIG: u64 = 256 << 10;

/// Serves what the configuration in that descriptor names.
pub fn main(number: FdNumber) -> ExitCode {
    let _ = rustix::thread::set_name(c"bulkhead-shares");
    match begin(number).and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("bulkhead-vmm: share server: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Reads the configuration, and goes to jail.
fn begin(number: FdNumber) -> Result<Service, String> {
    let mut inherited = Inherited::default();
    let take = |inherited: &mut Inherited, what: &'static str, number| {
        inherited.take(what, number).map_err(|error| error.to_string())
    };
    let file = File::from(take(&mut inherited, "config", number)?);
    let mut text = Vec::new();
    file.take(MAX_CONFIG).read_to_end(&mut text).map_err(|error| format!("the configuration: {error}"))?;
    let config: ShareConfig =
        serde_json::from_slice(&text).map_err(|error| format!("the configuration: {error}"))?;
    if config.version != VERSION {
        return Err(format!("a configuration of version {}, this is {VERSION}", config.version));
    }
    let channel = take(&mut inherited, "channel", config.channel)?;
    let area = take(&mut inherited, "area", config.area)?;
    let mut shares: Vec<(Share, OwnedFd)> = Vec::new();
    for share in config.shares {
        let known = shares.iter().any(|(other, _)| other.name == share.name);
        if known || check_name(share.name.as_bytes()).is_err() {
            return Err(format!("{:?} cannot be a share's name", share.name));
        }
        let root = take(&mut inherited, "shares", share.root)?;
        let (name, read_only, caching) = (share.name, share.read_only, share.caching);
        shares.push((Share { name, read_only, caching }, root));
    }
    let area = Area::map(area).map_err(|error| error.to_string())?;
    let own_files = own_files(config.jail).map_err(|error| format!("/proc/self/fd: {error}"))?;
    let mut keep = inherited.numbers().clone();
    keep.insert(std::os::fd::AsRawFd::as_raw_fd(&own_files));
    jail::enter_shares(config.jail, &keep, RIGHTS).map_err(|error| error.to_string())?;
    let memory = u64::from(config.memory_mib) << 20;
    let server = Server::new(shares, own_files, memory, open_files());
    Ok(Service::new(server, area, channel))
}

/// The list of this process's descriptors. Jailed, as a mount of its own: from a directory of `/proc` the way up
/// would lead to all of it.
fn own_files(jail: Jail) -> rustix::io::Result<OwnedFd> {
    const PATH: &str = "/proc/self/fd";
    match jail {
        Jail::Full => {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            rustix::mount::open_tree(CWD, PATH, flags)
        }
        Jail::Process => {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(PATH, flags, Mode::empty())
        }
    }
}

/// How many files are kept open for nodes: a quarter of what the process may have, since handles and owners of
/// locks need some too.
fn open_files() -> usize {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(limit / 4).unwrap_or(usize::MAX).clamp(16, 4096)
}

/// Serves until the VMM has ended.
fn run(service: Service) -> Result<(), String> {
    // Anything that goes wrong with a filter is told on standard error.
    seccomp::watch(std::io::stderr().as_fd()).map_err(|error| format!("SIGSYS: {error}"))?;
    let service = Arc::new(service);
    let mut threads = Vec::new();
    for index in 0..=WORKERS {
        let service = Arc::clone(&service);
        let thread =
            thread::Builder::new().name(format!("share{index}")).stack_size(STACK).spawn(move || {
                // Without its filter a thread serves nothing; the others do.
                if let Err(error) = seccomp::install(Kind::Shares) {
                    eprintln!("bulkhead-vmm: share server: seccomp: {error}");
                    return;
                }
                if index == WORKERS { service.wait_for_locks() } else { service.work() }
            });
        threads.push(thread.map_err(|error| format!("a thread: {error}"))?);
    }
    seccomp::install(Kind::Shares).map_err(|error| format!("seccomp: {error}"))?;
    for thread in threads {
        thread.join().map_err(|_| "a thread panicked".to_owned())?;
    }
    Ok(())
}
