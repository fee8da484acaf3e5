//! A container's root filesystem, as the agent mounts it before any of the container's processes exist.
//!
//! ```text
//!   /run/bulkhead/fs/<tag>          virtio-fs: one directory for each layer            (once for all containers)
//!   /run/bulkhead/fs/<tag>          virtio-fs: one file or directory for each share    (of one container)
//!   /run/bulkhead/fs/disks/<disk>   ext4 of a volume
//!   /run/bulkhead/fs/shm/<id>       tmpfs of memory that containers share
//!   /run/bulkhead/c/<id>/disk       ext4 of the writable layer: upper/ work/
//!   /run/bulkhead/c/<id>/files      tmpfs: contents of injected files, forwarded sockets
//!   /run/bulkhead/c/<id>/root       overlay of the two, injected files bound over it
//! ```
//!
//! All of it lies in the agent's mount namespace; a container's first process takes a copy of that
//! namespace, makes `root` its root and drops the rest, so the layers' share and the disk's own mount are
//! not to be reached from inside.
//!
//! A container's disks and share device may be in slots that are used again when it is gone, for another medium and
//! another server. So nothing is mounted that is still mounted somewhere, and the end of all of it is waited for.

use std::{
    fs::{self, File},
    io::Write,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use bulkhead_agent_api::{
    CopyUp, Create, Disk, ForwardedSocket, InjectedFile, Rootfs, SharedMemory, VOLUME_DATA, VOLUME_DISKS,
    VolumeDisk,
};
use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    },
};

use crate::{
    copy_up,
    error::{Context, Result, conflict, internal, invalid},
    forward::{self, Forwarder},
    log,
};
use live::Live;

mod live;
mod share;
mod shared_memory;

/// Where virtio-fs tags are mounted; the only place that a bind mount of a spec may come from.
pub const SHARES: &str = "/run/bulkhead/fs";

const CONTAINERS: &str = "/run/bulkhead/c";

/// Overlayfs takes no more (`OVL_MAX_STACK`).
const MAX_LAYERS: usize = 500;

const MAX_FILES: usize = 256;

/// The most volumes that are filled, and sockets.
const MAX_SHARES: usize = 512;

/// A mounted root filesystem.
#[derive(Debug)]
pub struct Mounted {
    base: PathBuf,
    /// What must not be taken away before its last mount is gone.
    live: Vec<Live>,
    /// Where the volumes that are disks are mounted.
    disks: Vec<PathBuf>,
    /// The paths of injected files, in the order of their numbers.
    injected: Vec<String>,
    /// Where the image's layers are.
    rootfs: Rootfs,
    /// Where the host's shares are mounted.
    shares: Option<PathBuf>,
    /// Where the memory is that it shares with other containers.
    shared_memory: Option<PathBuf>,
    /// Who serves its forwarded sockets.
    forwarder: Option<Forwarder>,
}

/// The block devices of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Devices {
    /// Of the writable layer.
    pub layer: PathBuf,
    /// Of its volumes, in the order of [`Create::disks`].
    pub volumes: Vec<PathBuf>,
}

/// A disk that is not there, or not yet.
#[derive(Debug)]
pub struct Absent {
    /// In words, for when it never comes.
    pub why: String,
    /// Whether there is a device for it, which has no medium or another one.
    pub known: bool,
}

/// Looks for a container's disks.
///
/// # Errors
/// One is not there, or not yet.
pub fn find_disks(create: &Create) -> Result<Devices, Absent> {
    let volumes = create.disks.iter().map(|volume| find_disk(&volume.disk)).collect::<Result<_, _>>()?;
    Ok(Devices { layer: find_disk(&create.rootfs.disk)?, volumes })
}

/// Looks for a disk by serial and size.
fn find_disk(disk: &Disk) -> Result<PathBuf, Absent> {
    let mut absent = Absent { why: format!("there is no disk {:?}", disk.id), known: false };
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let attribute = |name: &str| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        if attribute("serial").trim_end_matches(['\0', '\n']) != disk.id {
            continue;
        }
        let sectors: u64 = attribute("size").trim().parse().unwrap_or(0);
        if sectors.saturating_mul(512) == disk.size {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
        let size = sectors.saturating_mul(512);
        let why = format!("the disk {:?} has {size} bytes, not {}", disk.id, disk.size);
        absent = Absent { why, known: true };
    }
    Err(absent)
}

/// Checks what can be checked before the disk is there.
///
/// # Errors
/// Of kind `Invalid`.
pub fn validate(create: &Create) -> Result<()> {
    check_name("container id", &create.container)?;
    check_name("file share tag", &create.rootfs.tag)?;
    for layer in &create.rootfs.layers {
        check_name("layer name", layer)?;
    }
    if create.rootfs.layers.len() > MAX_LAYERS {
        return Err(invalid(format!(
            "{} layers are over the limit of {MAX_LAYERS}",
            create.rootfs.layers.len()
        )));
    }
    if create.files.len() > MAX_FILES {
        return Err(invalid("too many files to inject"));
    }
    let files = create.files.iter().map(|file| &file.path);
    for path in files.chain(create.sockets.iter().map(|socket| &socket.path)) {
        if !Path::new(path).is_absolute() || Path::new(path).file_name().is_none() || path.contains('\0') {
            return Err(invalid(format!("{path:?} is not the absolute path of a file")));
        }
    }
    if let Some(tag) = &create.shares {
        check_name("file share tag", tag)?;
    }
    if let Some(SharedMemory::Of(other)) = &create.shared_memory {
        check_name("container id", other)?;
    }
    for volume in &create.disks {
        check_name("disk", &volume.disk.id)?;
        if volume.copy_up.as_ref().is_some_and(|path| !path.starts_with('/') || path.contains('\0')) {
            return Err(invalid(format!("{:?} cannot be copied to a volume", volume.copy_up)));
        }
    }
    if create.copy_up.len().max(create.sockets.len()).max(create.disks.len()) > MAX_SHARES {
        return Err(invalid("too many volumes or sockets"));
    }
    for copy in &create.copy_up {
        check_name("share name", &copy.share)?;
        if !copy.path.starts_with('/') || copy.path.contains('\0') || create.shares.is_none() {
            return Err(invalid(format!("{:?} cannot be copied to a share", copy.path)));
        }
    }
    Ok(())
}

/// Names become parts of paths.
pub fn check_name(what: &str, name: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ':');
    if name.is_empty() || name.len() > 255 || name.starts_with('.') || !name.chars().all(allowed) {
        return Err(invalid(format!("{name:?} is not a valid {what}")));
    }
    Ok(())
}

impl Mounted {
    /// Mounts everything; what was mounted is undone after an error.
    pub fn new(create: &Create, devices: &Devices) -> Result<Self> {
        let base = Path::new(CONTAINERS).join(&create.container);
        let disks = std::iter::once(&devices.layer).chain(&devices.volumes);
        let live: Vec<Live> = disks.map(|device| Live::Disk(device.clone())).collect();
        if let Some(used) = live::wait_until_released(&live) {
            // Another container holds files of what was in its slot before.
            return Err(conflict(format!("{used} is still in use")));
        }
        let injected = create.files.iter().map(|file| file.path.clone()).collect();
        let rootfs = create.rootfs.clone();
        let mut mounted = Self {
            base,
            live,
            disks: Vec::new(),
            injected,
            rootfs,
            shares: None,
            shared_memory: None,
            forwarder: None,
        };
        match mounted.mount(create, devices) {
            Ok(()) => Ok(mounted),
            Err(error) => {
                let _ = mounted.unmount();
                Err(error)
            }
        }
    }

    /// The root directory.
    pub fn root(&self) -> PathBuf {
        self.base.join("root")
    }

    /// The paths of injected files.
    pub fn injected(&self) -> &[String] {
        &self.injected
    }

    /// The writable layer alone, as overlayfs keeps it.
    pub fn upper(&self) -> PathBuf {
        self.base.join("disk/upper")
    }

    /// The root file system without anything that is mounted in it.
    ///
    /// # Errors
    /// Of the system calls.
    pub fn bare_root(&self) -> Result<OwnedFd> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        rustix::mount::open_tree(CWD, self.root(), flags).context("open_tree of the root")
    }

    /// The image alone, all of its layers as one; mounted nowhere, and gone with its descriptor.
    ///
    /// # Errors
    /// Of the system calls.
    pub fn image(&self) -> Result<OwnedFd> {
        let mut layers = self.open_layers()?;
        // Without a writable layer an overlay takes two at least, and what marks removals shows in none.
        while layers.len() < 2 || self.rootfs.layers.len() == layers.len() {
            layers.push(open_directory(CWD, &self.base.join("empty"))?);
        }
        overlay(&layers, None)
    }

    /// Gives an injected file another content, for every process that sees it. One that was not injected (by the
    /// older daemon that made the container) is left out.
    pub fn rewrite(&self, file: &InjectedFile) -> Result<()> {
        let Some(index) = self.injected.iter().position(|path| *path == file.path) else { return Ok(()) };
        write_file(&self.base.join("files").join(index.to_string()), file)
            .context(format_args!("write {}", file.path))
    }

    fn mount(&mut self, create: &Create, devices: &Devices) -> Result<()> {
        self.build(&devices.layer)?;
        for (volume, device) in create.disks.iter().zip(&devices.volumes) {
            self.mount_disk(volume, device)?;
        }
        if let Some(tag) = &create.shares {
            let (shares, live) = share::mount_own(tag)?;
            self.live.push(live);
            self.shares = Some(shares.clone());
            for copy in &create.copy_up {
                copy_up::copy_up(&self.root(), &shares, copy)?;
            }
        }
        if let Some(memory) = &create.shared_memory {
            self.shared_memory = Some(shared_memory::mount(&create.container, memory)?);
        }
        self.inject(&create.files, &create.sockets)
    }

    fn build(&self, device: &Path) -> Result<()> {
        for name in ["disk", "files", "root", "empty"] {
            let path = self.base.join(name);
            fs::create_dir_all(&path).context(format_args!("mkdir {}", path.display()))?;
        }
        let disk = self.base.join("disk");
        // The format is fixed; noinit_itable, because a sparse template's inode tables are zeros already.
        let flags = MountFlags::NOATIME | MountFlags::NOSUID | MountFlags::NODEV;
        rustix::mount::mount(device, &disk, "ext4", flags, c"discard,noinit_itable")
            .context(format_args!("mount the writable layer {}", device.display()))?;
        for (name, mode) in [("upper", 0o755), ("work", 0o700)] {
            match rustix::fs::mkdir(disk.join(name), Mode::from_raw_mode(mode)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error).context(format_args!("mkdir {name} on the writable layer")),
            }
        }
        let mount = overlay(&self.open_layers()?, Some(&disk))?;
        let root = self.root();
        rustix::mount::move_mount(&mount, c"", CWD, &root, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .context(format_args!("mount {}", root.display()))
    }

    /// Unlike the writable layer's, its files are a container's own: what a volume may hold it may hold.
    fn mount_disk(&mut self, volume: &VolumeDisk, device: &Path) -> Result<()> {
        let path = Path::new(VOLUME_DISKS).join(&volume.disk.id);
        fs::create_dir_all(&path).context(format_args!("mkdir {}", path.display()))?;
        let read_only = if volume.read_only { MountFlags::RDONLY } else { MountFlags::empty() };
        rustix::mount::mount(
            device,
            &path,
            "ext4",
            MountFlags::NOATIME | read_only,
            c"discard,noinit_itable",
        )
        .context(format_args!("mount the volume {}", device.display()))?;
        self.disks.push(path.clone());
        if volume.read_only {
            return Ok(());
        }
        match rustix::fs::mkdir(path.join(VOLUME_DATA), Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error).context("mkdir of a volume's files"),
        }
        let Some(from) = &volume.copy_up else { return Ok(()) };
        let copy = CopyUp { share: VOLUME_DATA.into(), path: from.clone() };
        copy_up::copy_up(&self.root(), &path, &copy)
    }

    fn open_layers(&self) -> Result<Vec<OwnedFd>> {
        if self.rootfs.layers.is_empty() {
            return Ok(vec![open_directory(CWD, &self.base.join("empty"))?]);
        }
        let share = open_directory(CWD, &share::mount_layers(&self.rootfs.tag)?)?;
        self.rootfs.layers.iter().map(|layer| open_directory(&share, Path::new(layer))).collect()
    }

    fn inject(&mut self, files: &[InjectedFile], sockets: &[ForwardedSocket]) -> Result<()> {
        if files.is_empty() && sockets.is_empty() {
            return Ok(());
        }
        let store = self.base.join("files");
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount("tmpfs", &store, "tmpfs", flags, c"mode=0755,size=16m")
            .context("mount tmpfs")?;
        let root = open_directory(CWD, &self.root())?;
        for (index, file) in files.iter().enumerate() {
            let source = store.join(index.to_string());
            write_file(&source, file).context(format_args!("write {}", file.path))?;
            mount_over(&root, &source, &file.path)?;
        }
        let mut listeners = Vec::with_capacity(sockets.len());
        for (index, socket) in sockets.iter().enumerate() {
            let source = store.join(format!("socket{index}"));
            let listener = listen(&source, socket).context(format_args!("listen at {}", socket.path))?;
            listeners.push((listener, socket.port));
            mount_over(&root, &source, &socket.path)?;
        }
        if !listeners.is_empty() {
            self.forwarder = Some(forward::start(listeners)?);
        }
        Ok(())
    }

    /// Flushes the disks and unmounts all. Where something is busy still, it is detached: it goes with its last
    /// user.
    ///
    /// # Errors
    /// The first thing that failed; all the rest is done all the same.
    pub fn unmount(&self) -> Result<()> {
        let disk = self.base.join("disk");
        let mut outcome = Ok(());
        let mut note = |result: Result<()>| {
            if outcome.is_ok() {
                outcome = result;
            }
        };
        for disk in std::iter::once(&disk).chain(&self.disks) {
            if let Ok(directory) = open_directory(CWD, disk).map(File::from) {
                note(rustix::fs::syncfs(&directory).context(format_args!("flush {}", disk.display())));
            }
        }
        // The root may hold mounts below it, and is busy while a mount namespace is being torn down.
        note(unmount(&self.root(), UnmountFlags::DETACH));
        note(unmount(&self.base.join("files"), UnmountFlags::DETACH));
        for disk in self.disks.iter().chain([&disk]) {
            note(unmount(disk, UnmountFlags::empty()));
        }
        if let Some(shares) = &self.shares {
            note(share::unmount_own(shares));
        }
        if let Some(memory) = &self.shared_memory {
            note(unmount(memory, UnmountFlags::DETACH));
        }
        // A mount namespace that is being torn down keeps the disk in use for a moment after its last process was
        // reaped; the disk must not be taken away before it is written for the last time.
        if let Some(used) = live::wait_until_released(&self.live) {
            log::warn(format_args!("{used} is still in use"));
        }
        // Empty directories of a tmpfs, and no others; those that stay do no harm.
        let own = ["disk", "files", "root", "empty", ""].map(|name| self.base.join(name));
        for directory in own.iter().chain(&self.disks).chain(&self.shared_memory) {
            let _ = fs::remove_dir(directory);
        }
        outcome
    }
}

/// Unmounts what is mounted there, if anything is; what is busy goes with its last user.
fn unmount(path: &Path, flags: UnmountFlags) -> Result<()> {
    let unmounted = match rustix::mount::unmount(path, flags | UnmountFlags::NOFOLLOW) {
        Err(Errno::BUSY) => rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW),
        other => other,
    };
    match unmounted {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(error).context(format_args!("unmount {}", path.display())),
    }
}

/// A listening socket at a path, with its owner and permissions.
fn listen(path: &Path, socket: &ForwardedSocket) -> std::io::Result<OwnedFd> {
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    let (uid, gid) = (rustix::fs::Uid::from_raw(socket.uid), rustix::fs::Gid::from_raw(socket.gid));
    rustix::fs::chown(path, Some(uid), Some(gid))?;
    rustix::fs::chmod(path, Mode::from_raw_mode(socket.mode & 0o777))?;
    Ok(listener.into())
}

/// Puts a file over a path of the root. By descriptors on both sides: nothing in the image can lead this mount
/// elsewhere.
fn mount_over(root: &OwnedFd, source: &Path, path: &str) -> Result<()> {
    let target =
        open_target(root, Path::new(path)).context(format_args!("prepare {path} in the container"))?;
    let flags =
        rustix::mount::OpenTreeFlags::OPEN_TREE_CLONE | rustix::mount::OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = rustix::mount::open_tree(CWD, source, flags).context("open_tree")?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(tree, c"", target, c"", flags).context(format_args!("mount over {path}"))
}

/// An overlay that is mounted nowhere yet: writable on a disk, or read-only.
fn overlay(layers: &[OwnedFd], disk: Option<&Path>) -> Result<OwnedFd> {
    let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).context("fsopen overlay")?;
    let set = |key: &str, value: &Path| {
        rustix::mount::fsconfig_set_string(&context, key, value)
            .map_err(|error| internal(format!("overlay {key}: {error}{}", read_log(&context))))
    };
    set("source", Path::new("overlay"))?;
    for layer in layers {
        // Through its descriptor: a string parameter takes 255 bytes, and a name may have as many.
        set("lowerdir+", Path::new(&format!("/proc/self/fd/{}", layer.as_raw_fd())))?;
    }
    if let Some(disk) = disk {
        set("upperdir", &disk.join("upper"))?;
        set("workdir", &disk.join("work"))?;
    }
    rustix::mount::fsconfig_create(&context)
        .map_err(|error| internal(format!("mount the overlay: {error}{}", read_log(&context))))?;
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
        .context("fsmount")
}

/// What the kernel says of a failed configuration.
fn read_log(context: &OwnedFd) -> String {
    let mut log = String::new();
    let mut buffer = [0; 512];
    while let Ok(count) = rustix::io::read(context, &mut buffer) {
        log.push_str("; ");
        log.push_str(String::from_utf8_lossy(&buffer[..count]).trim());
    }
    log
}

fn open_directory(at: impl AsFd, path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::openat(at, path, flags, Mode::empty()).context(format_args!("open {}", path.display()))
}

fn write_file(path: &Path, file: &InjectedFile) -> std::io::Result<()> {
    let mut out = File::create(path)?;
    out.write_all(file.content.as_bytes())?;
    let mode = Mode::from_raw_mode(file.mode & 0o7777);
    Ok(rustix::fs::fchmod(&out, mode)?)
}

/// Opens the file that is to be mounted over, and makes it and its parents if they are missing. Nothing
/// outside of `root` is reached, whatever links the image has.
fn open_target(root: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let relative = path.strip_prefix("/").unwrap_or(path);
    let open = |path: &Path, flags: OFlags, mode: Mode| {
        rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, mode, ResolveFlags::IN_ROOT)
    };
    match open(relative, OFlags::PATH, Mode::empty()) {
        Err(Errno::NOENT) => {}
        found => return found,
    }
    let mut directory = PathBuf::new();
    for part in relative.parent().into_iter().flat_map(Path::iter) {
        let parent = open(
            if directory.as_os_str().is_empty() { Path::new(".") } else { &directory },
            OFlags::PATH,
            Mode::empty(),
        )?;
        match rustix::fs::mkdirat(parent, part, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
        directory.push(part);
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
    match open(relative, flags, Mode::from_raw_mode(0o644)) {
        Ok(_) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    open(relative, OFlags::PATH, Mode::empty())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn names_that_could_leave_their_directory_are_refused() {
        for name in ["", ".", "..", ".hidden", "a/b", "a b", "a\0", &"x".repeat(256)] {
            assert!(check_name("name", name).is_err(), "{name:?}");
        }
        for name in ["0123abcd", "layers", "sha256:ab", "a.b-c_d"] {
            assert!(check_name("name", name).is_ok(), "{name:?}");
        }
    }

    #[test]
    fn targets_are_made_inside_whatever_links_the_image_has() {
        let directory = tempfile::tempdir().unwrap();
        let inside = directory.path().join("root");
        fs::create_dir(&inside).unwrap();
        symlink("/etc-moved", inside.join("etc")).unwrap();
        symlink("../../outside", inside.join("up")).unwrap();
        fs::create_dir(inside.join("etc-moved")).unwrap();
        fs::create_dir(inside.join("outside")).unwrap();
        let root = open_directory(CWD, &inside).unwrap();
        open_target(&root, Path::new("/etc/hosts")).unwrap();
        open_target(&root, Path::new("/a/b/c")).unwrap();
        open_target(&root, Path::new("/up/file")).unwrap();
        open_target(&root, Path::new("/../../escape")).unwrap();
        for path in ["etc-moved/hosts", "a/b/c", "outside/file", "escape"] {
            assert!(inside.join(path).is_file(), "{path}");
        }
        assert_eq!(directory.path().read_dir().unwrap().count(), 1);
    }

    #[test]
    fn a_dangling_link_is_an_error_and_not_followed_out() {
        let directory = tempfile::tempdir().unwrap();
        let inside = directory.path().join("root");
        fs::create_dir(&inside).unwrap();
        symlink("/nowhere/file", inside.join("hosts")).unwrap();
        let root = open_directory(CWD, &inside).unwrap();
        assert!(open_target(&root, Path::new("/hosts")).is_err());
    }
}
