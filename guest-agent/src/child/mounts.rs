//! A container's own view of the file system.
//!
//! First the root is changed and everything of the agent's let go; only then is anything mounted. From
//! there on a path of the spec cannot lead out of the container, whatever links its image has.

use std::{
    fs,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::symlink,
    },
    path::{Component, Path},
};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Mount};
use rustix::{
    fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Uid},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
        OpenTreeFlags, UnmountFlags,
    },
};

use crate::{
    error::{Context, Result, invalid},
    mount_options::{self, Bind, MountOptions},
    rootfs::SHARES,
    spec::Checked,
    sys,
};

/// File systems that a container may mount new: none of them has a device or a host behind it.
const TYPES: [&str; 14] = [
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "debugfs",
    "devpts",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "proc",
    "securityfs",
    "sysfs",
    "tmpfs",
    "tracefs",
];

/// `PROC_SUPER_MAGIC`
const PROC: u64 = 0x9fa0;

/// Makes `root` this process's root directory, with the spec's mounts and devices.
pub(super) fn enter(container: &Checked, root: &Path) -> Result<()> {
    let mounts = parse(container)?;
    enter_with(&mounts, root)?;
    let own_dev = mounts
        .iter()
        .all(|(mount, options)| mount.destination() != Path::new("/dev") || options.bind.is_none());
    if own_dev {
        make_devices(container)?;
    }
    Ok(())
}

/// Makes `root` this process's root directory, with what the spec binds and nothing else.
pub(super) fn enter_at_rest(container: &Checked, root: &Path) -> Result<()> {
    let mut mounts = parse(container)?;
    mounts.retain(|(_, options)| options.bind.is_some());
    enter_with(&mounts, root)
}

fn enter_with(mounts: &[(&Mount, MountOptions)], root: &Path) -> Result<()> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).context("make the mounts private")?;
    // What comes from outside is picked up while outside is in reach.
    let sources =
        mounts.iter().map(|(mount, options)| bind_source(mount, options)).collect::<Result<Vec<_>>>()?;

    rustix::process::chdir(root).context(format_args!("chdir {}", root.display()))?;
    rustix::process::pivot_root(".", ".").context("pivot_root")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).context("let the old root go")?;
    rustix::process::chdir("/").context("chdir /")?;

    for ((mount, options), source) in mounts.iter().zip(sources) {
        let target = mount.destination();
        let result = match source {
            Some(tree) => bind(&tree, target, options),
            None => mount_new(mount, options),
        };
        result.map_err(|error| bulkhead_agent_api::AgentError {
            message: format!("mount {}: {}", target.display(), error.message),
            ..error
        })?;
    }
    Ok(())
}

/// What comes after everything that still has to be written: settings of the kernel, the working
/// directory, then masks and read-only marks.
pub(super) fn finish(container: &Checked) -> Result<()> {
    let Some(linux) = container.spec.linux() else { return Ok(()) };
    for (name, value) in linux.sysctl().iter().flatten() {
        set_sysctl(name, value)?;
    }
    let cwd = container.process()?.cwd();
    if cwd != Path::new("/") {
        make_directory(cwd)?;
    }
    if let Some(propagation) = linux.rootfs_propagation().as_ref().filter(|text| !text.is_empty()) {
        let flags = mount_options::propagation(propagation)
            .ok_or_else(|| invalid(format!("the propagation {propagation:?} is not valid")))?;
        rustix::mount::mount_change("/", flags).context("set the root's propagation")?;
    }
    for path in linux.readonly_paths().iter().flatten() {
        make_read_only(path).context(format_args!("make {path} read-only"))?;
    }
    for path in linux.masked_paths().iter().flatten() {
        mask(path)?;
    }
    if container.spec.root().as_ref().is_some_and(|root| root.readonly() == Some(true)) {
        sys::mount_setattr(CWD, c"/", false, libc::MOUNT_ATTR_RDONLY, 0)
            .context("make the root read-only")?;
    }
    Ok(())
}

fn parse(container: &Checked) -> Result<Vec<(&Mount, MountOptions)>> {
    let mut parsed = Vec::new();
    for mount in container.spec.mounts().iter().flatten() {
        let destination = mount.destination();
        if !destination.is_absolute() || destination.components().any(|part| part == Component::ParentDir) {
            return Err(invalid(format!("the mount destination {} is not absolute", destination.display())));
        }
        let mut options = MountOptions::parse(mount.options().iter().flatten().map(String::as_str))?;
        if mount.typ().as_deref() == Some("bind") {
            options.bind = Some(options.bind.unwrap_or(Bind::One));
        }
        parsed.push((mount, options));
    }
    Ok(parsed)
}

/// A detached copy of what a bind mount's source shows. Sources are shares of the host; everything else
/// in the agent's view is not for containers.
fn bind_source(mount: &Mount, options: &MountOptions) -> Result<Option<OwnedFd>> {
    let Some(kind) = options.bind else { return Ok(None) };
    let source = mount.source().clone().unwrap_or_default();
    let Ok(inside) = source.strip_prefix(SHARES) else {
        return Err(invalid(format!("the bind source {} is not a file share", source.display())));
    };
    let shares = rustix::fs::open(SHARES, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .context(format_args!("open {SHARES}"))?;
    // Links in a share are its owner's, and lead nowhere here.
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let file = rustix::fs::openat2(&shares, inside, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
        .map_err(|error| invalid(format!("the bind source {}: {error}", source.display())))?;
    Ok(Some(clone_tree(file, kind == Bind::Recursive).context("open_tree")?))
}

fn clone_tree(file: impl AsFd, recursive: bool) -> rustix::io::Result<OwnedFd> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    rustix::mount::open_tree(file, c"", flags)
}

/// Mounts a detached tree on a path's file, whatever it is by now called.
fn attach(tree: impl AsFd, target: impl AsFd) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(tree, c"", target, c"", flags)
}

fn bind(tree: &OwnedFd, target: &Path, options: &MountOptions) -> Result<()> {
    let is_directory =
        FileType::from_raw_mode(rustix::fs::fstat(tree).context("stat")?.st_mode) == FileType::Directory;
    if is_directory {
        make_directory(target)?;
    } else {
        make_file(target)?;
    }
    let set = attributes(options.flags);
    if set != 0 {
        sys::mount_setattr(tree, c"", options.recursive, set, 0).context("set attributes")?;
    }
    attach(tree, open_path(target)?).context("move_mount")?;
    set_propagation(target, options)
}

fn attributes(flags: MountFlags) -> u64 {
    let pairs = [
        (MountFlags::RDONLY, libc::MOUNT_ATTR_RDONLY),
        (MountFlags::NOSUID, libc::MOUNT_ATTR_NOSUID),
        (MountFlags::NODEV, libc::MOUNT_ATTR_NODEV),
        (MountFlags::NOEXEC, libc::MOUNT_ATTR_NOEXEC),
        (MountFlags::NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
        (MountFlags::NOSYMFOLLOW, libc::MOUNT_ATTR_NOSYMFOLLOW),
    ];
    pairs.into_iter().filter(|(flag, _)| flags.contains(*flag)).fold(0, |set, (_, attribute)| set | attribute)
}

fn mount_new(mount: &Mount, options: &MountOptions) -> Result<()> {
    let kind = mount.typ().as_deref().unwrap_or_default();
    if !TYPES.contains(&kind) {
        return Err(invalid(format!("the file system type {kind:?} is not supported")));
    }
    let kind = if kind == "cgroup" { "cgroup2" } else { kind };
    let target = mount.destination();
    make_directory(target)?;
    if matches!(kind, "proc" | "sysfs") {
        // Later steps rely on where these two are.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat2(CWD, target, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
            .map_err(|_| invalid(format!("{kind} must be mounted on an ordinary directory")))?;
    }
    let source = mount.source().as_deref().unwrap_or_else(|| Path::new(kind));
    let data =
        std::ffi::CString::new(options.data.as_str()).map_err(|_| invalid("a NUL in mount options"))?;
    rustix::mount::mount(source, target, kind, options.flags, data.as_c_str())
        .map_err(|error| invalid(format!("{kind} with options {:?}: {error}", options.data)))?;
    set_propagation(target, options)
}

fn set_propagation(target: &Path, options: &MountOptions) -> Result<()> {
    for flags in &options.propagation {
        rustix::mount::mount_change(target, *flags).context("set the propagation")?;
    }
    Ok(())
}

fn open_path(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .context(format_args!("open {}", path.display()))
}

fn make_directory(path: &Path) -> Result<()> {
    fs::create_dir_all(path).context(format_args!("mkdir {}", path.display()))
}

fn make_file(path: &Path) -> Result<()> {
    if let Some(parent) = path.parent() {
        make_directory(parent)?;
    }
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    match rustix::fs::open(path, flags, Mode::from_raw_mode(0o644)) {
        Ok(_) => Ok(()),
        // It exists, and cannot be written: all the better.
        Err(_) if path.exists() => Ok(()),
        Err(error) => Err(error).context(format_args!("create {}", path.display())),
    }
}

/// The nodes that every Linux program expects.
const NODES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/core", "/proc/kcore"),
];

fn make_devices(container: &Checked) -> Result<()> {
    make_directory(Path::new("/dev"))?;
    // Modes are given in full, so the mask of whoever started the agent must not count.
    let mask = rustix::process::umask(Mode::empty());
    for (name, major, minor) in NODES {
        let path = Path::new("/dev").join(name);
        make_node(&path, FileType::CharacterDevice, rustix::fs::makedev(major, minor), 0o666, 0, 0)?;
    }
    for device in container.spec.linux().iter().flat_map(|linux| linux.devices().iter().flatten()) {
        make_device(device)?;
    }
    for (link, target) in LINKS {
        if link == "/dev/core" && !Path::new(target).exists() {
            continue;
        }
        make_link(link, target)?;
    }
    // An image's or a mount's own ptmx would lead to a terminal outside of this container's devpts.
    match fs::remove_file("/dev/ptmx") {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).context("remove /dev/ptmx");
        }
        _ => make_link("/dev/ptmx", "pts/ptmx")?,
    }
    rustix::process::umask(mask);
    Ok(())
}

fn make_link(link: &str, target: &str) -> Result<()> {
    match symlink(target, link) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(error).context(format_args!("link {link}"))
        }
        _ => Ok(()),
    }
}

fn make_device(device: &LinuxDevice) -> Result<()> {
    let path = device.path();
    let kind = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::P => FileType::Fifo,
        LinuxDeviceType::A => return Err(invalid(format!("{}: a device of no type", path.display()))),
    };
    if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
        return Err(invalid(format!("the device path {} is not absolute", path.display())));
    }
    if let Some(parent) = path.parent() {
        make_directory(parent)?;
    }
    let number = |number: i64| u32::try_from(number).map_err(|_| invalid("a device number out of range"));
    let numbers = rustix::fs::makedev(number(device.major())?, number(device.minor())?);
    let mode = device.file_mode().unwrap_or(0o666) & 0o7777;
    make_node(path, kind, numbers, mode, device.uid().unwrap_or(0), device.gid().unwrap_or(0))
}

fn make_node(path: &Path, kind: FileType, numbers: u64, mode: u32, uid: u32, gid: u32) -> Result<()> {
    let what = || format!("make {}", path.display());
    match rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(mode), numbers) {
        Err(Errno::EXIST) => {
            let found = rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).context(what())?;
            if FileType::from_raw_mode(found.st_mode) != kind || found.st_rdev != numbers {
                return Err(invalid(format!("{} exists and is something else", path.display())));
            }
        }
        made => made.context(what())?,
    }
    rustix::fs::chownat(
        CWD,
        path,
        Some(Uid::from_raw(uid)),
        Some(Gid::from_raw(gid)),
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .context(what())
}

/// Writes below `/proc/sys`, and makes sure that it is that.
fn set_sysctl(name: &str, value: &str) -> Result<()> {
    let relative = name.replace('.', "/");
    if relative.split('/').any(|part| part.is_empty() || part == "..") {
        return Err(invalid(format!("the sysctl {name:?} is not valid")));
    }
    let refused = |error: Errno| invalid(format!("the sysctl {name} cannot be set to {value:?}: {error}"));
    let path = Path::new("/proc/sys").join(relative);
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file =
        rustix::fs::openat2(CWD, &path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS).map_err(refused)?;
    if rustix::fs::fstatfs(&file).map_err(refused)?.f_type as u64 != PROC {
        return Err(invalid("the container has no proc file system for its sysctls"));
    }
    rustix::io::write(&file, value.as_bytes()).map_err(refused)?;
    Ok(())
}

fn make_read_only(path: &str) -> std::io::Result<()> {
    let Some(file) = open_if_there(path)? else { return Ok(()) };
    let tree = clone_tree(&file, true)?;
    sys::mount_setattr(&tree, c"", true, libc::MOUNT_ATTR_RDONLY, 0)?;
    Ok(attach(tree, file)?)
}

/// Hides a file behind `/dev/null`, a directory behind an empty file system.
fn mask(path: &str) -> Result<()> {
    let what = || format!("mask {path}");
    let Some(file) = open_if_there(path).context(what())? else { return Ok(()) };
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&file).context(what())?.st_mode);
    let cover = if kind == FileType::Directory { empty_directory() } else { null_device() };
    attach(cover?, file).context(what())
}

fn open_if_there(path: &str) -> rustix::io::Result<Option<OwnedFd>> {
    match rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => Ok(Some(file)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(error),
    }
}

fn empty_directory() -> Result<OwnedFd> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).context("fsopen tmpfs")?;
    for (key, value) in [("nr_blocks", "1"), ("nr_inodes", "1"), ("mode", "0555")] {
        rustix::mount::fsconfig_set_string(&context, key, value).context("fsconfig")?;
    }
    rustix::mount::fsconfig_create(&context).context("fsconfig")?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV;
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).context("fsmount")
}

/// The container's `/dev/null`, which must be one (CVE-2025-31133).
fn null_device() -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::open("/dev/null", flags, Mode::empty()).context("open /dev/null")?;
    let found = rustix::fs::fstat(&file).context("stat /dev/null")?;
    if FileType::from_raw_mode(found.st_mode) != FileType::CharacterDevice
        || found.st_rdev != rustix::fs::makedev(1, 3)
    {
        return Err(invalid("the container's /dev/null is something else"));
    }
    clone_tree(file, false).context("open_tree of /dev/null")
}
