//! The keys with which a user leaves a terminal without ending its process.

use crate::engine::{Error, Result};

/// Watches a terminal's input for the keys. Bytes that may begin the keys are held back until it is clear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetachKeys {
    keys: Vec<u8>,
    /// How many of the keys the last bytes were.
    matched: usize,
}

/// How a user leaves a terminal, and who is told.
pub struct Detach {
    keys: DetachKeys,
    told: Box<dyn FnOnce() + Send>,
}

impl Detach {
    /// `told` is called when the keys were typed.
    pub fn new(keys: DetachKeys, told: impl FnOnce() + Send + 'static) -> Self {
        Self { keys, told: Box::new(told) }
    }

    /// Takes input.
    pub(super) fn scan(&mut self, bytes: &[u8]) -> Scanned {
        self.keys.scan(bytes)
    }

    /// The keys were typed, and nothing more is carried.
    pub(super) fn done(self) {
        (self.told)();
    }
}

/// What came of some input.
#[derive(Debug, PartialEq, Eq)]
pub enum Scanned {
    /// The process gets these bytes.
    Input(Vec<u8>),
    /// The keys were typed; before them the process gets these bytes.
    Detached(Vec<u8>),
}

impl DetachKeys {
    /// From `detachKeys`: keys separated by commas, each a character or `ctrl-` and one of `a`–`z`, `@`, `[`,
    /// `\`, `]`, `^`, `_`. Empty is `ctrl-p,ctrl-q`.
    ///
    /// # Errors
    /// Invalid.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = || Error::invalid(format!("Invalid detach keys ({text}) provided"));
        let text_or_default = if text.is_empty() { "ctrl-p,ctrl-q" } else { text };
        let mut keys = Vec::new();
        for key in text_or_default.split(',') {
            let byte = match *key.as_bytes() {
                [character] if character.is_ascii() => character,
                [b'c', b't', b'r', b'l', b'-', letter @ b'a'..=b'z'] => letter - b'a' + 1,
                [b'c', b't', b'r', b'l', b'-', b'@'] => 0,
                [b'c', b't', b'r', b'l', b'-', sign @ b'['..=b'_'] => sign - b'[' + 27,
                _ => return Err(wrong()),
            };
            keys.push(byte);
        }
        Ok(Self { keys, matched: 0 })
    }

    /// From the keys' own bytes; without any nothing detaches.
    pub fn from_bytes(keys: Vec<u8>) -> Self {
        Self { keys, matched: 0 }
    }

    /// The keys' own bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.keys
    }

    /// Takes input.
    pub fn scan(&mut self, bytes: &[u8]) -> Scanned {
        let mut input = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            if self.keys.get(self.matched) != Some(&byte) {
                // What was held back was input after all; this byte may begin the keys anew.
                input.extend_from_slice(&self.keys[..self.matched]);
                self.matched = 0;
            }
            if self.keys.get(self.matched) == Some(&byte) {
                self.matched += 1;
                if self.matched == self.keys.len() {
                    self.matched = 0;
                    return Scanned::Detached(input);
                }
            } else {
                input.push(byte);
            }
        }
        Scanned::Input(input)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: u8 = 16;
    const Q: u8 = 17;

    #[test]
    fn keys() {
        let keys = |text: &str| DetachKeys::parse(text).map(|keys| keys.keys).ok();
        assert_eq!(keys(""), Some(vec![P, Q]));
        assert_eq!(keys("a,ctrl-@,ctrl-[,ctrl-_"), Some(vec![b'a', 0, 27, 31]));
        for wrong in ["ctrl-", "ctrl-P", "ab", "a,", "é", "ctrl-pp"] {
            assert_eq!(keys(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn they_are_found_across_pieces_and_held_back_only_while_they_may_come() {
        let mut keys = DetachKeys::parse("").unwrap();
        assert_eq!(keys.scan(b"ab"), Scanned::Input(b"ab".to_vec()));
        assert_eq!(keys.scan(&[P]), Scanned::Input(vec![]));
        assert_eq!(keys.scan(b"x"), Scanned::Input(vec![P, b'x']));
        assert_eq!(keys.scan(&[P, P]), Scanned::Input(vec![P]));
        assert_eq!(keys.scan(&[Q, b'y']), Scanned::Detached(vec![]));
        assert_eq!(keys.scan(&[b'z', P, Q]), Scanned::Detached(vec![b'z']));
    }
}
