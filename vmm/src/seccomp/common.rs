//! Every thread: memory, locks, eventfds, its own end, and a panic's way out.

use libc::*;

use super::call::{Call, call, call_if, int, lacks, null, this_process};

pub(super) const CALLS: &[Call] = &[
    // ---- memory of the allocator
    call(SYS_brk, "malloc"),
    call_if(SYS_mmap, &[&[lacks(2, PROT_EXEC), int(4, -1)]], "malloc: anonymous memory, never code"),
    call(SYS_munmap, "free; the stack of a thread that ends"),
    call(SYS_mremap, "realloc"),
    call_if(SYS_mprotect, &[&[lacks(2, PROT_EXEC)]], "malloc: an arena grows"),
    call_if(
        SYS_madvise,
        &[&[int(2, MADV_DONTNEED)], &[int(2, MADV_FREE)]],
        "free; the stack of a thread that ends",
    ),
    call_if(SYS_prlimit64, &[&[int(0, 0), null(2)]], "the file server asks how many files it may open"),
    // ---- locks, events, time
    call(SYS_futex, "mutexes, condition variables, joins"),
    call(SYS_read, "eventfds; the signalfd"),
    call(SYS_write, "eventfds; a panic's message"),
    call(SYS_close, "what is detached or replaced"),
    #[cfg(debug_assertions)]
    call_if(SYS_fcntl, &[&[int(1, F_GETFD)]], "the standard library of a debug build checks what it closes"),
    call(SYS_clock_gettime, "time, where the vDSO cannot tell it"),
    call(SYS_clock_nanosleep, "a worker lets others go first"),
    call(SYS_nanosleep, "the same, by older C libraries"),
    call(SYS_restart_syscall, "the kernel goes on with a wait that a signal interrupted"),
    call(SYS_getrandom, "seeds of hash tables; virtio-rng"),
    call(SYS_sched_yield, "locks that spin"),
    // ---- signals, the end of a thread and of the process
    call(SYS_rt_sigreturn, "back from the handlers of vCPU kicks"),
    call(SYS_rt_sigprocmask, "a thread ends; a panic aborts"),
    call(SYS_sigaltstack, "a thread ends"),
    call(SYS_gettid, "a panic aborts"),
    call(SYS_getpid, "a panic aborts"),
    call_if(SYS_tgkill, &[&[this_process(0), int(2, SIGABRT)]], "a panic aborts"),
    call(SYS_exit, "a thread ends"),
    call(SYS_exit_group, "the process ends"),
    // ---- the report
    call(SYS_pwrite64, "the report of a violation; files are written at a position"),
];
