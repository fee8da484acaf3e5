//! Execs: an additional process in a running container.

use serde::{Deserialize, Serialize};

/// The body of `POST /containers/{id}/exec`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct CreateRequest {
    /// `user[:group]`, names or numbers; empty: the container's.
    pub user: String,
    /// With all capabilities.
    pub privileged: bool,
    /// With a terminal.
    pub tty: bool,
    /// The terminal's first size: rows, columns.
    pub console_size: Option<[u32; 2]>,
    /// Whether stdin will be attached.
    pub attach_stdin: bool,
    /// Whether stderr will be attached.
    pub attach_stderr: bool,
    /// Whether stdout will be attached.
    pub attach_stdout: bool,
    /// Ignored here by Docker too: the start request decides.
    pub detach: bool,
    /// Keys that detach, `ctrl-p,ctrl-q` when empty.
    pub detach_keys: String,
    /// Variables on top of the container's, `NAME=value`; a bare `NAME` removes it.
    pub env: Option<Vec<String>>,
    /// Empty: the container's.
    pub working_dir: String,
    /// The command and its arguments.
    #[serde(deserialize_with = "super::json::string_or_list")]
    pub cmd: Option<Vec<String>>,
}

/// The answer to [`CreateRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateResponse {
    /// The exec's id.
    #[serde(rename = "Id")]
    pub id: String,
}

/// The body of `POST /exec/{id}/start`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct StartRequest {
    /// Not to attach, but to answer at once.
    pub detach: bool,
    /// Whether the client expects a terminal; must be as it was created.
    pub tty: bool,
    /// The terminal's first size: rows, columns.
    pub console_size: Option<[u32; 2]>,
}

/// The answer to `GET /exec/{id}/json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Inspect {
    /// The exec's id.
    #[serde(rename = "ID")]
    pub id: String,
    /// Whether its process runs.
    pub running: bool,
    /// Null until it has ended.
    pub exit_code: Option<i64>,
    /// What it runs.
    pub process_config: ProcessConfig,
    /// As it was created.
    pub open_stdin: bool,
    /// As it was created.
    pub open_stderr: bool,
    /// As it was created.
    pub open_stdout: bool,
    /// Whether it is to be forgotten.
    pub can_remove: bool,
    /// The container's full id.
    #[serde(rename = "ContainerID")]
    pub container_id: String,
    /// Base64 of the keys that detach.
    pub detach_keys: String,
    /// Its pid in the guest, 0 when it does not run.
    pub pid: i64,
}

/// What an exec runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessConfig {
    /// With a terminal.
    pub tty: bool,
    /// The command.
    pub entrypoint: String,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// With all capabilities.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub privileged: Option<bool>,
    /// As it was asked for.
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub user: String,
}
