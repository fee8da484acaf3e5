//! Every target on its stored corpus, then on random changes of it for a bounded time: what `make test` does. A test
//! for each, so that one that fails has a name.
//!
//! `BULKHEAD_FUZZ_SECONDS` sets the time of each (2 by default), `BULKHEAD_FUZZ_SEED` where random changes begin. An
//! input that fails is written to the target directory and named.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_fuzz::mutate::{Random, mutated};

const LONGEST: usize = 4096;

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn stored(name: &str) -> Vec<Vec<u8>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(bulkhead_fuzz::corpora().join(name))
        .map(|entries| entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
        .unwrap_or_default();
    paths.sort();
    paths.iter().map(|path| fs::read(path).expect("a stored input")).collect()
}

fn bounded(name: &str) {
    let (_, target) = bulkhead_fuzz::targets().find(|(other, _)| *other == name).expect("a target");
    let run = |input: &[u8]| {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(input))) {
            let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.failed"));
            fs::write(&path, input).expect("the failed input is kept");
            eprintln!("{name} fails on {}", path.display());
            resume_unwind(panic);
        }
    };
    let corpus = stored(name);
    assert!(!corpus.is_empty(), "no stored corpus of {name}");
    corpus.iter().for_each(|input| run(input));
    let mut random = Random::new(number("BULKHEAD_FUZZ_SEED", 1));
    let until = Instant::now() + Duration::from_secs(number("BULKHEAD_FUZZ_SECONDS", 2));
    let mut runs = 0;
    while Instant::now() < until {
        run(&mutated(&corpus, &mut random, LONGEST));
        runs += 1;
    }
    println!("{name}: {} stored inputs, {runs} changes", corpus.len());
}

macro_rules! bounded {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                bounded(stringify!($name));
            }
        )*

        #[test]
        fn every_target_is_run() {
            let tested = [$(stringify!($name)),*];
            let missing: Vec<_> = bulkhead_fuzz::targets().filter(|(name, _)| !tested.contains(name)).collect();
            assert!(missing.is_empty(), "{missing:?}");
        }
    };
}

bounded!(
    agent_frames api_auth api_create api_filters api_reference api_route balloon block config control device_state fs fuse layer machine_state mem mmio net packets ports rng shares vsock
);
