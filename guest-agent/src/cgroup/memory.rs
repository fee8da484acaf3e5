//! Memory beyond limits: what all containers may have together, and page cache given up on request.

use std::{
    fs,
    io::{self, ErrorKind},
    path::Path,
};

use super::{Cgroup, PARENT, counter};
use crate::error::{Context, Result, invalid};

/// The most that one call reclaims, in bytes: everything else waits for it.
const MAX_RECLAIM: u64 = 64 << 20;

/// All of the machine's memory, in bytes.
pub fn total_memory() -> u64 {
    let info = rustix::system::sysinfo();
    u64::from(info.mem_unit).saturating_mul(info.totalram)
}

/// How many bytes all containers may have together.
///
/// # Errors
/// The kernel refuses it.
pub fn set_room(bytes: u64) -> Result<()> {
    fs::write(Path::new(PARENT).join("memory.max"), bytes.to_string()).context("set the containers' memory")
}

impl Cgroup {
    /// Frees `percent` of its page cache, at most 64 MiB. How many bytes it uses less.
    ///
    /// # Errors
    /// The percentage is none, or the kernel has no such thing.
    pub fn reclaim(&self, percent: u8) -> Result<u64> {
        if !(1..=100).contains(&percent) {
            return Err(invalid(format!("{percent} is not 1 to 100 percent")));
        }
        let stat = fs::read_to_string(self.path.join("memory.stat")).context("memory.stat")?;
        let bytes = wanted(&stat, percent);
        if bytes == 0 {
            return Ok(0);
        }
        let before = self.memory_use();
        // Swap is left alone: what a workload holds would only move from memory to its disk.
        let result = match self.try_reclaim(&format!("{bytes} swappiness=0")) {
            Err(error) if error.kind() == ErrorKind::InvalidInput => self.try_reclaim(&bytes.to_string()),
            result => result,
        };
        match result {
            // Less than asked for could be freed.
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("memory.reclaim"),
        }
        Ok(before.saturating_sub(self.memory_use()))
    }

    fn try_reclaim(&self, text: &str) -> io::Result<()> {
        fs::write(self.path.join("memory.reclaim"), text)
    }

    fn memory_use(&self) -> u64 {
        let text = fs::read_to_string(self.path.join("memory.current")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }
}

/// That part of the page cache in `memory.stat`, which counts shared memory in other lists.
fn wanted(stat: &str, percent: u8) -> u64 {
    let cache = counter(stat, "inactive_file").saturating_add(counter(stat, "active_file"));
    (cache / 100).saturating_mul(u64::from(percent)).min(MAX_RECLAIM)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_the_page_cache_is_wanted_and_bounded() {
        let stat = "anon 900000\nfile 5000\ninactive_anon 1\ninactive_file 4000\nactive_file 1000\n";
        assert_eq!(wanted(stat, 10), 500);
        assert_eq!(wanted("", 50), 0);
        assert_eq!(wanted(&format!("inactive_file {}\n", u64::MAX), 100), MAX_RECLAIM);
    }
}
