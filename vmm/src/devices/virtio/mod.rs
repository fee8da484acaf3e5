//! virtio 1.3 devices. A device knows no transport: it implements [`device::VirtioDevice`], and the MMIO
//! transport, its worker thread and the tests drive it through that trait alone.

pub mod device;
pub mod mmio;
pub mod queue;
pub mod worker;

#[cfg(test)]
#[allow(dead_code)]
pub(crate) mod testing;
