//! Everything but KVM: files, programs, filesystems.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags, XattrFlags};

use super::Finding;
use crate::{
    config::Config,
    sandbox::{self, Confinement},
};

/// Below this the data root is short of space.
const LITTLE_SPACE: u64 = 2 << 30;

pub(super) fn findings(config: &Config) -> Vec<Finding> {
    let vm = &config.vm;
    let data_root = &config.layout.data_root;
    vec![
        root(rustix::process::geteuid().is_root()),
        program("vmm", &vm.vmm, "Build it (`cargo build --release`) or name it with --vmm."),
        file("kernel", &vm.kernel, "Build it (`cargo xtask kernel`) or name it with --kernel."),
        file("initramfs", &vm.initramfs, "Build it (`cargo xtask rootfs`) or name it with --initramfs."),
        mkfs(std::env::var_os("PATH").unwrap_or_default().as_os_str()),
        xattrs(data_root),
        space(data_root),
        cgroup(Path::new("/sys/fs/cgroup/cgroup.controllers")),
        jail(&vm.confinement),
        landlock(),
    ]
}

fn root(is_root: bool) -> Finding {
    if is_root {
        Finding::ok("privilege", "root")
    } else {
        Finding::failed("privilege", "not root", "Run the daemon as root: it jails its microVMs.")
    }
}

fn file(name: &'static str, path: &Path, remedy: &str) -> Finding {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() && metadata.len() > 0 => {
            Finding::ok(name, path.display().to_string())
        }
        Ok(_) => Finding::failed(name, format!("{} is not a file, or is empty", path.display()), remedy),
        Err(error) => Finding::failed(name, format!("{}: {error}", path.display()), remedy),
    }
}

fn program(name: &'static str, path: &Path, remedy: &str) -> Finding {
    let executable = std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o111 != 0);
    match file(name, path, remedy) {
        found if found.remedy.is_none() && !executable => {
            Finding::failed(name, format!("{} is not executable", path.display()), remedy)
        }
        found => found,
    }
}

fn mkfs(path: &std::ffi::OsStr) -> Finding {
    let directories = std::env::split_paths(path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    match directories.map(|directory| directory.join("mkfs.ext4")).find(|candidate| candidate.is_file()) {
        Some(found) => Finding::ok("mkfs", found.display().to_string()),
        None => Finding::failed("mkfs", "there is no mkfs.ext4", "Install e2fsprogs."),
    }
}

/// What exists of a path.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|ancestor| ancestor.is_dir()).unwrap_or(Path::new("/"))
}

/// The layer store keeps each file's owner, mode and kind in an extended attribute.
fn xattrs(data_root: &Path) -> Finding {
    const NAME: &str = "xattrs";
    let directory = existing(data_root);
    let remedy = format!(
        "Put --data-root ({}) on ext4, XFS, Btrfs, or tmpfs of Linux 6.6 and later.",
        data_root.display()
    );
    // A file without a name: nothing is left behind.
    let probe = rustix::fs::open(
        directory,
        OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC,
        Mode::RUSR | Mode::WUSR,
    )
    .and_then(|file| rustix::fs::fsetxattr(&file, "user.bulkhead.check", b"1", XattrFlags::empty()));
    match probe {
        Ok(()) => Finding::ok(NAME, format!("{} has user attributes", directory.display())),
        Err(rustix::io::Errno::ACCESS | rustix::io::Errno::ROFS | rustix::io::Errno::PERM) => {
            Finding::failed(
                NAME,
                format!("{} cannot be written", directory.display()),
                format!("Run as root, and make {} writable.", data_root.display()),
            )
        }
        Err(error) => {
            Finding::failed(NAME, format!("{}: no user attributes: {error}", directory.display()), remedy)
        }
    }
}

fn space(data_root: &Path) -> Finding {
    const NAME: &str = "space";
    let directory = existing(data_root);
    match rustix::fs::statvfs(directory) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            #[allow(clippy::cast_precision_loss, reason = "for people")]
            let detail =
                format!("{:.1} GiB free in {}", free as f64 / f64::from(1 << 30), directory.display());
            if free < LITTLE_SPACE {
                Finding::warning(NAME, detail, "Make room, or put --data-root elsewhere.")
            } else {
                Finding::ok(NAME, detail)
            }
        }
        Err(error) => Finding::failed(NAME, format!("{}: {error}", directory.display()), "Make it readable."),
    }
}

fn cgroup(controllers: &Path) -> Finding {
    const NAME: &str = "cgroup";
    let Ok(given) = std::fs::read_to_string(controllers) else {
        return Finding::warning(
            NAME,
            "cgroup version 2 is not mounted at /sys/fs/cgroup: microVMs are not limited on the host",
            "Boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 there.",
        );
    };
    let missing = sandbox::missing_controllers(&given);
    if missing.is_empty() {
        Finding::ok(NAME, "version 2")
    } else {
        Finding::warning(
            NAME,
            format!("version 2 without {}: such limits are refused", missing.join(", ")),
            "Give the daemon a cgroup with these controllers (Delegate=yes), or boot without cgroup_disable=.",
        )
    }
}

/// Starts a program as a VMM is started.
fn jail(confinement: &Confinement) -> Finding {
    const NAME: &str = "jail";
    let Some(uids) = &confinement.uids else {
        return Finding::warning(
            NAME,
            "off: a VMM that its guest takes over is the daemon's user in the host's namespaces",
            "Leave out --jail=false.",
        );
    };
    match sandbox::probe_jail(uids) {
        Ok(()) => Finding::ok(
            NAME,
            format!("own user id ({} and up) and namespaces for each VMM", uids.range.start),
        ),
        Err(error) => Finding::failed(
            NAME,
            format!("a process cannot be put into namespaces of its own: {error}"),
            "Run as root outside of other containers, with a kernel that has all namespaces, and with \
             user.max_user_namespaces over 0. Or say --jail=false and do without.",
        ),
    }
}

fn landlock() -> Finding {
    const NAME: &str = "landlock";
    match sandbox::landlock_version() {
        Some(version) => Finding::ok(NAME, format!("version {version}")),
        None => Finding::warning(
            NAME,
            "the kernel has none: one layer less around each VMM",
            "Use Linux 5.13 or later with landlock among lsm=.",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Status;

    #[test]
    fn files_and_programs() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        assert_eq!(file("kernel", &path, "Build it.").status, Status::Failed);
        std::fs::write(&path, "").unwrap();
        assert_eq!(file("kernel", &path, "Build it.").status, Status::Failed);
        std::fs::write(&path, "x").unwrap();
        assert_eq!(file("kernel", &path, "Build it.").status, Status::Ok);
        assert!(program("vmm", &path, "Build it.").detail.ends_with("is not executable"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(program("vmm", &path, "Build it.").status, Status::Ok);
        assert_eq!(file("kernel", directory.path(), "Build it.").status, Status::Failed);
    }

    #[test]
    fn what_does_not_exist_yet_is_looked_for_above() {
        let directory = tempfile::tempdir().unwrap();
        let below = directory.path().join("a/b/c");
        assert_eq!(existing(&below), directory.path());
        assert!(space(&below).detail.ends_with(&directory.path().display().to_string()));
        assert_eq!(cgroup(&below).status, Status::Warning);
        assert_eq!(root(false).status, Status::Failed);
    }
}
