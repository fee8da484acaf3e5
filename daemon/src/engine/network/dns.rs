//! DNS messages (RFC 1035), as much as a resolver for neighbours needs: one question read, answers written.
//! Pure; every length is checked, since questions are a guest's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const HEADER: usize = 12;
const MAX_NAME: usize = 255;

/// What every client takes in a datagram without asking (RFC 1035, 4.2.1).
const PLAIN_UDP: usize = 512;

/// More than this is not sent in a datagram, whatever a client says (RFC 9715).
const LARGEST_UDP: usize = 1400;

/// How long an answer about a neighbour may be kept, in seconds: it may be gone soon.
const TTL: u32 = 10;

/// Types of records.
pub(super) mod kind {
    pub(crate) const A: u16 = 1;
    pub(crate) const PTR: u16 = 12;
    pub(crate) const AAAA: u16 = 28;
    pub(crate) const OPT: u16 = 41;
    pub(crate) const SVCB: u16 = 64;
    pub(crate) const HTTPS: u16 = 65;
    pub(crate) const ANY: u16 = 255;
}

/// How an answer went (RFC 1035, 4.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Code {
    Ok = 0,
    Malformed = 1,
    Failed = 2,
    NotImplemented = 4,
    Refused = 5,
}

/// A query with one question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Query {
    pub(super) id: u16,
    /// Of the header, as they came.
    flags: u16,
    /// In lower case, without the last dot. None: it has bytes that no host's name has.
    pub(super) name: Option<String>,
    pub(super) kind: u16,
    pub(super) is_internet: bool,
    /// The question as it came.
    question: Vec<u8>,
    /// What an answer in a datagram may have.
    pub(super) datagram: usize,
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

impl Query {
    /// Reads one. An error is the code to answer with; None: it is nothing that is answered.
    pub(super) fn parse(message: &[u8]) -> Result<Self, Option<Code>> {
        let id = word(message, 0).ok_or(None)?;
        let flags = word(message, 2).ok_or(None)?;
        if flags & 0x8000 != 0 {
            // An answer: to answer it would be to play ping-pong.
            return Err(None);
        }
        if flags & 0x7800 != 0 {
            return Err(Some(Code::NotImplemented));
        }
        let malformed = Some(Code::Malformed);
        let counts: Vec<u16> = (0..4).filter_map(|index| word(message, 4 + 2 * index)).collect();
        let [1, 0, 0, additional] = counts[..] else { return Err(malformed) };
        let (name, end) = read_name(message, HEADER).ok_or(malformed)?;
        let kind = word(message, end).ok_or(malformed)?;
        let class = word(message, end + 2).ok_or(malformed)?;
        let question = message.get(HEADER..end + 4).ok_or(malformed)?.to_vec();
        let datagram = if additional > 0 { edns(message, end + 4) } else { None };
        Ok(Self {
            id,
            flags,
            name,
            kind,
            is_internet: class == 1,
            question,
            datagram: datagram.unwrap_or(PLAIN_UDP).clamp(PLAIN_UDP, LARGEST_UDP),
        })
    }

    fn header(&self, code: Code, truncated: bool, answers: u16) -> Vec<u8> {
        let mut message = Vec::with_capacity(PLAIN_UDP);
        message.extend(self.id.to_be_bytes());
        // An answer, recursion wanted as it was and available.
        let flags = 0x8080 | self.flags & 0x0100 | u16::from(code as u8) | u16::from(truncated) << 9;
        message.extend(flags.to_be_bytes());
        for count in [1, answers, 0, 0] {
            message.extend(u16::to_be_bytes(count));
        }
        message.extend(&self.question);
        message
    }

    /// An answer without records.
    pub(super) fn failure(&self, code: Code) -> Vec<u8> {
        self.header(code, false, 0)
    }

    /// Addresses of the name.
    pub(super) fn addresses(&self, addresses: &[IpAddr], limit: usize) -> Vec<u8> {
        let records = addresses.iter().map(|address| match address {
            IpAddr::V4(address) => (kind::A, address.octets().to_vec()),
            IpAddr::V6(address) => (kind::AAAA, address.octets().to_vec()),
        });
        self.records(records.collect(), limit)
    }

    /// The name of an address. None: it cannot be written.
    pub(super) fn pointer(&self, name: &str, limit: usize) -> Option<Vec<u8>> {
        Some(self.records(vec![(kind::PTR, write_name(name)?)], limit))
    }

    fn records(&self, records: Vec<(u16, Vec<u8>)>, limit: usize) -> Vec<u8> {
        let count = u16::try_from(records.len()).unwrap_or(u16::MAX);
        let mut message = self.header(Code::Ok, false, count);
        for (kind, data) in records.into_iter().take(count.into()) {
            // The name is the question's, which begins right behind the header.
            message.extend([0xc0, HEADER as u8]);
            message.extend(kind.to_be_bytes());
            message.extend(1u16.to_be_bytes());
            message.extend(TTL.to_be_bytes());
            message.extend(u16::try_from(data.len()).unwrap_or(0).to_be_bytes());
            message.extend(data);
        }
        // Too much for a datagram: the client comes again over TCP.
        if message.len() > limit { self.header(Code::Ok, true, 0) } else { message }
    }

    /// Whether a message answers this query, sent under another id.
    pub(super) fn is_answered_by(&self, message: &[u8], id: u16) -> bool {
        let same = |question: &[u8]| question.eq_ignore_ascii_case(&self.question);
        word(message, 0) == Some(id)
            && word(message, 2).is_some_and(|flags| flags & 0x8000 != 0)
            && word(message, 4) == Some(1)
            && message.get(HEADER..HEADER + self.question.len()).is_some_and(same)
    }

    /// A forwarded answer as the client may have it.
    pub(super) fn relayed(&self, mut message: Vec<u8>, limit: usize) -> Vec<u8> {
        if message.len() > limit {
            return self.header(Code::Ok, true, 0);
        }
        if let Some(id) = message.get_mut(..2) {
            id.copy_from_slice(&self.id.to_be_bytes());
        }
        message
    }
}

/// The size of datagrams that a client says it takes (RFC 6891), in the first additional record.
fn edns(message: &[u8], at: usize) -> Option<usize> {
    // It has the root's name: a single zero.
    let is_root = message.get(at) == Some(&0);
    let size = usize::from(word(message, at + 3)?);
    (is_root && word(message, at + 1)? == kind::OPT).then_some(size)
}

/// A name of a question, where compression has no place, and where it ends.
fn read_name(message: &[u8], start: usize) -> Option<(Option<String>, usize)> {
    let mut name = Some(String::new());
    let mut at = start;
    loop {
        let length = usize::from(*message.get(at)?);
        at += 1;
        if length == 0 {
            return Some((name, at));
        }
        if length > 63 || at + length - start > MAX_NAME {
            return None;
        }
        let label = message.get(at..at + length)?;
        at += length;
        let is_text = label.iter().all(|byte| byte.is_ascii_graphic() && *byte != b'.');
        name = name.filter(|_| is_text).map(|mut name| {
            if !name.is_empty() {
                name.push('.');
            }
            name.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
            name
        });
    }
}

fn write_name(name: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(name.len() + 2);
    for label in name.split('.').filter(|label| !label.is_empty()) {
        bytes.push(u8::try_from(label.len()).ok().filter(|length| *length < 64)?);
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    (bytes.len() <= MAX_NAME).then_some(bytes)
}

/// How many records of an answer are looked at.
const MAX_RECORDS: u16 = 256;

/// The addresses in an answer with how many seconds each may be kept. What follows something malformed is not
/// looked at.
pub(super) fn addresses_in(message: &[u8]) -> Vec<(IpAddr, u32)> {
    let mut found = Vec::new();
    let _ = read_addresses(message, &mut found);
    found
}

fn read_addresses(message: &[u8], found: &mut Vec<(IpAddr, u32)>) -> Option<()> {
    let (questions, answers) = (word(message, 4)?, word(message, 6)?);
    let mut at = HEADER;
    for _ in 0..questions.min(MAX_RECORDS) {
        at = skip_name(message, at)? + 4;
    }
    for _ in 0..answers.min(MAX_RECORDS) {
        at = skip_name(message, at)?;
        let (kind, class) = (word(message, at)?, word(message, at + 2)?);
        let ttl = u32::from(word(message, at + 4)?) << 16 | u32::from(word(message, at + 6)?);
        let start = at + 10;
        let data = message.get(start..start + usize::from(word(message, at + 8)?))?;
        let address = match (kind, class) {
            (kind::A, 1) => <[u8; 4]>::try_from(data).ok().map(IpAddr::from),
            (kind::AAAA, 1) => <[u8; 16]>::try_from(data).ok().map(IpAddr::from),
            _ => None,
        };
        found.extend(address.map(|address| (address, ttl)));
        at = start + data.len();
    }
    Some(())
}

/// Where a name ends, which may be a pointer to another.
fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            pointer if pointer >= 0xc0 => return Some(at + 2),
            length if length < 0x40 => at += 1 + usize::from(length),
            _ => return None,
        }
    }
}

/// The address that a reverse query asks about.
pub(super) fn reverse(name: &str) -> Option<IpAddr> {
    if let Some(digits) = name.strip_suffix(".in-addr.arpa") {
        let mut octets = [0; 4];
        let mut parts = digits.split('.');
        for octet in octets.iter_mut().rev() {
            *octet = parts.next()?.parse().ok()?;
        }
        return parts.next().is_none().then(|| Ipv4Addr::from(octets).into());
    }
    let digits = name.strip_suffix(".ip6.arpa")?;
    let mut address = 0u128;
    let mut count = 0;
    for digit in digits.split('.').rev() {
        let value = u8::from_str_radix(digit, 16).ok().filter(|_| digit.len() == 1)?;
        address = address.checked_shl(4)? | u128::from(value);
        count += 1;
    }
    (count == 32).then(|| Ipv6Addr::from(address).into())
}

/// A query for a name of this type, as a client sends it.
#[cfg(test)]
pub(super) fn query(id: u16, name: &str, kind: u16) -> Vec<u8> {
    let mut message = id.to_be_bytes().to_vec();
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    message.extend(write_name(name).unwrap());
    message.extend(kind.to_be_bytes());
    message.extend([0, 1]);
    message
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_query_is_read_and_answered() {
        let query = Query::parse(&query(0x1234, "Web.Example", kind::A)).unwrap();
        assert_eq!((query.id, query.name.as_deref(), query.kind), (0x1234, Some("web.example"), kind::A));
        let answer = query.addresses(&["10.0.0.2".parse().unwrap()], 512);
        assert_eq!(&answer[..12], [0x12, 0x34, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
        assert_eq!(&answer[answer.len() - 16..], [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 10, 0, 4, 10, 0, 0, 2]);
        assert_eq!(query.failure(Code::Failed)[3], 0x82);
        assert!(query.is_answered_by(&answer, 0x1234));
        assert!(!query.is_answered_by(&answer, 0x1235));
        assert!(!query.is_answered_by(&super::query(0x1234, "Web.Example", kind::A), 0x1234));
    }

    #[test]
    fn what_does_not_fit_a_datagram_is_cut_and_said_so() {
        let query = Query::parse(&query(1, "many", kind::AAAA)).unwrap();
        let many: Vec<IpAddr> = (0..40).map(|n| Ipv6Addr::from(n).into()).collect();
        let cut = query.addresses(&many, 512);
        assert_eq!((cut[2] & 2, cut.len()), (2, query.failure(Code::Ok).len()));
        assert!(query.addresses(&many, usize::MAX).len() > 512);
        assert_eq!(query.relayed(vec![7; 600], 512)[2] & 2, 2);
        assert_eq!(query.relayed(vec![7; 20], 512)[..3], [0, 1, 7]);
    }

    #[test]
    fn the_size_that_a_client_takes_is_heeded_within_bounds() {
        for (said, taken) in [(100u16, 512), (1232, 1232), (65_000, 1400)] {
            let mut message = query(1, "a", kind::A);
            message[11] = 1;
            message.extend([0, 0, 41]);
            message.extend(said.to_be_bytes());
            message.extend([0; 6]);
            assert_eq!(Query::parse(&message).unwrap().datagram, taken);
        }
    }

    #[test]
    fn reverse_names_are_addresses() {
        assert_eq!(reverse("2.0.17.172.in-addr.arpa"), Some("172.17.0.2".parse().unwrap()));
        let nibbles = "2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa";
        assert_eq!(reverse(nibbles), Some("fd00::2".parse().unwrap()));
        for wrong in
            ["172.in-addr.arpa", "1.2.3.4.5.in-addr.arpa", "256.0.0.1.in-addr.arpa", "1.ip6.arpa", "web"]
        {
            assert_eq!(reverse(wrong), None, "{wrong}");
        }
        assert_eq!(write_name(&"x".repeat(64)), None);
    }

    #[test]
    fn the_addresses_of_an_answer_are_found() {
        let query = Query::parse(&query(1, "example.org", kind::A)).unwrap();
        let addresses = ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        let answer = query.addresses(&addresses, 4096);
        assert_eq!(addresses_in(&answer), addresses.map(|address| (address, TTL)));
        for end in 0..answer.len() {
            assert!(addresses_in(&answer[..end]).len() < 2);
        }
    }

    #[test]
    fn odd_messages_get_their_codes() {
        let good = query(1, "a", kind::A);
        let changed = |at: usize, value: u8| {
            let mut message = good.clone();
            message[at] = value;
            Query::parse(&message).map(|query| query.name)
        };
        assert_eq!(changed(2, 0x81), Err(None), "an answer");
        assert_eq!(changed(2, 0x10), Err(Some(Code::NotImplemented)), "another operation");
        assert_eq!(changed(5, 2), Err(Some(Code::Malformed)), "two questions");
        assert_eq!(changed(12, 0xc0), Err(Some(Code::Malformed)), "compression");
        assert_eq!(changed(13, 0), Ok(None), "no host's name");
        assert_eq!(Query::parse(&good[..good.len() - 1]), Err(Some(Code::Malformed)));
        assert_eq!(Query::parse(&[0; 3]), Err(None));
        let long = query(1, &vec!["abcdefg"; 31].join("."), kind::A);
        assert!(Query::parse(&long).is_ok());
    }

    proptest! {
        #[test]
        fn no_message_is_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            addresses_in(&bytes);
            if let Ok(query) = Query::parse(&bytes) {
                prop_assert!(query.addresses(&["1.2.3.4".parse().unwrap()], 512).len() <= 512);
                query.is_answered_by(&bytes, 1);
            }
        }

        #[test]
        fn mutated_queries_are_no_panic(at in 0usize..30, value: u8) {
            let mut message = query(1, "web.example.org", kind::AAAA);
            if let Some(byte) = message.get_mut(at) {
                *byte = value;
            }
            let _ = Query::parse(&message);
        }

        #[test]
        fn no_name_is_a_panic_backwards(name in "[0-9a-f.]{0,80}(\\.in-addr\\.arpa|\\.ip6\\.arpa)?") {
            let _ = reverse(&name);
        }
    }
}
