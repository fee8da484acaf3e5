//! Programs of the machine, with the libraries that they are linked with, as a layer for an image.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::image::LayerBuilder;

/// Names the directory of pjdfstest and fsx in the environment of tests.
pub const PROGRAMS_VARIABLE: &str = "BULKHEAD_TEST_POSIX";

/// The path of a test program for file systems.
///
/// # Errors
/// When the tests were started in another way than by xtask.
pub fn program(name: &str) -> Result<PathBuf> {
    let dir = env::var_os(PROGRAMS_VARIABLE)
        .context("end-to-end tests are run by `cargo xtask test e2e [FILTER]`")?;
    Ok(Path::new(&dir).join(name))
}

/// Adds programs to a layer, as `usr/bin/NAME`, each with its libraries and its loader.
///
/// # Errors
/// When one is not there, or not a program.
pub fn add_programs(layer: &mut LayerBuilder, programs: &[PathBuf]) -> Result<()> {
    let mut libraries = std::collections::BTreeSet::new();
    for program in programs {
        let name = program.file_name().and_then(|name| name.to_str()).context("a program's name")?;
        let bytes = std::fs::read(program).with_context(|| program.display().to_string())?;
        layer.file(&format!("usr/bin/{name}"), 0o755, &bytes)?;
        let listed = Command::new("ldd").arg(program).output()?;
        ensure!(listed.status.success(), "ldd {}: {}", program.display(), listed.status);
        libraries.extend(libraries_of(&String::from_utf8(listed.stdout)?)?);
    }
    for library in libraries {
        let bytes = std::fs::read(&library).with_context(|| library.clone())?;
        layer.file(library.trim_start_matches('/'), 0o755, &bytes)?;
    }
    Ok(())
}

/// The paths in what `ldd` prints: `NAME => /PATH (0x…)`, or the loader's `/PATH (0x…)`.
fn libraries_of(listed: &str) -> Result<Vec<String>> {
    let mut paths = Vec::new();
    for line in listed.lines() {
        if line.contains("not found") {
            bail!("{}", line.trim());
        }
        let path = line.split_whitespace().find(|word| word.starts_with('/'));
        paths.extend(path.map(str::to_owned));
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_those_with_a_path() {
        let listed =
            "\tlinux-vdso.so.1 (0x0)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x1)\n\t/lib64/ld.so.2 (0x2)\n";
        assert_eq!(libraries_of(listed).unwrap(), ["/lib/x/libc.so.6", "/lib64/ld.so.2"]);
        assert!(libraries_of("\tlibacl.so.1 => not found\n").is_err());
    }
}
