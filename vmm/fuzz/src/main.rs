//! A target in libFuzzer: `FUZZ_TARGET=name fuzz [libFuzzer's arguments]`.

#![no_main]

use std::sync::OnceLock;

use bulkhead_vmm::fuzzing::Target;
use libfuzzer_sys::fuzz_target;

fn target() -> Target {
    static TARGET: OnceLock<Target> = OnceLock::new();
    *TARGET.get_or_init(|| {
        let wanted = std::env::var("FUZZ_TARGET").unwrap_or_default();
        match bulkhead_fuzz::targets().find(|(name, _)| *name == wanted) {
            Some((_, target)) => target,
            None => {
                eprintln!("FUZZ_TARGET={wanted:?} is no target");
                std::process::exit(2)
            }
        }
    })
}

fuzz_target!(|bytes: &[u8]| target()(bytes));
