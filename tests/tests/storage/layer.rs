//! The writable layer's size, and what becomes of what is deleted.

use anyhow::ensure;

use crate::{Test, docker, host};

#[test]
fn a_full_layer_is_full_inside_and_deleted_files_go_back_to_the_host() -> Test {
    let docker = docker()?;
    let (host, _) = host()?;
    let container = docker.run_detached(&["--storage-opt", "size=64m", "busybox", "sleep", "1000"])?;
    let id = docker.inspect(container.name(), "{{.Id}}")?;
    let data_root = bulkhead_tests::Suite::from_env()?.data_root;
    let blocks = || -> anyhow::Result<u64> {
        let path = format!("{data_root}/containers/{id}/disk.img");
        Ok(host.sh("stat -c %b \"$1\"", &[&path])?.parse()?)
    };
    let full = container.exec(&["sh", "-c", "dd if=/dev/urandom of=/big bs=1M count=100 2>&1; true"])?;
    ensure!(full.contains("No space left on device"), "{full}");
    container.exec(&["sync"])?;
    let used = blocks()?;
    ensure!(used * 512 > 30 << 20, "{used} blocks");
    container.exec(&["sh", "-c", "rm /big; sync; echo fits >/small; sync; cat /small"])?;
    // Blocks are discarded when the journal has forgotten them.
    for _ in 0..100 {
        if blocks()? < used / 4 {
            return Ok(());
        }
        container.exec(&["sh", "-c", "date >/tick; sync"])?;
    }
    anyhow::bail!("{} of {used} blocks are still there", blocks()?)
}
