//! Which file a process executes, and in which words it is said that there is none.
//!
//! The texts are those of Go's `exec.LookPath`, which runc passes on and by which the docker CLI tells an
//! exit code of 127 from one of 126. Runs in the started child, as the container's user in its root.

use std::{
    io,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
};

use bulkhead_agent_api::{AgentError, ErrorKind};
use rustix::fs::{Access, AtFlags, CWD};

use crate::error::{Result, errno_text};

/// Finds the file for `name`: as it is when it has a slash, else in the directories of `path`.
///
/// # Errors
/// Kinds `NotFound` and `NotExecutable`, in runc's words.
pub fn find(name: &str, path: Option<&str>) -> Result<PathBuf> {
    if name.contains('/') {
        return executable(Path::new(name))
            .map(|()| PathBuf::from(name))
            .map_err(|error| failure(name, &error));
    }
    for directory in path.unwrap_or_default().split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        let candidate = Path::new(directory).join(name);
        if !name.is_empty() && executable(&candidate).is_ok() {
            if candidate.is_absolute() {
                return Ok(candidate);
            }
            let message =
                format!("exec: {name:?}: cannot run executable found relative to current directory");
            return Err(AgentError { kind: ErrorKind::NotExecutable, message });
        }
    }
    let message = format!("exec: {name:?}: executable file not found in $PATH");
    Err(AgentError { kind: ErrorKind::NotFound, message })
}

/// What a failed `execve` is called.
pub fn exec_failure(path: &Path, error: &io::Error) -> AgentError {
    AgentError { kind: kind(error), message: format!("exec {}: {}", path.display(), errno_text(error)) }
}

/// What a failed `chdir` to the working directory is called.
pub fn chdir_failure(cwd: &Path, error: &io::Error) -> AgentError {
    let message = format!("chdir to cwd ({cwd:?}) set in config.json failed: {}", errno_text(error));
    AgentError { kind: kind(error), message }
}

fn executable(path: &Path) -> io::Result<()> {
    let metadata = std::fs::metadata(path).map_err(|error| {
        // Go says which call failed.
        let text = format!("stat {}: {}", path.display(), errno_text(&error));
        io::Error::new(error.kind(), Stat { text, errno: error.raw_os_error() })
    })?;
    if metadata.is_dir() {
        return Err(rustix::io::Errno::ISDIR.into());
    }
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    rustix::fs::accessat(CWD, &path, Access::EXEC_OK, AtFlags::EACCESS)?;
    // Root may "execute" anything that has one x bit; without any, execve refuses.
    if metadata.permissions().mode() & 0o111 == 0 {
        return Err(rustix::io::Errno::ACCESS.into());
    }
    Ok(())
}

fn failure(name: &str, error: &io::Error) -> AgentError {
    AgentError { kind: kind(error), message: format!("exec: {name:?}: {}", errno_text(error)) }
}

/// 127 (not found) or 126 (found, and not to be run), as shells tell them apart.
fn kind(error: &io::Error) -> ErrorKind {
    let wrapped = error.get_ref().and_then(|inner| inner.downcast_ref::<Stat>());
    match wrapped.map_or_else(|| error.raw_os_error(), |stat| stat.errno) {
        Some(libc::ENOENT) => ErrorKind::NotFound,
        _ => ErrorKind::NotExecutable,
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{text}")]
struct Stat {
    text: String,
    errno: Option<i32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(name: &str, path: &str) -> (ErrorKind, String) {
        let error = find(name, Some(path)).unwrap_err();
        (error.kind, error.message)
    }

    #[test]
    fn a_name_is_searched_in_the_given_path_only() {
        assert_eq!(find("sh", Some("/nonexistent:/usr/bin:/bin")).unwrap(), Path::new("/usr/bin/sh"));
        let missing = "exec: \"sh\": executable file not found in $PATH";
        assert_eq!(error("sh", "/etc:/nonexistent"), (ErrorKind::NotFound, missing.into()));
        assert_eq!(find("sh", None).unwrap_err().message, missing);
        assert_eq!(error("", "/usr/bin").0, ErrorKind::NotFound);
    }

    #[test]
    fn a_path_says_what_is_wrong_with_it() {
        assert_eq!(find("/bin/sh", None).unwrap(), Path::new("/bin/sh"));
        assert_eq!(
            error("/nosuch", ""),
            (ErrorKind::NotFound, "exec: \"/nosuch\": stat /nosuch: no such file or directory".into())
        );
        assert_eq!(
            error("/etc/passwd", ""),
            (ErrorKind::NotExecutable, "exec: \"/etc/passwd\": permission denied".into())
        );
        assert_eq!(error("/etc/", ""), (ErrorKind::NotExecutable, "exec: \"/etc/\": is a directory".into()));
        assert_eq!(
            error("/etc/passwd/x", ""),
            (ErrorKind::NotExecutable, "exec: \"/etc/passwd/x\": stat /etc/passwd/x: not a directory".into())
        );
    }

    #[test]
    fn what_is_found_in_the_working_directory_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let name = "bulkhead-lookup-probe";
        std::fs::write(directory.path().join(name), "#!/bin/sh\n").unwrap();
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(directory.path().join(name), mode).unwrap();
        std::env::set_current_dir(directory.path()).unwrap();
        let (kind, message) = error(name, ":/bin");
        assert_eq!(kind, ErrorKind::NotExecutable);
        assert!(message.ends_with("found relative to current directory"), "{message}");
    }

    #[test]
    fn exec_failures_have_go_texts() {
        let error = exec_failure(Path::new("/a"), &io::Error::from_raw_os_error(libc::ENOEXEC));
        assert_eq!(
            (error.kind, error.message.as_str()),
            (ErrorKind::NotExecutable, "exec /a: exec format error")
        );
        let error = chdir_failure(Path::new("/w"), &io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(
            (error.kind, error.message.as_str()),
            (
                ErrorKind::NotFound,
                "chdir to cwd (\"/w\") set in config.json failed: no such file or directory"
            )
        );
    }
}
