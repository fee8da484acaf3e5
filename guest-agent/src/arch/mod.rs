//! What depends on the processor's architecture.

#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::{ABIS, FIRST_FOREIGN};

/// A system call interface that the kernel offers on this machine.
#[derive(Debug, Clone, Copy)]
pub struct Abi {
    /// `AUDIT_ARCH_*`, what a seccomp filter sees.
    pub audit: u32,
    /// The name in an OCI spec.
    pub oci: oci_spec::runtime::Arch,
    /// A line `name number` for each call.
    table: &'static str,
}

impl Abi {
    /// All calls of this interface, by name.
    pub fn calls(&self) -> std::collections::HashMap<&'static str, u32> {
        let parse = |line: &'static str| {
            let (name, number) = line.split_once(' ')?;
            Some((name, number.parse().ok()?))
        };
        self.table.lines().filter_map(parse).collect()
    }
}
