//! Debian's docker-registry on the host's loopback.

use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::host::{Forward, Host, Scratch};
use crate::http::Client;
use crate::image::{Blob, Image};

/// A registry that runs while this lives.
#[derive(Debug)]
pub struct Registry {
    process: Child,
    scratch: Scratch,
    address: String,
    forward: Forward,
}

const CONFIG: &str = "version: 0.1
log:
  level: info
  formatter: json
storage:
  filesystem:
    rootdirectory: DIRECTORY
  delete:
    enabled: true
http:
  addr: 127.0.0.1:0
";

impl Registry {
    /// Starts one on a free port.
    ///
    /// # Errors
    /// When it does not start, with its log.
    pub fn start(host: &Host) -> Result<Registry> {
        let scratch = host.scratch()?;
        let (config, log) = (scratch.join("config.yml"), scratch.join("log"));
        let text = CONFIG.replace("DIRECTORY", &scratch.join("data"));
        host.sh("printf %s \"$1\" > \"$2\"; : > \"$3\"", &[&text, &config, &log])?;
        let mut process = spawn_logged(host, &log, "docker-registry", &["serve", &config])?;
        let address = match wait_for_address(host, &log, &mut process) {
            Ok(address) => address,
            Err(error) => {
                let _ = process.kill();
                let _ = process.wait();
                return Err(error);
            }
        };
        let forward = host.forward(&address)?;
        Ok(Registry { process, scratch, address, forward })
    }

    /// Its address in the host.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A client here.
    #[must_use]
    pub fn client(&self) -> Client {
        Client::new(self.forward.address())
    }

    /// Where a client here connects: a path, or `ADDRESS:PORT`.
    #[must_use]
    pub fn forwarded(&self) -> &str {
        self.forward.address()
    }

    /// Where it keeps blobs, in the host.
    #[must_use]
    pub fn storage(&self) -> String {
        self.scratch.join("data")
    }

    /// Uploads an image as `repository:tag`.
    ///
    /// # Errors
    /// When the registry refuses it.
    pub fn push(&self, image: &Image, repository: &str, tag: &str) -> Result<()> {
        push(&self.client(), image, repository, tag)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // The program in the test host goes with its client here.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Uploads an image through the client.
///
/// # Errors
/// When the registry refuses it.
pub fn push(client: &Client, image: &Image, repository: &str, tag: &str) -> Result<()> {
    let config = image.config();
    for blob in image.layers().into_iter().chain([Blob { bytes: &config }]) {
        push_blob(client, repository, blob).with_context(|| format!("push {}", blob.digest()))?;
    }
    let (manifest, media_type) = image.manifest();
    let path = format!("/v2/{repository}/manifests/{tag}");
    client
        .request("PUT", &path, &[("Content-Type", media_type)], &manifest)?
        .success()
        .context("push the manifest")?;
    Ok(())
}

fn push_blob(client: &Client, repository: &str, blob: Blob<'_>) -> Result<()> {
    let found = client.request("HEAD", &format!("/v2/{repository}/blobs/{}", blob.digest()), &[], b"")?;
    if found.head.status == 200 {
        return Ok(());
    }
    let begun = client.request("POST", &format!("/v2/{repository}/blobs/uploads/"), &[], b"")?.success()?;
    let location = begun.head.header("location").context("no Location")?;
    // An absolute URL on the Host that was asked; only its path matters here.
    let path = match location.split_once("://") {
        Some((_, rest)) => rest.find('/').and_then(|at| rest.get(at..)).context("Location without a path")?,
        None => location,
    };
    let separator = if path.contains('?') { '&' } else { '?' };
    let path = format!("{path}{separator}digest={}", blob.digest());
    client.request("PUT", &path, &[("Content-Type", "application/octet-stream")], blob.bytes)?.success()?;
    Ok(())
}

/// Starts a program in the host with its output in a file there. It ends when the process here is killed.
pub(crate) fn spawn_logged(host: &Host, log: &str, program: &str, arguments: &[&str]) -> Result<Child> {
    let mut command: Command = host.command("sh");
    command.args(["-c", "log=$1; shift; exec \"$@\" >>\"$log\" 2>&1", "sh", log, program]).args(arguments);
    command.stdin(Stdio::null()).spawn().with_context(|| format!("start {program}"))
}

fn wait_for_address(host: &Host, log: &str, process: &mut Child) -> Result<String> {
    const MARK: &str = "listening on ";
    loop {
        let text = host.sh("cat \"$1\"", &[log])?;
        if let Some((_, rest)) = text.split_once(MARK) {
            let address = rest.split(|c: char| c == '"' || c.is_whitespace()).next().unwrap_or_default();
            return Ok(address.to_owned());
        }
        if let Some(status) = process.try_wait()? {
            bail!("docker-registry ended: {status}\n{text}");
        }
        thread::sleep(Duration::from_millis(100));
    }
}
