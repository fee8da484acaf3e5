//! Fuzzing by hand: one target of `vmm/fuzz`, instrumented, in libFuzzer.
//!
//! The stable compiler does for it: the instrumentation is a pass of LLVM's, libFuzzer a crate that builds LLVM's own
//! sources. Only a sanitizer needs a nightly compiler.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::bundle::cargo;
use crate::sh;
use crate::tree::Tree;

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Counters at edges, a table of their places, and comparisons, which tell the fuzzer what it lacks.
const INSTRUMENTED: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions -Coverflow-checks -Ccodegen-units=1";

#[derive(Args)]
pub(crate) struct FuzzArgs {
    /// The target; without one, their names are printed.
    target: Option<String>,
    /// Stop after this time. Default: when an input fails, or by hand.
    #[arg(long, value_name = "N")]
    seconds: Option<u32>,
    /// With LLVM's address sanitizer. Needs a nightly compiler (`rustup toolchain install nightly`).
    #[arg(long)]
    asan: bool,
    /// Afterwards put what reaches anything new into the stored corpus.
    #[arg(long)]
    store: bool,
    /// More arguments for libFuzzer.
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

pub(crate) fn run(tree: &Tree, args: &FuzzArgs) -> Result<()> {
    let stored = tree.root().join("vmm/fuzz/corpus");
    let Some(target) = &args.target else {
        let mut names: Vec<String> = fs::read_dir(&stored)?
            .map(|entry| Ok(entry?.file_name().display().to_string()))
            .collect::<Result<_>>()?;
        names.sort();
        println!("{}", names.join("\n"));
        return Ok(());
    };
    if !target.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_') {
        bail!("{target:?} is no target");
    }
    let program = build(tree, args.asan)?;
    let stored = stored.join(target);
    let grown = tree.target().join("fuzz/corpus").join(target);
    let failures = tree.target().join("fuzz/failures").join(target);
    for dir in [&stored, &grown, &failures] {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    }
    let fuzzer = |arguments: &[&Path]| {
        let mut fuzzer = Command::new(&program);
        fuzzer.env("FUZZ_TARGET", target).arg(format!("-artifact_prefix={}/", failures.display()));
        fuzzer.args(arguments);
        fuzzer
    };
    // What is found is put into the first directory.
    let mut fuzzing = fuzzer(&[&grown, &stored]);
    fuzzing.args(["-max_len=4096", "-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=1"]);
    if let Some(seconds) = args.seconds {
        fuzzing.arg(format!("-max_total_time={seconds}"));
    }
    sh::run(fuzzing.args(&args.arguments))
        .with_context(|| format!("a failing input lies in {}", failures.display()))?;
    if args.store {
        sh::run(fuzzer(&[&stored, &grown]).args(["-merge=1", "-max_len=1024"]))?;
    }
    Ok(())
}

fn build(tree: &Tree, asan: bool) -> Result<PathBuf> {
    let dir = tree.target().join(if asan { "fuzz-asan" } else { "fuzz" });
    let mut build = cargo(tree);
    let mut flags = INSTRUMENTED.to_owned();
    if asan {
        build = Command::new("cargo");
        build.arg("+nightly").current_dir(tree.root());
        build.env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO").env_remove("RUSTC");
        flags.push_str(" -Zsanitizer=address");
    }
    // A target is named so that build scripts and macros are not instrumented.
    build.env("CARGO_TARGET_DIR", &dir).env("RUSTFLAGS", flags);
    build.args(["build", "--release", "--target", TARGET, "-p", "bulkhead-fuzz", "--features", "libfuzzer"]);
    sh::run(build.args(["--bin", "fuzz"]))?;
    Ok(dir.join(TARGET).join("release/fuzz"))
}
