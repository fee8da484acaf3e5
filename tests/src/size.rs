//! How much a test does: what an emulated machine gets through in a minute or so, or the whole of what it is about.
//! `cargo xtask bench --only whole` runs those of the second size.

use std::env;

/// Asks for the whole, in the environment.
pub const WHOLE_VARIABLE: &str = "BULKHEAD_TEST_WHOLE";

/// How many, or how much, of something: `usual`, or `whole` where [`WHOLE_VARIABLE`] is set.
#[must_use]
pub fn size(usual: usize, whole: usize) -> usize {
    if is_whole() { whole } else { usual }
}

/// Whether [`WHOLE_VARIABLE`] is set.
#[must_use]
pub fn is_whole() -> bool {
    env::var_os(WHOLE_VARIABLE).is_some_and(|value| !value.is_empty())
}
