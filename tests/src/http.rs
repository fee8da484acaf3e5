//! A small HTTP/1.1 client that shows every byte: for requests that no proper client would send, for the registry,
//! and for timing an API without a command line's own time.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail};

/// A server: a unix socket's path, or `ADDRESS:PORT`.
#[derive(Debug, Clone)]
pub struct Client {
    address: String,
}

/// An answer without its body.
#[derive(Debug, Clone)]
pub struct Head {
    /// The status code.
    pub status: u16,
    headers: Vec<(String, String)>,
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Response {
    /// Status and headers.
    pub head: Head,
    /// The whole body, de-chunked.
    pub body: Vec<u8>,
}

/// A connection after its answer's head: a hijacked stream, or a body to be read as it comes.
#[derive(Debug)]
pub struct Stream {
    reader: BufReader<Socket>,
}

#[derive(Debug)]
enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Client {
    /// For the server at the address; connects at each request.
    #[must_use]
    pub fn new(address: &str) -> Client {
        Client { address: address.to_owned() }
    }

    /// One request, its whole answer.
    ///
    /// # Errors
    /// When the server cannot be reached or speaks no HTTP. A status is no error.
    pub fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<Response> {
        let close = [headers, &[("Connection", "close")]].concat();
        let (head, mut stream) = self.open(method, path, &close, body)?;
        let body = if method == "HEAD" { Vec::new() } else { stream.read_body(&head)? };
        Ok(Response { head, body })
    }

    /// A request with a JSON body.
    ///
    /// # Errors
    /// As [`Client::request`].
    pub fn json(&self, method: &str, path: &str, body: &serde_json::Value) -> Result<Response> {
        self.request(method, path, &[("Content-Type", "application/json")], body.to_string().as_bytes())
    }

    /// Sends a request and reads the answer's head; the rest is the caller's.
    ///
    /// # Errors
    /// As [`Client::request`].
    pub fn open(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<(Head, Stream)> {
        let mut socket =
            Socket::connect(&self.address).with_context(|| format!("connect to {}", self.address))?;
        let mut text = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\n", self.host_header());
        for (name, value) in headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        text.push_str(&format!("Content-Length: {}\r\n\r\n", body.len()));
        socket.write_all(text.as_bytes())?;
        // A server may refuse and close before it has read a body; its answer says why.
        let _ = socket.write_all(body);
        let mut stream = Stream { reader: BufReader::new(socket) };
        let head = stream.read_head().with_context(|| format!("{method} {path}"))?;
        Ok((head, stream))
    }

    fn host_header(&self) -> &str {
        if self.address.starts_with('/') { "localhost" } else { &self.address }
    }
}

impl Head {
    /// The header's value; names are compared without case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }
}

impl Response {
    /// The body as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// When it is none.
    pub fn json(&self) -> Result<serde_json::Value> {
        serde_json::from_slice(&self.body).with_context(|| format!("not JSON: {}", self.text()))
    }

    /// The answer, if its status is a success.
    ///
    /// # Errors
    /// Else, with its text.
    pub fn success(self) -> Result<Response> {
        if !(200..300).contains(&self.head.status) {
            bail!("status {}: {}", self.head.status, self.text());
        }
        Ok(self)
    }
}

impl Stream {
    /// Ends this side's direction; the other stays open.
    ///
    /// # Errors
    /// When the server has gone.
    pub fn close_write(&self) -> io::Result<()> {
        match self.reader.get_ref() {
            Socket::Unix(socket) => socket.shutdown(Shutdown::Write),
            Socket::Tcp(socket) => socket.shutdown(Shutdown::Write),
        }
    }

    fn read_head(&mut self) -> Result<Head> {
        let line = self.read_line()?;
        let status = line
            .strip_prefix("HTTP/1.")
            .and_then(|rest| rest.split(' ').nth(1))
            .and_then(|code| code.parse().ok());
        let status = status.with_context(|| format!("not an HTTP answer: {line:?}"))?;
        let mut headers = Vec::new();
        loop {
            let line = self.read_line()?;
            if line.is_empty() {
                return Ok(Head { status, headers });
            }
            let (name, value) = line.split_once(':').with_context(|| format!("not a header: {line:?}"))?;
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
    }

    /// The body that the head announces.
    ///
    /// # Errors
    /// When it is cut.
    pub fn read_body(&mut self, head: &Head) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        if matches!(head.status, 204 | 304) {
            return Ok(body);
        }
        if head.header("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
            while let Some(chunk) = self.read_chunk()? {
                body.extend_from_slice(&chunk);
            }
        } else if let Some(length) = head.header("content-length") {
            body.resize(length.parse()?, 0);
            self.reader.read_exact(&mut body).context("body cut short")?;
        } else {
            self.reader.read_to_end(&mut body)?;
        }
        Ok(body)
    }

    /// The next chunk of a chunked body; `None` after the last.
    ///
    /// # Errors
    /// When it is cut.
    pub fn read_chunk(&mut self) -> Result<Option<Vec<u8>>> {
        let line = self.read_line()?;
        let size = line.split(';').next().unwrap_or_default().trim();
        let size =
            usize::from_str_radix(size, 16).with_context(|| format!("not a chunk's size: {line:?}"))?;
        let mut chunk = vec![0; size];
        self.reader.read_exact(&mut chunk).context("chunk cut short")?;
        self.read_line()?;
        Ok((size > 0).then_some(chunk))
    }

    fn read_line(&mut self) -> Result<String> {
        let mut line = Vec::new();
        self.reader.read_until(b'\n', &mut line)?;
        if line.pop() != Some(b'\n') {
            bail!("the server closed the connection");
        }
        let line = String::from_utf8(line).context("not UTF-8")?;
        Ok(line.trim_end_matches('\r').to_owned())
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buffer)
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.reader.get_mut().write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Socket {
    fn connect(address: &str) -> io::Result<Socket> {
        Ok(if address.starts_with('/') {
            Socket::Unix(UnixStream::connect(address)?)
        } else {
            Socket::Tcp(TcpStream::connect(address)?)
        })
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(socket) => socket.read(buffer),
            Socket::Tcp(socket) => socket.read(buffer),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(socket) => socket.write(buffer),
            Socket::Tcp(socket) => socket.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    fn answer(text: &'static str) -> Client {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let mut request = [0; 4096];
            let _ = socket.read(&mut request).unwrap();
            socket.write_all(text.as_bytes()).unwrap();
        });
        Client::new(&address)
    }

    #[test]
    fn bodies_of_every_framing_are_read() {
        for text in [
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\nabc",
        ] {
            assert_eq!(answer(text).request("GET", "/", &[], b"").unwrap().text(), "abc");
        }
    }

    #[test]
    fn a_cut_body_is_an_error() {
        let cut = answer("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc");
        assert!(cut.request("GET", "/", &[], b"").is_err());
        let cut = answer("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n");
        assert!(cut.request("GET", "/", &[], b"").is_err());
    }
}
