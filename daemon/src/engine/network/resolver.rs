//! Answers the name queries of one container: its neighbours' names from the networks, everything else from the
//! host's name servers.
//!
//! ```text
//!   guest's program ─▶ agent at 127.0.0.11 ─▶ (vsock) ─▶ serve ─┬─▶ neighbours: names, aliases, links, addresses
//!                                                              └─▶ forward: UDP or TCP, as it came
//! ```
//!
//! A container may ask as it likes: so many questions at a time, each small, each for so long. One that asks too
//! much waits for itself and for nobody else.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bulkhead_agent_api::names::{HEADER, Header, Transport};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket, UnixStream},
    sync::{Semaphore, mpsc},
    task::{JoinHandle, JoinSet},
};

use super::dns::{Code, Query, kind, reverse};
use crate::{engine::Shared, sandbox::Sandbox};

/// Questions of one container at a time.
const AT_ONCE: usize = 64;

/// The longest question that is read; a longer one ends the connection.
const LONGEST: u16 = 4096;

/// How long a name server may take, and how often all of them are tried.
const WITHIN: Duration = Duration::from_secs(4);
const ROUNDS: usize = 2;

/// How long after a connection's end it is made again.
const AGAIN: Duration = Duration::from_secs(1);

/// The resolver of one run of a container. Dropped, it ends.
#[derive(Debug)]
pub(crate) struct Resolver(JoinHandle<()>);

impl Drop for Resolver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Resolver {
    /// Connects to the agent, and serves as long as it lives. When this returns the agent takes questions.
    ///
    /// # Errors
    /// Of the connection.
    pub(crate) async fn start(
        shared: Arc<Shared>,
        sandbox: Arc<Sandbox>,
        container: String,
    ) -> io::Result<Self> {
        let mut stream = sandbox.names().await?;
        Ok(Self(tokio::spawn(async move {
            loop {
                if let Err(error) = serve(&shared, &container, stream).await {
                    tracing::debug!(container, %error, "a resolver's connection has ended");
                }
                // After a restored machine's, for instance. A dead one's resolver is dropped.
                stream = loop {
                    tokio::time::sleep(AGAIN).await;
                    if let Ok(stream) = sandbox.names().await {
                        break stream;
                    }
                };
            }
        })))
    }
}

async fn serve(shared: &Arc<Shared>, container: &str, stream: UnixStream) -> io::Result<()> {
    let (mut reader, mut writer) = stream.into_split();
    let (answers, mut queue) = mpsc::channel::<(Header, Vec<u8>)>(AT_ONCE);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Some((header, message)) = queue.recv().await {
            let frame = [header.encode().as_slice(), &message].concat();
            if writer.write_all(&frame).await.is_err() {
                return;
            }
        }
    });
    let permits = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        while tasks.try_join_next().is_some() {}
        let permit = Arc::clone(&permits).acquire_owned().await.map_err(io::Error::other)?;
        let mut header = [0; HEADER];
        reader.read_exact(&mut header).await?;
        let header = Header::decode(header).filter(|header| header.length <= LONGEST);
        let header = header.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        let mut message = vec![0; usize::from(header.length)];
        reader.read_exact(&mut message).await?;
        let (shared, container, answers) = (Arc::clone(shared), container.to_owned(), answers.clone());
        tasks.spawn(async move {
            let _permit = permit;
            let Some(answer) = answer(&shared, &container, &message, header.transport).await else { return };
            if let Ok(length) = u16::try_from(answer.len()) {
                let _ = answers.send((Header { length, ..header }, answer)).await;
            }
        });
    }
}

async fn answer(shared: &Shared, container: &str, message: &[u8], transport: Transport) -> Option<Vec<u8>> {
    let query = match Query::parse(message) {
        Ok(query) => query,
        Err(None) => return None,
        Err(Some(code)) => return refusal(message, code),
    };
    let limit = if transport == Transport::Tcp { usize::from(u16::MAX) } else { query.datagram };
    if let Some(answer) = neighbours(shared, container, &query, limit) {
        return Some(answer);
    }
    let egress = shared.networks.egress(container);
    if let Some(egress) = &egress {
        if !egress.may_ask(&query) {
            return Some(query.failure(Code::Refused));
        }
        // Their answers tell clients how to hide from the proxy which server they ask for.
        if matches!(query.kind, kind::SVCB | kind::HTTPS) {
            return Some(query.addresses(&[], limit));
        }
    }
    Some(match forward(shared, container, message, &query, transport).await {
        Some(answer) => {
            if let Some(egress) = &egress {
                shared.networks.learn(egress, &query, &answer).await;
            }
            query.relayed(answer, limit)
        }
        None => query.failure(Code::Failed),
    })
}

/// A header alone, for a message that has not much more.
fn refusal(message: &[u8], code: Code) -> Option<Vec<u8>> {
    let mut answer = message.get(..4)?.to_vec();
    answer[2] |= 0x80;
    answer[3] = answer[3] & 0xf0 | code as u8;
    answer.extend([0; 8]);
    Some(answer)
}

/// Which of several addresses comes first: each in turn.
static TURN: AtomicUsize = AtomicUsize::new(0);

/// The answer where the question is about a neighbour.
fn neighbours(shared: &Shared, container: &str, query: &Query, limit: usize) -> Option<Vec<u8>> {
    let name = query.name.as_deref().filter(|_| query.is_internet)?;
    if query.kind == kind::PTR {
        let name = shared.networks.name_of(container, reverse(name)?)?;
        return query.pointer(&name, limit);
    }
    let mut addresses = shared.networks.addresses_of(container, name)?;
    let fits = |address: &IpAddr| match query.kind {
        kind::A => address.is_ipv4(),
        kind::AAAA => address.is_ipv6(),
        kind::ANY => true,
        _ => false,
    };
    addresses.retain(fits);
    if !addresses.is_empty() {
        let first = TURN.fetch_add(1, Ordering::Relaxed) % addresses.len();
        addresses.rotate_left(first);
    }
    // A name that is there and has no such record: nobody else is asked.
    Some(query.addresses(&addresses, limit))
}

/// Asks the name servers, one after the other.
async fn forward(
    shared: &Shared,
    container: &str,
    message: &[u8],
    query: &Query,
    transport: Transport,
) -> Option<Vec<u8>> {
    let servers = servers(shared, container)?;
    for _ in 0..ROUNDS {
        for server in &servers {
            let asked = async {
                match transport {
                    Transport::Udp => ask_udp(*server, message, query).await,
                    Transport::Tcp => ask_tcp(*server, message, query).await,
                }
            };
            match tokio::time::timeout(WITHIN, asked).await {
                Ok(Ok(answer)) => return Some(answer),
                Ok(Err(error)) => tracing::debug!(%server, %error, "a name server does not answer"),
                Err(_) => {}
            }
        }
    }
    None
}

/// The name servers of a container; None for one that nothing leads out of.
fn servers(shared: &Shared, container: &str) -> Option<Vec<SocketAddr>> {
    let record = shared.registry.find(container).ok()?.view().record;
    if !shared.networks.leads_out(&record) {
        return None;
    }
    let own = record.host_config.dns.clone().unwrap_or_default();
    let chosen = if own.is_empty() { shared.config.dns.clone() } else { own };
    let chosen = if chosen.is_empty() {
        let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let words = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
        words.map(|word| word.trim().to_owned()).collect()
    } else {
        chosen
    };
    let parsed = chosen.iter().filter_map(|server| server.parse::<IpAddr>().ok());
    Some(parsed.map(|server| SocketAddr::new(server, 53)).take(3).collect())
}

/// The message under an id of our own, which with the socket's port is what an answer must know.
fn renumbered(message: &[u8]) -> io::Result<(u16, Vec<u8>)> {
    let mut id = [0; 2];
    getrandom::fill(&mut id).map_err(io::Error::other)?;
    let rest = message.get(2..).unwrap_or_default();
    Ok((u16::from_be_bytes(id), [&id, rest].concat()))
}

async fn ask_udp(server: SocketAddr, message: &[u8], query: &Query) -> io::Result<Vec<u8>> {
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    let (id, message) = renumbered(message)?;
    socket.send(&message).await?;
    let mut buffer = vec![0; 65_536];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let answer = buffer.get(..length).unwrap_or_default();
        if query.is_answered_by(answer, id) {
            return Ok(answer.to_vec());
        }
    }
}

async fn ask_tcp(server: SocketAddr, message: &[u8], query: &Query) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let (id, message) = renumbered(message)?;
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), message.as_slice()].concat()).await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    if query.is_answered_by(&answer, id) { Ok(answer) } else { Err(io::ErrorKind::InvalidData.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::network::dns;

    #[test]
    fn a_refusal_is_an_answer_with_its_code() {
        let answer = refusal(&[1, 2, 0x11, 0x40, 0, 9], Code::Malformed).unwrap();
        assert_eq!(answer, [1, 2, 0x91, 0x41, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(refusal(&[1], Code::Malformed), None);
    }

    #[tokio::test]
    async fn only_the_answer_to_the_question_is_taken() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr().unwrap();
        let message = dns::query(7, "example.org", kind::A);
        let query = Query::parse(&message).unwrap();
        let serve = async {
            let mut buffer = [0; 512];
            let (length, client) = server.recv_from(&mut buffer).await.unwrap();
            let asked = Query::parse(&buffer[..length]).unwrap();
            let other = Query::parse(&dns::query(asked.id, "evil.org", kind::A)).unwrap();
            let evil = ["6.6.6.6".parse().unwrap()];
            // Another question's answer, another id's, nonsense; then the right one.
            for wrong in [other.addresses(&evil, 512), query.addresses(&evil, 512), vec![0; 3]] {
                server.send_to(&wrong, client).await.unwrap();
            }
            server.send_to(&asked.addresses(&["1.2.3.4".parse().unwrap()], 512), client).await.unwrap();
        };
        let (answer, ()) = tokio::join!(ask_udp(address, &message, &query), serve);
        assert!(answer.unwrap().ends_with(&[1, 2, 3, 4]));
    }
}
