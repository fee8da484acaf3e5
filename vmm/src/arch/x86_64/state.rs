//! What KVM holds of a machine, as it is saved: a vCPU's registers, the interrupt controllers, the timer and
//! the clock.
//!
//! The order in which a vCPU is restored is not free:
//!
//! ```text
//!  all: CPUID ─▶ TSC rate ─▶ TSC
//!  each: SREGS (APIC base) ─▶ LAPIC ─▶ MSRs, TSC_DEADLINE last ─▶ REGS ─▶ events
//!            XCRS ─▶ XSAVE (which features XSAVE may hold)      (REGS drop a pending exception)
//! ```
//!
//! The TSCs were the same to the tick and are to be so again. KVM takes two writes for one moment, and gives both
//! vCPUs one offset, when they differ by less than a second from what its own clock says: so all get the same
//! value, one right after the other ([`restore_tscs`]).
//!
//! A deadline can be set only in a local APIC that is in deadline mode, and means something only once the TSC
//! is what it was. A timer that has run out while its vCPU was parked shows up nowhere: its deadline reads as
//! zero and its interrupt is pending in KVM alone. So an armed timer without a deadline is saved with one that
//! is due; at worst the guest sees one timer interrupt too many.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, Xsave, kvm_clock_data,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// MSRs that are read or written by one call.
const MSRS_AT_ONCE: usize = 64;

const APIC_LVT_TIMER: usize = 0x320;
const LVT_MASKED: u32 = 1 << 16;
const LVT_TIMER_MODE: u32 = 3 << 17;
const LVT_TIMER_DEADLINE: u32 = 2 << 17;

/// How far a host's TSC rate may be from the saved one without scaling, in parts per million: what its
/// calibration may differ by from boot to boot, and what the kernel's clocks bear.
const TSC_TOLERANCE_PPM: u64 = 250;

/// The words of XSAVE's legacy and first extended area (`struct kvm_xsave` without its tail).
const XSAVE_WORDS: usize = 1024;
/// The most words of XSAVE state taken: AMX's 8 KiB of tiles with everything before it, and room.
const MAX_XSAVE_WORDS: usize = 16 * 1024;

/// Why state cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A KVM operation failed.
    #[error("{operation}: {source}")]
    Kvm {
        /// The ioctl.
        operation: &'static str,
        /// The cause.
        source: kvm_ioctls::Error,
    },
    /// KVM has other model-specific registers.
    #[error("KVM does not take {data:#x} for MSR {index:#x}")]
    Msr {
        /// The register's index.
        index: u32,
        /// The saved value.
        data: u64,
    },
    /// The processor runs at another rate, and KVM cannot scale.
    #[error("the TSC ran at {saved} kHz, and this host's runs at {host} kHz")]
    TscRate {
        /// When it was saved.
        saved: u32,
        /// Now.
        host: u32,
    },
    /// The processor's extended state has another size.
    #[error("{saved} words of extended processor state, this host has {host}")]
    Xsave {
        /// When it was saved.
        saved: usize,
        /// Now.
        host: usize,
    },
    /// A list is longer than KVM takes.
    #[error("too many {0}")]
    TooMany(&'static str),
}

fn kvm(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Kvm { operation, source }
}

/// What saving and restoring needs to know of this host's KVM.
#[derive(Debug, Clone)]
pub struct Abilities {
    /// The MSRs that make up a vCPU's state.
    msrs: Vec<u32>,
    /// Words of XSAVE state beyond [`XSAVE_WORDS`]; None where KVM has no KVM_GET_XSAVE2.
    xsave_tail: Option<usize>,
    /// Whether there are extended control registers.
    xcrs: bool,
    /// Whether KVM can run a vCPU at another TSC rate than the host's.
    tsc_scaling: bool,
}

impl Abilities {
    /// Asks KVM.
    ///
    /// # Errors
    /// The list of MSRs cannot be read.
    pub fn of(system: &Kvm, vm: &VmFd) -> Result<Self, StateError> {
        let list = system.get_msr_index_list().map_err(kvm("KVM_GET_MSR_INDEX_LIST"))?;
        let bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).ok().filter(|bytes| *bytes > 0);
        let words = bytes.map(|bytes| bytes.div_ceil(size_of::<u32>()));
        Ok(Self {
            msrs: list.as_slice().to_vec(),
            xsave_tail: words.map(|words| words.saturating_sub(XSAVE_WORDS)),
            xcrs: system.check_extension(Cap::Xcrs),
            tsc_scaling: system.check_extension(Cap::TscControl),
        })
    }
}

/// A vCPU as it is saved, but for CPUID: what that tells is checked, not kept (`cpuid::fingerprint`).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VcpuState {
    tsc_khz: Option<u32>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: Option<kvm_xcrs>,
    xsave: Vec<u32>,
    debug: kvm_debugregs,
    msrs: Vec<kvm_msr_entry>,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Saves a vCPU that does not run.
    ///
    /// # Errors
    /// A KVM operation fails.
    pub fn save(vcpu: &VcpuFd, abilities: &Abilities) -> Result<Self, StateError> {
        // First: it works off a pending INIT or SIPI, which changes the rest.
        let mp_state = vcpu.get_mp_state().map_err(kvm("KVM_GET_MP_STATE"))?;
        // Before the local APIC: a timer that runs out in between is then in both, and not in neither.
        let msrs = get_msrs(vcpu, &abilities.msrs)?;
        let mut state = Self {
            tsc_khz: vcpu.get_tsc_khz().ok(),
            mp_state,
            regs: vcpu.get_regs().map_err(kvm("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?,
            xcrs: abilities.xcrs.then(|| vcpu.get_xcrs()).transpose().map_err(kvm("KVM_GET_XCRS"))?,
            xsave: get_xsave(vcpu, abilities.xsave_tail)?,
            debug: vcpu.get_debug_regs().map_err(kvm("KVM_GET_DEBUGREGS"))?,
            msrs,
            lapic: vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?,
            events: vcpu.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS"))?,
        };
        state.keep_due_timer();
        Ok(state)
    }

    /// Brings a fresh vCPU, whose CPUID and TSC were set, to this state.
    ///
    /// # Errors
    /// KVM refuses a part of it, or this host cannot go on with it.
    pub fn restore(&self, vcpu: &VcpuFd, abilities: &Abilities) -> Result<(), StateError> {
        vcpu.set_mp_state(self.mp_state).map_err(kvm("KVM_SET_MP_STATE"))?;
        vcpu.set_sregs(&self.sregs).map_err(kvm("KVM_SET_SREGS"))?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(kvm("KVM_SET_XCRS"))?;
        }
        set_xsave(vcpu, &self.xsave, abilities.xsave_tail)?;
        vcpu.set_debug_regs(&self.debug).map_err(kvm("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(kvm("KVM_SET_LAPIC"))?;
        let msrs = self.msrs.iter().copied().filter(|msr| msr.index != MSR_TSC);
        let (last, msrs): (Vec<_>, Vec<_>) = msrs.partition(|msr| msr.index == MSR_TSC_DEADLINE);
        set_msrs(vcpu, &msrs)?;
        set_msrs(vcpu, &last)?;
        vcpu.set_regs(&self.regs).map_err(kvm("KVM_SET_REGS"))?;
        vcpu.set_vcpu_events(&self.events).map_err(kvm("KVM_SET_VCPU_EVENTS"))
    }

    fn tsc(&self) -> u64 {
        self.msrs.iter().find(|msr| msr.index == MSR_TSC).map_or(0, |msr| msr.data)
    }

    fn restore_tsc_rate(&self, vcpu: &VcpuFd, abilities: &Abilities) -> Result<(), StateError> {
        let (Some(saved), Ok(host)) = (self.tsc_khz, vcpu.get_tsc_khz()) else { return Ok(()) };
        if u64::from(saved.abs_diff(host)) * 1_000_000 <= u64::from(saved) * TSC_TOLERANCE_PPM {
            Ok(())
        } else if abilities.tsc_scaling {
            vcpu.set_tsc_khz(saved).map_err(kvm("KVM_SET_TSC_KHZ"))
        } else {
            Err(StateError::TscRate { saved, host })
        }
    }

    /// See the module's words on timers.
    fn keep_due_timer(&mut self) {
        let timer = lapic_register(&self.lapic, APIC_LVT_TIMER);
        if timer & LVT_MASKED != 0 || timer & LVT_TIMER_MODE != LVT_TIMER_DEADLINE {
            return;
        }
        let now = self.tsc().max(1);
        for msr in &mut self.msrs {
            if msr.index == MSR_TSC_DEADLINE && msr.data == 0 {
                msr.data = now;
            }
        }
    }
}

/// Sets the time stamp counters of all vCPUs of a machine to where the latest of them was.
///
/// # Errors
/// KVM refuses the value, or the host's rate is another.
pub fn restore_tscs(vcpus: &[VcpuFd], states: &[VcpuState], abilities: &Abilities) -> Result<(), StateError> {
    for (vcpu, state) in vcpus.iter().zip(states) {
        state.restore_tsc_rate(vcpu, abilities)?;
    }
    let data = states.iter().map(VcpuState::tsc).max().unwrap_or(0);
    let tsc = [kvm_msr_entry { index: MSR_TSC, data, ..Default::default() }];
    vcpus.iter().try_for_each(|vcpu| set_msrs(vcpu, &tsc))
}

fn lapic_register(lapic: &kvm_lapic_state, register: usize) -> u32 {
    let mut value = [0; 4];
    for (to, from) in value.iter_mut().zip(lapic.regs.iter().skip(register)) {
        *to = *from as u8;
    }
    u32::from_le_bytes(value)
}

/// The MSRs of a list; without those that KVM lists and does not give.
fn get_msrs(vcpu: &VcpuFd, list: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let mut found = Vec::with_capacity(list.len());
    let mut left = list;
    while !left.is_empty() {
        let (batch, rest) = left.split_at(left.len().min(MSRS_AT_ONCE));
        let entries: Vec<_> =
            batch.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| StateError::TooMany("MSRs"))?;
        let count = vcpu.get_msrs(&mut msrs).map_err(kvm("KVM_GET_MSRS"))?;
        found.extend(msrs.as_slice().iter().take(count));
        // It stops at the first that it does not give.
        left = if count < batch.len() { left.get(count + 1..).unwrap_or_default() } else { rest };
    }
    Ok(found)
}

fn set_msrs(vcpu: &VcpuFd, list: &[kvm_msr_entry]) -> Result<(), StateError> {
    let mut left = list;
    while !left.is_empty() {
        let (batch, rest) = left.split_at(left.len().min(MSRS_AT_ONCE));
        let msrs = Msrs::from_entries(batch).map_err(|_| StateError::TooMany("MSRs"))?;
        let count = vcpu.set_msrs(&msrs).map_err(kvm("KVM_SET_MSRS"))?;
        left = match batch.get(count) {
            None => rest,
            // It stops at the first that it does not take. One that can only be read is right as it is.
            Some(refused) => {
                let now = get_msrs(vcpu, &[refused.index])?;
                if now.first().is_none_or(|now| now.data != refused.data) {
                    return Err(StateError::Msr { index: refused.index, data: refused.data });
                }
                left.get(count + 1..).unwrap_or_default()
            }
        };
    }
    Ok(())
}

fn get_xsave(vcpu: &VcpuFd, tail: Option<usize>) -> Result<Vec<u32>, StateError> {
    let Some(tail) = tail else {
        let xsave = vcpu.get_xsave().map_err(kvm("KVM_GET_XSAVE"))?;
        return Ok(xsave.region.to_vec());
    };
    let mut xsave = Xsave::new(tail).map_err(|_| StateError::TooMany("words of XSAVE state"))?;
    // SAFETY: the area is as long as KVM_CAP_XSAVE2 says, and no feature is enabled later that enlarges it.
    unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(kvm("KVM_GET_XSAVE2"))?;
    let mut words = xsave.as_fam_struct_ref().xsave.region.to_vec();
    words.extend(xsave.as_slice());
    Ok(words)
}

fn set_xsave(vcpu: &VcpuFd, words: &[u32], tail: Option<usize>) -> Result<(), StateError> {
    let host = XSAVE_WORDS + tail.unwrap_or(0);
    let error = StateError::Xsave { saved: words.len(), host };
    if words.len() != host || host > MAX_XSAVE_WORDS {
        return Err(error);
    }
    let Some((first, rest)) = words.split_first_chunk::<XSAVE_WORDS>() else { return Err(error) };
    let mut xsave = Xsave::new(rest.len()).map_err(|_| error)?;
    // SAFETY: only the fixed part is written; the length of the tail stays as it is.
    unsafe { xsave.as_mut_fam_struct() }.xsave.region = *first;
    xsave.as_mut_slice().copy_from_slice(rest);
    // SAFETY: the area is as long as KVM_CAP_XSAVE2 says on this host, or as KVM_SET_XSAVE takes where there is
    // no such capability.
    unsafe { vcpu.set_xsave2(&xsave) }.map_err(kvm("KVM_SET_XSAVE"))
}

/// The interrupt controllers, the timer and the clock, as they are saved.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ChipState {
    pics: [kvm_irqchip; 2],
    ioapic: kvm_irqchip,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
}

impl ChipState {
    /// Saves the VM's chips while its vCPUs are parked.
    ///
    /// # Errors
    /// A KVM operation fails.
    pub fn save(vm: &VmFd) -> Result<Self, StateError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(kvm("KVM_GET_IRQCHIP"))?;
            Ok(chip)
        };
        let mut clock = vm.get_clock().map_err(kvm("KVM_GET_CLOCK"))?;
        // The guest's clock goes on from here, however long it was away: the flags would have it jump.
        clock.flags = 0;
        Ok(Self {
            pics: [chip(KVM_IRQCHIP_PIC_MASTER)?, chip(KVM_IRQCHIP_PIC_SLAVE)?],
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
            pit: vm.get_pit2().map_err(kvm("KVM_GET_PIT2"))?,
            clock,
        })
    }

    /// Brings fresh chips to this state. After the vCPUs: an interrupt that is pending in the I/O APIC goes to
    /// a local one.
    ///
    /// # Errors
    /// KVM refuses a part of it.
    pub fn restore(&self, vm: &VmFd) -> Result<(), StateError> {
        let ids = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
        for (chip, id) in self.pics.iter().chain([&self.ioapic]).zip(ids) {
            let chip = kvm_irqchip { chip_id: id, ..*chip };
            vm.set_irqchip(&chip).map_err(kvm("KVM_SET_IRQCHIP"))?;
        }
        vm.set_pit2(&self.pit).map_err(kvm("KVM_SET_PIT2"))?;
        vm.set_clock(&self.clock).map_err(kvm("KVM_SET_CLOCK"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vcpu(timer: u32, deadline: u64) -> VcpuState {
        let mut lapic = kvm_lapic_state::default();
        for (to, from) in lapic.regs.iter_mut().skip(APIC_LVT_TIMER).zip(timer.to_le_bytes()) {
            *to = from as std::ffi::c_char;
        }
        let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
        VcpuState {
            tsc_khz: Some(2_000_000),
            mp_state: kvm_mp_state::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xcrs: None,
            xsave: vec![0; XSAVE_WORDS],
            debug: kvm_debugregs::default(),
            msrs: vec![msr(MSR_TSC_DEADLINE, deadline), msr(MSR_TSC, 5000)],
            lapic,
            events: kvm_vcpu_events::default(),
        }
    }

    fn deadline(timer: u32, deadline: u64) -> u64 {
        let mut state = vcpu(timer, deadline);
        state.keep_due_timer();
        state.msrs[0].data
    }

    #[test]
    fn a_timer_that_ran_out_is_due() {
        assert_eq!(deadline(LVT_TIMER_DEADLINE | 0xec, 0), 5000);
        assert_eq!(deadline(LVT_TIMER_DEADLINE | 0xec, 9000), 9000);
        assert_eq!(deadline(LVT_TIMER_DEADLINE | LVT_MASKED | 0xec, 0), 0);
        assert_eq!(deadline(0xec, 0), 0, "one-shot by count");
    }

    #[test]
    fn states_are_whole_after_coding() {
        let mut state = vcpu(7, 8);
        state.regs.rip = 0x1234;
        state.xsave[1023] = 9;
        let bytes = postcard::to_stdvec(&state).unwrap();
        let again: VcpuState = postcard::from_bytes(&bytes).unwrap();
        assert_eq!((again.regs, again.lapic, again.xsave), (state.regs, state.lapic, state.xsave));
        assert_eq!(again.msrs, state.msrs);
    }
}
