//! The filters' programs, run by an interpreter, and one filter for real.

use bulkhead_bpf::{MAX_PROGRAM, interpreter::run};

use super::*;

const PROCESS: u64 = 4711;
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const TRAP: u32 = libc::SECCOMP_RET_TRAP;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;

fn verdict(kind: Kind, call: libc::c_long, args: [u64; 6]) -> u32 {
    run(&program(kind, PROCESS), ARCHITECTURE, u32::try_from(call).unwrap(), args)
}

#[test]
fn every_kind_has_a_program_that_the_kernel_takes() {
    for kind in Kind::ALL {
        assert!(program(kind, PROCESS).len() <= MAX_PROGRAM, "{kind:?}");
    }
}

#[test]
fn nobody_makes_processes_sockets_or_code_or_reaches_other_processes() {
    use libc::*;
    let never = [
        SYS_execve,
        SYS_execveat,
        SYS_fork,
        SYS_vfork,
        SYS_clone,
        SYS_clone3,
        SYS_socket,
        SYS_socketpair,
        SYS_connect,
        SYS_bind,
        SYS_listen,
        SYS_open,
        SYS_openat,
        SYS_creat,
        SYS_ptrace,
        SYS_process_vm_readv,
        SYS_process_vm_writev,
        SYS_pidfd_open,
        SYS_pidfd_getfd,
        SYS_mount,
        SYS_umount2,
        SYS_pivot_root,
        SYS_chroot,
        SYS_fsopen,
        SYS_open_tree,
        SYS_setns,
        SYS_unshare,
        SYS_setuid,
        SYS_setresuid,
        SYS_capset,
        SYS_prctl,
        SYS_setrlimit,
        SYS_bpf,
        SYS_io_uring_setup,
        SYS_userfaultfd,
        SYS_perf_event_open,
        SYS_keyctl,
        SYS_memfd_create,
        SYS_seccomp,
        SYS_rt_sigaction,
        SYS_tkill,
        SYS_rt_tgsigqueueinfo,
        SYS_pidfd_send_signal,
        SYS_unlinkat,
        SYS_linkat,
        SYS_symlinkat,
        SYS_mknodat,
        SYS_mkdirat,
        SYS_renameat2,
        SYS_fchmod,
        SYS_fchown,
        SYS_fsetxattr,
        SYS_chdir,
        SYS_fchdir,
        SYS_kexec_load,
        SYS_init_module,
        SYS_finit_module,
        SYS_reboot,
        SYS_swapon,
        SYS_dup,
        SYS_dup2,
        SYS_dup3,
        SYS_splice,
        SYS_sendfile,
        SYS_copy_file_range,
        SYS_memfd_secret,
        SYS_execve,
    ];
    let changes_files = [
        SYS_openat,
        SYS_unlinkat,
        SYS_linkat,
        SYS_symlinkat,
        SYS_mknodat,
        SYS_mkdirat,
        SYS_renameat2,
        SYS_fchmod,
        SYS_fsetxattr,
        SYS_copy_file_range,
    ];
    for kind in Kind::ALL {
        for call in never {
            // The share server is another process, whose work is with names of files.
            if kind == Kind::Shares && changes_files.contains(&call) {
                continue;
            }
            assert_eq!(verdict(kind, call, [0; 6]), TRAP, "{kind:?} {call}");
        }
        assert_eq!(verdict(kind, SYS_kill, [0; 6]), KILL);
        assert_eq!(run(&program(kind, PROCESS), 0x4000_0003, 1, [0; 6]), KILL, "another architecture");
        assert_eq!(verdict(kind, 0x4000_0000 + SYS_read, [0; 6]), TRAP, "x32");
    }
}

#[test]
fn arguments_count() {
    use libc::*;
    let minus_one = u64::from(u32::MAX);
    let (read, exec) = (PROT_READ as u64, PROT_EXEC as u64);
    for kind in Kind::ALL {
        let anonymous = [0, 4096, read, 0x22, minus_one, 0];
        assert_eq!(verdict(kind, SYS_mmap, anonymous), ALLOW);
        assert_eq!(verdict(kind, SYS_mmap, [0, 4096, read, 0x22, u64::MAX, 0]), ALLOW);
        assert_eq!(verdict(kind, SYS_mmap, [0, 4096, read | exec, 0x22, minus_one, 0]), TRAP);
        assert_eq!(verdict(kind, SYS_mmap, [0, 4096, read, 1, 5, 0]), TRAP, "a file");
        assert_eq!(verdict(kind, SYS_mprotect, [0, 4096, read, 0, 0, 0]), ALLOW);
        assert_eq!(verdict(kind, SYS_mprotect, [0, 4096, exec, 0, 0, 0]), TRAP);
        let abort = SIGABRT as u64;
        assert_eq!(verdict(kind, SYS_tgkill, [PROCESS, 7, abort, 0, 0, 0]), ALLOW);
        assert_eq!(verdict(kind, SYS_tgkill, [PROCESS + 1, 7, abort, 0, 0, 0]), TRAP);
        assert_eq!(verdict(kind, SYS_tgkill, [PROCESS, 7, SIGKILL as u64, 0, 0, 0]), TRAP);
        assert_eq!(verdict(kind, SYS_prlimit64, [0, 7, 0, 0xffff_0000, 0, 0]), ALLOW, "asks");
        assert_eq!(verdict(kind, SYS_prlimit64, [0, 7, 0xffff_0000, 0, 0, 0]), TRAP, "sets");
        assert_eq!(verdict(kind, SYS_prlimit64, [1, 7, 0, 0xffff_0000, 0, 0]), TRAP, "asks about another");
    }
}

#[test]
fn each_kind_has_its_own() {
    use libc::*;
    let run_guest = [5, 0xae80, 0, 0, 0, 0];
    let who = |call, args| Kind::ALL.into_iter().filter(move |kind| verdict(*kind, call, args) == ALLOW);
    assert_eq!(who(SYS_ioctl, run_guest).collect::<Vec<_>>(), [Kind::Vcpu]);
    assert_eq!(who(SYS_openat2, [0; 6]).collect::<Vec<_>>(), [Kind::Control, Kind::Fs, Kind::Shares]);
    assert_eq!(who(SYS_recvmsg, [0; 6]).collect::<Vec<_>>(), [Kind::Control, Kind::Vsock]);
    assert_eq!(who(SYS_fallocate, [0; 6]).collect::<Vec<_>>(), [Kind::Block, Kind::Shares]);
    assert_eq!(who(SYS_getdents64, [0; 6]).collect::<Vec<_>>(), [Kind::Fs, Kind::Shares]);
    // TIOCSTI, KVM_CREATE_VM, KVM_SET_REGS, TUNSETIFF
    for request in [0x5412, 0xae01, 0x4090_ae82, 0x4004_54ca] {
        assert_eq!(who(SYS_ioctl, [5, request, 0, 0, 0, 0]).count(), 0, "{request:#x}");
    }
}

#[test]
fn a_filter_is_installed_and_lets_the_thread_live_and_end() {
    for kind in Kind::ALL {
        let thread = std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            install(kind).unwrap();
            let numbers: std::collections::HashMap<u32, Vec<u8>> =
                (0..100).map(|number| (number, vec![1; 10])).collect();
            std::thread::sleep(std::time::Duration::from_micros(1));
            std::panic::catch_unwind(|| std::panic::resume_unwind(Box::new(numbers.len())))
        });
        assert!(thread.join().unwrap().is_err());
    }
}
