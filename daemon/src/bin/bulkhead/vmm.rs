//! A microVM's figures as text.

use std::fmt::Write;

use bulkhead_daemon::api::types::machine::{Machine, Traffic};

/// The figures in lines and a table.
pub(crate) fn render(machine: &Machine) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<14}{value}");
    };
    line("Container", machine.id.clone());
    if !machine.ended.is_empty() {
        line("Ended", plain(&machine.ended));
    } else if machine.pid == 0 {
        line("State", "no microVM runs, and none has died".into());
    } else {
        line("VMM", format!("pid {}{}", machine.pid, if machine.paused { ", vCPUs paused" } else { "" }));
        line("Entered guest", format!("{} us after its start", machine.entered_guest_us));
        let exits = machine.exits.iter().map(|exits| format!("{} {}", plain(&exits.reason), exits.count));
        line("Exits", exits.collect::<Vec<_>>().join(", "));
    }
    if !machine.devices.is_empty() {
        devices(&mut text, machine);
    }
    if !machine.recent.is_empty() {
        let _ = writeln!(text, "\nLATEST EVENTS");
        for event in &machine.recent {
            let _ = writeln!(text, "{:>12.6}  {}", event.at_us as f64 / 1e6, plain(&event.text));
        }
    }
    text
}

fn devices(text: &mut String, machine: &Machine) {
    let _ = writeln!(
        text,
        "\n{:<10}{:>8}{:>10}{:>12}{:>8}{:>22}{:>22}{:>20}",
        "DEVICE",
        "ACTIVE",
        "KICKS",
        "INTERRUPTS",
        "RESETS",
        "READ ops/bytes",
        "WRITTEN ops/bytes",
        "THROTTLED r/w"
    );
    for device in &machine.devices {
        let traffic = |traffic: &Traffic| format!("{}/{}", traffic.operations, traffic.bytes);
        let _ = writeln!(
            text,
            "{:<10}{:>8}{:>10}{:>12}{:>8}{:>22}{:>22}{:>20}",
            plain(&device.name),
            if device.active { "yes" } else { "no" },
            device.kicks,
            device.interrupts,
            device.resets,
            traffic(&device.read),
            traffic(&device.write),
            format!("{}/{}", device.read.throttled, device.write.throttled),
        );
    }
}

/// Text of a VMM, which a guest may have had its hand in, on one line.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '.' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use bulkhead_daemon::api::types::machine::{Device, Exits, Recorded};

    use super::*;

    #[test]
    fn a_running_machine_has_figures_and_events() {
        let machine = Machine {
            id: "c1".into(),
            pid: 7,
            exits: vec![Exits { reason: "mmio_write".into(), count: 3 }],
            devices: vec![Device {
                name: "block0".into(),
                write: Traffic { bytes: 4096, operations: 1, throttled: 2, throttled_us: 5 },
                ..Device::default()
            }],
            recent: vec![Recorded { at_us: 1_500_000, text: "block0: \u{1b}[2J".into() }],
            ..Machine::default()
        };
        let text = render(&machine);
        for expected in ["pid 7", "mmio_write 3", "1/4096", "0/2", "    1.500000  block0: .[2J"] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
    }

    #[test]
    fn a_dead_one_has_its_reason() {
        let machine = Machine { id: "c1".into(), ended: "the guest panicked".into(), ..Machine::default() };
        assert!(render(&machine).contains("Ended         the guest panicked"));
        assert!(render(&Machine::default()).contains("none has died"));
    }
}
