//! Random bytes of the host, from the system call itself: a VMM opens no path, and the usual library, where it is
//! linked statically, would open `/dev/urandom`.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

/// Fills `bytes`.
///
/// # Errors
/// The host has no entropy to give.
pub fn fill(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = match getrandom(&mut *bytes, GetRandomFlags::empty()) {
            Err(rustix::io::Errno::INTR) => 0,
            other => other?,
        };
        bytes = bytes.get_mut(count..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_bytes_are_random() {
        let mut first = [0; 1000];
        let mut second = first;
        fill(&mut first).unwrap();
        fill(&mut second).unwrap();
        assert_ne!(first, second);
        assert!(first.chunks(20).all(|chunk| chunk.iter().any(|byte| *byte != 0)));
        fill(&mut []).unwrap();
    }
}
