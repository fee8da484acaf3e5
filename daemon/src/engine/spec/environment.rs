//! A process's environment.

/// Where commands are looked for when nothing is said.
pub(super) const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// `base` with `changes` over it: `NAME=value` sets, a bare `NAME` removes.
pub(super) fn merge<'a>(mut base: Vec<String>, changes: impl Iterator<Item = &'a String>) -> Vec<String> {
    for change in changes {
        let name = change.split_once('=').map_or(change.as_str(), |(name, _)| name);
        let place = base.iter().position(|have| have.split('=').next() == Some(name));
        match (place, change.contains('=')) {
            (Some(place), true) => base[place].clone_from(change),
            (Some(place), false) => drop(base.remove(place)),
            (None, true) => base.push(change.clone()),
            (None, false) => {}
        }
    }
    base
}

/// A container's environment: Docker's own variables, those of its links, and the config's over them. (`HOME` is the agent's to
/// set: it knows the user.)
pub(super) fn of_container(
    hostname: &str,
    terminal: bool,
    links: &[String],
    config: &[String],
) -> Vec<String> {
    let mut base = vec![PATH.to_owned(), format!("HOSTNAME={hostname}")];
    if terminal {
        base.push("TERM=xterm".to_owned());
    }
    merge(base, links.iter().chain(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn the_config_has_the_last_word() {
        assert_eq!(of_container("h", false, &[], &[]), [PATH, "HOSTNAME=h"]);
        let config = strings(&["A=1", "TERM", "PATH=/x", "A=2=3", "HOSTNAMES=y", "NONE"]);
        assert_eq!(
            of_container("h", true, &strings(&["A=0"]), &config),
            ["PATH=/x", "HOSTNAME=h", "A=2=3", "HOSTNAMES=y"]
        );
    }
}
