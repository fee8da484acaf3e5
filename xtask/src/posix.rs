//! Test programs of others' for file systems, as crates.io has them: pjdfstest and fsx.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::sh;
use crate::tree::{self, whole};

/// By exact version, since the list of what passes is one of tests by name.
const PROGRAMS: [(&str, &str); 2] = [("pjdfstest", "0.2.2"), ("fsx", "0.3.2")];

/// The directory of the programs. Builds them where they are not in the cache yet.
pub(crate) fn ensure() -> Result<PathBuf> {
    let names = PROGRAMS.map(|(name, version)| format!("{name}-{version}")).join("-");
    let root = tree::cache_dir()?.join("tools").join(names);
    if !root.is_dir() {
        whole(&root, |new| {
            for (name, version) in PROGRAMS {
                println!("building {name} {version} for {}", root.display());
                let mut install = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
                install.args(["install", "--quiet", "--locked", "--no-track", "--root"]).arg(new);
                // What the cargo that runs us has set is not meant for it.
                install.env_remove("CARGO_TARGET_DIR").env_remove("RUSTFLAGS").current_dir(new);
                sh::run(install.args([name, "--version", &format!("={version}")]))?;
            }
            Ok(())
        })?;
    }
    Ok(root.join("bin"))
}
