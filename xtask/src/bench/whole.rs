//! End-to-end tests at the size that they are about, which an emulated host takes too long for to be tested with at
//! each change: a GiB where a MiB shows a fault, hundreds of deaths where a few do. Each is a row, its time; one that
//! fails is an error.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use bulkhead_tests::size::WHOLE_VARIABLE;
use bulkhead_tests::suite::SuiteOwner;

use super::Bench;
use super::figures::{Figure, Samples, Unit};
use crate::bundle;
use crate::posix;
use crate::sh;
use crate::test::{self, Programs};

/// What is measured, and the test that does it.
const TESTS: [(&str, &str); 8] = [
    ("whole-transfer-containers", "transfer::what_is_sent_arrives_between_containers"),
    ("whole-transfer-host", "transfer::what_is_sent_arrives_between_host_and_container"),
    ("whole-starts-in-parallel", "daemon::many_that_come_and_go_at_once_leave_nothing"),
    ("whole-copy", "copy::many_files_and_a_large_one"),
    ("whole-pjdfstest", "posix::pjdfstest"),
    ("whole-fsx", "posix::fsx"),
    ("whole-sqlite", "sqlite::a_rollback_journal"),
    ("whole-deaths", "random_death::"),
];

impl Bench<'_> {
    pub(super) fn whole(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let wanted: Vec<_> = TESTS.into_iter().filter(|(name, _)| self.wants(name)).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        sh::run(test::test_command(self.tree, "whole").arg("--no-run"))?;
        let (hostile_guest, posix) = (bundle::build_hostile_guest(self.tree)?, posix::ensure()?);
        let programs = Programs { bundle: self.bundle, hostile_guest: &hostile_guest, posix: &posix };
        let suite = SuiteOwner::start(self.host, self.bundle.dir())?;
        let (mut samples, mut failed) = (Samples::default(), Vec::new());
        for (name, tests) in wanted {
            let mut command = test::suite_command(self.tree, self.host, &suite, &programs, "whole")?;
            command.args(["--run-ignored", "all", tests]).env(WHOLE_VARIABLE, "1");
            let start = Instant::now();
            if let Err(error) = sh::run(&mut command) {
                failed.push(format!("{name}: {error:#}"));
                continue;
            }
            samples.add_time(name, start.elapsed());
            figures.push(Figure::alone(name, Unit::Milliseconds, &samples, name)?);
        }
        if !failed.is_empty() {
            let log = self.tree.target().join("bench/whole.log");
            std::fs::write(&log, suite.daemon_log().unwrap_or_default()).context("the daemon's log")?;
            bail!("{}\nthe daemon's log: {}", failed.join("\n"), log.display());
        }
        suite.finish()
    }
}
