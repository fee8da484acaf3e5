//! A guest that attacks its VMM.
//!
//! The VMM boots it as it boots Linux. There is no kernel and no driver in it: it has the machine to itself, and
//! writes whatever it likes to registers, rings and ports. What it is to do is a scenario's name, either on the
//! command line (`hostile=NAME` or `hostile=NAME:NUMBER`), or written into the image at [`SCENARIO`] where nobody
//! can give it a command line.
//!
//! ```text
//!  entry ─▶ run ─▶ paging, traps ─▶ devices found ─▶ scenario ─▶ "hostile: done" ─▶ reset line
//!                                                        ├─▶ "hostile: FAILED: why" ─▶ reset line
//!                                                        └─▶ whatever the attack ends in
//! ```
//!
//! A scenario that does not expect the machine's death ends by using the attacked device as it should be used: what
//! the attack left behind must not keep an honest driver from its work.

#![cfg_attr(not(test), no_std)]

pub mod boot;
pub mod console;
pub mod cpu;
pub mod memory;
pub mod scenarios;
pub mod smp;
pub mod virtio;

/// Names the scenario where there is no command line: the text after `=` up to the first zero. A test overwrites it
/// in a copy of the image.
#[used]
pub static SCENARIO: [u8; 64] = marked();

/// What [`SCENARIO`] begins with.
pub const MARK: &[u8; 18] = b"hostile-scenario0=";

const fn marked() -> [u8; 64] {
    let mut text = [0; 64];
    let mut index = 0;
    while index < MARK.len() {
        text[index] = MARK[index];
        index += 1;
    }
    text
}

/// Runs the scenario; never returns.
pub fn run(boot_params: u64) -> ! {
    cpu::take_over();
    let boot = boot::Boot::read(boot_params);
    virtio::Machine::probe(boot.memory_end).wait_until_attached();
    // Once more: a network slot is no device before it has its tap.
    let machine = virtio::Machine::probe(boot.memory_end);
    let (name, number) = boot.scenario();
    console::line(format_args!("scenario {name} {number}"));
    match scenarios::find(name) {
        Some(scenario) => scenario(&machine, number),
        None => panic!("no such scenario: {name:?}"),
    }
    console::line(format_args!("done"));
    cpu::power_off()
}
