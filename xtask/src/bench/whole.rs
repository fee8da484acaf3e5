//! End-to-end tests at the size that they are about, which an emulated host takes too long for to be tested with at
//! each change: a GiB where a MiB shows a fault, hundreds of deaths where a few do; and docker-py's own. Each is a row,
//! its time; one that fails is an error.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use bulkhead_tests::size::WHOLE_VARIABLE;
use bulkhead_tests::suite::SuiteOwner;

use super::Bench;
use super::figures::{Figure, Samples, Unit};
use crate::bundle;
use crate::docker_py;
use crate::posix;
use crate::sh;
use crate::test::{self, Programs};

/// What is measured, and the test that does it.
const TESTS: [(&str, &str); 9] = [
    ("whole-transfer-containers", "transfer::what_is_sent_arrives_between_containers"),
    ("whole-transfer-host", "transfer::what_is_sent_arrives_between_host_and_container"),
    ("whole-starts-in-parallel", "daemon::many_that_come_and_go_at_once_leave_nothing"),
    ("whole-copy", "copy::many_files_and_a_large_one"),
    ("whole-pjdfstest", "posix::pjdfstest"),
    ("whole-fsx", "posix::fsx"),
    ("whole-sqlite", "sqlite::a_rollback_journal"),
    ("whole-locks", "locks::"),
    ("whole-deaths", "random_death::"),
];

const DOCKER_PY: &str = "whole-docker-py";

impl Bench<'_> {
    pub(super) fn whole(&self, figures: &mut Vec<Figure>) -> Result<()> {
        if self.wants(DOCKER_PY) {
            let start = Instant::now();
            docker_py::run(self.tree, self.bundle, &[])?;
            figures.push(row(DOCKER_PY, start)?);
        }
        self.whole_tests(figures)
    }

    fn whole_tests(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let wanted: Vec<_> = TESTS.into_iter().filter(|(name, _)| self.wants(name)).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        sh::run(test::test_command(self.tree, "whole").arg("--no-run"))?;
        let (hostile_guest, posix) = (bundle::build_hostile_guest(self.tree)?, posix::ensure()?);
        let programs = Programs { bundle: self.bundle, hostile_guest: &hostile_guest, posix: &posix };
        let suite = SuiteOwner::start(self.host, self.bundle.dir())?;
        let mut failed = Vec::new();
        for (name, tests) in wanted {
            let mut command = test::suite_command(self.tree, self.host, &suite, &programs, "whole")?;
            command.args(["--run-ignored", "all", tests]).env(WHOLE_VARIABLE, "1");
            let start = Instant::now();
            if let Err(error) = sh::run(&mut command) {
                failed.push(format!("{name}: {error:#}"));
                continue;
            }
            figures.push(row(name, start)?);
        }
        if !failed.is_empty() {
            let log = self.tree.target().join("bench/whole.log");
            std::fs::write(&log, suite.daemon_log().unwrap_or_default()).context("the daemon's log")?;
            bail!("{}\nthe daemon's log: {}", failed.join("\n"), log.display());
        }
        suite.finish()
    }
}

fn row(name: &str, start: Instant) -> Result<Figure> {
    let mut samples = Samples::default();
    samples.add_time(name, start.elapsed());
    Figure::alone(name, Unit::Milliseconds, &samples, name)
}
