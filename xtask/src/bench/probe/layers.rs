//! Two ways of giving a layer to a guest, in our machine: the layer's directory over virtio-fs, with and without a
//! window, and one EROFS image of it as a disk.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use bulkhead_vmm_api::{Request, ShareKind};

use super::boot::CMDLINE;
use super::machine::Scene;
use super::{memory, ours};
use crate::bench::figures::Samples;
use crate::sh;

/// For the layer's whole content, read into the guest's cache.
const MEMORY_MIB: u32 = 512;
const WINDOW_MIB: u32 = 256;

/// What the guest prints last.
const LAST: &str = "read-large-again ";

/// What is to be measured on.
pub(super) struct Layer<'a> {
    /// As the store has it.
    pub(super) directory: &'a Path,
    /// The same as an EROFS image.
    pub(super) erofs: &'a Path,
    /// The program that measures, static.
    pub(super) program: &'a Path,
}

/// `WAY mount`: from the start of the VMM until the layer is mounted; `WAY walk` and what else the program prints; and
/// `WAY guest`, `WAY own`: the memory that the VMM then has for itself.
pub(super) fn ways(bundle: &Path, layer: &Layer<'_>, rounds: u32) -> Result<Samples> {
    let dir = tempfile::tempdir()?;
    let initramfs = initramfs(dir.path(), layer.program)?;
    let mut samples = Samples::default();
    for round in 0..=rounds {
        for (way, window_mib) in [("directory", 0), ("window", WINDOW_MIB), ("erofs", 0)] {
            let cmdline = format!("{CMDLINE} LAYER={way}");
            let scene = Scene {
                bundle,
                dir: dir.path(),
                initramfs: initramfs.clone(),
                cmdline: &cmdline,
                devices: true,
                memory_mib: MEMORY_MIB,
                window_mib,
            };
            let begin = Instant::now();
            let mut machine = ours::boot(&scene)?;
            let control = ours::connect(&scene)?;
            if way == "erofs" {
                let image = File::open(layer.erofs).context("the EROFS image")?;
                let request = Request::AttachDisk { id: ours::DISK.into(), read_only: true };
                ours::call(&control, &request, &[image.as_fd()])?;
            } else {
                let directory = File::open(layer.directory).context("the layer")?;
                let (tag, name) = (ours::TAG.into(), "layer".into());
                let request = Request::AttachShare { tag, name, kind: ShareKind::Layer };
                ours::call(&control, &request, &[directory.as_fd()])?;
            }
            machine.wait_for_mark().with_context(|| way.to_owned())?;
            let mounted = begin.elapsed();
            let printed = machine.wait_for_line(LAST).with_context(|| way.to_owned())?;
            // The first round warms caches.
            if round > 0 {
                samples.add_time(&format!("{way} mount"), mounted);
                for (name, nanoseconds) in printed.lines().filter_map(|line| line.trim().split_once(' ')) {
                    let Ok(nanoseconds) = nanoseconds.parse() else { continue };
                    samples.add(&format!("{way} {name}"), nanoseconds);
                }
                let memory::Private { guest, own } = memory::private(machine.process.id())?;
                samples.add(&format!("{way} guest"), guest);
                samples.add(&format!("{way} own"), own);
            }
        }
    }
    Ok(samples)
}

/// busybox, the program, and an init that mounts the layer and runs it.
fn initramfs(dir: &Path, program: &Path) -> Result<PathBuf> {
    const INIT: &str = r#"#!/busybox sh
/busybox mkdir /dev /fs /mnt
/busybox mount -t devtmpfs dev /dev
if [ "$LAYER" = erofs ]; then
    until /busybox mount -t erofs -o ro /dev/vda /mnt; do /busybox usleep 1000; done 2>/dev/null
else
    /busybox mount -t virtiofs -o ro layers /fs
    until [ -d /fs/layer ]; do /busybox usleep 1000; done
    /busybox mount -o bind /fs/layer /mnt
fi
echo init-has-begun
/files /mnt/tree /mnt/large
exec /busybox sleep 100000
"#;
    let root = dir.join("root");
    fs::create_dir(&root)?;
    fs::copy("/bin/busybox", root.join("busybox")).context("/bin/busybox (package busybox-static)")?;
    fs::copy(program, root.join("files")).context("the program")?;
    let init = root.join("init");
    fs::write(&init, INIT)?;
    for name in ["init", "files"] {
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(0o755))?;
    }
    let archive = dir.join("initramfs.cpio");
    let pack = "cd \"$1\" && find . | cpio --quiet -o -H newc >\"$2\"";
    sh::output(Command::new("sh").args(["-euc", pack, "sh"]).arg(&root).arg(&archive))?;
    Ok(archive)
}
