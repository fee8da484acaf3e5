//! Chains of descriptors that break the rules: each is completed or dropped, and the next, sound one is served.

use super::request_queue;
use crate::{
    memory::INDIRECT,
    virtio::{Desc, Driver, Kind, Machine, buffer},
};

const TABLE: u32 = 16;

/// A malformed chain: entries of the queue's own table, and of an indirect one.
struct Malformed {
    name: &'static str,
    table: [Desc; 3],
    indirect: [Desc; 3],
}

fn list(end: u64) -> [Malformed; 19] {
    const NONE: Desc = Desc::readable(0, 0);
    let (a, b) = (buffer(20), buffer(21));
    let out = Desc::readable(a, 64);
    let one = |name, first: Desc| Malformed { name, table: [first, NONE, NONE], indirect: [NONE; 3] };
    let two = |name, first: Desc, second: Desc| Malformed {
        name,
        table: [first.then(1), second, NONE],
        indirect: [NONE; 3],
    };
    let table = |name, entries: u32, indirect| Malformed {
        name,
        table: [Desc::indirect(INDIRECT, entries * TABLE), NONE, NONE],
        indirect,
    };
    [
        one("a loop of one", out.then(0)),
        two("a loop of two", out, Desc::writable(b, 64).then(0)),
        one("a next outside the table", out.then(0xffff)),
        two("a buffer behind memory", out, Desc::writable(end, 64)),
        two("a buffer across memory's end", out, Desc::writable(end - 8, 64)),
        two("a buffer at the end of everything", Desc::readable(u64::MAX - 7, 64), Desc::writable(b, 64)),
        two("a buffer in the device's registers", out, Desc::writable(0xd000_0000, 64)),
        two("readable behind writable", Desc::writable(b, 64), out),
        Malformed {
            name: "more than 4 GiB",
            table: [
                Desc::readable(0, u32::MAX).then(1),
                Desc::readable(0, u32::MAX).then(2),
                Desc::writable(b, 1),
            ],
            indirect: [NONE; 3],
        },
        two("zero lengths", Desc::readable(a, 0), Desc::writable(b, 0)),
        one("unknown flags", Desc { flags: 0xfff8, ..out }),
        one("an indirect table outside memory", Desc::indirect(1 << 40, TABLE)),
        one("an indirect table at the end of everything", Desc::indirect(u64::MAX - 15, TABLE)),
        table("an empty indirect table", 0, [NONE; 3]),
        one("half a descriptor", Desc::indirect(INDIRECT, 24)),
        table("a nested indirect table", 2, [out.then(1), Desc::indirect(INDIRECT, 2 * TABLE), NONE]),
        table("a loop in an indirect table", 1, [out.then(0), NONE, NONE]),
        one("a table as long as can be", Desc::indirect(INDIRECT, !15)),
        Malformed {
            name: "an indirect table that goes on",
            table: [Desc::indirect(INDIRECT, TABLE).then(1), out, NONE],
            indirect: [out, NONE, NONE],
        },
    ]
}

fn sound(driver: &mut Driver) {
    match driver.device.kind {
        Kind::Block => super::block::works(driver),
        Kind::Fs => super::fs::works(driver),
        Kind::Vsock => super::vsock::works(driver),
        Kind::Net => super::net::works(driver),
        Kind::Rng => super::rng::works(driver),
        _ => {}
    }
}

/// Every malformed chain, on every device's request queue.
pub(super) fn malformed(machine: &Machine, _: u64) {
    for device in machine.devices() {
        let mut driver = device.up();
        let queue = request_queue(device.kind);
        for malformed in list(machine.memory_end) {
            for (index, desc) in (0..).zip(malformed.indirect) {
                desc.put(INDIRECT, index);
            }
            let written = driver.request(queue, &malformed.table);
            // Where a chain is sound after all but for its flags, a device may have done what it asks for.
            assert!(written <= 64, "{:?}: {written} bytes for {}", device.kind, malformed.name);
            sound(&mut driver);
        }
        // A table of thousands, each entry leading to the next.
        for index in 0..8192 {
            Desc::readable(buffer(20), 1).then(index as u16 + 1).put(INDIRECT, index);
        }
        let written = driver.request(queue, &[Desc::indirect(INDIRECT, 8192 * TABLE)]);
        assert!(written == 0, "{:?}: {written} bytes for a table of thousands", device.kind);
        sound(&mut driver);
    }
}
