//! The last steps of a process, the same for a container's first and for an exec: from root of the
//! container to what the spec says, and `execve`.

use std::{
    convert::Infallible,
    ffi::CString,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
};

use oci_spec::runtime::{
    Capabilities, Capability, LinuxCapabilities, LinuxPersonalityDomain, PosixRlimitType, Process,
};
use rustix::{
    fs::{FileType, Gid, Mode, Uid},
    process::{Resource, Rlimit},
    thread::{CapabilitySet, CapabilitySets},
};

use super::{Plan, lookup, status, terminal::Terminal};
use crate::{
    error::{Context, Result, internal, invalid},
    seccomp::Filter,
    sys, tiny_init,
    users::{Database, Identity},
};

/// Execution domains (`linux/personality.h`).
const PER_LINUX: u64 = 0;
const PER_LINUX32: u64 = 8;

/// Puts the process's stdio in place and gives it to its user.
pub(super) fn take_stdio(plan: &Plan<'_>, terminal: Option<&Terminal>) -> Result<()> {
    let descriptors: [&OwnedFd; 3] = match (terminal, &plan.pipes) {
        (Some(terminal), _) => [terminal.slave(); 3],
        (None, Some([stdin, stdout, stderr])) => [stdin, stdout, stderr],
        (None, None) => return Err(internal("no stdio was prepared")),
    };
    for (number, descriptor) in descriptors.into_iter().enumerate() {
        sys::duplicate_to(descriptor, number as i32).context("dup2")?;
    }
    Ok(())
}

/// Becomes the process.
pub(super) fn execute(plan: &Plan<'_>) -> Result<Infallible> {
    let process = plan.process;
    // From here on names come from the image, and some lead through descriptors (`/proc/self/fd/7`): the
    // agent's own must not be among them (CVE-2024-21626).
    let keep: Vec<&OwnedFd> = [Some(&plan.status), plan.init.as_ref()].into_iter().flatten().collect();
    sys::close_all_but(&keep).context("close_range")?;
    let identity = identity(plan)?;
    give_stdio(&identity, plan.stdio.terminal);
    set_limits(process)?;
    if let Some(personality) =
        plan.container.spec.linux().as_ref().and_then(|linux| linux.personality().as_ref())
    {
        let domain = match personality.domain() {
            LinuxPersonalityDomain::PerLinux => PER_LINUX,
            LinuxPersonalityDomain::PerLinux32 => PER_LINUX32,
        };
        sys::set_personality(domain).context("set the personality")?;
    }
    rustix::process::umask(Mode::from_raw_mode(process.user().umask().unwrap_or(0o022) & 0o777));

    let confined = process.no_new_privileges() == Some(true);
    let seccomp = plan.container.seccomp.as_ref();
    if !confined {
        // Without no_new_privs a filter takes CAP_SYS_ADMIN, which is about to go.
        install(seccomp)?;
    }
    // Root may enter a directory that the user may not, and the user one that root may not (a share).
    let entered = rustix::process::chdir(process.cwd());
    become_user(process, &identity)?;
    if entered.is_err() {
        rustix::process::chdir(process.cwd())
            .map_err(|error| lookup::chdir_failure(process.cwd(), &error.into()))?;
    }
    check_cwd()?;
    if confined {
        rustix::thread::set_no_new_privs(true).context("set no_new_privs")?;
    }

    let environment = environment(process, &identity)?;
    let args = process.args().as_deref().unwrap_or_default();
    let name = args.first().map(String::as_str).unwrap_or_default();
    let path = lookup::find(name, variable(process, "PATH"))?;
    sys::close_on_exec_from_3().context("close_range")?;
    status::send_executing(&plan.status)?;
    if confined {
        install(seccomp)?;
    }
    let error = match &plan.init {
        Some(init) => {
            let args = tiny_init::arguments(args)?;
            // From here on: a signal that comes before the init waits for it would be lost.
            sys::block_signals().context("block signals")?;
            sys::exec_descriptor(init, &args, &environment)
        }
        None => {
            let args = strings(args)?;
            let file = CString::new(path.as_os_str().as_bytes()).map_err(|_| invalid("a NUL in a path"))?;
            nix::unistd::execve(&file, &args, &environment)
                .map_or_else(io::Error::from, |never| match never {})
        }
    };
    Err(lookup::exec_failure(&path, &error))
}

fn identity(plan: &Plan<'_>) -> Result<Identity> {
    let user = plan.process.user();
    let database = Database::read();
    let mut identity = match user.username().as_deref().filter(|name| !name.is_empty()) {
        Some(name) => database.resolve(name)?,
        None => database.by_ids(user.uid(), user.gid()),
    };
    identity.add_groups(user.additional_gids().iter().flatten().copied())?;
    for group in &plan.container.group_add {
        identity.add_groups([database.group(group)?])?;
    }
    Ok(identity)
}

/// Lets the user open `/dev/stdout` and its like again by name. Best effort, as runc's: it is not possible
/// for every kind of file.
fn give_stdio(identity: &Identity, terminal: bool) {
    let stdio = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
    for descriptor in stdio {
        let is_pipe = rustix::fs::fstat(descriptor)
            .is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Fifo);
        // A terminal's group is that of terminals, by its mount options; /dev/null stays root's.
        let group = if terminal { None } else { Some(Gid::from_raw(identity.gid)) };
        if is_pipe || terminal {
            let _ = rustix::fs::fchown(descriptor, Some(Uid::from_raw(identity.uid)), group);
        }
    }
}

fn set_limits(process: &Process) -> Result<()> {
    for limit in process.rlimits().iter().flatten() {
        let bound = |value: u64| (value != u64::MAX).then_some(value);
        let rlimit = Rlimit { current: bound(limit.soft()), maximum: bound(limit.hard()) };
        rustix::process::setrlimit(resource(limit.typ()), rlimit)
            .map_err(|error| invalid(format!("the limit {} cannot be set: {error}", limit.typ())))?;
    }
    Ok(())
}

fn resource(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitCpu => Resource::Cpu,
        PosixRlimitType::RlimitFsize => Resource::Fsize,
        PosixRlimitType::RlimitData => Resource::Data,
        PosixRlimitType::RlimitStack => Resource::Stack,
        PosixRlimitType::RlimitCore => Resource::Core,
        PosixRlimitType::RlimitRss => Resource::Rss,
        PosixRlimitType::RlimitNproc => Resource::Nproc,
        PosixRlimitType::RlimitNofile => Resource::Nofile,
        PosixRlimitType::RlimitMemlock => Resource::Memlock,
        PosixRlimitType::RlimitAs => Resource::As,
        PosixRlimitType::RlimitLocks => Resource::Locks,
        PosixRlimitType::RlimitSigpending => Resource::Sigpending,
        PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
        PosixRlimitType::RlimitNice => Resource::Nice,
        PosixRlimitType::RlimitRtprio => Resource::Rtprio,
        PosixRlimitType::RlimitRttime => Resource::Rttime,
    }
}

fn install(filter: Option<&Filter>) -> Result<()> {
    let Some(filter) = filter else { return Ok(()) };
    bulkhead_bpf::install(&filter.program, filter.flags).context("install the seccomp filter")
}

/// Sets ids and all five sets of capabilities.
fn become_user(process: &Process, identity: &Identity) -> Result<()> {
    let sets = process.capabilities().as_ref();
    let set = |set: Option<&Option<Capabilities>>| -> CapabilitySet {
        let capabilities = set.and_then(Option::as_ref).into_iter().flatten();
        capabilities.fold(CapabilitySet::empty(), |all, capability| all | bit(*capability))
    };
    let bounding = set(sets.map(LinuxCapabilities::bounding));
    for index in 0..64 {
        let one = CapabilitySet::from_bits_retain(1 << index);
        match rustix::thread::capability_is_in_bounding_set(one) {
            Ok(true) if !bounding.contains(one) => {
                rustix::thread::remove_capability_from_bounding_set(one).context("drop a capability")?;
            }
            Ok(_) => {}
            // The end of what this kernel knows.
            Err(_) => break,
        }
    }
    rustix::thread::set_keep_capabilities(true).context("keep capabilities")?;
    let groups: Vec<Gid> = identity.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    rustix::thread::set_thread_groups(&groups).context("setgroups")?;
    let gid = Gid::from_raw(identity.gid);
    rustix::thread::set_thread_res_gid(gid, gid, gid).context("setresgid")?;
    let uid = Uid::from_raw(identity.uid);
    rustix::thread::set_thread_res_uid(uid, uid, uid).context("setresuid")?;
    rustix::thread::set_keep_capabilities(false).context("keep capabilities")?;
    let wanted = CapabilitySets {
        effective: set(sets.map(LinuxCapabilities::effective)),
        permitted: set(sets.map(LinuxCapabilities::permitted)),
        inheritable: set(sets.map(LinuxCapabilities::inheritable)),
    };
    rustix::thread::set_capabilities(None, wanted).context("set capabilities")?;
    rustix::thread::clear_ambient_capability_set().context("clear ambient capabilities")?;
    for one in set(sets.map(LinuxCapabilities::ambient)).iter() {
        // Ambient capabilities must be permitted and inheritable; Docker's specs may name more.
        if wanted.permitted.contains(one) && wanted.inheritable.contains(one) {
            rustix::thread::configure_capability_in_ambient_set(one, true)
                .context("set an ambient capability")?;
        }
    }
    Ok(())
}

/// From the spec's name to the kernel's number (`linux/capability.h`).
fn bit(capability: Capability) -> CapabilitySet {
    match capability {
        Capability::Chown => CapabilitySet::CHOWN,
        Capability::DacOverride => CapabilitySet::DAC_OVERRIDE,
        Capability::DacReadSearch => CapabilitySet::DAC_READ_SEARCH,
        Capability::Fowner => CapabilitySet::FOWNER,
        Capability::Fsetid => CapabilitySet::FSETID,
        Capability::Kill => CapabilitySet::KILL,
        Capability::Setgid => CapabilitySet::SETGID,
        Capability::Setuid => CapabilitySet::SETUID,
        Capability::Setpcap => CapabilitySet::SETPCAP,
        Capability::LinuxImmutable => CapabilitySet::LINUX_IMMUTABLE,
        Capability::NetBindService => CapabilitySet::NET_BIND_SERVICE,
        Capability::NetBroadcast => CapabilitySet::NET_BROADCAST,
        Capability::NetAdmin => CapabilitySet::NET_ADMIN,
        Capability::NetRaw => CapabilitySet::NET_RAW,
        Capability::IpcLock => CapabilitySet::IPC_LOCK,
        Capability::IpcOwner => CapabilitySet::IPC_OWNER,
        Capability::SysModule => CapabilitySet::SYS_MODULE,
        Capability::SysRawio => CapabilitySet::SYS_RAWIO,
        Capability::SysChroot => CapabilitySet::SYS_CHROOT,
        Capability::SysPtrace => CapabilitySet::SYS_PTRACE,
        Capability::SysPacct => CapabilitySet::SYS_PACCT,
        Capability::SysAdmin => CapabilitySet::SYS_ADMIN,
        Capability::SysBoot => CapabilitySet::SYS_BOOT,
        Capability::SysNice => CapabilitySet::SYS_NICE,
        Capability::SysResource => CapabilitySet::SYS_RESOURCE,
        Capability::SysTime => CapabilitySet::SYS_TIME,
        Capability::SysTtyConfig => CapabilitySet::SYS_TTY_CONFIG,
        Capability::Mknod => CapabilitySet::MKNOD,
        Capability::Lease => CapabilitySet::LEASE,
        Capability::AuditWrite => CapabilitySet::AUDIT_WRITE,
        Capability::AuditControl => CapabilitySet::AUDIT_CONTROL,
        Capability::Setfcap => CapabilitySet::SETFCAP,
        Capability::MacOverride => CapabilitySet::MAC_OVERRIDE,
        Capability::MacAdmin => CapabilitySet::MAC_ADMIN,
        Capability::Syslog => CapabilitySet::SYSLOG,
        Capability::WakeAlarm => CapabilitySet::WAKE_ALARM,
        Capability::BlockSuspend => CapabilitySet::BLOCK_SUSPEND,
        Capability::AuditRead => CapabilitySet::AUDIT_READ,
        Capability::Perfmon => CapabilitySet::PERFMON,
        Capability::Bpf => CapabilitySet::BPF,
        Capability::CheckpointRestore => CapabilitySet::CHECKPOINT_RESTORE,
    }
}

/// The working directory must be in the container: a descriptor that leaked in could have led out
/// (CVE-2024-21626). The kernel then gives a path that does not begin with a slash.
fn check_cwd() -> Result<()> {
    match rustix::process::getcwd(Vec::new()) {
        Ok(path) if path.as_bytes().first() == Some(&b'/') => Ok(()),
        // One that was removed has no path, and might have been anywhere.
        _ => Err(invalid("the working directory is outside of the container")),
    }
}

fn variable<'a>(process: &'a Process, name: &str) -> Option<&'a str> {
    let value = |entry: &'a String| entry.strip_prefix(name)?.strip_prefix('=');
    process.env().iter().flatten().rev().find_map(value)
}

fn environment(process: &Process, identity: &Identity) -> Result<Vec<CString>> {
    let mut environment = strings(process.env().as_deref().unwrap_or_default())?;
    if variable(process, "HOME").is_none_or(str::is_empty) {
        environment.retain(|entry| !entry.as_bytes().starts_with(b"HOME="));
        environment.extend(strings(&[format!("HOME={}", identity.home)])?);
    }
    Ok(environment)
}

fn strings(texts: &[String]) -> Result<Vec<CString>> {
    let convert = |text: &String| CString::new(text.as_str());
    texts.iter().map(convert).collect::<Result<_, _>>().map_err(|_| invalid("an argument contains a NUL"))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn home_is_set_unless_the_environment_has_it() {
        let identity = Identity { uid: 1, gid: 1, groups: vec![], home: "/h".into() };
        let of = |env: &[&str]| {
            let json = serde_json::json!({"user": {}, "cwd": "/", "env": env});
            let process: Process = serde_json::from_value(json).unwrap();
            let environment = environment(&process, &identity).unwrap();
            environment.iter().map(|entry| entry.to_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(of(&["A=1"]), ["A=1", "HOME=/h"]);
        assert_eq!(of(&["HOME=/x", "A=1"]), ["HOME=/x", "A=1"]);
        assert_eq!(of(&["HOME="]), ["HOME=/h"]);
    }

    #[test]
    fn the_last_of_equal_variables_counts() {
        let json = serde_json::json!({"user": {}, "cwd": "/", "env": ["PATH=/a", "PATHS=/c", "PATH=/b"]});
        let process: Process = serde_json::from_value(json).unwrap();
        assert_eq!(variable(&process, "PATH"), Some("/b"));
        assert_eq!(variable(&process, "NO"), None);
    }

    #[test]
    fn capabilities_have_the_kernels_numbers() {
        for (name, number) in
            HashMap::from([("CAP_CHOWN", 0), ("CAP_SYS_ADMIN", 21), ("CAP_CHECKPOINT_RESTORE", 40)])
        {
            let capability: Capability = serde_json::from_value(name.into()).unwrap();
            assert_eq!(bit(capability).bits(), 1 << number, "{name}");
        }
    }
}
