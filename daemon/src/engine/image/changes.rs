//! `--change`: Dockerfile instructions that change a configuration, for `docker import` and `docker commit`.
//!
//! | instruction | form |
//! |---|---|
//! | `CMD` `ENTRYPOINT` | `["exec", "form"]`, or a line for `/bin/sh -c` |
//! | `ENV` `LABEL` | `name=value …` with quotes; `name value` |
//! | `EXPOSE` `VOLUME` | words; `VOLUME` also as a JSON list |
//! | `USER` `WORKDIR` `STOPSIGNAL` | one word |
//! | `HEALTHCHECK` | `NONE`, or `[--interval= --timeout= --start-period= --start-interval= --retries=] CMD …` |
//! | `ONBUILD` | an instruction, kept as it is |
//!
//! `$name`, `${name}`, `${name:-default}` and `${name:+alternative}` stand for variables of the image's `ENV`
//! in all but commands.

use std::collections::BTreeMap;

use jiff::SignedDuration;

use super::config::RunConfig;
use crate::{
    api::types::{Empty, container::Healthcheck},
    engine::{Error, Result},
};

/// The longest text of all changes together, in bytes.
const MAX_TEXT: usize = 1 << 20;

/// `config` with `changes` applied in order.
///
/// # Errors
/// A change is no instruction that may be used here, or malformed. All are 400.
pub(super) fn apply(config: RunConfig, changes: &[String]) -> Result<RunConfig> {
    if changes.iter().map(String::len).sum::<usize>() > MAX_TEXT {
        return Err(Error::invalid("the changes are too long"));
    }
    let mut config = config;
    // A line may end in a backslash and go on; each change may hold several lines.
    let text = changes.join("\n").replace("\\\r\n", " ").replace("\\\n", " ");
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        instruction(&mut config, &word.to_ascii_uppercase(), word, rest.trim())?;
    }
    Ok(config)
}

fn instruction(config: &mut RunConfig, name: &str, written: &str, rest: &str) -> Result<()> {
    const KNOWN: [&str; 11] = [
        "CMD",
        "ENTRYPOINT",
        "ENV",
        "EXPOSE",
        "HEALTHCHECK",
        "LABEL",
        "ONBUILD",
        "STOPSIGNAL",
        "USER",
        "VOLUME",
        "WORKDIR",
    ];
    if !KNOWN.contains(&name) {
        return Err(Error::invalid(format!("{} is not a valid change command", written.to_lowercase())));
    }
    if rest.is_empty() && !matches!(name, "CMD" | "ENTRYPOINT") {
        return Err(Error::invalid(format!("{name} requires at least one argument")));
    }
    let env = variables(config);
    let one = |text: &str| -> Result<String> {
        match words(text, &env)?.as_slice() {
            [word] => Ok(word.clone()),
            _ => Err(Error::invalid(format!("{name} requires exactly one argument"))),
        }
    };
    match name {
        "CMD" => config.cmd = Some(command(config, rest)),
        "ENTRYPOINT" => {
            config.entrypoint = Some(command(config, rest));
            config.cmd = None;
        }
        "ENV" => {
            for (name, value) in pairs(rest, &env)? {
                let list = config.env.get_or_insert_default();
                let prefix = format!("{name}=");
                list.retain(|entry| !entry.starts_with(&prefix));
                list.push(format!("{name}={value}"));
            }
        }
        "LABEL" => config.labels.get_or_insert_default().extend(pairs(rest, &env)?),
        "EXPOSE" => {
            for word in words(rest, &env)? {
                config.exposed_ports.get_or_insert_default().extend(ports(&word)?);
            }
        }
        "VOLUME" => {
            let paths = match serde_json::from_str::<Vec<String>>(rest) {
                Ok(paths) => paths,
                Err(_) => words(rest, &env)?,
            };
            for path in paths {
                if path.trim().is_empty() {
                    return Err(Error::invalid("VOLUME specified can not be an empty string"));
                }
                config.volumes.get_or_insert_default().insert(path, Empty {});
            }
        }
        "USER" => config.user = one(rest)?,
        "STOPSIGNAL" => config.stop_signal = one(rest)?,
        "WORKDIR" => {
            let path = one(rest)?;
            config.working_dir = if path.starts_with('/') {
                path
            } else {
                format!("{}/{path}", config.working_dir.trim_end_matches('/'))
            };
        }
        "HEALTHCHECK" => config.healthcheck = Some(healthcheck(config, rest)?),
        "ONBUILD" => {
            let first = rest.split_whitespace().next().unwrap_or_default().to_ascii_uppercase();
            if matches!(first.as_str(), "ONBUILD" | "FROM" | "MAINTAINER") {
                return Err(Error::invalid(format!("{first} isn't allowed as an ONBUILD trigger")));
            }
            config.on_build.get_or_insert_default().push(rest.to_owned());
        }
        _ => {}
    }
    Ok(())
}

/// A JSON list is run as it is; anything else is the shell's.
fn command(config: &RunConfig, text: &str) -> Vec<String> {
    if let Ok(list) = serde_json::from_str(text) {
        return list;
    }
    let mut line = shell(config);
    line.push(text.to_owned());
    line
}

fn shell(config: &RunConfig) -> Vec<String> {
    let default = || vec!["/bin/sh".to_owned(), "-c".to_owned()];
    config.shell.clone().filter(|shell| !shell.is_empty()).unwrap_or_else(default)
}

fn healthcheck(config: &RunConfig, text: &str) -> Result<Healthcheck> {
    let mut check = Healthcheck::default();
    let mut rest = text;
    while let Some(flag) = rest.strip_prefix("--") {
        let (flag, after) = flag.split_once(char::is_whitespace).unwrap_or((flag, ""));
        let (name, value) = flag.split_once('=').unwrap_or((flag, ""));
        let duration = || -> Result<i64> {
            let parsed: Option<SignedDuration> = value.parse().ok();
            parsed
                .and_then(|duration| i64::try_from(duration.as_nanos()).ok())
                .filter(|nanoseconds| *nanoseconds == 0 || *nanoseconds >= 1_000_000)
                .ok_or_else(|| Error::invalid(format!("invalid duration \"{value}\" for --{name}")))
        };
        match name {
            "interval" => check.interval = duration()?,
            "timeout" => check.timeout = duration()?,
            "start-period" => check.start_period = duration()?,
            "start-interval" => check.start_interval = duration()?,
            "retries" => {
                let parsed = value.parse().ok().filter(|retries| *retries >= 0);
                check.retries =
                    parsed.ok_or_else(|| Error::invalid(format!("invalid --retries \"{value}\"")))?;
            }
            _ => return Err(Error::invalid(format!("unknown flag: {name}"))),
        }
        rest = after.trim_start();
    }
    let (kind, rest) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let mut test = match (kind.to_ascii_uppercase().as_str(), rest.trim()) {
        ("NONE", "") => vec!["NONE".to_owned()],
        ("NONE", _) => return Err(Error::invalid("HEALTHCHECK NONE takes no arguments")),
        ("CMD", "") => return Err(Error::invalid("missing command after HEALTHCHECK CMD")),
        ("CMD", line) => match serde_json::from_str::<Vec<String>>(line) {
            Ok(list) => std::iter::once("CMD".to_owned()).chain(list).collect(),
            Err(_) => vec!["CMD-SHELL".to_owned(), line.to_owned()],
        },
        (kind, _) => return Err(Error::invalid(format!("unknown type \"{kind}\" in HEALTHCHECK (try CMD)"))),
    };
    // A shell of the image's own runs shell forms, and not the engine's idea of one.
    if test[0] == "CMD-SHELL" && config.shell.as_ref().is_some_and(|shell| !shell.is_empty()) {
        let line = test.remove(1);
        test = std::iter::once("CMD".to_owned()).chain(shell(config)).chain([line]).collect();
    }
    check.test = Some(test);
    Ok(check)
}

/// `80`, `80/udp`, `8000-8003/tcp`.
fn ports(word: &str) -> Result<BTreeMap<String, Empty>> {
    let bad = || Error::invalid(format!("invalid containerPort: {word:.100}"));
    let (range, protocol) = word.split_once('/').unwrap_or((word, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    if !matches!(protocol.as_str(), "tcp" | "udp" | "sctp") {
        return Err(Error::invalid(format!("invalid proto: {protocol:.100}")));
    }
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let number = |text: &str| text.parse::<u16>().map_err(|_| bad());
    let (first, last) = (number(first)?, number(last)?);
    if first > last {
        return Err(bad());
    }
    Ok((first..=last).map(|port| (format!("{port}/{protocol}"), Empty {})).collect())
}

fn variables(config: &RunConfig) -> BTreeMap<String, String> {
    let list = config.env.iter().flatten();
    list.filter_map(|entry| entry.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// `name=value name="other value"`, or the old `name the rest`.
fn pairs(text: &str, env: &BTreeMap<String, String>) -> Result<Vec<(String, String)>> {
    let first = text.split_whitespace().next().unwrap_or_default();
    if !first.contains('=') {
        let (name, value) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        if value.is_empty() {
            return Err(Error::invalid(format!(
                "Syntax error - can't find = in \"{first}\". Must be of the form: name=value"
            )));
        }
        let value = words(value, env)?.join(" ");
        return Ok(vec![(name.to_owned(), value)]);
    }
    words(text, env)?
        .into_iter()
        .map(|word| match word.split_once('=') {
            Some(("", _)) => Err(Error::invalid("names can not be blank")),
            Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
            None => Err(Error::invalid(format!(
                "Syntax error - can't find = in \"{word}\". Must be of the form: name=value"
            ))),
        })
        .collect()
}

/// Words as the shell splits them: quotes, backslashes and variables done.
fn words(text: &str, env: &BTreeMap<String, String>) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut word: Option<String> = None;
    let mut quote: Option<char> = None;
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, c) if c.is_whitespace() => found.extend(word.take()),
            (Some('\''), c) => word.get_or_insert_default().push(c),
            (Some(_), '\\') => {
                // Between double quotes a backslash is one unless it takes something's meaning away.
                let escaped = rest.next_if(|next| matches!(next, '"' | '$' | '\\'));
                word.get_or_insert_default().push(escaped.unwrap_or('\\'));
            }
            (None, '\\') => word.get_or_insert_default().extend(rest.next()),
            (_, '$') => {
                let value = variable(&mut rest, env)?;
                word.get_or_insert_default().push_str(&value);
            }
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return Err(Error::invalid("unexpected end of statement while looking for matching quote"));
    }
    found.extend(word);
    Ok(found)
}

fn variable(
    rest: &mut std::iter::Peekable<std::str::Chars<'_>>,
    env: &BTreeMap<String, String>,
) -> Result<String> {
    let is_name = |c: &char| c.is_ascii_alphanumeric() || *c == '_';
    let value = |name: &str| env.get(name).cloned().unwrap_or_default();
    if rest.next_if_eq(&'{').is_none() {
        let mut name = String::new();
        while let Some(c) = rest.next_if(is_name) {
            name.push(c);
        }
        return Ok(if name.is_empty() { "$".to_owned() } else { value(&name) });
    }
    let mut inside = String::new();
    loop {
        match rest.next() {
            Some('}') => break,
            Some(c) => inside.push(c),
            None => return Err(Error::invalid("syntax error: missing '}'")),
        }
    }
    let end = inside.find(|c| !is_name(&c)).unwrap_or(inside.len());
    let (name, modifier) = inside.split_at(end);
    let have = value(name);
    match modifier.split_at_checked(2) {
        None if modifier.is_empty() && !name.is_empty() => Ok(have),
        Some((":-", default)) => Ok(if have.is_empty() { default.to_owned() } else { have }),
        Some((":+", other)) => Ok(if have.is_empty() { String::new() } else { other.to_owned() }),
        _ => Err(Error::invalid(format!("unsupported modifier in \"${{{inside:.100}}}\""))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn applied(changes: &[&str]) -> Result<RunConfig> {
        apply(RunConfig::default(), &changes.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    fn list(words: &[&str]) -> Option<Vec<String>> {
        Some(words.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn instructions_change_the_configuration() {
        let config = applied(&[
            "ENTRYPOINT [\"/bin/app\", \"-v\"]",
            "cmd echo $HOME && true",
            "ENV A=1 B=\"two words\" C='$A'",
            "ENV D=${A}x$B E=${NONE:-def} F=${A:+alt}",
            "ENV A 2 3",
            "LABEL a.b=c \"d e\"=f",
            "EXPOSE 80 53/UDP 8000-8001",
            "VOLUME [\"/data\", \"/x y\"]",
            "VOLUME /more",
            "USER app:group",
            "WORKDIR /srv",
            "WORKDIR www",
            "STOPSIGNAL SIGINT",
            "HEALTHCHECK --interval=5s --retries=3 CMD curl -f http://x/",
            "ONBUILD RUN make",
        ])
        .unwrap();
        assert_eq!(config.entrypoint, list(&["/bin/app", "-v"]));
        assert_eq!(config.cmd, list(&["/bin/sh", "-c", "echo $HOME && true"]));
        assert_eq!(config.env, list(&["B=two words", "C=$A", "D=1xtwo words", "E=def", "F=alt", "A=2 3"]));
        assert_eq!(
            config.labels.unwrap(),
            BTreeMap::from([("a.b".into(), "c".into()), ("d e".into(), "f".into())])
        );
        let ports: Vec<_> = config.exposed_ports.unwrap().into_keys().collect();
        assert_eq!(ports, ["53/udp", "80/tcp", "8000/tcp", "8001/tcp"]);
        assert_eq!(config.volumes.unwrap().into_keys().collect::<Vec<_>>(), ["/data", "/more", "/x y"]);
        assert_eq!((config.user.as_str(), config.working_dir.as_str()), ("app:group", "/srv/www"));
        assert_eq!(config.stop_signal, "SIGINT");
        let check = config.healthcheck.unwrap();
        assert_eq!((check.interval, check.retries), (5_000_000_000, 3));
        assert_eq!(check.test, list(&["CMD-SHELL", "curl -f http://x/"]));
        assert_eq!(config.on_build, list(&["RUN make"]));
    }

    #[test]
    fn what_may_not_be_changed_is_refused() {
        for (change, part) in [
            ("RUN rm -rf /", "run is not a valid change command"),
            ("FROM x", "from is not a valid change command"),
            ("ENV", "ENV requires at least one argument"),
            ("ENV A", "can't find = in \"A\""),
            ("ENV A=\"x", "matching quote"),
            ("ENV A=${B", "missing '}'"),
            ("ENV A=${B:?x}", "unsupported modifier"),
            ("EXPOSE x", "invalid containerPort: x"),
            ("EXPOSE 80/ip", "invalid proto: ip"),
            ("USER a b", "exactly one argument"),
            ("HEALTHCHECK --interval=x CMD y", "invalid duration \"x\""),
            ("HEALTHCHECK PING", "unknown type \"PING\""),
            ("ONBUILD FROM x", "FROM isn't allowed"),
        ] {
            let error = applied(&[change]).unwrap_err();
            assert!(error.message.contains(part), "{change}: {}", error.message);
            assert_eq!(error.kind, crate::engine::ErrorKind::Invalid);
        }
    }

    #[test]
    fn lines_go_on_after_a_backslash() {
        assert_eq!(applied(&["ENV A=1 \\\n B=2\n# no\n"]).unwrap().env, list(&["A=1", "B=2"]));
    }

    proptest! {
        #[test]
        fn any_text_is_applied_or_refused(text in "(CMD|ENV|LABEL|EXPOSE|VOLUME|HEALTHCHECK|USER) [ -~]{0,40}") {
            let _ = applied(&[&text]);
        }
    }
}
