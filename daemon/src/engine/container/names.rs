//! Containers' names: valid, unique, and made up where the user gave none.

use crate::engine::{Error, Result};

const ADJECTIVES: [&str; 48] = [
    "able", "amber", "ancient", "bold", "brave", "bright", "brisk", "calm", "clever", "cosy", "daring",
    "eager", "early", "fair", "fleet", "gentle", "glad", "golden", "grand", "hardy", "honest", "humble",
    "jolly", "keen", "kind", "lively", "loyal", "lucid", "mellow", "merry", "mild", "neat", "noble",
    "patient", "plucky", "proud", "quick", "quiet", "ready", "rustic", "sharp", "silent", "solid", "steady",
    "sturdy", "tidy", "vivid", "witty",
];

const NOUNS: [&str; 48] = [
    "anchor",
    "badger",
    "barge",
    "beacon",
    "bosun",
    "breaker",
    "brig",
    "bulwark",
    "buoy",
    "canal",
    "capstan",
    "clipper",
    "compass",
    "cormorant",
    "current",
    "cutter",
    "dinghy",
    "dolphin",
    "estuary",
    "ferry",
    "fjord",
    "galley",
    "gannet",
    "harbour",
    "hawser",
    "heron",
    "hull",
    "jetty",
    "keel",
    "lagoon",
    "lantern",
    "lighthouse",
    "mooring",
    "narwhal",
    "otter",
    "pelican",
    "pilot",
    "quay",
    "rudder",
    "sextant",
    "skipper",
    "sloop",
    "spindrift",
    "tiller",
    "trawler",
    "walrus",
    "wharf",
    "windlass",
];

/// Checks a name that a user gave and takes off its `/`.
///
/// # Errors
/// 400 in Docker's words.
pub(crate) fn check(name: &str) -> Result<&str> {
    let bare = name.strip_prefix('/').unwrap_or(name);
    let valid = bare.len() >= 2
        && bare.starts_with(|c: char| c.is_ascii_alphanumeric())
        && bare.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'));
    if valid {
        Ok(bare)
    } else {
        Err(Error::invalid(format!(
            "Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed"
        )))
    }
}

/// A name made of an adjective and a noun; after some attempts that were taken, with a digit.
pub(crate) fn random(attempt: u32) -> String {
    let [a, b, c] = random_bytes();
    let pick = |words: &'static [&'static str; 48], byte: u8| words[usize::from(byte) % words.len()];
    let (adjective, noun) = (pick(&ADJECTIVES, a), pick(&NOUNS, b));
    if attempt < 3 { format!("{adjective}_{noun}") } else { format!("{adjective}_{noun}{}", c % 10) }
}

/// A new container's or exec's id: 64 hexadecimal digits. One whose first 12 digits are a number is not taken,
/// since it would be a bad host name.
pub(crate) fn new_id() -> String {
    loop {
        let bytes: [u8; 32] = random_bytes();
        let id = hex::encode(bytes);
        if id.bytes().take(12).any(|digit| !digit.is_ascii_digit()) {
            return id;
        }
    }
}

fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the kernel's random source does not fail once it is up");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_as_docker_checks_them() {
        for (name, bare) in [("web", "web"), ("/web", "web"), ("a1_.-", "a1_.-"), ("0x", "0x")] {
            assert_eq!(check(name).unwrap(), bare);
        }
        for name in ["", "/", "a", "_a", "-a", "a/b", "//a", "a b", "ä1", "a\n"] {
            let error = check(name).unwrap_err();
            assert!(error.message.starts_with(&format!("Invalid container name ({name}), only ")));
        }
    }

    #[test]
    fn made_up_names_are_valid() {
        for attempt in 0..6 {
            let name = random(attempt);
            assert_eq!(check(&name).unwrap(), name);
        }
        assert_eq!(new_id().len(), 64);
    }
}
