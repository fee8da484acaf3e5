//! Memory that containers share as their `/dev/shm`: a tmpfs of the first, mounted again for each that joins it. So
//! it lives until the last of them is gone, in whatever order they go.

use std::{
    ffi::CString,
    fs,
    path::{Path, PathBuf},
};

use bulkhead_agent_api::{SHARED_MEMORY, SharedMemory};
use rustix::{io::Errno, mount::MountFlags};

use crate::error::{Context, Result, conflict, invalid};

fn place(container: &str) -> PathBuf {
    Path::new(SHARED_MEMORY).join(container)
}

/// Mounts a container's: where.
///
/// # Errors
/// Of kind `Conflict`: the other container has none.
pub(super) fn mount(container: &str, memory: &SharedMemory) -> Result<PathBuf> {
    let path = place(container);
    fs::create_dir_all(&path).context(format_args!("mkdir {}", path.display()))?;
    let mounted = match memory {
        SharedMemory::Own(size) => {
            let options = CString::new(format!("mode=1777,size={size}"))
                .map_err(|_| invalid("a size of shared memory"))?;
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            rustix::mount::mount("shm", &path, "tmpfs", flags, options.as_c_str())
                .context(format_args!("mount {}", path.display()))
        }
        SharedMemory::Of(other) => match rustix::mount::mount_bind(place(other), &path) {
            Err(Errno::NOENT) => Err(conflict(format!("the container {other} shares no memory"))),
            other => other.context(format_args!("mount {}", path.display())),
        },
    };
    mounted.inspect_err(|_| drop(fs::remove_dir(&path)))?;
    Ok(path)
}
