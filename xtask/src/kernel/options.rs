//! Kernel options: what fragments ask for, and what a `.config` holds.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Option names, `CONFIG_` included, and their values as `.config` writes them; `n` for an option that is off.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options(BTreeMap<String, String>);

/// A requested option that the final configuration does not have as asked.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Lost {
    pub(crate) name: String,
    pub(crate) asked: String,
    /// `None` where the option is unknown or its dependencies are not met.
    pub(crate) got: Option<String>,
}

impl Options {
    /// The fragments together; a later one wins. Naming an option twice in one is a mistake.
    pub(crate) fn read(dir: &Path, fragments: &[String]) -> Result<Options> {
        let mut all = Options::default();
        for name in fragments {
            let path = dir.join(format!("{name}.config"));
            let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            all.0.extend(parse_fragment(&text).with_context(|| path.display().to_string())?.0);
        }
        Ok(all)
    }

    /// A whole `.config`.
    pub(crate) fn of_config(text: &str) -> Options {
        let set = text.lines().filter_map(|line| line.split_once('='));
        let unset = text
            .lines()
            .filter_map(|line| Some((line.strip_prefix("# ")?.strip_suffix(" is not set")?, "n")));
        Options(set.chain(unset).map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    /// As lines that kconfig reads, sorted.
    pub(crate) fn to_text(&self) -> String {
        let mut text = String::new();
        for (name, value) in &self.0 {
            let _ = match value.as_str() {
                "n" => writeln!(text, "# {name} is not set"),
                value => writeln!(text, "{name}={value}"),
            };
        }
        text
    }

    /// Those that `config` does not hold as asked here.
    pub(crate) fn lost_in(&self, config: &Options) -> Vec<Lost> {
        let lost =
            self.0.iter().filter(|(name, asked)| config.0.get(*name).map_or("n", String::as_str) != *asked);
        lost.map(|(name, asked)| Lost {
            name: name.clone(),
            asked: asked.clone(),
            got: config.0.get(name).cloned(),
        })
        .collect()
    }
}

fn parse_fragment(text: &str) -> Result<Options> {
    let mut options = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let parsed = line.split_once('=').filter(|(name, value)| {
            let known = name.strip_prefix("CONFIG_").is_some_and(|rest| !rest.is_empty());
            known && !value.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        });
        let Some((name, value)) = parsed else {
            bail!("line {}: {line:?} is not CONFIG_NAME=value", number + 1)
        };
        if options.insert(name.to_owned(), value.to_owned()).is_some() {
            bail!("line {}: {name} a second time", number + 1);
        }
    }
    Ok(Options(options))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str =
        "#\n# Automatically generated\n#\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_S=\"x=y\"\n";

    #[test]
    fn what_did_not_survive_is_named_with_what_came_instead() {
        let asked =
            parse_fragment("CONFIG_A=y\nCONFIG_B=y\nCONFIG_C=y\nCONFIG_D=n\nCONFIG_S=\"x=y\"\n").unwrap();
        let lost = asked.lost_in(&Options::of_config(CONFIG));
        let name = |name: &str, got: Option<&str>| Lost {
            name: name.to_owned(),
            asked: "y".to_owned(),
            got: got.map(str::to_owned),
        };
        assert_eq!(lost, [name("CONFIG_B", Some("n")), name("CONFIG_C", None)]);
    }

    #[test]
    fn an_option_asked_off_and_left_on_is_lost_too() {
        let lost = parse_fragment("CONFIG_A=n").unwrap().lost_in(&Options::of_config(CONFIG));
        assert_eq!(lost.len(), 1);
    }

    #[test]
    fn fragments_are_strict() {
        for bad in ["A=y", "CONFIG_A", "CONFIG_=y", "CONFIG_A=", "CONFIG_A=y\nCONFIG_A=n", "CONFIG A=y"] {
            assert!(parse_fragment(bad).is_err(), "{bad:?}");
        }
        assert_eq!(parse_fragment("# why\n\nCONFIG_A=y\n").unwrap().to_text(), "CONFIG_A=y\n");
    }

    #[test]
    fn text_is_what_a_config_says() {
        let options = Options::of_config(CONFIG);
        assert_eq!(Options::of_config(&options.to_text()), options);
    }
}
