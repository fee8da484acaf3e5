//! Saved states.

use std::{
    fs::File,
    io::{Seek, Write},
    sync::{Arc, Mutex},
};

use sha2::{Digest, Sha256};

use super::{devices, input::Input, transport};
use crate::{
    devices::virtio::{
        device::VirtioDevice,
        testing::{Bench, memory},
    },
    machine::snapshot::{SavedState, format},
};

/// A device's state, taken or refused; then the device is used.
pub(super) fn device(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    match input.byte() % 5 {
        0 => restore(&mut input, devices::new_block()),
        1 => restore(&mut input, devices::new_fs()),
        2 => restore(&mut input, devices::new_net().0),
        3 => restore(&mut input, devices::new_rng()),
        _ => restore(&mut input, devices::new_vsock().0),
    }
}

fn restore<D: VirtioDevice>(input: &mut Input<'_>, device: D) {
    let mut bench = Bench::new(device);
    let resources = bench.resources();
    if bench.device.restore(input.rest(), resources).is_err() {
        return;
    }
    for queue in 0..bench.device.queue_max_sizes().len() {
        // The rings may hold anything: zeroes, here.
        let _ = bench.kick(queue);
    }
    for source in 0..bench.device.event_sources().len() {
        let _ = bench.device.source_event(source);
    }
    let saved = bench.device.save().expect("saved");
    let resources = bench.resources();
    bench.device.reset();
    bench.device.restore(&saved, resources).expect("what was saved is taken");
}

/// A state file whose header and checksum are right, then what its devices are made of.
pub(super) fn machine(bytes: &[u8]) {
    let mut head = Vec::new();
    head.extend(b"BLKHSNAP");
    head.extend(format::VERSION.to_le_bytes());
    head.extend(62u32.to_le_bytes());
    head.extend((bytes.len() as u64).to_le_bytes());
    let digest = Sha256::new().chain_update(&head).chain_update(bytes).finalize();
    let fd = rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC).expect("a memory file");
    let mut file = File::from(fd);
    for part in [&head[..], &digest, bytes] {
        file.write_all(part).expect("written");
    }
    file.rewind().expect("rewound");
    let Ok(state) = SavedState::read(&file) else { return };
    let memory = memory();
    for saved in state.devices.iter().take(8) {
        let made: [Arc<Mutex<dyn VirtioDevice>>; 3] = [
            Arc::new(Mutex::new(devices::new_block())),
            Arc::new(Mutex::new(devices::new_fs())),
            Arc::new(Mutex::new(devices::new_rng())),
        ];
        for device in made {
            let mut transport = transport::transport(device, &memory);
            if transport.restore(&saved.transport).is_ok() {
                transport::work(&mut transport);
                transport.save().expect("saved");
            }
        }
    }
}
