//! What somebody who owns a VMM would try. Each says what came of it, if it comes back.

use libc::*;

/// An attack, run in a signal handler: it makes system calls and nothing else.
pub(crate) struct Attack {
    /// Names it on the command line and in the outcome.
    pub(crate) name: &'static str,
    /// Tries it.
    pub(crate) run: fn() -> &'static str,
}

const REFUSED: &str = "refused";

/// The highest descriptor that is tried.
const DESCRIPTORS: i32 = 128;

pub(crate) const ATTACKS: &[Attack] = &[
    // ---- files
    attack("open", || call(SYS_openat, [AT_FDCWD as u64, text(c"/etc/passwd"), 0, 0, 0, 0])),
    attack("open-old", || call(SYS_open, [text(c"/proc/self/mem"), 2, 0, 0, 0, 0])),
    attack("make-file", || call(SYS_mknodat, [AT_FDCWD as u64, text(c"/x"), 0o100_600, 0, 0, 0])),
    attack("unlink", || call(SYS_unlinkat, [AT_FDCWD as u64, text(c"/x"), 0, 0, 0, 0])),
    attack("climb", climb),
    attack("own-memory", || open_anywhere(c"/proc/self/mem", O_RDWR)),
    attack("root-list", || open_anywhere(c"/", O_RDONLY | O_DIRECTORY)),
    attack("write-layers", write_layers),
    // ---- other processes
    attack("kill", || call(SYS_kill, [1, SIGKILL as u64, 0, 0, 0, 0])),
    attack("kill-thread", || call(SYS_tgkill, [2, 2, SIGKILL as u64, 0, 0, 0])),
    attack("fork", || call(SYS_fork, [0; 6])),
    attack("clone", || call(SYS_clone, [SIGCHLD as u64, 0, 0, 0, 0, 0])),
    attack("execute", || call(SYS_execve, [text(c"/bin/sh"), 0, 0, 0, 0, 0])),
    attack("execute-fd", || call(SYS_execveat, [0, text(c""), 0, 0, AT_EMPTY_PATH as u64, 0])),
    attack("ptrace", || call(SYS_ptrace, [u64::from(PTRACE_ATTACH), 1, 0, 0, 0, 0])),
    attack("read-memory", || call(SYS_process_vm_readv, [2, 0, 0, 0, 0, 0])),
    attack("pidfd", || call(SYS_pidfd_open, [2, 0, 0, 0, 0, 0])),
    // ---- networks and sockets
    attack("socket-unix", || call(SYS_socket, [AF_UNIX as u64, SOCK_STREAM as u64, 0, 0, 0, 0])),
    attack("socket-tcp", || call(SYS_socket, [AF_INET as u64, SOCK_STREAM as u64, 0, 0, 0, 0])),
    attack("socket-netlink", || call(SYS_socket, [AF_NETLINK as u64, SOCK_RAW as u64, 0, 0, 0, 0])),
    attack("connect", || call(SYS_connect, [5, 0, 0, 0, 0, 0])),
    // ---- privileges
    attack("mount", || call(SYS_mount, [text(c"proc"), text(c"/"), text(c"proc"), 0, 0, 0])),
    attack("unshare", || call(SYS_unshare, [CLONE_NEWUSER as u64, 0, 0, 0, 0, 0])),
    attack("setns", || call(SYS_setns, [5, 0, 0, 0, 0, 0])),
    attack("setuid", || call(SYS_setuid, [0; 6])),
    attack("capset", || call(SYS_capset, [0; 6])),
    attack("chroot", || call(SYS_chroot, [text(c"/"), 0, 0, 0, 0, 0])),
    attack("raise-limit", || {
        call(SYS_prlimit64, [0, u64::from(RLIMIT_CORE), text(c"limits of sixteen"), 0, 0, 0])
    }),
    attack("new-filter", || call(SYS_seccomp, [0; 6])),
    attack("handler", || call(SYS_rt_sigaction, [SIGSYS as u64, 0, 0, 8, 0, 0])),
    // ---- the kernel's wider surface
    attack("bpf", || call(SYS_bpf, [0; 6])),
    attack("io-uring", || call(SYS_io_uring_setup, [8, 0, 0, 0, 0, 0])),
    attack("userfaultfd", || call(SYS_userfaultfd, [0; 6])),
    attack("perf", || call(SYS_perf_event_open, [0; 6])),
    attack("keyctl", || call(SYS_keyctl, [0; 6])),
    attack("module", || call(SYS_init_module, [0; 6])),
    attack("ioctl-tty", || call(SYS_ioctl, [2, TIOCSTI, text(c"x"), 0, 0, 0])),
    // KVM_CREATE_VM
    attack("another-machine", || call(SYS_ioctl, [5, 0xae01, 0, 0, 0, 0])),
    // ---- code of its own
    attack("map-code", || {
        let protection = (PROT_READ | PROT_WRITE | PROT_EXEC) as u64;
        call(SYS_mmap, [0, 4096, protection, (MAP_PRIVATE | MAP_ANONYMOUS) as u64, u64::MAX, 0])
    }),
    attack("make-code", || {
        let page = text(c"") & !4095;
        call(SYS_mprotect, [page, 4096, (PROT_READ | PROT_EXEC) as u64, 0, 0, 0])
    }),
];

const fn attack(name: &'static str, run: fn() -> &'static str) -> Attack {
    Attack { name, run }
}

fn text(text: &'static std::ffi::CStr) -> u64 {
    text.as_ptr() as u64
}

fn raw(number: c_long, args: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = args;
    // SAFETY: whether the arguments make sense is the kernel's to find out: it touches no memory of ours but
    // what they point to, which are constants and one buffer.
    unsafe { syscall(number, a, b, c, d, e, f) }
}

fn call(number: c_long, args: [u64; 6]) -> &'static str {
    if raw(number, args) < 0 { REFUSED } else { "done" }
}

/// `struct open_how`.
#[repr(C)]
struct How {
    flags: u64,
    mode: u64,
    resolve: u64,
}

fn open_at(directory: i32, path: &'static std::ffi::CStr, flags: i32, mode: u64) -> i64 {
    let how = How { flags: flags as u64, mode, resolve: 0 };
    raw(SYS_openat2, [directory as u64, text(path), (&raw const how) as u64, size_of::<How>() as u64, 0, 0])
}

fn open_anywhere(path: &'static std::ffi::CStr, flags: i32) -> &'static str {
    if open_at(AT_FDCWD, path, flags, 0) < 0 { REFUSED } else { "opened" }
}

/// From each directory that it holds, up and over to the host's files.
fn climb() -> &'static str {
    for directory in 0..DESCRIPTORS {
        for path in [
            // A layer has an /etc/passwd too; this one only a host has.
            c"../../../../../../../../../../../../etc/debian_version",
            c"../../../../../../../../../../../../proc/1/environ",
            c"../../../../../../../../../../../../dev/kvm",
        ] {
            if open_at(directory, path, O_RDONLY, 0) >= 0 {
                return "got out";
            }
        }
    }
    REFUSED
}

/// Into each directory that it holds, and over each file that it may only read.
fn write_layers() -> &'static str {
    for directory in 0..DESCRIPTORS {
        if open_at(directory, c"planted", O_WRONLY | O_CREAT, 0o600) >= 0 {
            return "made a file";
        }
        if open_at(directory, c"bin/busybox", O_RDWR, 0) >= 0 {
            return "may write a file";
        }
        if open_at(directory, c".", O_RDWR | O_TMPFILE, 0o600) >= 0 {
            return "made a nameless file";
        }
    }
    REFUSED
}
