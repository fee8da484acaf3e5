//! Machines whose VMM's process is started here: ours, QEMU's `microvm` and Firecracker's, with the same kernel,
//! initramfs, command line and memory.

use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;

use anyhow::{Context, Result, bail};

use super::{firecracker, ours, qemu};

/// Of every machine here.
pub(super) const MEMORY_MIB: u32 = 128;

/// What the measured init prints first.
pub(super) const MARK: &str = "init-has-begun";

/// What a machine boots from.
pub(super) struct Scene<'a> {
    /// Our programs and the kernel.
    pub(super) bundle: &'a Path,
    /// For sockets and files; one machine of a kind at a time.
    pub(super) dir: &'a Path,
    pub(super) initramfs: PathBuf,
    pub(super) cmdline: &'a str,
    /// Whether it has what a container's machine has: disk, share, vsock, random numbers.
    pub(super) devices: bool,
    pub(super) memory_mib: u32,
    /// Of our machine's share; 0: none.
    pub(super) window_mib: u32,
}

impl Scene<'_> {
    pub(super) fn kernel(&self) -> PathBuf {
        self.bundle.join("vmlinux")
    }
}

/// Whose machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Contender {
    Bulkhead,
    Qemu,
    /// Its executable.
    Firecracker(PathBuf),
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Contender::Bulkhead => "bulkhead",
            Contender::Qemu => "qemu-microvm",
            Contender::Firecracker(_) => "firecracker",
        })
    }
}

impl Contender {
    /// Us, and whom we are compared with.
    pub(super) fn pair(firecracker: Option<&Path>) -> [Contender; 2] {
        let peer = firecracker.map_or(Contender::Qemu, |path| Contender::Firecracker(path.to_owned()));
        [Contender::Bulkhead, peer]
    }

    /// Starts its VMM, which boots at once.
    pub(super) fn boot(&self, scene: &Scene<'_>) -> Result<Machine> {
        match self {
            Contender::Bulkhead => ours::boot(scene),
            Contender::Qemu => qemu::boot(scene),
            Contender::Firecracker(program) => firecracker::boot(program, scene),
        }
    }
}

/// A VMM that runs, and its guest's console; killed when dropped.
pub(super) struct Machine {
    pub(super) process: Child,
    console: BufReader<File>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Machine {
    pub(super) fn new(process: Child, console: File) -> Machine {
        Machine { process, console: BufReader::new(console) }
    }

    /// Until the guest's init has spoken.
    pub(super) fn wait_for_mark(&mut self) -> Result<()> {
        let (mut line, mut seen) = (Vec::new(), String::new());
        while self.console.read_until(b'\n', &mut line)? > 0 {
            let text = String::from_utf8_lossy(&line);
            if text.contains(MARK) {
                return Ok(());
            }
            seen.push_str(&text);
            line.clear();
        }
        bail!("the machine ended before its init began: {}\n{seen}", self.process.wait()?)
    }

    /// Until the guest prints a line that begins with this; what it printed, that line included.
    pub(super) fn wait_for_line(&mut self, beginning: &str) -> Result<String> {
        let mut seen = String::new();
        loop {
            let mut line = Vec::new();
            if self.console.read_until(b'\n', &mut line)? == 0 {
                bail!("the machine ended before it printed {beginning:?}: {}\n{seen}", self.process.wait()?);
            }
            let text = String::from_utf8_lossy(&line);
            seen.push_str(&text);
            if text.starts_with(beginning) {
                return Ok(seen);
            }
        }
    }

    /// Until its process has ended; everything that its guest printed meanwhile.
    pub(super) fn wait_for_end(&mut self) -> Result<String> {
        let mut rest = Vec::new();
        self.console.read_to_end(&mut rest)?;
        self.process.wait()?;
        Ok(String::from_utf8_lossy(&rest).into_owned())
    }
}

/// Asks for a port of the guest and waits for the agent's first frame there. None when the guest does not take
/// the connection.
pub(super) fn agent_answers(socket: &Path, command: &str) -> Result<Option<()>> {
    let mut connection =
        UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
    writeln!(connection, "{command}")?;
    let mut reader = BufReader::new(connection);
    let mut answer = String::new();
    reader.read_line(&mut answer)?;
    if !answer.starts_with("OK ") {
        return Ok(None);
    }
    Ok(first_frame(&mut reader).is_ok().then_some(()))
}

/// A frame's length: the agent has spoken.
pub(super) fn first_frame(connection: &mut impl Read) -> Result<()> {
    connection.read_exact(&mut [0; 4]).context("the agent's first frame")
}

/// Removes what an earlier machine left.
pub(super) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
