//! The server's name in the first message of a TLS client (RFC 8446, 4.1.2; RFC 6066, 3). Pure, and as hostile as a
//! guest: nothing of it is believed but its lengths, each of which is checked.

/// What the first bytes of a connection say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Hello {
    /// It is not told yet.
    Incomplete,
    /// A TLS client asks for this server, in lower case and without a final dot; None: for none by name.
    Client(Option<String>),
    /// Not a TLS client.
    Other,
}

/// The longest first message that is looked at. Those with keys for the time after quantum computers have 2 KiB.
pub(super) const LONGEST: usize = 16 << 10;

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u16 = 0;
const HOST_NAME: u8 = 0;

/// Looks at the first bytes of a connection.
pub(super) fn read(bytes: &[u8]) -> Hello {
    if bytes.first().is_some_and(|first| *first != HANDSHAKE) {
        return Hello::Other;
    }
    match message(bytes) {
        Ok(Some(message)) => match server_name(&message) {
            Some(name) => Hello::Client(name),
            None => Hello::Other,
        },
        Ok(None) if bytes.len() < LONGEST => Hello::Incomplete,
        _ => Hello::Other,
    }
}

/// What is not TLS.
struct NotTls;

/// The first handshake message, put together of its records. None: more is to come.
fn message(mut bytes: &[u8]) -> Result<Option<Vec<u8>>, NotTls> {
    let mut message = Vec::new();
    loop {
        let Some((&[kind, major, _, high, low], rest)) = bytes.split_first_chunk::<5>() else {
            return Ok(None);
        };
        let length = usize::from(u16::from_be_bytes([high, low]));
        if kind != HANDSHAKE || major != 3 || length == 0 || length > 1 << 14 {
            return Err(NotTls);
        }
        let part = rest.get(..length).unwrap_or(rest);
        message.extend(part);
        if let Some((&[kind, a, b, c], body)) = message.split_first_chunk::<4>() {
            let length = u32::from_be_bytes([0, a, b, c]) as usize;
            if kind != CLIENT_HELLO || length > LONGEST {
                return Err(NotTls);
            }
            if let Some(body) = body.get(..length) {
                return Ok(Some(body.to_vec()));
            }
        }
        if part.len() < length {
            return Ok(None);
        }
        bytes = rest.get(length..).unwrap_or_default();
    }
}

/// What is left of a message.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn number<const BYTES: usize>(&mut self) -> Option<usize> {
        Some(self.take(BYTES)?.iter().fold(0, |number, byte| number << 8 | usize::from(*byte)))
    }

    /// What has its length in the bytes before it.
    fn vector<const BYTES: usize>(&mut self) -> Option<Rest<'a>> {
        let length = self.number::<BYTES>()?;
        self.take(length).map(Rest)
    }
}

/// None: it is malformed. Two names, and two lists of them, are: servers differ in which of them they take.
fn server_name(hello: &[u8]) -> Option<Option<String>> {
    let mut hello = Rest(hello);
    hello.take(2 + 32)?;
    hello.vector::<1>()?;
    hello.vector::<2>()?;
    hello.vector::<1>()?;
    if hello.0.is_empty() {
        return Some(None);
    }
    let mut extensions = hello.vector::<2>()?;
    let mut found = None;
    while !extensions.0.is_empty() {
        let kind = extensions.number::<2>()?;
        let mut extension = extensions.vector::<2>()?;
        if kind != usize::from(SERVER_NAME) {
            continue;
        }
        let mut names = extension.vector::<2>()?;
        let kind = names.number::<1>()?;
        let name = names.vector::<2>()?;
        if kind != usize::from(HOST_NAME) || !names.0.is_empty() || !extension.0.is_empty() || found.is_some()
        {
            return None;
        }
        let name = std::str::from_utf8(name.0).ok().filter(|name| name.is_ascii())?;
        let name = name.strip_suffix('.').unwrap_or(name);
        found = Some(name.to_ascii_lowercase());
    }
    Some(found)
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn vector(length: usize, content: &[u8]) -> Vec<u8> {
        let bytes = (content.len() as u32).to_be_bytes();
        [&bytes[4 - length..], content].concat()
    }

    fn extension(kind: u16, content: &[u8]) -> Vec<u8> {
        [kind.to_be_bytes().as_slice(), &vector(2, content)].concat()
    }

    pub(in super::super) fn named(name: &str) -> Vec<u8> {
        extension(0, &vector(2, &[&[0], vector(2, name.as_bytes()).as_slice()].concat()))
    }

    /// A first message with these extensions, in records of at most `size` bytes.
    pub(in super::super) fn client(extensions: &[Vec<u8>], size: usize) -> Vec<u8> {
        let parts = [
            vec![3, 3],
            vec![7; 32],
            vector(1, &[1; 32]),
            vector(2, &[0x13, 1]),
            vector(1, &[0]),
            vector(2, &extensions.concat()),
        ];
        let message = [vec![CLIENT_HELLO], vector(3, &parts.concat())].concat();
        let record = |part: &[u8]| [&[HANDSHAKE, 3, 1], vector(2, part).as_slice()].concat();
        message.chunks(size).map(record).collect::<Vec<_>>().concat()
    }

    fn name(text: &str) -> Hello {
        Hello::Client(Some(text.to_owned()))
    }

    #[test]
    fn the_name_is_found_however_the_message_is_cut() {
        let extensions = [extension(10, &[0, 2, 0, 29]), named("WWW.example.org."), extension(21, &[0; 100])];
        for size in [1, 7, 100, 10_000] {
            let bytes = client(&extensions, size);
            assert_eq!(read(&bytes), name("www.example.org"), "{size}");
            for end in 0..bytes.len() {
                assert_eq!(read(&bytes[..end]), Hello::Incomplete, "{size}: {end}");
            }
            // What follows is none of ours.
            assert_eq!(read(&[bytes, vec![20, 3, 3, 0, 1, 1]].concat()), name("www.example.org"));
        }
    }

    #[test]
    fn no_name_is_told_from_nonsense() {
        assert_eq!(read(&client(&[extension(10, &[])], 1000)), Hello::Client(None));
        for (what, extensions) in [
            ("two lists", vec![named("a"), named("b")]),
            ("two names", vec![extension(0, &vector(2, &[0, 0, 1, b'a', 0, 0, 1, b'b']))]),
            ("another kind", vec![extension(0, &vector(2, &[1, 0, 1, b'a']))]),
            ("more behind", vec![extension(0, &[0, 4, 0, 0, 1, b'a', 9])]),
            ("not ASCII", vec![named("\u{e4}")]),
            ("cut short", vec![vec![0, 0, 0, 9, 1]]),
        ] {
            assert_eq!(read(&client(&extensions, 1000)), Hello::Other, "{what}");
        }
        assert_eq!(read(b"GET / HTTP/1.1"), Hello::Other);
        assert_eq!(read(&[22, 2, 0, 0, 1]), Hello::Other);
        assert_eq!(read(&[22, 3, 1, 0, 4, 2, 0, 0, 0]), Hello::Other, "a server's");
        assert_eq!(read(&[22, 3, 1, 0, 4, 1, 255, 255, 255]), Hello::Other, "too long");
    }

    #[test]
    fn a_message_without_an_end_is_given_up() {
        let endless = [vec![22, 3, 1, 0x40, 0], vec![1, 0, 0x40, 0], vec![0; LONGEST]].concat();
        assert_eq!(read(&endless[..LONGEST - 1]), Hello::Incomplete);
        assert_eq!(read(&endless[..LONGEST]), Hello::Other);
    }

    proptest! {
        #[test]
        fn no_bytes_are_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            read(&bytes);
            read(&[&[22, 3, 1, 0, 250, 1, 0, 0, 200], bytes.as_slice()].concat());
        }

        #[test]
        fn what_differs_in_a_byte_is_no_other_name(at in 0usize..140, byte: u8) {
            let mut bytes = client(&[named("www.example.org")], 1000);
            let at = at % bytes.len();
            bytes[at] = byte;
            if let Hello::Client(Some(found)) = read(&bytes) {
                prop_assert!(found.len() <= 255);
            }
        }
    }
}
