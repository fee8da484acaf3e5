//! x86-64: its own interface and that of i386 programs. The tables are those of Linux 6.12.

use oci_spec::runtime::Arch;

use super::Abi;

/// The native interface first.
pub const ABIS: [Abi; 2] = [
    Abi { audit: 0xc000_003e, oci: Arch::ScmpArchX86_64, table: include_str!("syscalls_64.txt") },
    Abi { audit: 0x4000_0003, oci: Arch::ScmpArchX86, table: include_str!("syscalls_32.txt") },
];

/// From this number on calls belong to the x32 interface, which the guest kernel does not have.
pub const FIRST_FOREIGN: u32 = 0x4000_0000;
