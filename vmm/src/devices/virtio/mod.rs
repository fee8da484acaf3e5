//! virtio 1.3 devices. A device knows no transport: it implements [`device::VirtioDevice`], and the MMIO
//! transport, its worker thread and the tests drive it through that trait alone.

pub mod device;
