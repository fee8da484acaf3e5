//! Slots for devices that come while the machine runs.
//!
//! ```text
//!   slot (virtio-mmio window) ──bind──▶ device of a driver ──unbind──▶ slot
//!       device id 0 while empty
//! ```
//!
//! The kernel looks into every slot once, when it boots; one that was empty then is looked into again by
//! binding it by hand. Disks and file shares keep their drivers from then on, attached or not.

use std::{fs, io, path::Path};

const DEVICES: &str = "/sys/bus/platform/devices";
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";

/// Looks into every slot without a driver: those that hold a device by now get one.
pub fn look_into() {
    let Ok(devices) = fs::read_dir(DEVICES) else { return };
    for device in devices.flatten() {
        let name = device.file_name();
        if name.to_str().is_some_and(is_slot) && !device.path().join("driver").exists() {
            // The error is that the slot is still empty.
            let _ = fs::write(Path::new(DRIVER).join("bind"), name.as_encoded_bytes());
        }
    }
}

/// Takes its driver from the device in a slot.
///
/// # Errors
/// Of the write: there is no such slot, or no driver.
pub fn let_go(slot: &str) -> io::Result<()> {
    fs::write(Path::new(DRIVER).join("unbind"), slot)
}

/// Whether a platform device of that name is a slot.
pub fn is_slot(name: &str) -> bool {
    name.starts_with("virtio-mmio")
}
