//! `bulkhead-vmm`: one microVM.

fn main() {}
