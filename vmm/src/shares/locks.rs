//! Locks that lock: against other processes of the guest, other guests, and processes of the host.
//!
//! | in the guest | here |
//! |---|---|
//! | `flock` | `flock` on the open file that the handle is |
//! | `fcntl(F_SETLK)`, by process | an open file description lock, on a file opened for the process that owns it |
//! | `fcntl(F_OFD_SETLK)`, by open file | likewise |
//!
//! Open file description locks conflict with those that processes of the host take by `fcntl`, and end with the
//! descriptor: when the owner flushes the file (each close does), or the handle by which the lock was taken is
//! released.
//!
//! A lock that is waited for is tried again and again ([`Waiting`]), so that neither a worker nor a slot stands still.
//! Linux cannot interrupt a request of virtio-fs: who waits, waits until the lock is there, whatever signals come. To
//! answer EINTR now and then would be worse: `fuse_setlk` makes ERESTARTSYS of it, which a process sees as error 512
//! where no signal is pending.

use std::{
    collections::HashMap,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::{fs::FlockOperation, io::Errno};

use super::{Result, index::Indexes};
use crate::devices::virtio::fs::wire::{FileLock, LkIn};

/// How often a lock that is waited for is tried: soon, then more and more rarely.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// The most owners of locks, each with an open file.
const MOST_OWNERS: usize = 4096;

/// The most requests that wait for one. A guest's queues hold fewer.
const MOST_WAITING: usize = 4096;

const F_RDLCK: u32 = libc::F_RDLCK as u32;
const F_WRLCK: u32 = libc::F_WRLCK as u32;
const F_UNLCK: u32 = libc::F_UNLCK as u32;

/// Who holds `fcntl` locks, on which node.
#[derive(Debug, Default)]
pub(super) struct Owners {
    owners: Mutex<HashMap<(u64, u64), Owner>>,
    /// Those of a lock that is their guest's.
    pub(super) indexes: Indexes,
}

#[derive(Debug)]
struct Owner {
    file: Arc<OwnedFd>,
    /// The handle by which it asked last.
    handle: u64,
}

impl Owners {
    fn lock(&self) -> MutexGuard<'_, HashMap<(u64, u64), Owner>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file of an owner, opened by `open` where it has none yet.
    pub(super) fn file(
        &self,
        node: u64,
        asked: &LkIn,
        open: impl FnOnce() -> Result<OwnedFd>,
    ) -> Result<Arc<OwnedFd>> {
        let mut owners = self.lock();
        if let Some(owner) = owners.get_mut(&(node, asked.owner)) {
            owner.handle = asked.fh;
            return Ok(Arc::clone(&owner.file));
        }
        if owners.len() >= MOST_OWNERS {
            return Err(Errno::NOLCK);
        }
        let file = Arc::new(open()?);
        owners.insert((node, asked.owner), Owner { file: Arc::clone(&file), handle: asked.fh });
        Ok(file)
    }

    /// An owner has closed the node's file: all of its locks on it end.
    pub(super) fn closed(&self, node: u64, owner: u64) {
        let gone = self.lock().remove(&(node, owner));
        drop(gone);
        self.indexes.closed(node, owner);
    }

    /// A handle is released for good: so do the locks that were taken by it alone.
    pub(super) fn released(&self, node: u64, handle: u64) {
        self.lock().retain(|(of, _), owner| *of != node || owner.handle != handle);
        self.indexes.released(node, handle);
    }

    /// Ends all.
    pub(super) fn clear(&self) {
        self.lock().clear();
        self.indexes.clear();
    }
}

/// Sets a `flock` lock; EAGAIN where somebody else's is in the way.
pub(super) fn flock(file: &OwnedFd, kind: u32) -> Result<()> {
    let operation = match kind {
        F_RDLCK => FlockOperation::NonBlockingLockShared,
        F_WRLCK => FlockOperation::NonBlockingLockExclusive,
        F_UNLCK => FlockOperation::Unlock,
        _ => return Err(Errno::INVAL),
    };
    rustix::fs::flock(file, operation)
}

/// Sets an `fcntl` lock; EAGAIN where somebody else's is in the way.
pub(super) fn set(file: &OwnedFd, lock: &FileLock) -> Result<()> {
    let mut native = native(lock)?;
    // SAFETY: the structure is a `struct flock`, which the kernel reads.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut native) } {
        0 => Ok(()),
        _ => Err(match last_error() {
            Errno::ACCESS => Errno::AGAIN,
            errno => errno,
        }),
    }
}

/// Which lock is in the way of one.
pub(super) fn get(file: &OwnedFd, lock: &FileLock) -> Result<FileLock> {
    let mut native = native(lock)?;
    // SAFETY: the structure is a `struct flock`, which the kernel reads and writes.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut native) } != 0 {
        return Err(last_error());
    }
    let kind = u32::try_from(native.l_type).unwrap_or(F_UNLCK);
    if kind == F_UNLCK {
        return Ok(FileLock { kind, ..*lock });
    }
    let start = u64::try_from(native.l_start).unwrap_or(0);
    let end = match u64::try_from(native.l_len) {
        Ok(0) | Err(_) => i64::MAX as u64,
        Ok(length) => start.saturating_add(length - 1),
    };
    // Its holder's number means nothing in the guest.
    Ok(FileLock { start, end, kind, pid: 0 })
}

fn native(lock: &FileLock) -> Result<libc::flock> {
    let start = i64::try_from(lock.start).map_err(|_| Errno::INVAL)?;
    let end = i64::try_from(lock.end).unwrap_or(i64::MAX);
    if end < start || !matches!(lock.kind, F_RDLCK | F_WRLCK | F_UNLCK) {
        return Err(Errno::INVAL);
    }
    // SAFETY: zero is a valid `struct flock`.
    let mut native: libc::flock = unsafe { std::mem::zeroed() };
    native.l_type = lock.kind as libc::c_short;
    native.l_whence = libc::SEEK_SET as libc::c_short;
    native.l_start = start;
    native.l_len = if end == i64::MAX { 0 } else { end - start + 1 };
    Ok(native)
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Requests that wait for a lock.
#[derive(Debug)]
pub(super) struct Waiting<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<T> {
    requests: Vec<T>,
    /// Among them those that are just being tried.
    count: usize,
    /// A lock may have ended.
    stirred: bool,
    closed: bool,
}

impl<T> Default for Waiting<T> {
    fn default() -> Self {
        let state = State { requests: Vec::new(), count: 0, stirred: false, closed: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }
}

impl<T> Waiting<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether no more can wait.
    pub(super) fn is_full(&self) -> bool {
        self.lock().count >= MOST_WAITING
    }

    /// Puts a request off.
    pub(super) fn add(&self, request: T) {
        let mut state = self.lock();
        state.requests.push(request);
        state.count += 1;
        state.stirred = true;
        self.changed.notify_all();
    }

    /// Says that a lock has ended.
    pub(super) fn stir(&self) {
        let mut state = self.lock();
        if !state.requests.is_empty() {
            state.stirred = true;
            self.changed.notify_all();
        }
    }

    /// Lets [`Waiting::run`] return.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Tries those that wait until it is closed. `again` says whether a request is done.
    pub(super) fn run(&self, mut again: impl FnMut(&T) -> bool) {
        let mut pause = FIRST_PAUSE;
        let mut state = self.lock();
        while !state.closed {
            if state.requests.is_empty() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if state.stirred {
                pause = FIRST_PAUSE;
            } else {
                let waited = self.changed.wait_timeout(state, pause);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            state.stirred = false;
            let mut requests = std::mem::take(&mut state.requests);
            drop(state);
            let before = requests.len();
            requests.retain(|request| !again(request));
            state = self.lock();
            state.count -= before - requests.len();
            // Who has waited longest is tried first.
            requests.append(&mut state.requests);
            state.requests = requests;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &std::path::Path) -> OwnedFd {
        std::fs::File::options().read(true).write(true).open(path).unwrap().into()
    }

    fn lock(kind: u32, start: u64, end: u64) -> FileLock {
        FileLock { start, end, kind, pid: 0 }
    }

    #[test]
    fn locks_exclude_others_and_processes_of_the_host() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (ours, theirs) = (open(file.path()), open(file.path()));
        set(&ours, &lock(F_WRLCK, 10, 19)).unwrap();
        assert_eq!(set(&theirs, &lock(F_RDLCK, 19, 30)), Err(Errno::AGAIN));
        set(&theirs, &lock(F_WRLCK, 20, i64::MAX as u64)).unwrap();
        assert_eq!(get(&theirs, &lock(F_RDLCK, 0, 12)).unwrap(), lock(F_WRLCK, 10, 19));
        assert_eq!(get(&ours, &lock(F_WRLCK, 0, u64::MAX)).unwrap(), lock(F_WRLCK, 20, i64::MAX as u64));
        assert_eq!(get(&ours, &lock(F_RDLCK, 0, 5)).unwrap().kind, F_UNLCK);
        // As a process of the host asks, which owns its locks itself.
        let mut asked = native(&lock(F_WRLCK, 0, 100)).unwrap();
        // SAFETY: as in `set`.
        let result = unsafe { libc::fcntl(theirs.as_raw_fd(), libc::F_SETLK, &raw mut asked) };
        assert!(result < 0);
        drop(ours);
        set(&theirs, &lock(F_WRLCK, 0, 30)).unwrap();
        for wrong in [lock(F_WRLCK, 5, 4), lock(9, 0, 1), lock(F_RDLCK, u64::MAX, u64::MAX)] {
            assert_eq!(set(&theirs, &wrong), Err(Errno::INVAL));
        }
    }

    #[test]
    fn a_flock_is_the_open_files() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (ours, theirs) = (open(file.path()), open(file.path()));
        flock(&ours, F_RDLCK).unwrap();
        flock(&theirs, F_RDLCK).unwrap();
        assert_eq!(flock(&theirs, F_WRLCK), Err(Errno::AGAIN));
        flock(&ours, F_UNLCK).unwrap();
        flock(&theirs, F_WRLCK).unwrap();
        assert_eq!(flock(&ours, 7), Err(Errno::INVAL));
    }

    #[test]
    fn owners_end_by_closing_or_with_their_handle() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let owners = Owners::default();
        let asked = |owner, fh| LkIn { fh, owner, lock: lock(F_WRLCK, 0, 9), lk_flags: 0, padding: 0 };
        let first = owners.file(5, &asked(1, 100), || Ok(open(file.path()))).unwrap();
        set(&first, &lock(F_WRLCK, 0, 9)).unwrap();
        let again = owners.file(5, &asked(1, 100), || unreachable!()).unwrap();
        assert!(Arc::ptr_eq(&first, &again));
        drop((first, again));
        let second = owners.file(5, &asked(2, 101), || Ok(open(file.path()))).unwrap();
        assert_eq!(set(&second, &lock(F_WRLCK, 0, 9)), Err(Errno::AGAIN));
        owners.closed(5, 3);
        owners.released(6, 100);
        assert_eq!(set(&second, &lock(F_WRLCK, 0, 9)), Err(Errno::AGAIN));
        owners.released(5, 100);
        set(&second, &lock(F_WRLCK, 0, 9)).unwrap();
        drop(second);
        owners.closed(5, 2);
        set(&open(file.path()), &lock(F_WRLCK, 0, 9)).unwrap();
    }

    #[test]
    fn who_waits_is_tried_again() {
        let waiting = Arc::new(Waiting::default());
        let tries = Arc::new(Mutex::new(Vec::new()));
        let thread = std::thread::spawn({
            let (waiting, tries) = (Arc::clone(&waiting), Arc::clone(&tries));
            move || {
                waiting.run(|request: &u32| {
                    tries.lock().unwrap().push(*request);
                    tries.lock().unwrap().len() >= 5
                });
            }
        });
        waiting.add(7);
        while !waiting.lock().requests.is_empty() || tries.lock().unwrap().len() < 5 {
            std::thread::sleep(Duration::from_millis(1));
        }
        waiting.close();
        thread.join().unwrap();
        assert!(tries.lock().unwrap().iter().all(|request| *request == 7));
    }
}
