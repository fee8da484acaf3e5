//! Descriptors that nobody named are closed: the daemon leaves none open on purpose, but what another of its
//! threads opens while it spawns, or a library leaves, must not come along.

use std::{collections::BTreeSet, io};

use bulkhead_vmm_api::FdNumber;

/// Closes all but the standard streams and `keep`, whose numbers are over 2.
///
/// # Errors
/// The kernel has no `close_range` (before Linux 5.9).
pub(super) fn close_others(keep: &BTreeSet<FdNumber>) -> io::Result<()> {
    for (first, last) in gaps(keep) {
        // SAFETY: nothing in this process owns a descriptor in these ranges: all it has taken are kept.
        if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The ranges over 2 without these numbers, ends included.
fn gaps(keep: &BTreeSet<FdNumber>) -> Vec<(u32, u32)> {
    let mut gaps = Vec::new();
    let mut next = 3;
    for number in keep.iter().filter_map(|number| u32::try_from(*number).ok()).filter(|number| *number > 2) {
        if number > next {
            gaps.push((next, number - 1));
        }
        next = number + 1;
    }
    gaps.push((next, u32::MAX));
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gaps_leave_out_what_is_kept_and_nothing_else() {
        assert_eq!(gaps(&BTreeSet::new()), [(3, u32::MAX)]);
        assert_eq!(gaps(&BTreeSet::from([3, 4, 7])), [(5, 6), (8, u32::MAX)]);
        assert_eq!(gaps(&BTreeSet::from([-1, 0, 5])), [(3, 4), (6, u32::MAX)]);
    }
}
