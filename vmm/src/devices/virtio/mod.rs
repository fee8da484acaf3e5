//! virtio 1.3 devices. A device knows no transport: it implements [`device::VirtioDevice`], and the MMIO
//! transport, its worker thread and the tests drive it through that trait alone.

pub mod balloon;
pub mod block;
pub mod common;
pub mod device;
pub mod fs;
pub mod iovec;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod release;
pub mod rng;
pub mod vsock;
pub mod worker;

#[cfg(test)]
mod hostile;
#[cfg(any(test, feature = "fuzzing"))]
#[allow(dead_code)]
pub(crate) mod testing;
