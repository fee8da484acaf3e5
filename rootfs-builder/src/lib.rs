//! Layers, writable disks and the initramfs: a library for the daemon, a binary for builds.

pub mod disk;
pub mod initramfs;
pub mod layers;
