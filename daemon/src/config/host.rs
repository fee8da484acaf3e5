//! Where the API is served: the values of `--host`.

use std::path::PathBuf;

/// A listening address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// `unix://PATH`
    Unix(PathBuf),
    /// `tcp://HOST:PORT`: host (IPv6 in brackets) and port.
    Tcp(String),
    /// `fd://` or `fd://NAME`: sockets that systemd passed, all or those of that name.
    Fd(Option<String>),
}

/// Where the API is served when nothing is said: beside dockerd's socket, not in its place.
pub(super) const DEFAULT_SOCKET: &str = "/run/bulkhead.sock";

impl Default for Host {
    fn default() -> Self {
        Self::Unix(DEFAULT_SOCKET.into())
    }
}

impl Host {
    /// From a flag's text, as dockerd reads it: an empty text is the default, one without a scheme is TCP.
    /// The default port is 2376 with TLS, else 2375.
    ///
    /// # Errors
    /// In dockerd's words.
    pub fn parse(text: &str, tls: bool) -> Result<Self, String> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(Self::default());
        }
        let wrong = |why: &str| format!("invalid bind address ({text}): {why}");
        let (scheme, address) = text.split_once("://").unwrap_or(("tcp", text));
        if address.contains("://") {
            return Err(wrong(&format!("invalid {scheme} address: {address}")));
        }
        match scheme {
            "unix" if address.is_empty() => Ok(Self::default()),
            "unix" if !address.starts_with('/') => Err(wrong("must be an absolute path")),
            // sun_path, less its final zero.
            "unix" if address.len() > 107 => Err(wrong("path is longer than 107 bytes")),
            "unix" => Ok(Self::Unix(address.into())),
            "fd" => Ok(Self::Fd((!matches!(address, "" | "*")).then(|| address.to_owned()))),
            "tcp" => tcp(address, if tls { 2376 } else { 2375 }).map(Self::Tcp).map_err(|why| wrong(&why)),
            other => Err(wrong(&format!("unsupported proto '{other}'"))),
        }
    }
}

/// Whether systemd has opened sockets for this process (sd_listen_fds(3)). Where nothing is said of where to serve,
/// it is on them.
pub(super) fn activated() -> bool {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    number("LISTEN_PID") == Some(std::process::id()) && number("LISTEN_FDS").is_some_and(|count| count > 0)
}

/// An address of TCP with its port, which must be there.
///
/// # Errors
/// It is none.
pub(super) fn tcp_address(text: &str) -> Result<String, String> {
    match tcp(text, 0) {
        Ok(address) if !address.ends_with(":0") => Ok(address),
        Ok(_) => Err(format!("invalid address ({text}): a port is missing")),
        Err(why) => Err(format!("invalid address ({text}): {why}")),
    }
}

fn tcp(address: &str, default_port: u16) -> Result<String, String> {
    if address.contains(['/', '?', '#', '@']) {
        return Err("should not contain a path element".into());
    }
    let (host, port) = match address.rsplit_once(':') {
        // The colon may be within an IPv6 address.
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (address, None),
    };
    if host.contains(':') && !(host.starts_with('[') && host.ends_with(']')) {
        return Err("an IPv6 address must stand in brackets".into());
    }
    let port = match port {
        None | Some("") => default_port,
        Some(text) => match text.parse() {
            Ok(0) | Err(_) => return Err(format!("invalid port: {text}")),
            Ok(port) => port,
        },
    };
    Ok(format!("{}:{port}", if host.is_empty() { "127.0.0.1" } else { host }))
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp://{address}"),
            Self::Fd(name) => write!(f, "fd://{}", name.as_deref().unwrap_or_default()),
        }
    }
}
