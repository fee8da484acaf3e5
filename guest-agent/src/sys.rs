//! The system calls that neither rustix nor nix wraps: all of the agent's `unsafe` that is not a signal
//! mask. Each function is safe to call.

use std::{
    ffi::{CStr, CString},
    io,
    mem::size_of,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
};

/// A started child.
#[derive(Debug)]
pub struct Child {
    /// Its pid in this process's pid namespace.
    pub pid: i32,
    /// Refers to it until it is reaped, and never to another.
    pub pidfd: OwnedFd,
}

/// `CLONE_INTO_CGROUP`, which libc lacks.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Forks with `clone3`: new namespaces by `flags` (`CLONE_NEW*`), and the child in `cgroup` from its first
/// instruction. The child runs `body`, which ends by `execve` or by returning an exit code; it never
/// returns to the caller.
///
/// # Errors
/// Of `clone3`.
pub fn fork_into(flags: u64, cgroup: Option<&OwnedFd>, body: impl FnOnce() -> i32) -> io::Result<Child> {
    let mut pidfd: RawFd = -1;
    let mut args = libc::clone_args {
        flags: flags | libc::CLONE_PIDFD as u64,
        pidfd: &raw mut pidfd as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: 0,
    };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without a stack and without CLONE_VM this is a fork: the child has a copy of all memory and
    // goes on here. The agent has one thread, so no lock is held by somebody who is not in the copy, and
    // the child may allocate. `args` and `pidfd` outlive the call.
    let pid =
        check(unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) })?;
    if pid == 0 {
        if let Err(error) = hide() {
            crate::log::warn(format_args!("a child cannot be hidden: {error}"));
            // SAFETY: always sound; nothing of the parent's is run at exit.
            unsafe { libc::_exit(125) }
        }
        let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(125);
        // SAFETY: always sound; nothing of the parent's is run at exit.
        unsafe { libc::_exit(code) }
    }
    // SAFETY: the kernel has put a new descriptor there, ours alone.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Child { pid: pid as i32, pidfd })
}

/// Until `execve`, lets nobody trace this process or reach its descriptors, executable and directories
/// through `/proc`, but with CAP_SYS_PTRACE: an exec is in its container's pid namespace, with as many rights
/// as the container's own root, while it still holds what is the agent's (CVE-2016-9962).
///
/// # Errors
/// Of `prctl`.
pub fn hide() -> io::Result<()> {
    Ok(rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?)
}

/// Closes every descriptor from 3 on but those in `keep`.
///
/// For a child that is about to `execve`: whatever object owned a closed descriptor must not be used or
/// dropped any more, which the child's end, `execve` or `_exit`, sees to.
///
/// # Errors
/// Of `close_range`.
pub fn close_all_but(keep: &[&OwnedFd]) -> io::Result<()> {
    let mut keep: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(fd.as_raw_fd()).ok()).collect();
    keep.sort_unstable();
    let mut first = 3u32;
    for fd in keep.into_iter().filter(|fd| *fd >= 3).chain([u32::MAX]) {
        if let Some(last) = fd.checked_sub(1).filter(|last| *last >= first) {
            // SAFETY: see above: the owners of these descriptors are never used again.
            check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })?;
        }
        first = fd.saturating_add(1);
    }
    Ok(())
}

/// Sends any signal by number, real-time ones too.
///
/// # Errors
/// ESRCH when the process has ended, EINVAL when there is no such signal.
pub fn pidfd_send_signal(pidfd: &OwnedFd, signal: i32) -> io::Result<()> {
    let none: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: the kernel takes a null siginfo and reads nothing.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, none, 0) })?;
    Ok(())
}

/// Sets and clears attributes (`MOUNT_ATTR_*`) of the mount at `path` or, with an empty path, at `fd`.
///
/// # Errors
/// Of `mount_setattr`.
pub fn mount_setattr(fd: impl AsFd, path: &CStr, recursive: bool, set: u64, clear: u64) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: set, attr_clr: clear, propagation: 0, userns_fd: 0 };
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: path is a C string, attributes has the size that is given; both outlive the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_fd().as_raw_fd(),
            path.as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    })?;
    Ok(())
}

/// An instruction of eBPF, `struct bpf_insn`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BpfInstruction {
    /// Operation.
    pub code: u8,
    /// Destination register in the low half, source in the high one.
    pub registers: u8,
    /// Jump or memory offset.
    pub offset: i16,
    /// Constant.
    pub immediate: i32,
}

const BPF_PROG_LOAD: u32 = 5;
const BPF_PROG_ATTACH: u32 = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// When the kernel asks a cgroup's program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum CgroupHook {
    /// At the opening or making of a device node.
    Device = 6,
    /// At `connect` of an IPv4 socket.
    Connect4 = 10,
    /// At `sendto` of an IPv4 UDP socket.
    SendMessage4 = 14,
    /// At `recvfrom` of an IPv4 UDP socket.
    ReceiveMessage4 = 19,
    /// At `getpeername` of an IPv4 socket.
    PeerName4 = 29,
}

/// Loads a program that can be attached to cgroups. It is gone with its last descriptor and attachment.
///
/// # Errors
/// Of `bpf`.
pub fn load_program(hook: CgroupHook, program: &[BpfInstruction]) -> io::Result<OwnedFd> {
    /// The head of `union bpf_attr` for BPF_PROG_LOAD.
    #[repr(C)]
    struct Load {
        program_type: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        expected_attach_type: u32,
    }
    let load = Load {
        program_type: match hook {
            CgroupHook::Device => BPF_PROG_TYPE_CGROUP_DEVICE,
            _ => BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
        },
        count: u32::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        instructions: program.as_ptr() as u64,
        // No function of the kernel is called that asks for a licence.
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: [0; 16],
        interface: 0,
        expected_attach_type: hook as u32,
    };
    // SAFETY: Load begins as the kernel's structure does and its size is given; what it points to lives on.
    let fd =
        check(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>()) })?;
    // SAFETY: the kernel has made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Loads a program and attaches it to a cgroup for the cgroup's life.
///
/// # Errors
/// Of `bpf`.
pub fn attach_program(cgroup: &impl AsFd, hook: CgroupHook, program: &[BpfInstruction]) -> io::Result<()> {
    /// The head of `union bpf_attr` for BPF_PROG_ATTACH.
    #[repr(C)]
    struct Attach {
        target: u32,
        program: u32,
        attach_type: u32,
        flags: u32,
    }
    let program = load_program(hook, program)?;
    let attach = Attach {
        target: cgroup.as_fd().as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        attach_type: hook as u32,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: Attach begins as the kernel's structure does and its size is given; both descriptors live.
    check(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of::<Attach>()) })?;
    Ok(())
}

/// Marks every descriptor from 3 on to be closed by `execve`, whoever forgot to.
///
/// # Errors
/// Of `close_range`.
pub fn close_on_exec_from_3() -> io::Result<()> {
    // SAFETY: nothing is closed here, only a flag is set.
    check(unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) })?;
    Ok(())
}

/// Sets this process's execution domain.
///
/// # Errors
/// Of `personality`.
pub fn set_personality(persona: u64) -> io::Result<()> {
    // SAFETY: takes a number and gives a number.
    check(libc::c_long::from(unsafe { libc::personality(persona) }))?;
    Ok(())
}

/// Brings the loopback interface of this process's network namespace up.
///
/// # Errors
/// Of the ioctl.
pub fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    // SAFETY: ifreq is plain data, for which zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which lives on.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }.into())?;
    Ok(())
}

/// Mixes `entropy` into the kernel's random generator, credits it in full, and reseeds the generator from it:
/// what any process reads afterwards does not follow from what was there before, kernel and vDSO included.
///
/// # Errors
/// Of the ioctls; without CAP_SYS_ADMIN, EPERM.
pub fn reseed(entropy: &[u8]) -> io::Result<()> {
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    let length = i32::try_from(entropy.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // `struct rand_pool_info`: the credit in bits, the length in bytes, the bytes.
    let mut pool = Vec::with_capacity(8 + entropy.len());
    pool.extend(length.saturating_mul(8).to_ne_bytes());
    pool.extend(length.to_ne_bytes());
    pool.extend(entropy);
    let random = std::fs::OpenOptions::new().write(true).open("/dev/urandom")?;
    // SAFETY: the kernel reads the two numbers and as many bytes as the second says, which are there. (It
    // copies from any alignment.)
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY as _, pool.as_ptr()) }.into())?;
    // SAFETY: takes no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG as _) }.into())?;
    Ok(())
}

/// `SO_VM_SOCKETS_CONNECT_TIMEOUT` for 64-bit time, which libc lacks.
const SO_VM_SOCKETS_CONNECT_TIMEOUT: libc::c_int = 8;

/// A vsock stream socket that does not block.
///
/// # Errors
/// Of `socket`.
pub fn vsock_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: takes numbers.
    let fd = check(unsafe { libc::socket(libc::AF_VSOCK, kind, 0) }.into())?;
    // SAFETY: a new descriptor, ours alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Begins to connect; the kernel's limit of two seconds is raised to `patience`.
///
/// # Errors
/// Of `connect`, but not EINPROGRESS.
pub fn vsock_connect(socket: &OwnedFd, cid: u32, port: u32, patience: std::time::Duration) -> io::Result<()> {
    let time = libc::timeval { tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX), tv_usec: 0 };
    let (value, size) = ((&raw const time).cast(), size_of::<libc::timeval>() as libc::socklen_t);
    let option = SO_VM_SOCKETS_CONNECT_TIMEOUT;
    // SAFETY: the option is a timeval; its size is given and it lives on.
    let set = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::AF_VSOCK, option, value, size) };
    check(set.into())?;
    let address = vsock_address(cid, port);
    // SAFETY: the address is a sockaddr_vm of the size given.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), address_size()) };
    match check(result.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(()),
    }
}

/// Binds to a port for every peer and listens.
///
/// # Errors
/// Of `bind` and `listen`.
pub fn vsock_listen(socket: &OwnedFd, port: u32) -> io::Result<()> {
    let address = vsock_address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address is a sockaddr_vm of the size given.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), address_size()) }.into())?;
    // SAFETY: takes numbers.
    check(unsafe { libc::listen(socket.as_raw_fd(), 128) }.into())?;
    Ok(())
}

/// Who is at the other end of a vsock connection.
///
/// # Errors
/// Of `getpeername`.
pub fn vsock_peer_cid(socket: impl AsFd) -> io::Result<u32> {
    let mut address = vsock_address(0, 0);
    let mut size = address_size();
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `size` bytes.
    check(unsafe { libc::getpeername(fd, (&raw mut address).cast(), &raw mut size) }.into())?;
    Ok(address.svm_cid)
}

fn vsock_address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: sockaddr_vm is plain data, for which zeros are a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn address_size() -> libc::socklen_t {
    size_of::<libc::sockaddr_vm>() as libc::socklen_t
}

/// Blocks every signal. What comes meanwhile waits, even for PID 1, which gets no signal that it neither
/// handles nor blocks.
///
/// # Errors
/// Of `sigprocmask`.
pub fn block_signals() -> io::Result<()> {
    use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
    Ok(sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?)
}

/// Gives this process the signal state that a program expects: nothing blocked, nothing ignored.
///
/// # Errors
/// Of `sigprocmask` and `sigaction`.
pub fn reset_signals() -> io::Result<()> {
    use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
    // SAFETY: the default disposition runs no code of ours. (Rust ignores SIGPIPE from the start.)
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    Ok(())
}

/// `dup2`: makes `number` another name of `fd`, inherited by `execve`.
///
/// # Errors
/// Of `dup2`.
pub fn duplicate_to(fd: &OwnedFd, number: RawFd) -> io::Result<()> {
    // SAFETY: used in a child for 0, 1 and 2, which no object owns.
    check(unsafe { libc::dup2(fd.as_raw_fd(), number) }.into())?;
    Ok(())
}

/// Executes an open file; returns only when that failed.
pub fn exec_descriptor(file: &OwnedFd, args: &[CString], environment: &[CString]) -> io::Error {
    let flags = nix::fcntl::AtFlags::AT_EMPTY_PATH;
    match nix::unistd::execveat(file, c"", args, environment, flags) {
        Ok(never) => match never {},
        Err(error) => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The exit code of a child that runs `body`.
    fn in_child(body: impl FnOnce() -> i32) -> i32 {
        let child = fork_into(0, None, body).unwrap();
        let pid = rustix::process::Pid::from_raw(child.pid);
        let (_, status) =
            rustix::process::waitpid(pid, rustix::process::WaitOptions::empty()).unwrap().unwrap();
        status.exit_status().unwrap()
    }

    #[test]
    fn nobody_looks_into_a_child_before_it_executes() {
        let hidden = || {
            let behavior = rustix::process::dumpable_behavior();
            i32::from(behavior == Ok(rustix::process::DumpableBehavior::NotDumpable))
        };
        assert_eq!(in_child(hidden), 1);
        assert_eq!(hidden(), 0, "this process is as it was");
    }

    #[test]
    fn descriptors_are_closed_but_for_those_kept() {
        let open = || std::fs::File::open("/dev/null").map(OwnedFd::from).unwrap();
        let descriptors: Vec<OwnedFd> = (0..6).map(|_| open()).collect();
        let left = in_child(|| {
            if close_all_but(&[&descriptors[4], &descriptors[1]]).is_err() {
                return 99;
            }
            let is_open = |fd: i32| {
                // SAFETY: asks for flags; any number may be asked about.
                unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
            };
            let mut bits = 0;
            for (at, descriptor) in descriptors.iter().enumerate() {
                bits |= i32::from(is_open(descriptor.as_raw_fd())) << at;
            }
            if (0..3).all(is_open) { bits } else { 98 }
        });
        assert_eq!(left, 0b01_0010);
    }
}
