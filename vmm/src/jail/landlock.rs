//! Landlock: a domain without rules, so that everything it handles is denied. Files are handled when they are
//! opened or made by path; what came as a descriptor is not concerned. A kernel without Landlock, or with
//! less of it, gives that much less: everything here is denied by other means as well.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use super::JailError;

/// What a thread may still do with file names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Files {
    /// Open for reading what lies below a directory it was given: the file server does.
    ReadBeneath,
    /// Nothing.
    None,
}

/// `struct landlock_ruleset_attr`.
#[repr(C)]
struct Handled {
    files: u64,
    /// Since version 4.
    net: u64,
    /// Since version 6.
    scoped: u64,
}

const CREATE_RULESET_VERSION: u32 = 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
/// Bind and connect TCP sockets.
const NET: u64 = 0b11;
/// Abstract Unix sockets of others, and signals to others.
const SCOPED: u64 = 0b11;

/// Restricts the calling thread, and those that it starts from now on. Domains add up.
///
/// # Errors
/// The kernel has Landlock and refuses.
pub(super) fn restrict(files: Files) -> Result<(), JailError> {
    let Some(version) = version() else { return Ok(()) };
    let (handled, size) = handled(version, files);
    // SAFETY: the pointer is to `size` bytes of `struct landlock_ruleset_attr`, which the kernel copies.
    let result = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const handled, size, 0u32) };
    let ruleset = i32::try_from(result).ok().filter(|fd| *fd >= 0);
    let ruleset =
        ruleset.ok_or_else(|| JailError::at("landlock_create_ruleset")(io::Error::last_os_error()))?;
    // SAFETY: the descriptor is new and nobody else's.
    let ruleset = unsafe { OwnedFd::from_raw_fd(ruleset) };
    // SAFETY: takes plain numbers.
    let result = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0u32) };
    if result < 0 {
        return Err(JailError::at("landlock_restrict_self")(io::Error::last_os_error()));
    }
    Ok(())
}

/// The kernel's version of Landlock; None where it has none or was started without.
fn version() -> Option<i64> {
    let (none, size) = (std::ptr::null::<Handled>(), 0usize);
    // SAFETY: with this flag nothing is read.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, size, CREATE_RULESET_VERSION) };
    (version > 0).then_some(version)
}

/// All that this version can handle, and how much of the structure it knows.
fn handled(version: i64, files: Files) -> (Handled, usize) {
    let kinds = match version {
        1 => 13,
        2 => 14,
        3 | 4 => 15,
        _ => 16,
    };
    let all = (1 << kinds) - 1;
    let files = match files {
        Files::ReadBeneath => all & !(READ_FILE | READ_DIR),
        Files::None => all,
    };
    let size = match version {
        ..4 => 8,
        4 | 5 => 16,
        _ => 24,
    };
    (Handled { files, net: NET, scoped: SCOPED }, size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_handles_what_it_knows() {
        let none = |version| (handled(version, Files::None).0.files, handled(version, Files::None).1);
        assert_eq!(none(1), (0x1fff, 8));
        assert_eq!(none(3), (0x7fff, 8));
        assert_eq!(none(4), (0x7fff, 16));
        assert_eq!(none(6), (0xffff, 24));
        assert_eq!(handled(6, Files::ReadBeneath).0.files, 0xfff3);
    }

    #[test]
    fn a_restricted_thread_opens_nothing_and_others_are_not_concerned() {
        let Some(_) = version() else { return };
        std::thread::spawn(|| {
            rustix::thread::set_no_new_privs(true).unwrap();
            restrict(Files::ReadBeneath).unwrap();
            assert!(std::fs::File::open("/proc/self/stat").is_ok());
            assert!(std::fs::File::create(std::env::temp_dir().join("bulkhead-landlock")).is_err());
            restrict(Files::None).unwrap();
            let error = std::fs::File::open("/proc/self/stat").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
            assert!(std::net::TcpListener::bind("127.0.0.1:0").is_err() || version() < Some(4));
        })
        .join()
        .unwrap();
        assert!(std::fs::File::open("/proc/self/stat").is_ok());
    }
}
