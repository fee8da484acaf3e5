//! Makes a socket of the test host reachable outside, e.g. the daemon's for a docker CLI.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::client::Client;
use super::relay::{self, Duplex};
use super::wire::{Address, Request};

/// A socket outside whose connections end at a socket inside.
pub(crate) struct Forward {
    listener: Listener,
    to: Address,
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Forward {
    /// Listens outside. A socket file left by an earlier forward is replaced, any other file is not.
    pub(crate) fn bind(listen: &Address, to: Address) -> Result<Forward> {
        let listener = match listen {
            Address::Unix(path) => {
                remove_stale_socket(path)?;
                Listener::Unix(UnixListener::bind(path).with_context(|| format!("listen on {listen}"))?)
            }
            Address::Tcp(address) => {
                Listener::Tcp(TcpListener::bind(address).with_context(|| format!("listen on {listen}"))?)
            }
        };
        Ok(Forward { listener, to })
    }

    /// Serves until the test host is gone.
    pub(crate) fn serve(self, client: &Client) -> Result<()> {
        loop {
            let outer = match self.accept() {
                Ok(outer) => outer,
                Err(error) => {
                    // Out of descriptors, most likely: some connection will end.
                    eprintln!("xtask: forward to {}: {error}", self.to);
                    thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            let (client, to) = (client.clone(), self.to.clone());
            thread::spawn(move || match client.request(Request::Connect(to.clone()), None) {
                Ok(inner) => relay::both_ways(outer, Duplex::Tcp(inner)),
                Err(error) => eprintln!("xtask: forward to {to}: {error:#}"),
            });
        }
    }

    fn accept(&self) -> io::Result<Duplex> {
        Ok(match &self.listener {
            Listener::Unix(listener) => Duplex::Unix(listener.accept()?.0),
            Listener::Tcp(listener) => Duplex::Tcp(listener.accept()?.0),
        })
    }
}

fn remove_stale_socket(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            fs::remove_file(path).with_context(|| format!("replace {}", path.display()))
        }
        Ok(_) => bail!("{} is there and no socket", path.display()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("look at {}", path.display())),
    }
}
