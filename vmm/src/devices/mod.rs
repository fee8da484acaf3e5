//! What the guest sees on its bus.

pub mod virtio;
