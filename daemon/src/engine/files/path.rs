//! Paths and modes as Docker's clients write and read them.

use crate::engine::{Error, Result};

/// A path in a container as it is asked for: from the root, without `.` and `..`, but with the slash or the `/.` at
/// its end, which say that a last symbolic link is to be followed.
///
/// # Errors
/// Invalid: it is empty, too long, or holds a NUL.
pub(super) fn absolute(path: &str) -> Result<String> {
    if path.is_empty() {
        return Err(Error::invalid("bad parameter: path cannot be empty"));
    }
    if path.len() > bulkhead_agent_api::files::MAX_FILES_PATH - 3 || path.contains('\0') {
        return Err(Error::invalid("bad parameter: path is not valid"));
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    let mut clean = format!("/{}", parts.join("/"));
    let here = path == "." || path.ends_with("/.");
    if (here || path.ends_with('/')) && !clean.ends_with('/') {
        clean.push('/');
    }
    if here {
        clean.push('.');
    }
    Ok(clean)
}

/// Go's `os.FileMode` of a `st_mode`.
pub(super) fn go_mode(mode: u32) -> u32 {
    const DIRECTORY: u32 = 1 << 31;
    const SYMLINK: u32 = 1 << 27;
    const DEVICE: u32 = 1 << 26;
    const FIFO: u32 = 1 << 25;
    const SOCKET: u32 = 1 << 24;
    const SETUID: u32 = 1 << 23;
    const SETGID: u32 = 1 << 22;
    const CHARACTER: u32 = 1 << 21;
    const STICKY: u32 = 1 << 20;
    let kind = match mode & libc::S_IFMT {
        libc::S_IFDIR => DIRECTORY,
        libc::S_IFLNK => SYMLINK,
        libc::S_IFBLK => DEVICE,
        libc::S_IFCHR => DEVICE | CHARACTER,
        libc::S_IFIFO => FIFO,
        libc::S_IFSOCK => SOCKET,
        _ => 0,
    };
    let special = [(libc::S_ISUID, SETUID), (libc::S_ISGID, SETGID), (libc::S_ISVTX, STICKY)];
    let special = special.into_iter().filter(|(bit, _)| mode & bit != 0).fold(0, |all, (_, bit)| all | bit);
    kind | special | (mode & 0o777)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cleaned_and_keep_their_ends() {
        for (path, expected) in [
            ("/", "/"),
            ("a", "/a"),
            ("/a/b/", "/a/b/"),
            ("/a//b/.", "/a/b/."),
            ("/.", "/."),
            (".", "/."),
            ("..", "/"),
            ("/../../etc/./passwd", "/etc/passwd"),
            ("/a/../", "/"),
        ] {
            assert_eq!(absolute(path).unwrap(), expected, "{path}");
        }
        assert!(absolute("").is_err() && absolute("a\0b").is_err() && absolute(&"a".repeat(5000)).is_err());
    }

    #[test]
    fn modes_are_gos() {
        assert_eq!(go_mode(0o040_755), 0x8000_01ed);
        assert_eq!(go_mode(0o120_777), 0x0800_01ff);
        assert_eq!(go_mode(0o104_755), 0x0080_01ed);
        assert_eq!(go_mode(0o041_777), 0x8010_01ff);
        assert_eq!(go_mode(0o020_666), 0x0420_01b6);
        assert_eq!(go_mode(0o100_644), 0o644);
    }
}
