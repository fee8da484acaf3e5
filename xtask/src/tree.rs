//! Where things are: the work tree, its `target/`, and the cache outside it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The work tree a chore is done in.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    root: PathBuf,
}

impl Tree {
    /// The given tree, or the nearest one above the current directory.
    pub(crate) fn find(given: Option<&Path>) -> Result<Tree> {
        let start = match given {
            Some(dir) => dir.canonicalize().with_context(|| format!("work tree {}", dir.display()))?,
            None => env::current_dir()?.canonicalize()?,
        };
        let is_tree = |dir: &Path| dir.join("Cargo.toml").is_file() && dir.join("xtask/Cargo.toml").is_file();
        match start.ancestors().find(|dir| is_tree(dir)) {
            Some(root) => Ok(Tree { root: root.to_owned() }),
            None => bail!("no work tree at or above {}: give it with --tree", start.display()),
        }
    }

    /// The top of the tree.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Cargo's output directory.
    pub(crate) fn target(&self) -> PathBuf {
        self.root.join("target")
    }
}

/// Where results that outlive a work tree are kept: `$XDG_CACHE_HOME/bulkhead` or `~/.cache/bulkhead`.
pub(crate) fn cache_dir() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => {
            let home = env::var_os("HOME").filter(|dir| !dir.is_empty());
            PathBuf::from(home.context("neither XDG_CACHE_HOME nor HOME is set")?).join(".cache")
        }
    };
    let dir = base.join("bulkhead");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    Ok(dir)
}

/// Makes a directory that is there whole or not at all.
pub(crate) fn whole(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let _ = fs::remove_dir_all(&new);
    fs::create_dir_all(&new)?;
    fill(&new)?;
    Ok(fs::rename(&new, path)?)
}
