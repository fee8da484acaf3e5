//! Between `clone3` and `execveat`: a new process that waits until the daemon has written down who it is, takes
//! its user id and descriptors, and becomes the program.
//!
//! ```text
//!   daemon                                child, alone in its namespaces and its control group
//!     │ clone3 ──────────────────────────▶ waits for a byte; a daemon that dies here ends it
//!     │ uid_map, gid_map, identity file
//!     │ one byte ────────────────────────▶ session, groups, uid and gid, capabilities for the jail,
//!     │                                    descriptors, signals
//!     │ ◀──────── end of file: execveat ── or the step that failed and its error
//! ```
//!
//! The daemon has other threads, whose locks the child has copied as they were: until it executes it makes
//! system calls and nothing else. Everything that needs memory is made before, in [`Program`].

use std::{
    ffi::{CStr, CString},
    fs,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use rustix::thread::{CapabilitySet, CapabilitySets};

/// `CLONE_INTO_CGROUP`, which libc has as a smaller type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// `CLONE_CLEAR_SIGHAND`: the child begins with no handlers.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;

/// Namespaces of its own. The control groups' comes later: it shows the group that the process is in then.
const NAMESPACES: libc::c_int = libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS;

/// What the jail needs in the process's own user namespace: to mount and unmount, and to give up for ever.
const JAIL_CAPABILITIES: CapabilitySet = CapabilitySet::SYS_ADMIN.union(CapabilitySet::SETPCAP);

/// What a share server keeps besides: rights over files, see `bulkhead_vmm::shares::RIGHTS`.
const FILE_CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID);

/// Which of the host's user ids a process in namespaces of its own has rights over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rights {
    /// Its own alone.
    Own,
    /// All, by the capabilities that concern files: it serves files of whatever user.
    Files,
}

impl Rights {
    fn capabilities(self) -> CapabilitySet {
        match self {
            Self::Own => JAIL_CAPABILITIES,
            Self::Files => JAIL_CAPABILITIES.union(FILE_CAPABILITIES),
        }
    }

    /// A line of `uid_map` or `gid_map`.
    fn map(self, uid: u32) -> String {
        match self {
            Self::Own => format!("{uid} {uid} 1"),
            Self::Files => format!("0 0 {}", u32::MAX),
        }
    }
}

/// What is executed, and with what.
pub(super) struct Program<'a> {
    /// The executable.
    pub(super) path: &'a Path,
    /// Its arguments, its name among them.
    pub(super) arguments: Vec<CString>,
    /// Its standard streams.
    pub(super) streams: [BorrowedFd<'a>; 3],
    /// Descriptors that it inherits under their numbers.
    pub(super) inherited: Vec<RawFd>,
    /// The user and group id that it runs under, in namespaces of its own; None: the daemon's, and in its.
    pub(super) uid: Option<u32>,
    /// What it has rights over, where it has an id of its own.
    pub(super) rights: Rights,
    /// The control group that it is made in.
    pub(super) cgroup: Option<BorrowedFd<'a>>,
}

/// Starts a program. `named` is told its pid before the program begins; if that fails, it never does.
///
/// # Errors
/// The kernel refuses one of the steps, which the error names.
pub(super) fn start(
    program: &Program<'_>,
    named: impl FnOnce(i32) -> io::Result<()>,
) -> io::Result<(i32, OwnedFd)> {
    let image = Image::new(program)?;
    let (wait, go) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let (failure, report) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;

    let mut pidfd: RawFd = -1;
    let namespaces = program.uid.map_or(0, |_| NAMESPACES as u64);
    let mut arguments = CloneArguments {
        flags: namespaces | CLONE_CLEAR_SIGHAND | libc::CLONE_PIDFD as u64,
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArguments::default()
    };
    if let Some(cgroup) = program.cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: the structure is `struct clone_args` and as long as said. Without CLONE_VM the child has memory
    // of its own, and runs nothing but `Child::run`, which does not return.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<CloneArguments>()) };
    match i32::try_from(pid).unwrap_or(-1) {
        ..0 => return Err(step("clone3", &io::Error::last_os_error())),
        0 => Child { program, image: &image, wait: &wait, go: &go, report: &report }.run(),
        _ => {}
    }
    let pid = i32::try_from(pid).unwrap_or(-1);
    // SAFETY: the kernel has made the descriptor and told its number; it is nobody else's.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    drop((wait, report));

    let begun =
        map_ids(pid, program.uid, program.rights).and_then(|()| named(pid)).and_then(|()| begin(go, failure));
    match begun {
        Ok(()) => Ok((pid, pidfd)),
        Err(error) => {
            // Nobody must be left that nobody knows of. It may have ended by itself.
            let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
            let _ = rustix::process::waitid(
                rustix::process::WaitId::PidFd(pidfd.as_fd()),
                rustix::process::WaitIdOptions::EXITED,
            );
            Err(error)
        }
    }
}

/// The child's own numbers stand for themselves in its user namespace, and no others stand for anything; of one that
/// has rights over files, all do.
fn map_ids(pid: i32, uid: Option<u32>, rights: Rights) -> io::Result<()> {
    let Some(uid) = uid else { return Ok(()) };
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{pid}/{map}"), rights.map(uid)).map_err(|error| step(map, &error))?;
    }
    // The daemon may be protected from being killed when memory is short. A VMM is not.
    fs::write(format!("/proc/{pid}/oom_score_adj"), "0").map_err(|error| step("oom_score_adj", &error))
}

/// Lets the child go on, and waits until it has executed.
fn begin(go: OwnedFd, failure: OwnedFd) -> io::Result<()> {
    fs::File::from(go).write_all(&[0])?;
    let mut told = Vec::new();
    fs::File::from(failure).take(64).read_to_end(&mut told)?;
    let Some((at, errno)) = told.split_first() else { return Ok(()) };
    let errno = errno.try_into().map_or(libc::EIO, i32::from_ne_bytes);
    let name = STEPS.get(usize::from(*at)).copied().unwrap_or("a step");
    Err(step(name, &io::Error::from_raw_os_error(errno)))
}

/// An error with the step's name, still of its kind.
fn step(name: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{name}: {error}"))
}

/// `struct clone_args`.
#[repr(C)]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// The arguments of `execveat`.
struct Image {
    /// Open, so that no directory above it need be passed by the new user; None: executed by its path.
    file: Option<OwnedFd>,
    path: CString,
    argv: Vec<*const libc::c_char>,
    /// No environment.
    envp: [*const libc::c_char; 1],
}

impl Image {
    fn new(program: &Program<'_>) -> io::Result<Self> {
        let mut argv: Vec<_> = program.arguments.iter().map(|argument| argument.as_ptr()).collect();
        argv.push(std::ptr::null());
        let file = program.uid.map(|_| fs::File::open(program.path)).transpose()?.map(OwnedFd::from);
        let path = match file {
            Some(_) => CString::default(),
            None => CString::new(program.path.as_os_str().as_bytes())?,
        };
        Ok(Self { file, path, argv, envp: [std::ptr::null()] })
    }
}

/// The steps of the child, by whose numbers it tells which failed.
const STEPS: [&str; 11] = [
    "the daemon",
    "setsid",
    "standard streams",
    "close_range",
    "setgroups",
    "setresgid",
    "PR_SET_KEEPCAPS",
    "setresuid",
    "capabilities",
    "sigprocmask",
    "execveat",
];

struct Child<'a> {
    program: &'a Program<'a>,
    image: &'a Image,
    wait: &'a OwnedFd,
    go: &'a OwnedFd,
    report: &'a OwnedFd,
}

impl Child<'_> {
    /// Becomes the program, or tells why not and ends. Makes system calls only: nothing here allocates, locks, or
    /// can panic.
    fn run(&self) -> ! {
        let (at, errno) = self.steps();
        let [a, b, c, d] = errno.to_ne_bytes();
        let message = [at, a, b, c, d];
        // SAFETY: the buffer is as long as said; `_exit` runs nothing of this process's.
        unsafe {
            libc::write(self.report.as_raw_fd(), message.as_ptr().cast(), message.len());
            libc::_exit(127)
        }
    }

    /// The first step that failed, and its error.
    fn steps(&self) -> (u8, i32) {
        let mut at = 0;
        match self.try_steps(&mut at) {
            Ok(()) => (at, libc::EIO),
            Err(errno) => (at, errno.raw_os_error()),
        }
    }

    fn try_steps(&self, at: &mut u8) -> rustix::io::Result<()> {
        // Its own copy of the writing end would keep the child waiting for a daemon that is dead.
        // SAFETY: the descriptor is open, and in this process nothing uses it from here on.
        unsafe { rustix::io::close(self.go.as_raw_fd()) };
        if rustix::io::read(self.wait, &mut [0; 1])? == 0 {
            return Err(rustix::io::Errno::PIPE);
        }
        *at += 1;
        rustix::process::setsid()?;
        *at += 1;
        for (stream, number) in self.program.streams.iter().zip(0..) {
            // SAFETY: takes plain numbers. The streams' own descriptors are over 2.
            check(unsafe { libc::dup2(stream.as_raw_fd(), number) })?;
        }
        *at += 1;
        self.inherit()?;
        *at += 1;
        if let Some(uid) = self.program.uid {
            self.take_ids(uid, at)?;
        } else {
            *at += 5;
        }
        // SAFETY: the set is initialised by the call, and so is what the other reads.
        unsafe {
            let mut none = std::mem::MaybeUninit::uninit();
            libc::sigemptyset(none.as_mut_ptr());
            check(libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut()))?;
        }
        *at += 1;
        self.execute()
    }

    /// Everything is closed by the execution but what the program inherits.
    fn inherit(&self) -> rustix::io::Result<()> {
        // SAFETY: takes plain numbers.
        check(unsafe {
            libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) as libc::c_int
        })?;
        for &fd in &self.program.inherited {
            // SAFETY: takes plain numbers.
            check(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) })?;
        }
        Ok(())
    }

    /// No other groups, this id, and what the jail needs carried over the execution.
    fn take_ids(&self, uid: u32, at: &mut u8) -> rustix::io::Result<()> {
        let (user, group) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(uid));
        // Of this process, not of a thread among others as the C library has it: it has but one.
        rustix::thread::set_thread_groups(&[])?;
        *at += 1;
        rustix::thread::set_thread_res_gid(group, group, group)?;
        *at += 1;
        // Where all ids are mapped it was root until now, and would lose everything with the next step.
        rustix::thread::set_keep_capabilities(true)?;
        *at += 1;
        rustix::thread::set_thread_res_uid(user, user, user)?;
        *at += 1;
        let kept = self.program.rights.capabilities();
        rustix::thread::set_capabilities(
            None,
            CapabilitySets { effective: kept, permitted: kept, inheritable: kept },
        )?;
        for capability in kept.iter() {
            rustix::thread::configure_capability_in_ambient_set(capability, true)?;
        }
        *at += 1;
        Ok(())
    }

    fn execute(&self) -> rustix::io::Result<()> {
        let Image { file, path, argv, envp } = self.image;
        let (directory, flags) = match file {
            Some(file) => (file.as_raw_fd(), libc::AT_EMPTY_PATH),
            None => (libc::AT_FDCWD, 0),
        };
        let path: &CStr = path;
        // SAFETY: the path is a C string, and both lists are of such and end with a null pointer. All of them
        // outlive the call, which does not return where it succeeds.
        check(unsafe {
            libc::syscall(libc::SYS_execveat, directory, path.as_ptr(), argv.as_ptr(), envp.as_ptr(), flags)
                as libc::c_int
        })
    }
}

fn check(result: libc::c_int) -> rustix::io::Result<()> {
    if result < 0 {
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        Err(rustix::io::Errno::from_raw_os_error(errno))
    } else {
        Ok(())
    }
}
