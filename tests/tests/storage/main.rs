//! Volumes, bind mounts and the writable layer: the real docker CLI on the shared daemon.

mod binds;
mod disks;
mod layer;
mod locks;
mod posix;
mod space;
mod sqlite;
mod volumes;
mod window;

use anyhow::Result;
use bulkhead_tests::{Docker, Host, Suite, host::Scratch};

/// An error fails the test, with its whole story.
type Test = anyhow::Result<()>;

fn docker() -> Result<Docker> {
    Ok(Suite::from_env()?.docker())
}

/// The host, and a directory of it.
fn host() -> Result<(Host, Scratch)> {
    let host = Host::from_env()?;
    let scratch = host.scratch()?;
    Ok((host, scratch))
}

/// A volume's name that nobody else uses; what has it is removed when this is dropped.
struct Volume {
    docker: Docker,
    name: String,
}

impl Volume {
    fn new(docker: &Docker, purpose: &str) -> Self {
        let name = format!("test-{purpose}-{}", std::process::id());
        Self { docker: docker.clone(), name }
    }

    /// As `-v` takes it.
    fn at(&self, target: &str) -> String {
        format!("{}:{target}", self.name)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = self.docker.run(&["volume", "rm", "-f", &self.name]);
    }
}
