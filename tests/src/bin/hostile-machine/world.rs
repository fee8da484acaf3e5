//! What a hostile machine is given, and the check that nothing else was touched: a disk, a layer, a tap, and clients
//! of its sockets.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result};
use bulkhead_layer_format::{Meta, XATTR};
use nix::libc;

/// The share's name in the guest's view.
pub(crate) const SHARE: &str = "share";
/// The port that clients listen on.
const PORT: u32 = 1024;
const CLIENTS: usize = 8;
/// How much each client writes, whatever the guest reads.
const WRITES: usize = 1 << 20;
const DISK_BYTES: u64 = 1 << 20;

/// Names that the guest tries to make anywhere.
const TRACES: [&str; 4] = ["/pwned", "/tmp/pwned", "/run/pwned", "/etc/pwned"];

pub(crate) struct World {
    dir: tempfile::TempDir,
    layer: BTreeMap<PathBuf, Vec<u8>>,
}

impl World {
    pub(crate) fn new() -> Result<Self> {
        // Where files have extended attributes.
        let dir = tempfile::tempdir_in("/run")?;
        let world = Self { layer: make_layer(&dir.path().join("layer"))?, dir };
        let disk = File::create(world.dir.path().join("disk"))?;
        disk.set_len(DISK_BYTES)?;
        disk.write_all_at(&[1; 512], 0)?;
        Ok(world)
    }

    /// A directory for the machine's own files.
    pub(crate) fn private(&self) -> Result<PathBuf> {
        let dir = self.dir.path().join("machine");
        fs::create_dir(&dir)?;
        Ok(dir)
    }

    pub(crate) fn share(&self) -> Result<OwnedFd> {
        Ok(File::open(self.dir.path().join("layer"))?.into())
    }

    pub(crate) fn disk(&self) -> Result<OwnedFd> {
        Ok(File::options().read(true).write(true).open(self.dir.path().join("disk"))?.into())
    }

    /// A tap of its own that is up, and leads nowhere.
    pub(crate) fn tap(&self) -> Result<OwnedFd> {
        let tap = File::options().read(true).write(true).open("/dev/net/tun").context("/dev/net/tun")?;
        // SAFETY: an all-zero `ifreq` is valid: no name, no flags.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = i16::try_from(flags)?;
        // SAFETY: TUNSETIFF reads and writes an `ifreq`, which this is.
        check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }, "TUNSETIFF")?;
        let socket =
            std::net::UdpSocket::bind("127.0.0.1:0").or_else(|_| std::net::UdpSocket::bind("0.0.0.0:0"))?;
        request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_UP)?;
        // SAFETY: SIOCSIFFLAGS reads an `ifreq`, whose name the kernel has filled in.
        let up = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) };
        check(up, "SIOCSIFFLAGS")?;
        Ok(tap.into())
    }

    /// Clients that listen for the guest, write a lot and read nothing, for as long as the machine is there.
    pub(crate) fn listen(&self, socket: &Path) {
        for _ in 0..CLIENTS {
            let socket = socket.to_owned();
            thread::spawn(move || while client(&socket).is_ok() {});
        }
    }

    /// What has changed that must not.
    pub(crate) fn damage(&self) -> Result<Vec<String>> {
        let mut damage = Vec::new();
        if contents(&self.dir.path().join("layer"))? != self.layer {
            damage.push("the layer is not what it was".to_owned());
        }
        damage.extend(
            TRACES
                .iter()
                .filter(|path| fs::symlink_metadata(path).is_ok())
                .map(|path| format!("{path} was made")),
        );
        let disk = File::open(self.dir.path().join("disk"))?;
        if disk.metadata()?.len() != DISK_BYTES {
            damage.push("the disk has another size".to_owned());
        }
        Ok(damage)
    }
}

fn check(result: libc::c_int, what: &'static str) -> Result<()> {
    if result < 0 { Err(std::io::Error::last_os_error()).context(what) } else { Ok(()) }
}

fn client(socket: &Path) -> Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    writeln!(stream, "LISTEN {PORT}")?;
    let mut answer = String::new();
    BufReader::new(stream.try_clone()?).take(32).read_line(&mut answer)?;
    if answer.starts_with("OK ") {
        // Fails when the guest ends the connection, as it is meant to.
        let _ = stream.write_all(&vec![0x77; WRITES]);
        // Nothing is read; the end, which poll always tells of, is waited for without reading.
        let mut fds = [nix::poll::PollFd::new(stream.as_fd(), nix::poll::PollFlags::empty())];
        nix::poll::poll(&mut fds, nix::poll::PollTimeout::NONE)?;
    }
    Ok(())
}

/// A small layer in the store's own form; gives its files and their contents.
fn make_layer(root: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mark = |path: &Path, mode: u32| -> Result<()> {
        let meta = Meta { mode, uid: 0, gid: 0, rdev: 0, xattrs: Vec::new() }.encode()?;
        Ok(rustix::fs::setxattr(path, XATTR, &meta, rustix::fs::XattrFlags::empty())?)
    };
    let directory = |path: &Path| -> Result<()> {
        fs::create_dir(path)?;
        mark(path, 0o040_755)
    };
    let file = |path: &Path, mode: u32, content: &[u8]| -> Result<()> {
        fs::write(path, content)?;
        mark(path, mode)
    };
    directory(root)?;
    directory(&root.join("dir"))?;
    file(&root.join("file"), 0o100_644, b"0123456789")?;
    file(&root.join("link"), 0o120_777, b"/etc/passwd")?;
    for number in 0..300 {
        file(&root.join(format!("dir/n{number}")), 0o100_644, b"n")?;
    }
    contents(root)
}

fn contents(root: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut open = vec![root.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let kind = path.symlink_metadata()?;
            let content = if kind.is_file() { fs::read(&path)? } else { Vec::new() };
            if kind.is_dir() {
                open.push(path.clone());
            }
            found.insert(path, content);
        }
    }
    Ok(found)
}
