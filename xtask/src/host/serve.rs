//! The command server in the test host: one thread a connection, one request a connection (see [`super::wire`]).

mod exec;

use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::relay::{self, Duplex};
use super::state;
use super::wire::{self, Address, Hello, Request, Tag};

/// What the console shows when the server listens; `up` waits for it.
pub(crate) const READY: &str = "bulkhead test host ready";

#[derive(Args)]
pub(crate) struct ServeArgs {
    /// The state directory, with the token.
    #[arg(long)]
    state: PathBuf,
}

pub(crate) fn run(args: &ServeArgs) -> Result<()> {
    let token = state::read_token(&args.state)?;
    let listener = TcpListener::bind(("0.0.0.0", wire::PORT)).context("listen")?;
    println!("{READY}");
    let (stop, stopped) = std::sync::mpsc::channel();
    thread::spawn(move || {
        for connection in listener.incoming() {
            let (token, stop) = (token.clone(), stop.clone());
            match connection {
                Ok(connection) => drop(thread::spawn(move || match serve(connection, &token) {
                    Ok(Next::Serve) => {}
                    Ok(Next::Stop) => drop(stop.send(())),
                    Err(error) => eprintln!("host-serve: {error:#}"),
                })),
                Err(error) => eprintln!("host-serve: accept: {error}"),
            }
        }
    });
    stopped.recv().context("the listener ended")
}

/// What the server does after a request.
enum Next {
    Serve,
    Stop,
}

fn serve(mut connection: TcpStream, token: &str) -> Result<Next> {
    connection.set_nodelay(true)?;
    let hello = wire::read_hello(&mut connection)?;
    if let Err(refusal) = check(&hello, token) {
        wire::write_frame(&mut connection, Tag::Failed, refusal.to_string().as_bytes())?;
        return Ok(Next::Serve);
    }
    match hello.request {
        Request::Ping => wire::write_frame(&mut connection, Tag::Accepted, &[])?,
        Request::Exec(request) => exec::serve(connection, &request)?,
        Request::Connect(to) => connect(connection, &to)?,
        Request::PowerOff => {
            wire::write_frame(&mut connection, Tag::Accepted, &[])?;
            connection.shutdown(Shutdown::Write)?;
            return Ok(Next::Stop);
        }
    }
    Ok(Next::Serve)
}

fn check(hello: &Hello, token: &str) -> Result<()> {
    if hello.version != wire::VERSION {
        bail!("the test host speaks version {}, the client {}: restart it", wire::VERSION, hello.version);
    }
    // A secret of one machine between processes of one user: no timing attack to fear over slirp.
    if hello.token != token {
        bail!("wrong token");
    }
    Ok(())
}

fn connect(mut connection: TcpStream, to: &Address) -> Result<()> {
    match dial(to) {
        Ok(inner) => {
            wire::write_frame(&mut connection, Tag::Accepted, &[])?;
            relay::both_ways(Duplex::Tcp(connection), inner);
        }
        Err(error) => wire::write_frame(&mut connection, Tag::Failed, format!("{to}: {error}").as_bytes())?,
    }
    Ok(())
}

fn dial(to: &Address) -> io::Result<Duplex> {
    Ok(match to {
        Address::Unix(path) => Duplex::Unix(UnixStream::connect(path)?),
        Address::Tcp(address) => Duplex::Tcp(TcpStream::connect(address)?),
    })
}
