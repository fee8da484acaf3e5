//! `bulkhead-vmm`: one microVM. See [`bulkhead_vmm::process`].

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_vmm::process::main()
}
