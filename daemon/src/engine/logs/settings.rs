//! What `--log-driver` and `--log-opt` say, checked and resolved.

use std::collections::BTreeMap;

use regex::Regex;

use super::forward::{self, Target};
use crate::{
    engine::{Error, Result},
    units,
};

/// The log drivers there are.
pub const DRIVERS: [&str; 5] = ["json-file", "local", "none", "syslog", "journald"];

/// A log driver with its options.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// Whether lines are kept at all.
    pub(super) kept: bool,
    /// Bytes after which a new file is begun; None: never.
    pub(super) max_size: Option<u64>,
    /// How many files there are at most, the current one included.
    pub(super) max_files: usize,
    /// Whether files that are full are compressed.
    pub(super) compress: bool,
    /// What each record carries for `logs --details`.
    pub(super) attributes: BTreeMap<String, String>,
    /// Where lines go besides.
    pub(super) target: Option<Target>,
}

/// What is told of a container in its log.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its name, without a slash.
    pub name: &'a str,
    /// Its image as the user named it.
    pub image: &'a str,
    /// Its image's id, `sha256:…`.
    pub image_id: &'a str,
    /// Its labels.
    pub labels: &'a BTreeMap<String, String>,
    /// Its variables.
    pub env: &'a [String],
}

impl Settings {
    /// Of a container.
    ///
    /// # Errors
    /// Those of [`validate`], for options that were not validated.
    pub fn of(driver: &str, options: &BTreeMap<String, String>, subject: &Subject<'_>) -> Result<Self> {
        let mut settings = Self::parse(driver, options)?;
        settings.attributes = attributes(options, subject)?;
        settings.target = target(driver, options, subject, &settings.attributes)?;
        Ok(settings)
    }

    /// Whether old lines may go.
    pub fn rotates(&self) -> bool {
        self.max_size.is_some()
    }

    /// Whether lines are kept.
    pub fn keeps(&self) -> bool {
        self.kept
    }

    fn parse(driver: &str, options: &BTreeMap<String, String>) -> Result<Self> {
        const FILES: [&str; 3] = ["max-size", "max-file", "compress"];
        const ABOUT: [&str; 5] = ["labels", "labels-regex", "env", "env-regex", "tag"];
        let forwarded = forward::options_of(driver);
        let known = match (driver, forwarded) {
            ("json-file", _) => [&FILES[..], &ABOUT].concat(),
            ("local", _) => FILES.to_vec(),
            ("none", _) => Vec::new(),
            (_, Some(own)) => [own, &ABOUT].concat(),
            _ => return Err(Error::invalid(format!("logger: no log driver named '{driver}' is registered"))),
        };
        if let Some(name) = options.keys().find(|name| !known.contains(&name.as_str()) && *name != "mode") {
            return Err(Error::invalid(format!("unknown log opt '{name}' for {driver} log driver")));
        }
        match options.get("mode").map(String::as_str) {
            None | Some("" | "blocking") => {}
            Some("non-blocking") => {
                return Err(Error::invalid(
                    "log option mode=non-blocking is not supported: a guest's output is held back, never thrown away",
                ));
            }
            Some(mode) => return Err(Error::invalid(format!("logger: logging mode not supported: {mode}"))),
        }
        // What goes elsewhere is kept here only to be read again.
        let local = driver == "local" || forwarded.is_some();
        let max_size = match options.get("max-size").map(String::as_str) {
            None if local => Some(20 << 20),
            None | Some("-1") => None,
            Some(text) => Some(size(text).ok_or_else(|| Error::invalid(format!("invalid size: '{text}'")))?),
        };
        let max_files = match options.get("max-file") {
            None if local => 5,
            None => 1,
            Some(text) => {
                let count = text.parse::<i64>();
                let count =
                    count.map_err(|_| Error::invalid(format!("invalid value for max-file: {text}")))?;
                usize::try_from(count)
                    .ok()
                    .filter(|count| *count > 0)
                    .ok_or_else(|| Error::invalid("max-file cannot be less than 1"))?
            }
        };
        let compress = match options.get("compress").map(String::as_str) {
            None => local,
            Some("true" | "1" | "t" | "T" | "TRUE" | "True") => true,
            Some("false" | "0" | "f" | "F" | "FALSE" | "False") => false,
            Some(text) => return Err(Error::invalid(format!("invalid value for compress: {text}"))),
        };
        if compress && !local && (max_files < 2 || max_size.is_none()) {
            return Err(Error::invalid(
                "compress cannot be true when max-file is less than 2 or max-size is not set",
            ));
        }
        Ok(Self { kept: driver != "none", max_size, max_files, compress, ..Self::default() })
    }

    /// A driver without options, for tests.
    #[cfg(test)]
    pub(crate) fn plain(driver: &str) -> Self {
        Self::parse(driver, &BTreeMap::new()).unwrap()
    }
}

/// Whether a driver takes these options (`--log-opt`).
///
/// # Errors
/// Invalid: no such driver, or an option or value that it does not have.
pub fn validate(driver: &str, options: &BTreeMap<String, String>) -> Result<()> {
    Settings::parse(driver, options)?;
    let nobody = Subject { id: "", name: "", image: "", image_id: "", labels: &BTreeMap::new(), env: &[] };
    let attributes = attributes(options, &nobody)?;
    target(driver, options, &nobody, &attributes).map(drop)
}

fn target(
    driver: &str,
    options: &BTreeMap<String, String>,
    subject: &Subject<'_>,
    attributes: &BTreeMap<String, String>,
) -> Result<Option<Target>> {
    let template =
        options.get("tag").map(String::as_str).filter(|text| !text.is_empty()).unwrap_or("{{.ID}}");
    let mut attributes = attributes.clone();
    attributes.remove("tag");
    Target::of(driver, options, subject, tag(template, subject)?, &attributes)
}

/// More than nothing.
fn size(text: &str) -> Option<u64> {
    units::size(text).filter(|size| *size > 0)
}

fn attributes(options: &BTreeMap<String, String>, subject: &Subject<'_>) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    let list = |name: &str| options.get(name).map(String::as_str).unwrap_or_default().split(',');
    let pattern = |name: &str| match options.get(name).filter(|text| !text.is_empty()) {
        None => Ok(None),
        Some(text) => {
            Regex::new(text).map(Some).map_err(|error| Error::invalid(format!("invalid {name}: {error}")))
        }
    };
    let env: BTreeMap<&str, &str> = subject.env.iter().filter_map(|pair| pair.split_once('=')).collect();
    let labels = subject.labels.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    for (exact, regex, have) in [("labels", "labels-regex", labels.collect()), ("env", "env-regex", env)] {
        let have: BTreeMap<&str, &str> = have;
        let regex = pattern(regex)?;
        let wanted = have.iter().filter(|(name, _)| {
            list(exact).any(|wanted| wanted == **name)
                || regex.as_ref().is_some_and(|regex| regex.is_match(name))
        });
        found.extend(wanted.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    }
    if let Some(template) = options.get("tag").filter(|template| !template.is_empty()) {
        found.insert("tag".into(), tag(template, subject)?);
    }
    Ok(found)
}

/// A tag's template: the fields that Docker documents, and text between them.
fn tag(template: &str, subject: &Subject<'_>) -> Result<String> {
    let short = |id: &str| id.trim_start_matches("sha256:").chars().take(12).collect::<String>();
    let mut text = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{{") {
        text.push_str(before);
        let wrong =
            || Error::invalid(format!("invalid log tag: {template:?}: only fields can be named in it"));
        let (field, after) = after.split_once("}}").ok_or_else(wrong)?;
        match field.trim() {
            ".ID" => text.push_str(&short(subject.id)),
            ".FullID" => text.push_str(subject.id),
            ".Name" => text.push_str(subject.name),
            ".ImageID" => text.push_str(&short(subject.image_id)),
            ".ImageFullID" => text.push_str(subject.image_id),
            ".ImageName" => text.push_str(subject.image),
            ".DaemonName" => text.push_str("docker"),
            _ => return Err(wrong()),
        }
        rest = after;
    }
    text.push_str(rest);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn options_are_checked() {
        for (driver, pairs) in [
            ("json-file", &[][..]),
            ("json-file", &[("mode", "blocking")]),
            ("json-file", &[("max-size", "10m"), ("max-file", "3"), ("compress", "true")]),
            ("json-file", &[("labels", "a,b"), ("env-regex", "^X_"), ("tag", "{{.Name}}/{{ .ID }}")]),
            ("local", &[("max-size", "1k")]),
        ] {
            validate(driver, &options(pairs)).unwrap();
        }
        for (driver, name, value, message) in [
            ("gelf", "tag", "x", "logger: no log driver named 'gelf' is registered"),
            ("syslog", "max-size", "1m", "unknown log opt 'max-size' for syslog log driver"),
            ("json-file", "max-size", "x", "invalid size: 'x'"),
            ("json-file", "max-size", "0", "invalid size: '0'"),
            ("json-file", "max-file", "0", "max-file cannot be less than 1"),
            ("json-file", "nosuch", "1", "unknown log opt 'nosuch' for json-file log driver"),
            ("local", "tag", "1", "unknown log opt 'tag' for local log driver"),
            ("none", "tag", "1", "unknown log opt 'tag' for none log driver"),
            ("json-file", "mode", "odd", "logger: logging mode not supported: odd"),
            (
                "json-file",
                "compress",
                "true",
                "compress cannot be true when max-file is less than 2 or max-size is not set",
            ),
        ] {
            assert_eq!(validate(driver, &options(&[(name, value)])).unwrap_err().message, message);
        }
        for template in ["{{.Odd}}", "{{.ID", "{{if .ID}}"] {
            assert!(validate("json-file", &options(&[("tag", template)])).is_err(), "{template}");
        }
        assert!(validate("json-file", &options(&[("env-regex", "(")])).is_err());
    }

    #[test]
    fn the_local_driver_rotates_by_itself() {
        let local = Settings::plain("local");
        assert_eq!((local.max_size, local.max_files, local.compress), (Some(20 << 20), 5, true));
        let json = Settings::plain("json-file");
        assert_eq!((json.max_size, json.max_files, json.compress), (None, 1, false));
    }

    #[test]
    fn attributes_are_chosen_by_name_and_by_expression() {
        let labels = options(&[("a", "1"), ("b", "2"), ("team.x", "3")]);
        let env = ["HOME=/".to_owned(), "X_Y=z=1".to_owned(), "BARE".to_owned()];
        let id = "0123456789abcdef";
        let subject = Subject {
            id,
            name: "web",
            image: "nginx",
            image_id: "sha256:fedcba98765432",
            labels: &labels,
            env: &env,
        };
        let chosen = options(&[
            ("labels", "a,nosuch"),
            ("labels-regex", r"^team\."),
            ("env-regex", "^X_"),
            ("tag", "{{.ImageName}}-{{.Name}}-{{.ID}}-{{.ImageID}}"),
        ]);
        let settings = Settings::of("json-file", &chosen, &subject).unwrap();
        let expected = options(&[
            ("X_Y", "z=1"),
            ("a", "1"),
            ("tag", "nginx-web-0123456789ab-fedcba987654"),
            ("team.x", "3"),
        ]);
        assert_eq!(settings.attributes, expected);
    }
}
