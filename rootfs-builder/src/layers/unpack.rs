//! Unpacking.
pub(super) fn unpack() {}
