//! What is still mounted, by anybody: also in a mount namespace that is being torn down, or where a file is held
//! open.

use std::{
    fmt,
    path::PathBuf,
    time::{Duration, Instant},
};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};

/// How long something that was unmounted may stay in use.
const RELEASE: Duration = Duration::from_secs(2);

const STEP: Duration = Duration::from_millis(1);

/// Something that was mounted.
#[derive(Debug)]
pub(super) enum Live {
    /// The device of a disk.
    Disk(PathBuf),
    /// What the kernel knows of a file share as long as it is mounted: [`super::share`] finds it.
    Share(PathBuf),
}

impl Live {
    fn is_in_use(&self) -> bool {
        match self {
            Self::Disk(device) => {
                // A mounted file system has it for itself, up to its last write.
                let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
                rustix::fs::open(device, flags, Mode::empty()).is_err_and(|error| error == Errno::BUSY)
            }
            Self::Share(known) => known.exists(),
        }
    }
}

impl fmt::Display for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(device) => write!(f, "the disk {}", device.display()),
            Self::Share(_) => f.write_str("the file share"),
        }
    }
}

/// Waits until nothing of it is in use; what still is after a while.
pub(super) fn wait_until_released(live: &[Live]) -> Option<&Live> {
    let deadline = Instant::now() + RELEASE;
    loop {
        let used = live.iter().find(|live| live.is_in_use())?;
        if Instant::now() >= deadline {
            return Some(used);
        }
        std::thread::sleep(STEP);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_not_in_use() {
        let directory = tempfile::tempdir().unwrap();
        let nothing = directory.path().join("nothing");
        let live = [Live::Disk(nothing.clone()), Live::Share(nothing)];
        assert!(wait_until_released(&live).is_none());
    }

    #[test]
    fn what_stays_is_named_after_a_while() {
        let directory = tempfile::tempdir().unwrap();
        let live = [Live::Share(directory.path().to_owned())];
        let used = wait_until_released(&live);
        assert_eq!(used.map(ToString::to_string).as_deref(), Some("the file share"));
    }
}
