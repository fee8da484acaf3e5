//! A program for containers: stands in for testcontainers' reaper (ryuk), whose image lies on Docker Hub. It speaks
//! the same protocol, and does the same with the daemon's socket, which is mounted into its container. Built by the
//! test that puts it into an image, with nothing but the C library.
//!
//! ```text
//!  a client ── connects to port 8080, says which objects are its own ──▶ "label=org.testcontainers.session-id=…\n"
//!           ◀─ ACK ─────────────────────────────────────────────────────
//!           ── ends, or is killed: the connection closes ──▶ after a while without clients (RYUK_RECONNECTION_TIMEOUT)
//!                                                            the containers are removed, and the reaper ends
//! ```

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Read, Result, Write},
    net::{TcpListener, TcpStream},
    os::unix::net::UnixStream,
    sync::{Mutex, mpsc},
    time::Duration,
};

/// Where the daemon's socket is mounted.
const SOCKET: &str = "/var/run/docker.sock";

/// The values of filters, `label=NAME=VALUE` each.
static OWNED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

enum Client {
    Came,
    Left,
}

fn main() -> Result<()> {
    let wait = std::env::var("RYUK_RECONNECTION_TIMEOUT").unwrap_or_default();
    let wait = Duration::from_secs(wait.trim_end_matches('s').parse().unwrap_or(10));
    let listener = TcpListener::bind("0.0.0.0:8080")?;
    println!("{}", ask("GET", "/_ping")?.trim());
    println!("Started!");
    let (sender, clients) = mpsc::channel();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let sender = sender.clone();
            std::thread::spawn(move || {
                let _ = sender.send(Client::Came);
                let _ = hear(client);
                let _ = sender.send(Client::Left);
            });
        }
    });
    let mut connected = 0;
    loop {
        let news = match connected {
            0 => clients.recv_timeout(if OWNED.lock().expect("no panic").is_empty() { wait * 6 } else { wait }),
            _ => clients.recv().map_err(Into::into),
        };
        match news {
            Ok(Client::Came) => connected += 1,
            Ok(Client::Left) => connected -= 1,
            Err(_) => break,
        }
    }
    let owned = OWNED.lock().expect("no panic").clone();
    for filter in owned {
        prune(&filter)?;
    }
    Ok(())
}

/// Takes a client's filters, until it goes.
fn hear(client: TcpStream) -> Result<()> {
    let mut answers = client.try_clone()?;
    for line in BufReader::new(client).lines() {
        if let Some(filter) = line?.trim().strip_prefix("label=") {
            OWNED.lock().expect("no panic").insert(filter.to_owned());
            answers.write_all(b"ACK\n")?;
        }
    }
    Ok(())
}

fn prune(filter: &str) -> Result<()> {
    let filters = format!("{{\"label\":{{\"{filter}\":true}}}}");
    let encoded: String = filters.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let list = ask("GET", &format!("/containers/json?all=1&filters={encoded}"))?;
    let key = "{\"Id\":\"";
    for (at, _) in list.match_indices(key) {
        let id = list.get(at + key.len()..at + key.len() + 64).unwrap_or_default();
        println!("removing {id}");
        ask("DELETE", &format!("/containers/{id}?force=1&v=1"))?;
    }
    Ok(())
}

/// What the daemon answers, without the head.
fn ask(method: &str, path: &str) -> Result<String> {
    let mut daemon = UnixStream::connect(SOCKET)?;
    // HTTP/1.0: no chunks.
    daemon.write_all(format!("{method} {path} HTTP/1.0\r\nHost: docker\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    daemon.read_to_string(&mut answer)?;
    Ok(answer.split_once("\r\n\r\n").map_or(answer.clone(), |(_, body)| body.to_owned()))
}
