//! A container's root filesystem, as the agent mounts it before any of the container's processes exist.
//!
//! ```text
//!   /run/bulkhead/fs/<tag>          virtio-fs: one directory for each layer, or each share   (once a tag)
//!   /run/bulkhead/c/<id>/disk       ext4 of the writable layer: upper/ work/
//!   /run/bulkhead/c/<id>/files      tmpfs: contents of injected files, forwarded sockets
//!   /run/bulkhead/c/<id>/root       overlay of the two, injected files bound over it
//! ```
//!
//! All of it lies in the agent's mount namespace; a container's first process takes a copy of that
//! namespace, makes `root` its root and drops the rest, so the layers' share and the disk's own mount are
//! not to be reached from inside.

use std::{
    fs::{self, File},
    io::Write,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bulkhead_agent_api::{
    CopyUp, Create, Disk, ForwardedSocket, InjectedFile, Rootfs, VOLUME_DATA, VOLUME_DISKS, VolumeDisk,
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
    error::{Context, Result, internal, invalid},
    forward::{self, Forwarder},
};

/// Where virtio-fs tags are mounted; the only place that a bind mount of a spec may come from.
pub const SHARES: &str = "/run/bulkhead/fs";

const CONTAINERS: &str = "/run/bulkhead/c";

/// Overlayfs takes no more (`OVL_MAX_STACK`).
const MAX_LAYERS: usize = 500;

const MAX_FILES: usize = 256;

/// The most volumes that are filled, and sockets.
const MAX_SHARES: usize = 512;

/// How much of a layer's file is read at once: each request leaves the guest, and finds what it asks for in the host's
/// cache. Linux's own is 128.
const READ_AHEAD_KIB: u32 = 512;

/// How long an unmounted disk may stay in use.
const RELEASE: Duration = Duration::from_secs(2);

/// A mounted root filesystem.
#[derive(Debug)]
pub struct Mounted {
    base: PathBuf,
    /// What the kernel knows of each mounted disk; gone when the last mount of it is.
    live: Vec<PathBuf>,
    /// Where the volumes that are disks are mounted.
    disks: Vec<PathBuf>,
    /// The paths of injected files, in the order of their numbers.
    injected: Vec<String>,
    /// Where the image's layers are.
    rootfs: Rootfs,
    /// Where the host's shares are mounted.
    shares: Option<PathBuf>,
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

/// Looks for a container's disks.
///
/// # Errors
/// One is not there, or not yet; in words, for when it never comes.
pub fn find_disks(create: &Create) -> Result<Devices, String> {
    let volumes = create.disks.iter().map(|volume| find_disk(&volume.disk)).collect::<Result<_, _>>()?;
    Ok(Devices { layer: find_disk(&create.rootfs.disk)?, volumes })
}

/// Looks for a disk by serial and size.
fn find_disk(disk: &Disk) -> Result<PathBuf, String> {
    let mut seen = format!("there is no disk {:?}", disk.id);
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let attribute = |name: &str| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        if attribute("serial").trim_end_matches(['\0', '\n']) != disk.id {
            continue;
        }
        let sectors: u64 = attribute("size").trim().parse().unwrap_or(0);
        if sectors.saturating_mul(512) == disk.size {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
        seen = format!("the disk {:?} has {} bytes, not {}", disk.id, sectors.saturating_mul(512), disk.size);
    }
    Err(seen)
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
        let live = |device: &PathBuf| Path::new("/sys/fs/ext4").join(device.file_name().unwrap_or_default());
        let live = std::iter::once(&devices.layer).chain(&devices.volumes).map(live).collect();
        let injected = create.files.iter().map(|file| file.path.clone()).collect();
        let rootfs = create.rootfs.clone();
        let mut mounted =
            Self { base, live, disks: Vec::new(), injected, rootfs, shares: None, forwarder: None };
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
            let shares = self.shares.insert(mount_share(tag, MountFlags::NOATIME)?).clone();
            for copy in &create.copy_up {
                copy_up::copy_up(&self.root(), &shares, copy)?;
            }
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
        let flags = MountFlags::RDONLY | MountFlags::NOATIME;
        let mounted = mount_share(&self.rootfs.tag, flags)?;
        read_ahead(&mounted);
        let share = open_directory(CWD, &mounted)?;
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

    /// Flushes the disk and unmounts all. Where something is busy still, it is detached: it goes with its
    /// last user.
    pub fn unmount(&self) -> Result<()> {
        let disk = self.base.join("disk");
        for disk in std::iter::once(&disk).chain(&self.disks) {
            if let Ok(directory) = open_directory(CWD, disk).map(File::from) {
                rustix::fs::syncfs(&directory).context(format_args!("flush {}", disk.display()))?;
            }
        }
        let mut detached = Ok(());
        let disks = self.disks.iter().cloned().chain([disk]).map(|disk| (disk, UnmountFlags::empty()));
        // The root may hold mounts below it, and is busy while a mount namespace is being torn down.
        let rest = [(self.root(), UnmountFlags::DETACH), (self.base.join("files"), UnmountFlags::DETACH)]
            .into_iter();
        for (path, flags) in rest.chain(disks) {
            match rustix::mount::unmount(&path, flags | UnmountFlags::NOFOLLOW) {
                Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
                Err(Errno::BUSY) => {
                    detached = rustix::mount::unmount(&path, UnmountFlags::DETACH)
                        .context(format_args!("unmount {}", path.display()));
                }
                Err(error) => detached = Err(error).context(format_args!("unmount {}", path.display())),
            }
        }
        if let Some(shares) = &self.shares {
            release_shares(shares)?;
        }
        self.wait_until_released();
        if detached.is_ok() {
            // Empty directories of a tmpfs; those that stay do no harm.
            let own = ["disk", "files", "root", "empty", ""].map(|name| self.base.join(name));
            for directory in own.iter().chain(&self.disks) {
                let _ = fs::remove_dir(directory);
            }
        }
        detached
    }
}

impl Mounted {
    /// A mount namespace that is being torn down keeps the disk in use for a moment after its last process
    /// was reaped; the disk must not be taken away before it is written for the last time.
    fn wait_until_released(&self) {
        let deadline = Instant::now() + RELEASE;
        while self.live.iter().any(|live| live.exists()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Unmounts the shares, which writes what was changed in memory maps; or, as long as another container uses them,
/// writes it.
fn release_shares(shares: &Path) -> Result<()> {
    match rustix::mount::unmount(shares, UnmountFlags::NOFOLLOW) {
        Ok(()) => {
            let _ = fs::remove_dir(shares);
            Ok(())
        }
        Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(Errno::BUSY) => {
            rustix::fs::syncfs(open_directory(CWD, shares)?).context("write what was changed in shares")
        }
        Err(error) => Err(error).context(format_args!("unmount {}", shares.display())),
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

/// Mounts a virtio-fs tag, once.
fn mount_share(tag: &str, flags: MountFlags) -> Result<PathBuf> {
    let path = Path::new(SHARES).join(tag);
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(&path).context(format_args!("mkdir {}", path.display()))?;
    rustix::mount::mount(tag, &path, "virtiofs", flags, None)
        .inspect_err(|_| drop(fs::remove_dir(&path)))
        .context(format_args!("mount the file share {tag:?}"))?;
    Ok(path)
}

/// Has Linux read [`READ_AHEAD_KIB`] ahead in a share's files. Where it does not take that, it reads as it did.
fn read_ahead(mounted: &Path) {
    let Ok(stat) = rustix::fs::stat(mounted) else { return };
    let (major, minor) = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    let _ = fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), READ_AHEAD_KIB.to_string());
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
