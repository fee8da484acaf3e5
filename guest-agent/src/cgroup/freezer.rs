//! The freezer: a container's processes stand still between two instructions, and so do those that are born
//! in its cgroup meanwhile. A kill still ends them.
//!
//! ```text
//!   freeze() ──▶ cgroup.freeze 1 ──▶ the kernel stops them one by one ──▶ is_frozen()
//!   thaw()   ──▶ cgroup.freeze 0
//! ```
//! A process that the kernel is working for at that moment (it waits for a disk) stops when that is done, so
//! whoever froze asks [`Cgroup::is_frozen`] until it is so.

use std::fs;

use super::{Cgroup, counter};
use crate::error::{Context, Result};

impl Cgroup {
    /// Begins to freeze every process; nothing if they are frozen.
    ///
    /// # Errors
    /// The cgroup is gone.
    pub fn freeze(&self) -> Result<()> {
        fs::write(self.path.join("cgroup.freeze"), "1").context("freeze a cgroup")
    }

    /// Lets every process run on; nothing if they do.
    ///
    /// # Errors
    /// The cgroup is gone.
    pub fn thaw(&self) -> Result<()> {
        fs::write(self.path.join("cgroup.freeze"), "0").context("thaw a cgroup")
    }

    /// Whether every process stands still.
    pub fn is_frozen(&self) -> bool {
        counter(&self.events(), "frozen") > 0
    }
}
