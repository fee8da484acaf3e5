//! Names inside an archive, made safe to walk.

/// The longest path in bytes: Linux's PATH_MAX without its NUL.
pub const MAX_PATH: usize = 4095;
/// The longest name of one file: NAME_MAX.
pub const MAX_NAME: usize = 255;
/// How deep a path may go: removing a tree holds one file descriptor a level.
pub const MAX_DEPTH: usize = 256;

/// A path below an archive's root: no `.`, no `..`, no empty component. The empty path is the root itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EntryPath(Vec<u8>);

impl EntryPath {
    /// Cleans an archive's name as Docker does: it is taken relative to the root even when it begins with a
    /// slash, and `a/../b` is `b`.
    ///
    /// # Errors
    /// Why the name cannot be used, for people.
    pub fn clean(name: &[u8]) -> Result<Self, String> {
        if name.len() > MAX_PATH {
            return Err(format!("its name is longer than {MAX_PATH} bytes"));
        }
        let mut path = Self::default();
        for component in name.split(|&byte| byte == b'/') {
            match component {
                b"" | b"." => {}
                b".." if path.0.is_empty() => return Err("it lies outside the root".into()),
                b".." => path = path.split().map_or_else(Self::default, |(parent, _)| parent),
                _ => path.push(component)?,
            }
        }
        Ok(path)
    }

    /// Adds a component, which must be neither empty, `.` nor `..`, and hold no slash.
    ///
    /// # Errors
    /// The component or the path is too long, or the component holds a NUL.
    pub fn push(&mut self, component: &[u8]) -> Result<(), String> {
        if component.contains(&0) {
            return Err("its name holds a NUL byte".into());
        }
        if component.len() > MAX_NAME {
            return Err(format!("a part of its name is longer than {MAX_NAME} bytes"));
        }
        if self.0.len() + 1 + component.len() > MAX_PATH {
            return Err(format!("its name is longer than {MAX_PATH} bytes"));
        }
        if self.depth() == MAX_DEPTH {
            return Err(format!("it lies more than {MAX_DEPTH} directories deep"));
        }
        if !self.0.is_empty() {
            self.0.push(b'/');
        }
        self.0.extend(component);
        Ok(())
    }

    /// The directory and the name in it; None for the root.
    #[must_use]
    pub fn split(&self) -> Option<(Self, Vec<u8>)> {
        if self.0.is_empty() {
            return None;
        }
        Some(match self.0.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => (Self(self.0[..slash].to_vec()), self.0[slash + 1..].to_vec()),
            None => (Self::default(), self.0.clone()),
        })
    }

    /// The components, outermost first.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.0.split(|&byte| byte == b'/').filter(|component| !component.is_empty())
    }

    /// The path as the kernel takes it relative to the root.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        if self.0.is_empty() { b"." } else { &self.0 }
    }

    fn depth(&self) -> usize {
        self.components().count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn cleans(name: &str, path: &str) {
        let cleaned = EntryPath::clean(name.as_bytes()).unwrap();
        assert_eq!(String::from_utf8_lossy(&cleaned.0), path);
    }

    #[test]
    fn names_are_cleaned_as_docker_does() {
        cleans("", "");
        cleans(".", "");
        cleans("./", "");
        cleans("/", "");
        cleans("a", "a");
        cleans("./a/b/", "a/b");
        cleans("/etc//passwd", "etc/passwd");
        cleans("a/./b/../c", "a/c");
        cleans("a/..", "");
        cleans("...", "...");
    }

    #[test]
    fn nothing_leaves_the_root() {
        for name in ["..", "../x", "/..", "a/../../x", "./../x", "a/b/../../../c"] {
            assert!(EntryPath::clean(name.as_bytes()).is_err(), "{name}");
        }
    }

    #[test]
    fn lengths_are_capped() {
        assert!(EntryPath::clean(&[b'a'; MAX_NAME]).is_ok());
        assert!(EntryPath::clean(&[b'a'; MAX_NAME + 1]).is_err());
        assert!(EntryPath::clean(&b"a/".repeat(MAX_DEPTH)).is_ok());
        assert!(EntryPath::clean(&b"a/".repeat(MAX_DEPTH + 1)).is_err());
        assert!(EntryPath::clean(&b"/".repeat(MAX_PATH + 1)).is_err());
        assert!(EntryPath::clean(b"a\0b").is_err());
    }
}
