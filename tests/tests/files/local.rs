//! Trees of files on this machine, to copy and to compare.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use anyhow::Result;

/// What a file is, as far as `docker cp` carries it over: content or target, mode, owner, modification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct File {
    pub(crate) content: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: i64,
}

/// Everything below a directory, by relative name.
pub(crate) fn tree(root: &Path) -> Result<BTreeMap<String, File>> {
    let mut found = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let meta = path.symlink_metadata()?;
            let content = if meta.is_dir() {
                todo.push(path.clone());
                Vec::new()
            } else if meta.is_symlink() {
                fs::read_link(&path)?.into_os_string().into_encoded_bytes()
            } else {
                fs::read(&path)?
            };
            // Of a directory that is copied into, the time is that of the copy.
            let mtime = if meta.is_dir() { 0 } else { meta.mtime() };
            let file = File { content, mode: meta.mode(), owner: (meta.uid(), meta.gid()), mtime };
            found.insert(path.strip_prefix(root)?.display().to_string(), file);
        }
    }
    Ok(found)
}

/// `count` small files in directories of a hundred, and one of `mib` MiB; no two alike.
pub(crate) fn many(root: &Path, count: usize, mib: usize) -> Result<()> {
    for number in 0..count {
        let dir = root.join(format!("d{}", number / 100));
        if number % 100 == 0 {
            fs::create_dir_all(&dir)?;
        }
        fs::write(dir.join(format!("f{number}")), format!("{number} ").repeat(number % 40))?;
    }
    let mut large = Vec::with_capacity(mib << 20);
    for word in 0_u64..(mib as u64) << 17 {
        large.extend(word.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    }
    Ok(fs::write(root.join("large"), large)?)
}

/// A few files of every kind that a user has.
pub(crate) fn few(root: &Path) -> Result<()> {
    fs::create_dir_all(root.join("sub/empty"))?;
    fs::write(root.join("a"), "one")?;
    fs::write(root.join("sub/b"), "two")?;
    fs::write(root.join("sub").join("n".repeat(200)), "long")?;
    fs::set_permissions(root.join("a"), fs::Permissions::from_mode(0o4751))?;
    symlink("a", root.join("link"))?;
    symlink("/etc/passwd", root.join("sub/absolute"))?;
    std::os::unix::fs::lchown(root.join("a"), Some(70_000), Some(80_000))?;
    Ok(())
}
