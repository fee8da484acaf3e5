//! `bulkhead-rootfs`: builds what a sandbox starts from.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use bulkhead_rootfs::{disk, initramfs};
use clap::{Parser, Subcommand};

/// Builds the initramfs and the disks of Bulkhead's microVMs.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Packs the static guest agent into an initramfs.
    Initramfs {
        /// The agent's executable.
        #[arg(long)]
        agent: PathBuf,
        /// The archive to write.
        #[arg(long)]
        out: PathBuf,
    },
    /// Makes the formatted image that containers' writable disks are cloned from.
    Template {
        /// Its size in MiB.
        #[arg(long, default_value_t = 64 << 10)]
        size_mib: u64,
        /// The image to write.
        #[arg(long)]
        out: PathBuf,
    },
    /// Clones a template.
    Clone {
        /// The template.
        #[arg(long)]
        template: PathBuf,
        /// The disk to make; must not exist.
        #[arg(long)]
        out: PathBuf,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Initramfs { agent, out } => pack(&agent, &out),
        Command::Template { size_mib, out } => {
            let size = size_mib.checked_mul(1 << 20).context("the size is too big")?;
            Ok(disk::template(&out, size, disk::Purpose::WritableLayer)?)
        }
        Command::Clone { template, out } => {
            disk::clone(&template, &out)?;
            Ok(())
        }
    }
}

/// Writes beside `out` first, so that a build that is cut short leaves no half archive.
fn pack(agent: &Path, out: &Path) -> Result<()> {
    let bytes = std::fs::read(agent).with_context(|| format!("cannot read {}", agent.display()))?;
    let mut unfinished = out.as_os_str().to_owned();
    unfinished.push(".unfinished");
    let file = File::create(&unfinished).with_context(|| format!("cannot create {}", out.display()))?;
    let mut writer = BufWriter::new(file);
    initramfs::write(&bytes, &mut writer)?;
    writer.flush()?;
    std::fs::rename(&unfinished, out).with_context(|| format!("cannot write {}", out.display()))
}
