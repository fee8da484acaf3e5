//! QEMU's software CPU as the machine: it emulates AMD SVM with nested paging, so the Linux in it has a true
//! `/dev/kvm` whatever the outer machine's is like.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::thread::CpuSet;
use serde::{Deserialize, Serialize};

use super::state::StateDir;
use super::{affinity, clock, serve, wire};
use crate::sh;

/// What a test host is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) kernel: PathBuf,
    pub(crate) memory_mib: u32,
    /// More than one CPU is quicker only where the outer machine has them to spare, and less reliable:
    /// emulated CPUs lose races that real ones win.
    pub(crate) cpus: u32,
    /// A disk for data roots; 0: none.
    #[serde(default)]
    pub(crate) disk_gib: u32,
}

/// How long a boot may take on a machine with much else to do. It takes about two seconds on an idle one.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// Starts QEMU and waits until the command server listens. Gives the process and the port.
pub(crate) fn boot(machine: &Machine, target: &Path, dir: &StateDir) -> Result<(Child, u16)> {
    if !machine.kernel.is_file() {
        bail!("no test host kernel at {}: `cargo xtask kernel testhost` builds it", machine.kernel.display());
    }
    let port = free_port()?;
    let console = dir.console();
    File::create(&console)?;
    let log = File::create(dir.qemu_log())?;
    let mut qemu = command(machine, target, dir, port)?;
    if machine.disk_gib > 0 {
        make_disk(&dir.disk(), machine.disk_gib)?;
        // What an end of QEMU leaves of it is thrown away, so nothing is flushed.
        let drive =
            format!("if=none,id=data,format=raw,cache=unsafe,discard=unmap,file={}", option(&dir.disk())?);
        qemu.arg("-drive").arg(drive).args(["-device", "virtio-blk-device,drive=data"]);
    }
    qemu.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let start = |cpu: Option<CpuSet>| {
        let cpu = cpu.filter(|_| machine.cpus == 1);
        // SAFETY: each is one system call; they neither allocate nor lock. The machine outlives this command and
        // its terminal.
        unsafe {
            qemu.pre_exec(move || {
                if let Some(cpu) = &cpu {
                    rustix::thread::sched_setaffinity(None, cpu)?;
                }
                Ok(rustix::process::setsid().map(|_| ())?)
            });
        }
        qemu.spawn()
    };
    let child = affinity::on_a_cpu(start);
    let mut child = child.context("start qemu-system-x86_64 (`cargo xtask deps` installs it)")?;
    match wait_until_ready(&mut child, &console) {
        Ok(()) => Ok((child, port)),
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(error.context(format!("test host\n{}", tails(dir))))
        }
    }
}

/// An empty ext4 of holes.
fn make_disk(path: &Path, gib: u32) -> Result<()> {
    let _ = fs::remove_file(path);
    File::create(path)?.set_len(u64::from(gib) << 30)?;
    sh::run(Command::new("mkfs.ext4").args(["-q", "-F", "-E", "nodiscard"]).arg(path))
}

fn command(machine: &Machine, target: &Path, dir: &StateDir, port: u16) -> Result<Command> {
    let init = std::env::current_exe()?;
    let kernel_arguments = kernel_arguments(&init, target, dir.path())?;
    let mut qemu = Command::new("qemu-system-x86_64");
    // With one CPU there is no thread to win, and the single-threaded translator is the better tested.
    let threads = if machine.cpus == 1 { "single" } else { "multi" };
    qemu.arg("-accel")
        .arg(format!("tcg,thread={threads},tb-size=1024"))
        // XSAVE is hidden: the nested XSAVE state of QEMU 7.2 is doubtful.
        .args(["-cpu", "EPYC,+svm,+npt,-xsave"])
        .args(["-M", "microvm,acpi=on,rtc=on", "-global", "virtio-mmio.force-legacy=false"])
        .arg("-m")
        .arg(machine.memory_mib.to_string())
        .arg("-smp")
        .arg(machine.cpus.to_string())
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .arg("-serial")
        .arg(format!("file:{}", option(&dir.console())?))
        .args(["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"])
        .args(["-device", "virtio-9p-device,fsdev=root,mount_tag=root"])
        .arg("-fsdev")
        .arg(format!("local,id=target,path={},security_model=none,multidevs=remap", option(target)?))
        .args(["-device", "virtio-9p-device,fsdev=target,mount_tag=target"])
        // Nothing inside reaches the world; the world reaches one port, on loopback.
        .arg("-netdev")
        .arg(format!("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:{}", wire::PORT))
        .args(["-device", "virtio-net-device,netdev=net"])
        .args(["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-device,rng=rng"])
        // With more than one CPU an interrupt is lost now and then (see `affinity`): the local APIC's timer is then
        // pending (IRR) while the CPU halts, and all stands still until another interrupt comes. A balloon that is
        // asked for its figures raises one a second.
        .args(["-device", "virtio-balloon-device"])
        .args(["-global", "virtio-balloon-device.guest-stats-polling-interval=1"])
        .arg("-kernel")
        .arg(&machine.kernel)
        .arg("-append")
        .arg(kernel_arguments);
    Ok(qemu)
}

fn kernel_arguments(init: &Path, target: &Path, state: &Path) -> Result<String> {
    let text = format!(
        "tsc_early_khz={} console=ttyS0 quiet panic=-1 reboot=t mitigations=off kvm_amd.nested=0 \
         root=root rootfstype=9p rootflags=trans=virtio,version=9p2000.L,msize=524288,cache=loose ro \
         init={} -- host-init --target {} --state {}",
        clock::tsc_khz(),
        word(init)?,
        word(target)?,
        word(state)?,
    );
    if text.len() >= 2048 {
        bail!("the work tree's path is too long for a kernel command line");
    }
    Ok(text)
}

/// A path as one word of a kernel command line.
fn word(path: &Path) -> Result<&str> {
    let text = path.to_str().filter(|text| !text.contains(|c: char| c.is_whitespace() || c == '"'));
    text.with_context(|| format!("{}: the test host needs a path without blanks and quotes", path.display()))
}

/// A path inside a QEMU option, where a comma is doubled.
fn option(path: &Path) -> Result<String> {
    Ok(word(path)?.replace(',', ",,"))
}

/// A loopback port that was free a moment ago. Should another take it before QEMU does, QEMU says so.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

fn wait_until_ready(child: &mut Child, console: &Path) -> Result<()> {
    let start = Instant::now();
    loop {
        if fs::read(console).is_ok_and(|text| contains(&text, serve::READY.as_bytes())) {
            return Ok(());
        }
        if let Some(status) = child.try_wait()? {
            bail!("QEMU ended while the test host started: {status}");
        }
        if start.elapsed() > BOOT_LIMIT {
            bail!("the test host did not come up in {} s", BOOT_LIMIT.as_secs());
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

/// The ends of the two logs, for an error message.
fn tails(dir: &StateDir) -> String {
    [dir.qemu_log(), dir.console()]
        .iter()
        .filter_map(|path| {
            let text = fs::read(path).ok()?;
            let text = String::from_utf8_lossy(&text).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            let tail = lines.get(lines.len().saturating_sub(20)..).unwrap_or_default().join("\n");
            (!tail.is_empty()).then(|| format!("--- end of {}\n{tail}", path.display()))
        })
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_a_kernel_command_line_cannot_hold_are_refused() {
        assert!(word(Path::new("/a b")).is_err());
        assert!(word(Path::new("/a\"b")).is_err());
        assert_eq!(word(Path::new("/a,b")).unwrap(), "/a,b");
        assert_eq!(option(Path::new("/a,b")).unwrap(), "/a,,b");
    }
}
