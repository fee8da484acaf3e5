//! QEMU's `microvm` machine, the peer where Firecracker is not given.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::machine::{MEMORY_MIB, Machine, Scene};

/// Without devices: it is compared at boots alone.
pub(super) fn boot(scene: &Scene<'_>) -> Result<Machine> {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "microvm,x-option-roms=off,pit=off,pic=off,isa-serial=on,rtc=off", "-enable-kvm"])
        .args(["-cpu", "host", "-m", &MEMORY_MIB.to_string(), "-smp", "1"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .args(["-append", scene.cmdline, "-kernel"])
        .arg(scene.kernel())
        .arg("-initrd")
        .arg(&scene.initramfs);
    let mut process = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("start QEMU")?;
    let console = process.stdout.take().context("QEMU's stdout")?;
    Ok(Machine::new(process, File::from(OwnedFd::from(console))))
}
