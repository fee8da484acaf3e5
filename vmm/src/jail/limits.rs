//! Resource limits. Memory and CPU time are the control group's affair; these bound what it does not count.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::JailError;

/// Open files: thousands for the file server, one for each vsock connection.
pub(super) const FILES: u64 = 16 * 1024;

/// Open files of a share server: what its guest has open, and what is kept open to be found again.
pub(super) const SHARED_FILES: u64 = 48 * 1024;

pub(super) fn set(files: u64) -> Result<(), JailError> {
    // The soft limit that comes along is often 1024, for programs that use select().
    let files = getrlimit(Resource::Nofile).maximum.map_or(files, |most| most.min(files));
    limit("RLIMIT_NOFILE", Resource::Nofile, files)?;
    // A core would hold the guest's memory.
    limit("RLIMIT_CORE", Resource::Core, 0)?;
    limit("RLIMIT_MEMLOCK", Resource::Memlock, 0)?;
    limit("RLIMIT_MSGQUEUE", Resource::Msgqueue, 0)?;
    limit("RLIMIT_NICE", Resource::Nice, 0)?;
    limit("RLIMIT_RTPRIO", Resource::Rtprio, 0)
}

/// The limit counts what the user id runs, which is this process alone.
///
/// One more than there are: KVM starts a worker of its own in the process's name when the first vCPU is first
/// run, and answers `EAGAIN` for ever when it may not.
pub(super) fn no_more_threads(there: usize) -> Result<(), JailError> {
    limit("RLIMIT_NPROC", Resource::Nproc, there as u64 + 1)
}

fn limit(name: &'static str, resource: Resource, value: u64) -> Result<(), JailError> {
    let limit = Rlimit { current: Some(value), maximum: Some(value) };
    setrlimit(resource, limit).map_err(JailError::at(name))
}
