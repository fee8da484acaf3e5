//! The docker CLI's reference, command by command, as a person would type it: what comes out, and the exit code.
//!
//! ```text
//!  ## title                     a case: its containers are $A and $B, removed at its end
//!  $ docker run … $A            a line for the shell; what it prints must be the lines below it
//!  a line of stdout             [..] stands for anything
//!  ! a line of stderr           compared when any are given
//!  ? 125                        the exit code, 0 without it
//!  ~ a line of stderr           in the words of Debian's dockerd (20.10), when that one is asked
//!  ~? 0                         its exit code
//!  ~- why                       it is not asked at all
//! ```
//!
//! The expectations are Docker's: `BULKHEAD_TABLE_DOCKER=unix:///var/run/docker.sock` has the same tables checked
//! against a dockerd (`cargo xtask test table` starts one).

use std::fmt::Write;
use std::process::Command;

use anyhow::{Context, bail};
use bulkhead_tests::{Docker, Suite};

use crate::Test;

/// Names a daemon that is to be asked instead of ours.
const VARIABLE: &str = "BULKHEAD_TABLE_DOCKER";

#[test]
fn containers() -> Test {
    run("containers", include_str!("table/containers.table"))
}

#[test]
fn processes() -> Test {
    run("processes", include_str!("table/processes.table"))
}

#[test]
fn images() -> Test {
    run("images", include_str!("table/images.table"))
}

#[test]
fn daily() -> Test {
    run("daily", include_str!("table/daily.table"))
}

#[test]
fn system() -> Test {
    run("system", include_str!("table/system.table"))
}

fn docker() -> anyhow::Result<Docker> {
    match std::env::var(VARIABLE) {
        Ok(host) => Ok(Docker::new(host.strip_prefix("unix://").context("unix://PATH is expected")?)),
        Err(_) => Ok(Suite::from_env()?.docker()),
    }
}

/// A line for the shell, and what is expected of it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Step {
    line: usize,
    command: String,
    stdout: Vec<String>,
    stderr: Vec<String>,
    code: i32,
    old_stderr: Vec<String>,
    old_code: Option<i32>,
    not_old: bool,
}

impl Step {
    /// What Debian's dockerd (20.10) says in other words.
    fn of_old(mut self) -> Self {
        self.code = self.old_code.unwrap_or(self.code);
        if !self.old_stderr.is_empty() {
            self.stderr = std::mem::take(&mut self.old_stderr);
        }
        self
    }
}

/// Steps under a title.
#[derive(Debug, Default, PartialEq, Eq)]
struct Case {
    title: String,
    steps: Vec<Step>,
}

fn parse(text: &str) -> anyhow::Result<Vec<Case>> {
    let mut cases: Vec<Case> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if let Some(title) = line.strip_prefix("## ") {
            cases.push(Case { title: title.to_owned(), ..Case::default() });
            continue;
        }
        let Some(case) = cases.last_mut() else {
            if line.is_empty() || line.starts_with('#') {
                continue;
            } else {
                bail!("line {}: no case", index + 1)
            }
        };
        if let Some(command) = line.strip_prefix("$ ") {
            case.steps.push(Step { line: index + 1, command: command.to_owned(), ..Step::default() });
            continue;
        }
        if line.is_empty() {
            continue;
        }
        let step = case.steps.last_mut().with_context(|| format!("line {}: no command", index + 1))?;
        if line.starts_with("~- ") {
            step.not_old = true;
        } else if let Some(code) = line.strip_prefix("~? ") {
            step.old_code = Some(code.parse()?);
        } else if let Some(text) = line.strip_prefix("~ ") {
            step.old_stderr.push(text.to_owned());
        } else if let Some(code) = line.strip_prefix("? ") {
            step.code = code.parse()?;
        } else if let Some(text) = line.strip_prefix("! ") {
            step.stderr.push(text.to_owned());
        } else {
            step.stdout.push(line.to_owned());
        }
    }
    Ok(cases)
}

/// Whether a line is as expected, where `[..]` stands for anything.
fn matches(expected: &str, line: &str) -> bool {
    let mut parts = expected.split("[..]");
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = line.strip_prefix(first) else { return false };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else { return rest.is_empty() };
    for part in middle {
        match rest.find(part) {
            Some(at) => rest = rest.get(at + part.len()..).unwrap_or_default(),
            None => return false,
        }
    }
    rest.ends_with(last)
}

fn all_match(expected: &[String], text: &str) -> bool {
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    lines.len() == expected.len()
        && expected.iter().zip(lines).all(|(expected, line)| matches(expected, line))
}

fn run(table: &str, text: &str) -> Test {
    let docker = docker()?;
    let mut wrong = String::new();
    let mut count = 0;
    for case in parse(text)? {
        let (a, b) = (docker.container(), docker.container());
        let directory = tempfile::tempdir()?;
        for step in case.steps {
            let step = match std::env::var_os(VARIABLE) {
                Some(_) if step.not_old => continue,
                Some(_) => step.of_old(),
                None => step,
            };
            let mut shell = Command::new("sh");
            // With everything that the CLI's own environment is.
            for (name, value) in docker.command(&[]).get_envs() {
                match value {
                    Some(value) => shell.env(name, value),
                    None => shell.env_remove(name),
                };
            }
            shell.args(["-c", &step.command]).env("A", a.name()).env("B", b.name());
            let output = shell.current_dir(directory.path()).stdin(std::process::Stdio::null()).output()?;
            let (stdout, stderr) =
                (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            let named = |lines: &[String]| -> Vec<String> {
                lines.iter().map(|line| line.replace("$A", a.name()).replace("$B", b.name())).collect()
            };
            let code = output.status.code().unwrap_or(-1);
            let (expected_out, expected_err) = (named(&step.stdout), named(&step.stderr));
            let as_expected = code == step.code
                && all_match(&expected_out, &stdout)
                && (expected_err.is_empty() || all_match(&expected_err, &stderr));
            count += 1;
            if !as_expected {
                write!(
                    wrong,
                    "\n{table}.table:{}: {}\n$ {}\nexpected {} {expected_out:?} {expected_err:?}\ngot {code}\n{stdout}{stderr}",
                    step.line, case.title, step.command, step.code
                )?;
            }
        }
    }
    assert!(count > 0 && wrong.is_empty(), "{wrong}");
    Ok(())
}

#[test]
fn the_table_is_read_as_it_is_described() -> Test {
    let text = "# words\n\n## one\n$ docker x \"$A\"\nout $A\n! err\n? 3\n~ error\n~? 4\n\n$ true\n";
    let cases = parse(text)?;
    assert_eq!((cases.len(), cases[0].title.as_str(), cases[0].steps.len()), (1, "one", 2));
    let step = &cases[0].steps[0];
    assert_eq!((step.line, step.code, step.command.as_str()), (4, 3, "docker x \"$A\""));
    assert_eq!(
        (step.stdout.as_slice(), step.stderr.as_slice()),
        (&["out $A".to_owned()][..], &["err".to_owned()][..])
    );
    let old = parse(text)?.remove(0).steps.remove(0).of_old();
    assert_eq!((old.stderr.as_slice(), old.code), (&["error".to_owned()][..], 4));
    for (expected, line, is) in [
        ("abc", "abc", true),
        ("abc", "abcd", false),
        ("a[..]c", "abbbc", true),
        ("a[..]c", "ac", true),
        ("a[..]c[..]", "xac", false),
        ("[..]b[..]d", "abcd", true),
        ("[..]b[..]d", "adcb", false),
    ] {
        assert_eq!(matches(expected, line), is, "{expected} {line}");
    }
    assert!(parse("$ x").is_err() && parse("## a\nx").is_err());
    Ok(())
}
