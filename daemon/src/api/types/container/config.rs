//! `Config`: what a container runs, the portable part. An image's config has the same form.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::api::types::{Empty, is_default, is_empty_list, json::string_or_list};

/// A container's (or an image's) config. `Option` where Docker tells null from empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Config {
    /// The host name, empty: the id's first 12 digits.
    pub hostname: String,
    /// The NIS domain name.
    pub domainname: String,
    /// `user[:group]`, names or numbers, as the image's passwd and group have them.
    pub user: String,
    /// Whether the client attaches to stdin.
    pub attach_stdin: bool,
    /// Whether the client attaches to stdout.
    pub attach_stdout: bool,
    /// Whether the client attaches to stderr.
    pub attach_stderr: bool,
    /// `port/protocol`.
    #[serde(skip_serializing_if = "is_empty_map")]
    pub exposed_ports: Option<BTreeMap<String, Empty>>,
    /// A terminal for all three streams.
    pub tty: bool,
    /// Keep stdin open.
    pub open_stdin: bool,
    /// Close stdin when the first client that attached to it goes.
    pub stdin_once: bool,
    /// `NAME=value`.
    pub env: Option<Vec<String>>,
    /// The command, or the entry point's arguments.
    #[serde(deserialize_with = "string_or_list")]
    pub cmd: Option<Vec<String>>,
    /// How to find out whether it is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<Healthcheck>,
    /// Windows only.
    #[serde(skip_serializing_if = "is_default")]
    pub args_escaped: bool,
    /// The image as the user named it.
    pub image: String,
    /// Paths that are to be volumes.
    pub volumes: Option<BTreeMap<String, Empty>>,
    /// Empty: `/`.
    pub working_dir: String,
    /// What to run before [`Config::cmd`]; one empty string resets the image's.
    #[serde(deserialize_with = "string_or_list")]
    pub entrypoint: Option<Vec<String>>,
    /// Without a network.
    #[serde(skip_serializing_if = "is_default")]
    pub network_disabled: bool,
    /// The MAC address, before API 1.44.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub mac_address: String,
    /// Build triggers of the image.
    pub on_build: Option<Vec<String>>,
    /// The user's metadata.
    pub labels: Option<BTreeMap<String, String>>,
    /// The signal that `stop` sends first, empty: SIGTERM.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub stop_signal: String,
    /// Seconds between that signal and SIGKILL.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_timeout: Option<i64>,
    /// The shell of shell-form instructions.
    #[serde(skip_serializing_if = "is_empty_list", deserialize_with = "string_or_list")]
    pub shell: Option<Vec<String>>,
}

/// A health check. Durations are nanoseconds, 0: inherit or default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Healthcheck {
    /// `["NONE"]`, `["CMD", args…]` or `["CMD-SHELL", command]`.
    #[serde(skip_serializing_if = "is_empty_list")]
    pub test: Option<Vec<String>>,
    /// Between two checks.
    #[serde(skip_serializing_if = "is_default")]
    pub interval: i64,
    /// Until a check is taken for hung.
    #[serde(skip_serializing_if = "is_default")]
    pub timeout: i64,
    /// How long failures do not count after the start.
    #[serde(skip_serializing_if = "is_default")]
    pub start_period: i64,
    /// Between two checks within the start period.
    #[serde(skip_serializing_if = "is_default")]
    pub start_interval: i64,
    /// How many failures in a row make it unhealthy.
    #[serde(skip_serializing_if = "is_default")]
    pub retries: i64,
}

pub(super) fn is_empty_map<K, V>(map: &Option<BTreeMap<K, V>>) -> bool {
    map.as_ref().is_none_or(BTreeMap::is_empty)
}
