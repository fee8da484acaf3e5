//! Machines, from the start of their VMM's process.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use super::machine::{Contender, MARK, MEMORY_MIB, Scene};
use super::{firecracker, memory, ours};
use crate::bench::figures::Samples;
use crate::sh;

/// What a container's guest is booted with.
pub(super) const CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=k 8250.nr_uarts=1 rdinit=/init";

/// To the first line that the guest's init prints, and to the process's end after the init has ended the machine
/// at once: `NAME init`, `NAME exit`.
pub(super) fn init_and_exit(bundle: &Path, rounds: u32, firecracker: Option<&Path>) -> Result<Samples> {
    let dir = tempfile::tempdir()?;
    let initramfs = marking_initramfs(dir.path())?;
    let scene = Scene {
        bundle,
        dir: dir.path(),
        initramfs,
        cmdline: CMDLINE,
        devices: false,
        memory_mib: MEMORY_MIB,
        window_mib: 0,
    };
    let contenders = Contender::pair(firecracker);
    let mut samples = Samples::default();
    for round in 0..=rounds {
        for contender in &contenders {
            let begin = Instant::now();
            let mut machine = contender.boot(&scene)?;
            machine.wait_for_mark().with_context(|| contender.to_string())?;
            let init = begin.elapsed();
            machine.wait_for_end()?;
            let exit = begin.elapsed();
            // The first round warms caches.
            if round > 0 {
                samples.add_time(&format!("{contender} init"), init);
                samples.add_time(&format!("{contender} exit"), exit);
            }
        }
    }
    Ok(samples)
}

/// To the agent's first message, with the devices that a container's machine has; cold, and restored from a
/// machine that was saved then: `NAME cold`, `NAME restored`. And what memory the VMMs then have for
/// themselves: `NAME cold own` and so on.
pub(super) fn agent(
    bundle: &Path,
    rounds: u32,
    firecracker: Option<&Path>,
    with_restore: bool,
) -> Result<Samples> {
    let dir = tempfile::tempdir()?;
    let initramfs = bundle.join("initramfs.cpio");
    let scene = Scene {
        bundle,
        dir: dir.path(),
        initramfs,
        cmdline: CMDLINE,
        devices: true,
        memory_mib: MEMORY_MIB,
        window_mib: 0,
    };
    let our_saved = with_restore.then(|| ours::save(&scene)).transpose()?;
    let their_saved = match firecracker {
        Some(program) if with_restore => Some(firecracker::save(program, &scene)?),
        _ => None,
    };
    let mut samples = Samples::default();
    for round in 0..=rounds {
        let mut measure = |what: &str, start: &dyn Fn() -> Result<super::machine::Machine>| -> Result<()> {
            let begin = Instant::now();
            let machine = start().with_context(|| what.to_owned())?;
            let taken = begin.elapsed();
            if round > 0 {
                samples.add_time(what, taken);
                samples.add(&format!("{what} own"), memory::private(machine.process.id())?.own);
            }
            Ok(())
        };
        measure("bulkhead cold", &|| ours::boot_to_agent(&scene))?;
        if let Some(saved) = &our_saved {
            measure("bulkhead restored", &|| ours::restore(&scene, saved))?;
        }
        if let Some(program) = firecracker {
            measure("firecracker cold", &|| firecracker::boot_to_agent(program, &scene, &["--no-api"]))?;
            if let Some(saved) = &their_saved {
                measure("firecracker restored", &|| firecracker::restore(program, &scene, saved))?;
            }
        }
    }
    Ok(samples)
}

/// Boots our machine once with more on the command line, and prints its console: for whoever looks for what a
/// kernel spends its boot on (`initcall_debug loglevel=8`).
pub(super) fn show(bundle: &Path, more: &str, until_agent: bool) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let initramfs = if until_agent { bundle.join("initramfs.cpio") } else { marking_initramfs(dir.path())? };
    let cmdline = format!("{CMDLINE} {more}");
    let scene = Scene {
        bundle,
        dir: dir.path(),
        initramfs,
        cmdline: &cmdline,
        devices: until_agent,
        memory_mib: MEMORY_MIB,
        window_mib: 0,
    };
    let begin = Instant::now();
    let mut machine =
        if until_agent { ours::boot_to_agent(&scene)? } else { Contender::Bulkhead.boot(&scene)? };
    let ready = begin.elapsed();
    if until_agent {
        machine.process.kill()?;
    }
    let console = machine.wait_for_end()?;
    io::stdout().write_all(console.as_bytes())?;
    println!(
        "\n{:.1} ms to {}",
        ready.as_secs_f64() * 1e3,
        if until_agent { "the agent" } else { "the spawn" }
    );
    Ok(())
}

/// busybox, and an init that says that it has begun and ends the machine.
fn marking_initramfs(dir: &Path) -> Result<PathBuf> {
    let root = dir.join("root");
    fs::create_dir(&root)?;
    fs::copy("/bin/busybox", root.join("busybox")).context("/bin/busybox (package busybox-static)")?;
    let init = root.join("init");
    fs::write(&init, format!("#!/busybox sh\necho {MARK}\nexec /busybox reboot -f\n"))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    let archive = dir.join("initramfs.cpio");
    let pack = "cd \"$1\" && find . | cpio --quiet -o -H newc >\"$2\"";
    sh::output(Command::new("sh").args(["-euc", pack, "sh"]).arg(&root).arg(&archive))?;
    Ok(archive)
}
