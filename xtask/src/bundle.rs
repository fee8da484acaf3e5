//! Builds everything a host runs into one directory, where each part finds the others: `target/bulkhead/`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::kernel;
use crate::sh;
use crate::tree::Tree;

const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";

#[derive(Args)]
pub(crate) struct BuildArgs {
    /// Build as it is installed: slower to build, smaller and faster.
    #[arg(long)]
    dist: bool,
}

/// The built programs and images.
#[derive(Debug, Clone)]
pub(crate) struct Bundle {
    dir: PathBuf,
}

impl Bundle {
    /// The one that an earlier build left.
    pub(crate) fn existing(tree: &Tree) -> Result<Bundle> {
        let bundle = Bundle { dir: tree.target().join("bulkhead") };
        for file in [bundle.daemon(), bundle.vmm(), bundle.kernel(), bundle.initramfs()] {
            if !file.is_file() {
                bail!("{} is not there: `cargo xtask build` makes it", file.display());
            }
        }
        Ok(bundle)
    }

    /// The directory that holds them.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn daemon(&self) -> PathBuf {
        self.dir.join("bulkheadd")
    }

    /// The program for people.
    pub(crate) fn cli(&self) -> PathBuf {
        self.dir.join("bulkhead")
    }

    pub(crate) fn vmm(&self) -> PathBuf {
        self.dir.join("bulkhead-vmm")
    }

    pub(crate) fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    pub(crate) fn initramfs(&self) -> PathBuf {
        self.dir.join("initramfs.cpio")
    }
}

pub(crate) fn run(tree: &Tree, args: &BuildArgs) -> Result<()> {
    let bundle = build(tree, if args.dist { "dist" } else { "release" })?;
    println!("{}", bundle.dir().display());
    Ok(())
}

/// Builds with the Cargo profile, and collects.
pub(crate) fn build(tree: &Tree, profile: &str) -> Result<Bundle> {
    let bundle = Bundle { dir: tree.target().join("bulkhead") };
    fs::create_dir_all(bundle.dir())?;
    let mut programs = cargo(tree);
    programs.args(["build", "--profile", profile, "-p", "bulkhead-daemon", "-p", "bulkhead-rootfs"]);
    sh::run(&mut programs)?;
    let vmm = build_static(tree, "bulkhead-vmm", profile)?;
    let agent = build_static(tree, "bulkhead-agent", "agent")?;
    let built = tree.target().join(profile);
    for program in ["bulkheadd", "bulkhead", "bulkhead-rootfs"] {
        place(&built.join(program), &bundle.dir().join(program))?;
    }
    place(&vmm, &bundle.vmm())?;
    sh::run(
        Command::new(built.join("bulkhead-rootfs"))
            .args(["initramfs", "--agent"])
            .arg(agent)
            .arg("--out")
            .arg(bundle.initramfs()),
    )?;
    place(&kernel::ensure(tree, kernel::Set::Guest)?, &bundle.kernel())?;
    Ok(bundle)
}

/// A static executable with no interpreter. The agent must be one, as the only file in its initramfs; for the
/// VMM, of which one is started for every container, linking at each start would be a third of what it takes
/// to be ready. `--target` is what makes the flag apply to the program and not to what builds it.
fn build_static(tree: &Tree, program: &str, profile: &str) -> Result<PathBuf> {
    let mut build = cargo(tree);
    build.args(["build", "--profile", profile, "--target", STATIC_TARGET, "-p", program, "--bin", program]);
    build.args(["--config", &format!("target.{STATIC_TARGET}.rustflags=['-Ctarget-feature=+crt-static']")]);
    sh::run(&mut build)?;
    Ok(tree.target().join(STATIC_TARGET).join(profile).join(program))
}

/// The guest that attacks its VMM, as an image that a VMM boots in place of a kernel. Its profile is the agent's, since
/// there is nobody to unwind a panic to.
pub(crate) fn build_hostile_guest(tree: &Tree) -> Result<PathBuf> {
    let mut guest = cargo(tree);
    guest.args(["build", "--quiet", "--profile", "agent", "--target", STATIC_TARGET]);
    guest.args(["-p", "bulkhead-hostile-guest", "--features", "image", "--bin", "hostile-guest"]);
    sh::run(&mut guest)?;
    Ok(tree.target().join(STATIC_TARGET).join("agent/hostile-guest"))
}

/// Puts a file into the bundle under a new inode, so that one that runs, or is mapped, stays as it was.
fn place(from: &Path, to: &Path) -> Result<()> {
    let new = to.with_extension("new");
    fs::copy(from, &new).with_context(|| format!("copy {}", from.display()))?;
    fs::rename(&new, to).with_context(|| format!("put {} in place", to.display()))
}

/// Cargo in the tree.
pub(crate) fn cargo(tree: &Tree) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(tree.root()).env("CARGO_TARGET_DIR", tree.target());
    // Set by the cargo that runs xtask; cargo would pass them on as if they were the caller's wish.
    cargo.env_remove("CARGO_MANIFEST_DIR").env_remove("CARGO_PKG_NAME").env_remove("RUSTFLAGS");
    cargo
}
