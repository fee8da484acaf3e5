//! Builds the kernels that `kernel-config/` describes, once for each set of options, source and compiler.
//!
//! ```text
//! versions.toml, fragments ─▶ requested options ─┐
//! dpkg: source version ──────────────────────────┼─▶ key ─▶ cache/kernel/SET-KEY/vmlinux, there already?
//! gcc --version ─────────────────────────────────┘                │ no
//!             allnoconfig + options → olddefconfig → all there? → make vmlinux → strip → move into place
//! ```

mod build;
mod options;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use self::options::Options;
use crate::sh;
use crate::tree::{self, Tree};

/// Raised when the way of building changes what comes out.
const RECIPE: &str = "1";

#[derive(Args)]
pub(crate) struct KernelArgs {
    /// Which kernel. Default: both.
    #[arg(value_enum)]
    set: Option<Set>,
    /// Check that every requested option survives, and build nothing.
    #[arg(long)]
    config_only: bool,
}

/// One of the two kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Set {
    /// What every microVM boots.
    Guest,
    /// What `cargo xtask host` boots.
    Testhost,
}

impl Set {
    fn name(self) -> &'static str {
        match self {
            Set::Guest => "guest",
            Set::Testhost => "testhost",
        }
    }
}

/// `kernel-config/versions.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Versions {
    source: SourceVersion,
    kernel: Kernels,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SourceVersion {
    package: String,
    tarball: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kernels {
    guest: KernelSpec,
    testhost: KernelSpec,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct KernelSpec {
    fragments: Vec<String>,
    objects: u32,
}

/// A kernel that can be built, or was.
struct Plan {
    set: Set,
    options: Options,
    source_version: String,
    tarball: PathBuf,
    objects: u32,
    /// `cache/kernel`
    cache: PathBuf,
    key: String,
}

pub(crate) fn run(tree: &Tree, args: &KernelArgs) -> Result<()> {
    for set in args.set.map_or_else(|| vec![Set::Guest, Set::Testhost], |set| vec![set]) {
        if args.config_only {
            build::check(&Plan::new(tree, set)?)?;
            println!("kernel {}: every requested option survives", set.name());
        } else {
            println!("{}", ensure(tree, set)?.display());
        }
    }
    Ok(())
}

/// The path of the kernel, built now if it is not cached.
pub(crate) fn ensure(tree: &Tree, set: Set) -> Result<PathBuf> {
    let plan = Plan::new(tree, set)?;
    let vmlinux = plan.vmlinux();
    if !vmlinux.is_file() {
        build::build(&plan)?;
    }
    Ok(vmlinux)
}

/// Where the kernel is, or would be, once built.
pub(crate) fn cached(tree: &Tree, set: Set) -> Result<PathBuf> {
    Ok(Plan::new(tree, set)?.vmlinux())
}

impl Plan {
    fn new(tree: &Tree, set: Set) -> Result<Plan> {
        let dir = tree.root().join("kernel-config");
        let versions = read_versions(&dir)?;
        let spec = match set {
            Set::Guest => versions.kernel.guest,
            Set::Testhost => versions.kernel.testhost,
        };
        let options = Options::read(&dir.join("fragments"), &spec.fragments)?;
        let source_version = package_version(&versions.source.package)?;
        let compiler = sh::output(Command::new("gcc").arg("--version"))?;
        let compiler = compiler.lines().next().unwrap_or_default();
        let key = key(&[RECIPE, set.name(), &options.to_text(), &source_version, compiler]);
        let cache = tree::cache_dir()?.join("kernel");
        Ok(Plan {
            set,
            options,
            source_version,
            tarball: versions.source.tarball,
            objects: spec.objects,
            cache,
            key,
        })
    }

    fn directory(&self) -> PathBuf {
        self.cache.join(format!("{}-{}", self.set.name(), self.key))
    }

    fn vmlinux(&self) -> PathBuf {
        self.directory().join("vmlinux")
    }
}

fn read_versions(dir: &Path) -> Result<Versions> {
    let path = dir.join("versions.toml");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("parse {}", path.display()))
}

fn package_version(package: &str) -> Result<String> {
    sh::output(Command::new("dpkg-query").args(["--show", "--showformat=${Version}", package])).with_context(
        || format!("the kernel's source, package {package}, is not installed (`cargo xtask deps`)"),
    )
}

fn key(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(u64::try_from(part.len()).unwrap_or(u64::MAX).to_le_bytes());
        hash.update(part);
    }
    hex::encode(&hash.finalize()[..8])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_changes_with_each_part_and_where_parts_meet() {
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
        assert_ne!(key(&["a"]), key(&["a", ""]));
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
    }

    #[test]
    fn the_tree_s_fragments_parse_and_name_no_option_twice_in_one_file() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernel-config");
        let versions = read_versions(&dir).unwrap();
        for spec in [versions.kernel.guest, versions.kernel.testhost] {
            assert!(!Options::read(&dir.join("fragments"), &spec.fragments).unwrap().to_text().is_empty());
        }
    }
}
