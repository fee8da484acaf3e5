//! How VMMs are confined: `jail`, `jail-uids`, `cgroup-parent`.

use std::{
    ops::Range,
    path::{Component, Path, PathBuf},
};

use super::Options;
use crate::{
    layout::Layout,
    sandbox::{Confinement, Uids},
};

/// Ids that no distribution and no other program hands out: they begin where systemd's for containers end, and
/// end where its next begin. <https://systemd.io/UIDS-GIDS>
const UIDS: Range<u32> = 0x7000_0000..0x7ffe_0000;

/// Where control groups are mounted on every distribution.
const CGROUPS: &str = "/sys/fs/cgroup";

pub(super) fn from(options: &Options, layout: &Layout) -> Result<Confinement, String> {
    let range = options.jail_uids.as_deref().map_or(Ok(UIDS), uids)?;
    let cgroups = cgroup_parent(options.cgroup_parent.as_deref().unwrap_or("/bulkhead"))?;
    let jailed = options.jail.unwrap_or(true);
    Ok(Confinement { uids: jailed.then(|| Uids { range, directory: layout.uids() }), cgroups: Some(cgroups) })
}

/// `FIRST:COUNT`
fn uids(text: &str) -> Result<Range<u32>, String> {
    let range = text.split_once(':').and_then(|(first, count)| {
        let first: u32 = first.parse().ok()?;
        Some(first..first.checked_add(count.parse().ok()?)?)
    });
    match range {
        Some(range) if range.start > 0 && !range.is_empty() => Ok(range),
        _ => Err(format!("invalid jail-uids {text:?}: must be FIRST:COUNT, without the id 0")),
    }
}

/// A group's path below the mount; as with dockerd it may begin with a slash or not.
fn cgroup_parent(text: &str) -> Result<PathBuf, String> {
    let below = Path::new(text.trim_start_matches('/'));
    let plain = below.components().all(|part| matches!(part, Component::Normal(_)));
    if below.as_os_str().is_empty() || !plain {
        return Err(format!("invalid cgroup-parent {text:?}"));
    }
    Ok(Path::new(CGROUPS).join(below))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_ids() {
        assert_eq!(uids("1000:5"), Ok(1000..1005));
        for text in ["", "1000", "0:5", "1000:0", "4294967295:2", "a:b", "1:2:3", "-1:5"] {
            assert!(uids(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_group_s_path_stays_below_the_mount() {
        assert_eq!(cgroup_parent("/a/b"), Ok("/sys/fs/cgroup/a/b".into()));
        assert_eq!(cgroup_parent("a.slice"), Ok("/sys/fs/cgroup/a.slice".into()));
        for text in ["", "/", "../x", "a/../../b", "./a"] {
            assert!(cgroup_parent(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_jail_is_off_only_where_that_is_said() {
        let layout = Layout { data_root: "/d".into(), exec_root: "/e".into() };
        let default = from(&Options::default(), &layout).unwrap();
        assert_eq!(default.uids, Some(Uids { range: UIDS, directory: "/e/u".into() }));
        let off = from(&Options { jail: Some(false), ..Options::default() }, &layout).unwrap();
        assert_eq!(off.uids, None);
        assert_eq!(off.cgroups, default.cgroups);
    }
}
