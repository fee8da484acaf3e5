//! A registry whose connections break: passes TCP connections on to another server, and cuts those whose answers
//! exceed a limit. Prints its address.
//!
//! `cutting-proxy UPSTREAM LIMIT TIMES`: cut after LIMIT bytes of answer, the first TIMES connections that come so
//! far.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result};

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let upstream = arguments.next().context("UPSTREAM")?;
    let limit: u64 = arguments.next().context("LIMIT")?.parse()?;
    let cuts = Arc::new(AtomicU64::new(arguments.next().context("TIMES")?.parse()?));
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?);
    for client in listener.incoming() {
        let (client, upstream, cuts) = (client?, upstream.clone(), cuts.clone());
        thread::spawn(move || pass_on(&client, &upstream, limit, &cuts));
    }
    Ok(())
}

fn pass_on(client: &TcpStream, upstream: &str, limit: u64, cuts: &AtomicU64) -> io::Result<()> {
    let server = TcpStream::connect(upstream)?;
    let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || {
        let _ = io::copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Write);
    });
    let (mut from_server, mut to_client) = (&server, client);
    let mut passed = 0;
    let mut buffer = [0; 4096];
    loop {
        let count = from_server.read(&mut buffer)?;
        if count == 0 {
            return to_client.shutdown(Shutdown::Write);
        }
        to_client.write_all(buffer.get(..count).unwrap_or_default())?;
        passed += count as u64;
        let take_one = |left: u64| left.checked_sub(1);
        if passed > limit && cuts.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take_one).is_ok() {
            server.shutdown(Shutdown::Both)?;
            return client.shutdown(Shutdown::Both);
        }
    }
}
