//! One line of a json-file log: `{"log":"…\n","stream":"stdout","time":"2026-01-02T03:04:05.678Z"}`.
//!
//! The text is escaped as Docker escapes it: `<`, `>`, `&`, U+2028 and U+2029 as `\u…`, and each byte that
//! is not part of UTF-8 as `\ufffd`. A true U+FFFD stands as it is, so [`raw_length`] can tell from a line
//! how many bytes the process wrote.

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::Timestamp;
use serde::Deserialize;

use super::{Record, Stream};

/// The longest line that a writer makes is about six times 16 KiB; a longer one is damage.
pub(super) const MAX_LINE: usize = 256 << 10;

/// Appends the line of `text`. `time` is a timestamp as text, `attributes` JSON or nothing.
pub(super) fn encode(out: &mut Vec<u8>, stream: Stream, time: &str, text: &[u8], attributes: &str) {
    out.extend_from_slice(b"{");
    if !text.is_empty() {
        out.extend_from_slice(b"\"log\":\"");
        escape(out, text);
        out.extend_from_slice(b"\",");
    }
    out.extend_from_slice(b"\"stream\":\"");
    out.extend_from_slice(name(stream).as_bytes());
    if !attributes.is_empty() {
        out.extend_from_slice(b"\",\"attrs\":");
        out.extend_from_slice(attributes.as_bytes());
        out.extend_from_slice(b",\"time\":\"");
    } else {
        out.extend_from_slice(b"\",\"time\":\"");
    }
    out.extend_from_slice(time.as_bytes());
    out.extend_from_slice(b"\"}\n");
}

fn name(stream: Stream) -> &'static str {
    match stream {
        Stream::Stdin => "stdin",
        Stream::Stdout => "stdout",
        Stream::Stderr => "stderr",
    }
}

fn stream(name: &str) -> Option<Stream> {
    match name {
        "stdout" => Some(Stream::Stdout),
        "stderr" => Some(Stream::Stderr),
        _ => None,
    }
}

fn escape(out: &mut Vec<u8>, text: &[u8]) {
    for chunk in text.utf8_chunks() {
        escape_utf8(out, chunk.valid());
        for _ in chunk.invalid() {
            out.extend_from_slice(b"\\ufffd");
        }
    }
}

fn escape_utf8(out: &mut Vec<u8>, text: &str) {
    const HEX: [u8; 16] = *b"0123456789abcdef";
    let bytes = text.as_bytes();
    let mut plain_from = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        let plain = match byte {
            b'"' | b'\\' | b'<' | b'>' | b'&' | 0..0x20 => false,
            // U+2028 and U+2029 are E2 80 A8 and E2 80 A9.
            0xE2 => !matches!(bytes.get(at + 1..at + 3), Some([0x80, 0xA8 | 0xA9])),
            _ => true,
        };
        if plain {
            continue;
        }
        out.extend_from_slice(&bytes[plain_from..at]);
        plain_from = at + 1;
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            0xE2 => {
                out.extend_from_slice(if bytes[at + 2] == 0xA8 { b"\\u2028" } else { b"\\u2029" });
                plain_from = at + 3;
            }
            _ => {
                let (high, low) = (HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]);
                out.extend_from_slice(&[b'\\', b'u', b'0', b'0', high, low]);
            }
        }
    }
    out.extend_from_slice(&bytes[plain_from..]);
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(default, borrow)]
    log: std::borrow::Cow<'a, str>,
    stream: &'a str,
    #[serde(default)]
    attrs: BTreeMap<String, String>,
    time: Timestamp,
}

/// The record of a line, None when it is damaged.
pub(super) fn decode(line: &[u8]) -> Option<Record> {
    let line: Line<'_> = serde_json::from_slice(line).ok()?;
    Some(Record {
        stream: stream(line.stream)?,
        time: line.time,
        bytes: Bytes::copy_from_slice(line.log.as_bytes()),
        attributes: line.attrs,
    })
}

/// Which stream a line is of, and how many bytes the process wrote for it. None when it is damaged.
pub(super) fn raw_length(line: &[u8]) -> Option<(Stream, u64)> {
    #[derive(Deserialize)]
    struct Raw<'a> {
        #[serde(default, borrow)]
        log: Option<&'a serde_json::value::RawValue>,
        stream: &'a str,
    }
    let line: Raw<'_> = serde_json::from_slice(line).ok()?;
    let mut length = 0;
    let mut text = line.log.map_or("\"\"", |raw| raw.get()).as_bytes();
    text = text.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
    while let Some((&byte, rest)) = text.split_first() {
        let (taken, stands_for) = match (byte, rest.first()) {
            (b'\\', Some(b'u')) => match rest.get(1..5)? {
                b"2028" | b"2029" => (6, 3),
                _ => (6, 1),
            },
            (b'\\', _) => (2, 1),
            _ => (1, 1),
        };
        text = text.get(taken..)?;
        length += stands_for;
    }
    Some((stream(line.stream)?, length))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn line(text: &[u8]) -> String {
        let mut out = Vec::new();
        encode(&mut out, Stream::Stderr, "2026-01-02T03:04:05.6Z", text, "");
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn lines_are_those_of_docker() {
        for (text, log) in [
            (&b"plain\n"[..], r"plain\n"),
            (b"a\tb\r\x1b[0m\x7f\"\\/", "a\\u0009b\\r\\u001b[0m\x7f\\\"\\\\/"),
            (b"<a href='x'>&</a>", r"\u003ca href='x'\u003e\u0026\u003c/a\u003e"),
            ("é\u{2028}\u{2029}\u{20ac}\u{fffd}".as_bytes(), "é\\u2028\\u2029€\u{fffd}"),
            (b"\xff\xe2\x80", r"\ufffd\ufffd\ufffd"),
        ] {
            let expected =
                format!("{{\"log\":\"{log}\",\"stream\":\"stderr\",\"time\":\"2026-01-02T03:04:05.6Z\"}}\n");
            assert_eq!(line(text), expected);
        }
        assert_eq!(line(b""), "{\"stream\":\"stderr\",\"time\":\"2026-01-02T03:04:05.6Z\"}\n");
    }

    #[test]
    fn attributes_stand_beside_the_stream() {
        let mut out = Vec::new();
        encode(&mut out, Stream::Stdout, "2026-01-02T03:04:05Z", b"x\n", r#"{"a":"b"}"#);
        let expected = r#"{"log":"x\n","stream":"stdout","attrs":{"a":"b"},"time":"2026-01-02T03:04:05Z"}"#;
        assert_eq!(String::from_utf8(out.clone()).unwrap().trim_end(), expected);
        assert_eq!(decode(&out).unwrap().attributes["a"], "b");
        assert_eq!(raw_length(&out), Some((Stream::Stdout, 2)));
    }

    #[test]
    fn what_is_damaged_is_no_record() {
        let whole = line(b"text\n");
        for cut in 1..whole.len() - 1 {
            assert_eq!(decode(&whole.as_bytes()[..cut]), None);
            assert_eq!(raw_length(&whole.as_bytes()[..cut]), None);
        }
        assert_eq!(raw_length(br#"{"log":5,"stream":"stdout","time":"2026-01-02T03:04:05Z"}"#), None);
        assert_eq!(raw_length(br#"{"log":"a","stream":"other","time":"2026-01-02T03:04:05Z"}"#), None);
    }

    proptest! {
        #[test]
        fn every_byte_is_counted(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let line = line(&text);
            prop_assert_eq!(raw_length(line.as_bytes()), Some((Stream::Stderr, text.len() as u64)));
            prop_assert_eq!(line.matches('\n').count(), 1);
            let record = decode(line.as_bytes()).unwrap();
            prop_assert_eq!(record.stream, Stream::Stderr);
        }

        #[test]
        fn text_comes_back_as_it_was(text in ".{0,80}") {
            prop_assert_eq!(decode(line(text.as_bytes()).as_bytes()).unwrap().bytes, text.as_bytes());
        }
    }
}
