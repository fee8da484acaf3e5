//! What all tests of a run share: one daemon, one registry, one image. `cargo xtask test` starts it and passes it on
//! in the environment, since every test is a process of its own.

use std::env;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::daemon::{Daemon, DaemonOptions};
use crate::docker::Docker;
use crate::host::Host;
use crate::http::Client;
use crate::image::Image;
use crate::registry::Registry;

const VARIABLE: &str = "BULKHEAD_TEST_SUITE";

/// Names the directory with the packages for Python that tests use.
pub const PYTHON_VARIABLE: &str = "BULKHEAD_TEST_PYTHON";

/// Names Node.js.
pub const NODE_VARIABLE: &str = "BULKHEAD_TEST_NODE";

/// Names the script that is `devcontainer`.
pub const DEVCONTAINER_VARIABLE: &str = "BULKHEAD_TEST_DEVCONTAINER";

/// The shared daemon and registry, as a test sees them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Suite {
    /// The daemon's socket here.
    pub docker_socket: String,
    /// The daemon's socket in the host.
    pub inner_socket: String,
    /// The daemon's data root, in the host.
    pub data_root: String,
    /// The registry's address in the host.
    pub registry: String,
    /// The registry here.
    pub registry_here: String,
    /// The registry's files, in the host.
    pub registry_storage: String,
}

impl Suite {
    /// The suite of this run.
    ///
    /// # Errors
    /// When the tests were started in another way than by xtask.
    pub fn from_env() -> Result<Suite> {
        let text =
            env::var(VARIABLE).context("end-to-end tests are run by `cargo xtask test e2e [FILTER]`")?;
        serde_json::from_str(&text).with_context(|| format!("${VARIABLE}"))
    }

    /// The CLI on the shared daemon.
    #[must_use]
    pub fn docker(&self) -> Docker {
        Docker::new(&self.docker_socket)
    }

    /// The shared daemon's API.
    #[must_use]
    pub fn api(&self) -> Client {
        Client::new(&self.docker_socket)
    }

    /// Uploads an image.
    ///
    /// # Errors
    /// When the registry refuses it.
    pub fn push(&self, image: &Image, repository: &str, tag: &str) -> Result<()> {
        crate::registry::push(&Client::new(&self.registry_here), image, repository, tag)
    }

    /// A daemon of a test's own, with the shared registry as its Docker Hub.
    #[must_use]
    pub fn daemon_options(&self) -> DaemonOptions {
        DaemonOptions { registry: Some(self.registry.clone()), ..DaemonOptions::default() }
    }
}

/// Owns what a [`Suite`] names.
#[derive(Debug)]
pub struct SuiteOwner {
    daemon: Daemon,
    registry: Registry,
}

impl SuiteOwner {
    /// Starts registry and daemon, uploads busybox as Docker Hub's `busybox`, and pulls it.
    ///
    /// # Errors
    /// When one of them does not start.
    pub fn start(host: &Host, bundle: &Path) -> Result<SuiteOwner> {
        let registry = Registry::start(host)?;
        registry.push(&Image::busybox()?, "library/busybox", "latest")?;
        let options =
            DaemonOptions { registry: Some(registry.address().to_owned()), ..DaemonOptions::default() };
        let daemon = Daemon::start_from(host, bundle, options)?;
        daemon.docker().ok(&["pull", "busybox"])?;
        Ok(SuiteOwner { daemon, registry })
    }

    /// What tests get: a variable's name and value.
    ///
    /// # Errors
    /// Never, but for memory.
    pub fn to_env(&self) -> Result<(&'static str, String)> {
        let suite = Suite {
            docker_socket: self.daemon.socket().to_owned(),
            inner_socket: self.daemon.inner_socket(),
            data_root: self.daemon.data_root(),
            registry: self.registry.address().to_owned(),
            registry_here: self.registry.forwarded().to_owned(),
            registry_storage: self.registry.storage(),
        };
        Ok((VARIABLE, serde_json::to_string(&suite)?))
    }

    /// Stops the daemon, which must have nothing left of the containers that all tests removed.
    ///
    /// # Errors
    /// When something is left, by name.
    pub fn finish(mut self) -> Result<()> {
        let left = self.daemon.settled_leftovers()?;
        self.daemon.stop()?;
        if !left.is_empty() {
            bail!("left behind after all tests:\n{left}");
        }
        Ok(())
    }

    /// The end of the daemon's log, for a failed run.
    ///
    /// # Errors
    /// When the host is gone.
    pub fn daemon_log(&self) -> Result<String> {
        self.daemon.log()
    }
}
