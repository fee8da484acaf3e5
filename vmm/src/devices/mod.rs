//! What the guest sees on its bus.

pub mod i8042;
pub mod serial;
pub mod virtio;
