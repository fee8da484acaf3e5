//! `bulkheadd check`: what this machine can do, and the remedy for each thing missing.

mod cpu;
mod host;
pub mod kvm;

use std::{
    fmt::Write,
    sync::atomic::{AtomicBool, Ordering},
};

pub use cpu::guest_cpu;
use serde::Serialize;

use crate::{
    config::Config,
    engine::{Error, Result},
};

/// How one thing stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Containers run, with less than there could be.
    Warning,
    /// Containers do not run.
    Failed,
}

/// What was found out about one thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at: stable, in kebab case.
    pub name: &'static str,
    /// How it stands.
    pub status: Status,
    /// What was seen.
    pub detail: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, detail: detail.into(), remedy: None }
    }

    fn warning(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, status: Status::Warning, detail: detail.into(), remedy: Some(remedy.into()) }
    }

    fn failed(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, status: Status::Failed, detail: detail.into(), remedy: Some(remedy.into()) }
    }
}

/// All findings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether containers can run here.
    pub usable: bool,
    /// One each.
    pub findings: Vec<Finding>,
}

/// Looks at KVM alone, or at everything that `config` needs.
pub fn run(config: &Config, kvm_only: bool) -> Report {
    let mut findings = vec![kvm::finding(&kvm::probe())];
    if !kvm_only {
        findings.extend(host::findings(config));
    }
    let usable = findings.iter().all(|finding| finding.status != Status::Failed);
    Report { usable, findings }
}

impl Report {
    /// For people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for finding in &self.findings {
            let mark = match finding.status {
                Status::Ok => "ok     ",
                Status::Warning => "warning",
                Status::Failed => "FAILED ",
            };
            let _ = writeln!(text, "{mark}  {:<12} {}", finding.name, finding.detail);
            if let Some(remedy) = &finding.remedy {
                let _ = writeln!(text, "                      → {remedy}");
            }
        }
        let verdict = if self.usable { "Containers can run here." } else { "Containers cannot run here." };
        let _ = writeln!(text, "{verdict}");
        text
    }
}

/// Whether this machine runs guests. Takes a fraction of a second until it once does, nothing afterwards.
///
/// # Errors
/// Unavailable: what is missing, and its remedy.
pub fn can_run_guests() -> Result<()> {
    static IT_DOES: AtomicBool = AtomicBool::new(false);
    if IT_DOES.load(Ordering::Relaxed) {
        return Ok(());
    }
    let finding = kvm::finding(&kvm::probe());
    if finding.status == Status::Failed {
        let remedy = finding.remedy.unwrap_or_default();
        return Err(Error::unavailable(format!(
            "KVM is not usable on this machine: {}. {remedy}",
            finding.detail
        )));
    }
    IT_DOES.store(true, Ordering::Relaxed);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_names_the_remedy() {
        let findings = vec![
            Finding::ok("cgroup", "version 2"),
            Finding::warning("space", "1 GiB free", "Make room."),
            Finding::failed("kernel", "there is no /k", "Install it."),
        ];
        let report = Report { usable: false, findings };
        insta::assert_snapshot!(report.text());
        insta::assert_json_snapshot!(report);
    }
}
