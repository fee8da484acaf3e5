//! Puts the built programs where a system keeps them, with a systemd unit.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use crate::bundle;
use crate::tree::Tree;

#[derive(Args)]
pub(crate) struct InstallArgs {
    /// Where programs go.
    #[arg(long, default_value = "/usr", value_name = "DIR")]
    prefix: PathBuf,
    /// Install below this directory instead of `/`, for packages.
    #[arg(long, value_name = "DIR")]
    destdir: Option<PathBuf>,
}

pub(crate) fn run(tree: &Tree, args: &InstallArgs) -> Result<()> {
    let bundle = bundle::build(tree, "dist")?;
    let root = args.destdir.clone().unwrap_or_else(|| PathBuf::from("/"));
    let under = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    let bin = under(&args.prefix.join("bin"));
    let lib = under(&args.prefix.join("lib/bulkhead"));
    let unit = under(Path::new("/usr/lib/systemd/system/bulkhead.service"));
    put(&fs::read(bundle.daemon())?, &bin.join("bulkheadd"), 0o755)?;
    put(&fs::read(bundle.cli())?, &bin.join("bulkhead"), 0o755)?;
    put(&fs::read(bundle.vmm())?, &bin.join("bulkhead-vmm"), 0o755)?;
    put(&fs::read(bundle.kernel())?, &lib.join("vmlinux"), 0o644)?;
    put(&fs::read(bundle.initramfs())?, &lib.join("initramfs.cpio"), 0o644)?;
    put(service(&args.prefix).as_bytes(), &unit, 0o644)?;
    put(SOCKET.as_bytes(), &unit.with_extension("socket"), 0o644)?;
    println!("start it: systemctl daemon-reload && systemctl enable --now bulkhead");
    println!("use it:   docker -H unix:///run/bulkhead.sock run --rm busybox uname -r");
    Ok(())
}

fn put(contents: &[u8], to: &Path, mode: u32) -> Result<()> {
    let dir = to.parent().context("a path without a directory")?;
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let new = to.with_extension("new");
    fs::write(&new, contents).with_context(|| format!("write {}", new.display()))?;
    fs::set_permissions(&new, fs::Permissions::from_mode(mode))?;
    fs::rename(&new, to).with_context(|| format!("put {} in place", to.display()))?;
    println!("installed {}", to.display());
    Ok(())
}

/// For those who enable it: systemd then opens the socket itself, early, and starts the daemon at the first client. The
/// daemon serves what it is passed unless it is told otherwise.
const SOCKET: &str = "[Unit]
Description=Bulkhead's API

[Socket]
ListenStream=/run/bulkhead.sock
SocketMode=0660

[Install]
WantedBy=sockets.target
";

/// The daemon may stop at any time while containers run on: only its own process is stopped, and a crash brings it
/// back.
fn service(prefix: &Path) -> String {
    let prefix = prefix.display();
    format!(
        "[Unit]
Description=Bulkhead, containers in microVMs
Documentation=https://github.com/bulkhead/bulkhead
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
ExecStart={prefix}/bin/bulkheadd --kernel {prefix}/lib/bulkhead/vmlinux --initramfs {prefix}/lib/bulkhead/initramfs.cpio
ExecReload=/bin/kill -HUP $MAINPID
KillMode=process
Delegate=yes
Restart=on-failure
LimitNOFILE=infinity
TasksMax=infinity
OOMScoreAdjust=-500

[Install]
WantedBy=multi-user.target
"
    )
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_unit_names_the_installed_files_and_leaves_containers_running() {
        let unit = super::service(std::path::Path::new("/opt/b"));
        assert!(
            unit.contains("ExecStart=/opt/b/bin/bulkheadd --kernel /opt/b/lib/bulkhead/vmlinux"),
            "{unit}"
        );
        assert!(unit.contains("KillMode=process"));
    }
}
