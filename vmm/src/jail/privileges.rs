//! Capabilities given up, and the ways to get some, or anything else, closed.

use std::io;

use rustix::{
    fs::Mode,
    process::{DumpableBehavior, set_dumpable_behavior, umask},
    thread::{
        CapabilitiesSecureBits, CapabilitySet, CapabilitySets, clear_ambient_capability_set,
        remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits,
        set_no_new_privs,
    },
};

use super::JailError;

/// Gives up every capability in every set but `kept`, for ever. Those that are there are over this process's own
/// namespaces alone (of a share server's, over files too); without them it can change nothing of these either.
pub(super) fn drop_all_but(kept: CapabilitySet) -> Result<(), JailError> {
    for number in 0..CapabilitySet::all().bits().trailing_ones() {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The kernel knows fewer: this was the last.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(JailError::at("PR_CAPBSET_DROP")(error)),
        }
    }
    clear_ambient_capability_set().map_err(JailError::at("PR_CAP_AMBIENT"))?;
    let for_ever = CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_SETUID_FIXUP
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    set_capabilities_secure_bits(for_ever).map_err(JailError::at("PR_SET_SECUREBITS"))?;
    let left = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, left).map_err(JailError::at("capset"))
}

/// No program that is executed gains anything, nobody of the same user may look into this process, no memory
/// that was ever written becomes code, and no file is made that others could use.
pub(super) fn keep_from_gaining() -> Result<(), JailError> {
    set_no_new_privs(true).map_err(JailError::at("PR_SET_NO_NEW_PRIVS"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(JailError::at("PR_SET_DUMPABLE"))?;
    refuse_new_code().map_err(JailError::at("PR_SET_MDWE"))?;
    umask(Mode::all());
    Ok(())
}

fn refuse_new_code() -> io::Result<()> {
    // SAFETY: takes plain numbers and changes only what later mappings may be.
    let result = unsafe { libc::prctl(libc::PR_SET_MDWE, libc::PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) };
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            // Before Linux 6.3 there is no such thing. The filters refuse executable mappings too.
            error if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            error => Err(error),
        },
    }
}
