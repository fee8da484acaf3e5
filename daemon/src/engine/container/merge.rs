//! Merges a container's config with its image's, by dockerd's rules.

use crate::api::types::container::{Config, Healthcheck};

/// Fills in what the user left open.
pub(super) fn merge(user: &mut Config, image: &Config) {
    if user.user.is_empty() {
        user.user.clone_from(&image.user);
    }
    if let Some(ports) = &image.exposed_ports {
        let own = user.exposed_ports.get_or_insert_default();
        own.extend(ports.iter().map(|(port, empty)| (port.clone(), *empty)));
    }
    merge_env(user, image);
    if let Some(labels) = &image.labels {
        let own = user.labels.get_or_insert_default();
        for (name, value) in labels {
            own.entry(name.clone()).or_insert_with(|| value.clone());
        }
    }
    merge_command(user, image);
    if let Some(check) = &image.healthcheck {
        merge_healthcheck(user.healthcheck.get_or_insert_default(), check);
    }
    if user.working_dir.is_empty() {
        user.working_dir.clone_from(&image.working_dir);
    }
    if let Some(volumes) = &image.volumes {
        let own = user.volumes.get_or_insert_default();
        own.extend(volumes.iter().map(|(path, empty)| (path.clone(), *empty)));
    }
    if user.stop_signal.is_empty() {
        user.stop_signal.clone_from(&image.stop_signal);
    }
    user.on_build.clone_from(&image.on_build);
}

/// A variable of the image is added unless the user has one of its name.
fn merge_env(user: &mut Config, image: &Config) {
    let Some(image_env) = image.env.as_ref().filter(|env| !env.is_empty()) else { return };
    let own = user.env.get_or_insert_default();
    let name = |variable: &str| variable.split('=').next().unwrap_or_default().to_owned();
    for variable in image_env {
        if !own.iter().any(|other| name(other) == name(variable)) {
            own.push(variable.clone());
        }
    }
}

/// The image's command counts only with the image's entry point. An entry point of one empty string takes the
/// image's away, and its command with it.
fn merge_command(user: &mut Config, image: &Config) {
    if user.entrypoint.as_ref().is_none_or(Vec::is_empty) {
        if user.cmd.as_ref().is_none_or(Vec::is_empty) {
            user.cmd.clone_from(&image.cmd);
        }
        if user.entrypoint.is_none() {
            user.entrypoint.clone_from(&image.entrypoint);
        }
    }
    if matches!(user.entrypoint.as_deref(), Some([only]) if only.is_empty()) {
        user.entrypoint = None;
    }
}

fn merge_healthcheck(user: &mut Healthcheck, image: &Healthcheck) {
    if user.test.as_ref().is_none_or(Vec::is_empty) {
        user.test.clone_from(&image.test);
    }
    for (own, theirs) in [
        (&mut user.interval, image.interval),
        (&mut user.timeout, image.timeout),
        (&mut user.start_period, image.start_period),
        (&mut user.start_interval, image.start_interval),
        (&mut user.retries, image.retries),
    ] {
        if *own == 0 {
            *own = theirs;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(list: &[&str]) -> Option<Vec<String>> {
        Some(list.iter().map(|&text| text.to_owned()).collect())
    }

    fn commands(user: (Option<Vec<String>>, Option<Vec<String>>)) -> (Option<Vec<String>>, Option<Vec<String>>) {
        let image = Config { entrypoint: strings(&["/entry"]), cmd: strings(&["default"]), ..Config::default() };
        let mut config = Config { entrypoint: user.0, cmd: user.1, ..Config::default() };
        merge(&mut config, &image);
        (config.entrypoint, config.cmd)
    }

    #[test]
    fn command_and_entry_point() {
        let image = strings(&["/entry"]);
        assert_eq!(commands((None, None)), (image.clone(), strings(&["default"])));
        assert_eq!(commands((None, strings(&["own"]))), (image, strings(&["own"])));
        assert_eq!(commands((strings(&["/own"]), None)), (strings(&["/own"]), None));
        assert_eq!(commands((strings(&[""]), strings(&["sh"]))), (None, strings(&["sh"])));
        assert_eq!(commands((strings(&[""]), None)), (None, None));
    }

    #[test]
    fn variables_and_labels_of_the_user_win() {
        let label = |value: &str| Some([("a".to_owned(), value.to_owned())].into());
        let image =
            Config { env: strings(&["PATH=/bin", "LANG=C"]), labels: label("image"), ..Config::default() };
        let mut user = Config { env: strings(&["LANG=de", "X"]), labels: label("user"), ..Config::default() };
        merge(&mut user, &image);
        assert_eq!(user.env, strings(&["LANG=de", "X", "PATH=/bin"]));
        assert_eq!(user.labels, label("user"));
    }

    #[test]
    fn a_health_check_inherits_what_it_does_not_say() {
        let image = Config {
            healthcheck: Some(Healthcheck { test: strings(&["CMD", "x"]), retries: 3, ..Healthcheck::default() }),
            ..Config::default()
        };
        let own = Healthcheck { retries: 5, ..Healthcheck::default() };
        let mut user = Config { healthcheck: Some(own), ..Config::default() };
        merge(&mut user, &image);
        let check = user.healthcheck.unwrap();
        assert_eq!((check.test, check.retries), (strings(&["CMD", "x"]), 5));
    }
}
