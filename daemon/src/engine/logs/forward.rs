//! The drivers `syslog` and `journald`: what a container says goes to the host's log too. The local files stay, so
//! that `docker logs` has something to read, as in Docker.
//!
//! Each line is one datagram. What the host's log does not take at once is not sent: it must not hold up whoever
//! reads the container's output, and it stands in the local files.

use std::{
    collections::BTreeMap,
    io,
    net::UdpSocket,
    os::unix::net::UnixDatagram,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
};

use jiff::{Timestamp, tz::TimeZone};

use super::{Stream, Subject};
use crate::engine::{Error, Result};

const SYSLOG_SOCKET: &str = "/dev/log";
const JOURNAL_SOCKET: &str = "/run/systemd/journal/socket";

const FACILITIES: [&str; 24] = [
    "kern",
    "user",
    "mail",
    "daemon",
    "auth",
    "syslog",
    "lpr",
    "news",
    "uucp",
    "cron",
    "authpriv",
    "ftp",
    "ntp",
    "security",
    "console",
    "solaris-cron",
    "local0",
    "local1",
    "local2",
    "local3",
    "local4",
    "local5",
    "local6",
    "local7",
];

/// Where lines go, and how they are written there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    address: Address,
    form: Form,
    tag: String,
    /// For the journal: fields of the container.
    fields: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Address {
    Unix(PathBuf),
    Udp(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Journal,
    Rfc3164 { facility: u8 },
    Rfc5424 { facility: u8 },
}

/// The options of a driver that are about where lines go; None for a driver that sends none anywhere.
pub(super) fn options_of(driver: &str) -> Option<&'static [&'static str]> {
    match driver {
        "syslog" => Some(&["syslog-address", "syslog-facility", "syslog-format"]),
        "journald" => Some(&[]),
        _ => None,
    }
}

impl Target {
    /// Of a container; `tag` is [`Subject`]'s by the driver's template.
    ///
    /// # Errors
    /// Invalid: an address, facility or format that is none, or not one of those here.
    pub(super) fn of(
        driver: &str,
        options: &BTreeMap<String, String>,
        subject: &Subject<'_>,
        tag: String,
        attributes: &BTreeMap<String, String>,
    ) -> Result<Option<Self>> {
        let option = |name: &str| options.get(name).map(String::as_str).filter(|text| !text.is_empty());
        let invalid = |text: String| Err(Error::invalid(text));
        let (address, form) = match driver {
            "journald" => (Address::Unix(JOURNAL_SOCKET.into()), Form::Journal),
            "syslog" => {
                let address = match option("syslog-address") {
                    None => Address::Unix(SYSLOG_SOCKET.into()),
                    Some(text) => match text.split_once("://") {
                        Some(("unix" | "unixgram", path)) if path.starts_with('/') => {
                            Address::Unix(path.into())
                        }
                        Some(("udp", host)) if host.contains(':') => Address::Udp(host.to_owned()),
                        Some(("udp", host)) if !host.is_empty() => Address::Udp(format!("{host}:514")),
                        Some(("tcp" | "tcp+tls", _)) => {
                            return invalid(format!(
                                "syslog-address {text}: only unixgram and udp are supported here"
                            ));
                        }
                        _ => {
                            return invalid(format!(
                                "syslog-address should be in form proto://address, got {text}"
                            ));
                        }
                    },
                };
                let facility = option("syslog-facility").unwrap_or("daemon");
                let number = FACILITIES.iter().position(|name| *name == facility);
                let number =
                    number.or_else(|| facility.parse().ok().filter(|number| *number < FACILITIES.len()));
                let Some(facility) = number.and_then(|number| u8::try_from(number).ok()) else {
                    return invalid("invalid syslog facility".into());
                };
                let form = match option("syslog-format") {
                    None | Some("rfc3164") => Form::Rfc3164 { facility },
                    Some("rfc5424" | "rfc5424micro") => Form::Rfc5424 { facility },
                    Some(other) => return invalid(format!("invalid syslog format: {other}")),
                };
                (address, form)
            }
            _ => return Ok(None),
        };
        let short = |id: &str| id.trim_start_matches("sha256:").chars().take(12).collect::<String>();
        let mut fields = BTreeMap::from([
            ("CONTAINER_ID".to_owned(), short(subject.id)),
            ("CONTAINER_ID_FULL".to_owned(), subject.id.to_owned()),
            ("CONTAINER_NAME".to_owned(), subject.name.to_owned()),
            ("CONTAINER_TAG".to_owned(), tag.clone()),
            ("IMAGE_NAME".to_owned(), subject.image.to_owned()),
            ("SYSLOG_IDENTIFIER".to_owned(), tag.clone()),
        ]);
        fields.extend(attributes.iter().map(|(name, value)| (field_name(name), value.clone())));
        Ok(Some(Self { address, form, tag, fields }))
    }

    /// A line as a datagram.
    fn datagram(&self, stream: Stream, line: &[u8], now: Timestamp, host: &str) -> Vec<u8> {
        let severity: u8 = if stream == Stream::Stderr { 3 } else { 6 };
        let mut out = Vec::with_capacity(line.len() + 128);
        match self.form {
            Form::Journal => {
                field(&mut out, "MESSAGE", line);
                field(&mut out, "PRIORITY", severity.to_string().as_bytes());
                self.fields.iter().for_each(|(name, value)| field(&mut out, name, value.as_bytes()));
            }
            Form::Rfc3164 { facility } => {
                let time = now.to_zoned(TimeZone::system()).strftime("%b %e %H:%M:%S").to_string();
                let priority = facility * 8 + severity;
                // The host's own log adds its name itself.
                let name =
                    if matches!(self.address, Address::Udp(_)) { format!(" {host}") } else { String::new() };
                let head = format!("<{priority}>{time}{name} {}[{}]: ", self.tag, std::process::id());
                out.extend_from_slice(head.as_bytes());
                out.extend_from_slice(line);
            }
            Form::Rfc5424 { facility } => {
                let (priority, pid) = (facility * 8 + severity, std::process::id());
                let head = format!("<{priority}>1 {now:.6} {host} {} {pid} {} - ", self.tag, self.tag);
                out.extend_from_slice(head.as_bytes());
                out.extend_from_slice(line);
            }
        }
        out
    }
}

/// A field of the journal's in the form that any value may have: name, length, value.
fn field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    out.push(b'\n');
    out.extend_from_slice(&(value.len() as u64).to_le_bytes());
    out.extend_from_slice(value);
    out.push(b'\n');
}

/// A label's or variable's name as the journal takes names: capitals, digits and underscores, beginning with a letter.
fn field_name(name: &str) -> String {
    let name: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect();
    name.trim_start_matches(|c: char| !c.is_ascii_uppercase()).to_owned()
}

/// The way to a [`Target`], open.
#[derive(Debug)]
pub(super) struct Forward {
    target: Target,
    socket: Socket,
    host: String,
    /// Whether it was told that lines are not taken; it is told once.
    told: AtomicBool,
}

#[derive(Debug)]
enum Socket {
    Unix(UnixDatagram),
    Udp(UdpSocket),
}

impl Forward {
    /// Connects.
    ///
    /// # Errors
    /// Nobody listens there.
    pub(super) fn open(target: &Target) -> io::Result<Self> {
        let named = |name: &dyn std::fmt::Debug, error: io::Error| {
            io::Error::new(error.kind(), format!("{name:?}: {error}"))
        };
        let socket = match &target.address {
            Address::Unix(path) => {
                let socket = UnixDatagram::unbound()?;
                socket.connect(path).map_err(|error| named(path, error))?;
                socket.set_nonblocking(true)?;
                Socket::Unix(socket)
            }
            Address::Udp(address) => {
                let socket = UdpSocket::bind("0.0.0.0:0")?;
                socket.connect(address).map_err(|error| named(address, error))?;
                socket.set_nonblocking(true)?;
                Socket::Udp(socket)
            }
        };
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        Ok(Self { target: target.clone(), socket, host, told: AtomicBool::new(false) })
    }

    /// Sends whole lines.
    pub(super) fn send(&self, stream: Stream, lines: &[u8], now: Timestamp) {
        for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let datagram = self.target.datagram(stream, line, now, &self.host);
            let sent = match &self.socket {
                Socket::Unix(socket) => socket.send(&datagram),
                Socket::Udp(socket) => socket.send(&datagram),
            };
            if let Err(error) = sent
                && !self.told.swap(true, Ordering::Relaxed)
            {
                tracing::warn!(%error, "the host's log does not take a container's lines; the local files have them");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(driver: &str, pairs: &[(&str, &str)]) -> Result<Option<Target>> {
        let options = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let id = "0123456789abcdef";
        let subject =
            Subject { id, name: "web", image: "nginx", image_id: "", labels: &BTreeMap::new(), env: &[] };
        let attributes = [("com.example.team".to_owned(), "a".to_owned())].into();
        Target::of(driver, &options, &subject, "web-tag".into(), &attributes)
    }

    #[test]
    fn lines_are_datagrams_of_their_logs_form() {
        let now: Timestamp = "2026-01-02T03:04:05.6Z".parse().unwrap();
        let pid = std::process::id();
        let text = |target: &Target, stream| {
            String::from_utf8(target.datagram(stream, b"said", now, "host")).unwrap()
        };
        let syslog = target("syslog", &[]).unwrap().unwrap();
        let line = text(&syslog, Stream::Stderr);
        assert!(line.starts_with("<27>Jan ") && line.ends_with(&format!(" web-tag[{pid}]: said")), "{line}");
        let new = target("syslog", &[("syslog-format", "rfc5424"), ("syslog-facility", "local0")])
            .unwrap()
            .unwrap();
        let expected = format!("<134>1 2026-01-02T03:04:05.600000Z host web-tag {pid} web-tag - said");
        assert_eq!(text(&new, Stream::Stdout), expected);
        let journal =
            target("journald", &[]).unwrap().unwrap().datagram(Stream::Stdout, b"said", now, "host");
        let has = |part: &[u8]| journal.windows(part.len()).any(|window| window == part);
        assert!(has(b"MESSAGE\n\x04\0\0\0\0\0\0\0said\n") && has(b"PRIORITY\n\x01\0\0\0\0\0\0\x006\n"));
        assert!(has(b"CONTAINER_ID\n\x0c\0\0\0\0\0\0\x000123456789ab\n") && has(b"COM_EXAMPLE_TEAM\n"));
        assert_eq!(field_name("1_odd-name"), "ODD_NAME");
    }

    #[test]
    fn addresses_and_facilities_are_checked() {
        assert_eq!(target("json-file", &[]).unwrap(), None);
        for (name, value) in [
            ("syslog-address", "tcp://h:1"),
            ("syslog-address", "udp://"),
            ("syslog-address", "/dev/log"),
            ("syslog-facility", "nosuch"),
            ("syslog-facility", "24"),
            ("syslog-format", "rfc1"),
        ] {
            assert!(target("syslog", &[(name, value)]).is_err(), "{name}={value}");
        }
        let udp = target("syslog", &[("syslog-address", "udp://192.0.2.1")]).unwrap().unwrap();
        assert_eq!(udp.address, Address::Udp("192.0.2.1:514".into()));
    }

    #[test]
    fn what_is_sent_arrives_and_a_log_that_is_gone_harms_nobody() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("log");
        let log = UnixDatagram::bind(&path).unwrap();
        let address = format!("unixgram://{}", path.display());
        let target = target("syslog", &[("syslog-address", &address)]).unwrap().unwrap();
        let forward = Forward::open(&target).unwrap();
        forward.send(Stream::Stdout, b"one\n\ntwo\n", Timestamp::now());
        let mut buffer = [0; 200];
        for expected in ["one", "two"] {
            let length = log.recv(&mut buffer).unwrap();
            assert!(String::from_utf8_lossy(&buffer[..length]).ends_with(expected));
        }
        drop(log);
        forward.send(Stream::Stdout, b"three\n", Timestamp::now());
        std::fs::remove_file(&path).unwrap();
        assert!(Forward::open(&target).is_err());
    }
}
