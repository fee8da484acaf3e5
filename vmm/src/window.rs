//! A window of shared memory: guest addresses at which the guest sees pages of the host's files, those of the page
//! cache themselves, and so no copy of its own.
//!
//! ```text
//!   guest addresses   │ 2 MiB │ 2 MiB │ 2 MiB │ …      read-only to the guest: a KVM slot says so
//!   this process        file    zeros   file           PROT_READ: an open file, shared, or the zero page
//!                         ▲ map ──▶ ◀── clear
//! ```
//!
//! What is mapped changes while vCPUs run: KVM follows the process's mappings.
//!
//! **A file that is cut short** takes the pages behind its new end away. A guest that looks there makes KVM_RUN fail,
//! and [`Window::mend`] puts zeros in their place. A device that looks there, for a guest whose buffers lie in the
//! window, gets a signal, as does one that is told to write there; the handler puts a page of zeros in its place, which
//! is this process's own, and the device goes on. So neither file nor guest can end a machine by it, nor does anybody
//! ever write to a file.

use std::{
    collections::BTreeMap,
    ffi::c_void,
    io,
    os::fd::BorrowedFd,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use rustix::{
    io::Errno,
    mm::{MapFlags, ProtFlags, mmap, mmap_anonymous},
};

/// What is mapped begins at multiples of this, in the window and in the file, and is at most as long: the range in
/// which Linux's FUSE maps files (`FUSE_DAX_SHIFT`).
pub const GRANULE: u64 = 2 << 20;

const PAGE: usize = 4096;

/// `MADV_POPULATE_READ`, since Linux 5.14.
const POPULATE_READ: i32 = 22;

/// Where windows begin and end, for the handler of signals, which takes no lock; 0 where there is none. A machine has
/// one; tests have several.
static WINDOWS: [[AtomicUsize; 2]; 8] = [const { [AtomicUsize::new(0), AtomicUsize::new(0)] }; 8];

/// A window, reserved for the process's life.
#[derive(Debug)]
pub struct Window {
    guest: u64,
    host: usize,
    size: u64,
    /// Bytes that are mapped, by the granule's offset in the window.
    mapped: Mutex<BTreeMap<u64, usize>>,
}

impl Window {
    /// Reserves addresses for the window at guest address `guest`; everything in it reads as zeros.
    ///
    /// # Errors
    /// The size is not a multiple of [`GRANULE`], there are no such addresses, or the process has too many windows.
    pub fn reserve(guest: u64, size: u64) -> io::Result<Self> {
        let granule = usize::try_from(GRANULE).map_err(io::Error::other)?;
        let bytes = usize::try_from(size).map_err(io::Error::other)?;
        let reserved = bytes.checked_add(granule).ok_or(io::ErrorKind::InvalidInput)?;
        if bytes == 0 || !size.is_multiple_of(GRANULE) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                reserved,
                ProtFlags::READ,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let host = (base as usize).next_multiple_of(granule);
        watch(host, bytes)?;
        Ok(Self { guest, host, size, mapped: Mutex::default() })
    }

    /// Its first guest address.
    #[must_use]
    pub fn guest(&self) -> u64 {
        self.guest
    }

    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where it begins in this process.
    #[must_use]
    pub fn host(&self) -> *mut u8 {
        self.host as *mut u8
    }

    /// Maps what `file` has from `offset` on, a granule at most, at `at`; behind the file's `size` are zeros.
    ///
    /// # Errors
    /// EINVAL where `at` or `offset` is no granule's beginning, in the window and in the file; what the kernel says. Then
    /// the granule is as it was, or clear.
    pub fn map(&self, at: u64, file: BorrowedFd<'_>, offset: u64, size: u64) -> Result<(), Errno> {
        let address = self.granule(at)?;
        if !offset.is_multiple_of(GRANULE) || offset >= size {
            return Err(Errno::INVAL);
        }
        self.clear(at)?;
        let length = usize::try_from((size - offset).min(GRANULE)).map_err(|_| Errno::INVAL)?;
        let length = length.next_multiple_of(PAGE);
        let (protection, flags) = (ProtFlags::READ, MapFlags::SHARED | MapFlags::FIXED | MapFlags::POPULATE);
        // SAFETY: the granule lies in the window, to which nothing in this process refers but through raw pointers, as
        // guest memory.
        unsafe { mmap(address, length, protection, flags, file, offset) }?;
        self.mapped().insert(at, length);
        Ok(())
    }

    /// Lets a granule read as zeros again.
    ///
    /// # Errors
    /// EINVAL where `at` is no granule's beginning in the window; what the kernel says.
    pub fn clear(&self, at: u64) -> Result<(), Errno> {
        let address = self.granule(at)?;
        self.mapped().remove(&at);
        zeros(address, usize::try_from(GRANULE).map_err(|_| Errno::INVAL)?)
    }

    /// Clears all of it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn clear_all(&self) -> Result<(), Errno> {
        self.mapped().clear();
        zeros(self.host as *mut c_void, usize::try_from(self.size).map_err(|_| Errno::INVAL)?)
    }

    /// Puts zeros where mapped files have no pages any more. Whether there was such a place: if not, it was something
    /// else that failed.
    pub fn mend(&self) -> bool {
        let mut mended = false;
        for (&at, &length) in self.mapped().iter() {
            let Ok(address) = self.granule(at) else { continue };
            if populate(address, length) != Err(Errno::FAULT) {
                continue;
            }
            for page in (0..length).step_by(PAGE).map(|offset| address.wrapping_byte_add(offset)) {
                if populate(page, PAGE) == Err(Errno::FAULT) {
                    mended |= zeros(page, PAGE).is_ok();
                }
            }
        }
        mended
    }

    /// Where a granule begins in this process.
    fn granule(&self, at: u64) -> Result<*mut c_void, Errno> {
        if !at.is_multiple_of(GRANULE) || at >= self.size {
            return Err(Errno::INVAL);
        }
        let at = usize::try_from(at).map_err(|_| Errno::INVAL)?;
        Ok((self.host as *mut c_void).wrapping_byte_add(at))
    }

    fn mapped(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, usize>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Window {
    /// The addresses stay reserved: KVM and devices may know them. Only tests, which have no machine, drop one.
    fn drop(&mut self) {
        let _ = self.clear_all();
        for [start, end] in &WINDOWS {
            if start.load(Ordering::SeqCst) == self.host {
                end.store(0, Ordering::SeqCst);
                start.store(0, Ordering::SeqCst);
            }
        }
    }
}

/// Puts zeros, all of them the kernel's one page of zeros, in a range of the window.
fn zeros(address: *mut c_void, length: usize) -> Result<(), Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
    // SAFETY: the callers give ranges of the window alone, to which nothing in this process refers but through raw
    // pointers, as guest memory.
    unsafe { mmap_anonymous(address, length, ProtFlags::READ, flags) }.map(drop)
}

/// Has the kernel find the pages of a range: EFAULT where there is one that cannot be had.
fn populate(address: *mut c_void, length: usize) -> Result<(), Errno> {
    // SAFETY: advice that changes no content, on a range that is mapped.
    if unsafe { libc::madvise(address, length, POPULATE_READ) } == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// Has faults in the window handled from now on.
fn watch(host: usize, size: usize) -> io::Result<()> {
    static ONCE: std::sync::Once = std::sync::Once::new();
    let mut outcome = Ok(());
    ONCE.call_once(|| {
        for (signal, previous) in [(libc::SIGBUS, &BUS), (libc::SIGSEGV, &SEGV)] {
            // SAFETY: zero is a valid sigaction: no flags, no signals blocked.
            let (mut action, mut old): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
            action.sa_sigaction = faulted as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            // SAFETY: both structures are initialised, and the handler has the signature that SA_SIGINFO demands.
            if unsafe { libc::sigaction(signal, &raw const action, &raw mut old) } < 0 {
                outcome = Err(io::Error::last_os_error());
                return;
            }
            if old.sa_flags & libc::SA_SIGINFO != 0 {
                previous.store(old.sa_sigaction, Ordering::SeqCst);
            }
        }
    });
    outcome?;
    let free = |[start, _]: &&[AtomicUsize; 2]| {
        start.compare_exchange(0, host, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    };
    let [_, end] = WINDOWS.iter().find(free).ok_or(io::ErrorKind::OutOfMemory)?;
    end.store(host + size, Ordering::SeqCst);
    Ok(())
}

/// Whether an address lies in a window.
fn in_window(address: usize) -> bool {
    let within = |[start, end]: &[AtomicUsize; 2]| {
        (start.load(Ordering::SeqCst)..end.load(Ordering::SeqCst)).contains(&address)
    };
    WINDOWS.iter().any(within)
}

/// Who was asked about faults before: the standard library, which knows a stack's end.
static BUS: AtomicUsize = AtomicUsize::new(0);
static SEGV: AtomicUsize = AtomicUsize::new(0);

extern "C" fn faulted(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a whole siginfo_t, which for these signals has an address.
    let address = unsafe { (*info).si_addr() } as usize;
    if in_window(address) {
        let page = (address - address % PAGE) as *mut c_void;
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
        // SAFETY: the page lies in the window, to which nothing in this process refers but through raw pointers, as
        // guest memory. mmap takes no lock of this process and allocates nothing.
        if unsafe { libc::mmap(page, PAGE, protection, flags, -1, 0) } == page {
            return;
        }
    }
    let previous = if signal == libc::SIGBUS { &BUS } else { &SEGV }.load(Ordering::SeqCst);
    if previous == 0 {
        // SAFETY: takes plain numbers and does not return.
        unsafe {
            libc::syscall(libc::SYS_kill, libc::getpid(), libc::SIGKILL);
            libc::_exit(signal);
        }
    }
    // SAFETY: the address is that of the handler which was installed for this signal with SA_SIGINFO, and so has this
    // signature.
    let previous: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut c_void) =
        unsafe { std::mem::transmute(previous) };
    previous(signal, info, context);
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::fd::AsFd, ptr};

    use super::*;

    fn read(window: &Window, at: usize) -> u8 {
        // SAFETY: within the window, which is mapped.
        unsafe { ptr::read_volatile(window.host().wrapping_add(at)) }
    }

    #[test]
    fn files_come_and_go_are_cut_short_and_never_written() {
        let window = Window::reserve(1 << 40, 4 * GRANULE).unwrap();
        assert!(Window::reserve(1 << 40, GRANULE + 4096).is_err() && Window::reserve(1 << 40, 0).is_err());
        let granule = GRANULE as usize;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; granule + 3 * PAGE + 5]).unwrap();
        let size = file.metadata().unwrap().len();

        window.map(0, file.as_fd(), 0, size).unwrap();
        window.map(2 * GRANULE, file.as_fd(), GRANULE, size).unwrap();
        assert_eq!((read(&window, 0), read(&window, granule - 1), read(&window, granule)), (7, 7, 0));
        assert_eq!(
            (read(&window, 2 * granule + 3 * PAGE + 4), read(&window, 2 * granule + 3 * PAGE + 5)),
            (7, 0)
        );
        assert_eq!(read(&window, 2 * granule + 4 * PAGE), 0);
        for (at, offset) in [(1, 0), (0, 1), (4 * GRANULE, 0), (0, 2 * GRANULE), (u64::MAX - GRANULE + 1, 0)]
        {
            assert_eq!(window.map(at, file.as_fd(), offset, size), Err(Errno::INVAL), "{at} {offset}");
        }
        assert_eq!(window.clear(4 * GRANULE), Err(Errno::INVAL));
        window.clear(0).unwrap();
        assert_eq!(read(&window, 0), 0);

        // Cut short: what is asked for by KVM is mended, what is left stays.
        assert!(!window.mend());
        file.set_len(GRANULE + 4096).unwrap();
        assert!(window.mend());
        assert!(!window.mend());
        assert_eq!((read(&window, 2 * granule), read(&window, 2 * granule + PAGE)), (7, 0));
        // And what a device looks at.
        file.set_len(0).unwrap();
        assert_eq!(read(&window, 2 * granule), 0);

        // A device that writes there writes to a page of its own.
        file.set_len(size).unwrap();
        window.map(0, file.as_fd(), 0, size).unwrap();
        // SAFETY: within the window; the handler makes it writable.
        unsafe { ptr::write_volatile(window.host(), 9) };
        assert_eq!(read(&window, 0), 9);
        let mut first = [1];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut first, 0).unwrap();
        assert_eq!(first, [0]);
        window.clear_all().unwrap();
        assert_eq!(read(&window, 0), 0);
    }
}
