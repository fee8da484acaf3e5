//! Docker's user strings, resolved against a container's own `/etc/passwd` and `/etc/group`.
//!
//! The rules are those that Docker's users know (`docker run --user`, `USER` of an image):
//!
//! | given | user | group | further groups |
//! |---|---|---|---|
//! | `name` | must be in passwd | passwd's | groups that list the name |
//! | `1000` in passwd | 1000 | passwd's | groups that list its name |
//! | `1000` not in passwd | 1000 | 0 | none |
//! | `user:group` | as above | a name in group, or a number | none |
//!
//! Both files belong to the image or the workload: lines that do not parse are skipped, sizes are capped,
//! and nothing but a regular file is read.

use std::{fs::File, io::Read, path::Path};

use rustix::fs::{Mode, OFlags};

use crate::error::{Result, invalid};

/// The most that is read of `/etc/passwd` or `/etc/group`, in bytes.
const MAX_FILE: u64 = 4 << 20;

/// The highest uid or gid that Docker takes.
const MAX_ID: u32 = i32::MAX as u32;

/// The most supplementary groups that the kernel takes (`NGROUPS_MAX`).
const MAX_GROUPS: usize = 65536;

/// A line of `/etc/passwd`, the fields that matter.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Passwd {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
}

/// A line of `/etc/group`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Group {
    name: String,
    gid: u32,
    members: Vec<String>,
}

/// Who a process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups, the group itself first: a process that drops it must not lose what a
    /// negative group permission takes away.
    pub groups: Vec<u32>,
    /// The home directory by passwd, else `/`.
    pub home: String,
}

/// A container's users and groups.
#[derive(Debug, Default)]
pub struct Database {
    users: Vec<Passwd>,
    groups: Vec<Group>,
}

impl Database {
    /// Parses the texts of the two files.
    pub fn parse(passwd: &str, group: &str) -> Self {
        Self {
            users: passwd.lines().filter_map(parse_passwd).collect(),
            groups: group.lines().filter_map(parse_group).collect(),
        }
    }

    /// Reads the two files of the root directory that this process has; absent ones are empty.
    pub fn read() -> Self {
        Self::parse(&read_text(Path::new("/etc/passwd")), &read_text(Path::new("/etc/group")))
    }

    /// Resolves `user[:group]`; empty is uid 0.
    ///
    /// # Errors
    /// Of kind `Invalid`, in Docker's words.
    pub fn resolve(&self, user: &str) -> Result<Identity> {
        let (user, group) = match user.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
            None => (user, None),
        };
        let number = if user.is_empty() { Some(0) } else { user.parse::<u32>().ok() };
        let entry = self.users.iter().find(|entry| match number {
            Some(uid) => entry.uid == uid,
            None => entry.name == user,
        });
        let (uid, gid, home) = match (entry, number) {
            (Some(entry), _) => (entry.uid, entry.gid, entry.home.as_str()),
            (None, Some(uid)) => (uid, 0, "/"),
            (None, None) => {
                return Err(invalid(format!(
                    "unable to find user {user}: no matching entries in passwd file"
                )));
            }
        };
        check_id(uid)?;
        let (gid, further) = match (group, entry) {
            (Some(group), _) => (self.group(group)?, Vec::new()),
            (None, Some(entry)) => (gid, self.groups_of(&entry.name)),
            (None, None) => (gid, Vec::new()),
        };
        let home = if home.is_empty() { "/" } else { home };
        Ok(Identity { uid, gid, groups: unique([gid].into_iter().chain(further))?, home: home.to_owned() })
    }

    /// The identity for ids that the spec gives as numbers.
    pub fn by_ids(&self, uid: u32, gid: u32) -> Identity {
        let home = self.users.iter().find(|entry| entry.uid == uid).map_or("/", |entry| &entry.home);
        Identity { uid, gid, groups: vec![gid], home: home.to_owned() }
    }

    /// Resolves one group, a name or a number.
    ///
    /// # Errors
    /// Of kind `Invalid`, in Docker's words.
    pub fn group(&self, group: &str) -> Result<u32> {
        let number = group.parse::<u32>().ok();
        let entry = self.groups.iter().find(|entry| match number {
            Some(gid) => entry.gid == gid,
            None => entry.name == group,
        });
        match (entry, number) {
            (Some(entry), _) => check_id(entry.gid),
            (None, Some(gid)) => check_id(gid),
            (None, None) => {
                Err(invalid(format!("unable to find group {group}: no matching entries in group file")))
            }
        }
    }

    fn groups_of(&self, name: &str) -> Vec<u32> {
        let lists = |group: &&Group| group.members.iter().any(|member| member == name);
        self.groups.iter().filter(lists).map(|group| group.gid).collect()
    }
}

impl Identity {
    /// Adds supplementary groups.
    ///
    /// # Errors
    /// Of kind `Invalid` when they are more than the kernel takes.
    pub fn add_groups(&mut self, more: impl IntoIterator<Item = u32>) -> Result<()> {
        self.groups = unique(std::mem::take(&mut self.groups).into_iter().chain(more))?;
        Ok(())
    }
}

fn unique(groups: impl Iterator<Item = u32>) -> Result<Vec<u32>> {
    let mut seen = std::collections::BTreeSet::new();
    let groups: Vec<u32> = groups.filter(|gid| seen.insert(*gid)).take(MAX_GROUPS + 1).collect();
    if groups.len() > MAX_GROUPS { Err(invalid("too many supplementary groups")) } else { Ok(groups) }
}

fn check_id(id: u32) -> Result<u32> {
    if id <= MAX_ID { Ok(id) } else { Err(invalid("uids and gids must be in range 0-2147483647")) }
}

fn parse_passwd(line: &str) -> Option<Passwd> {
    let mut fields = line.trim().split(':');
    let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
    let (_password, uid, gid) = (fields.next()?, fields.next()?, fields.next()?);
    let (_comment, home) = (fields.next(), fields.next());
    Some(Passwd {
        name: name.to_owned(),
        uid: uid.parse().ok()?,
        gid: gid.parse().ok()?,
        home: home.unwrap_or_default().to_owned(),
    })
}

fn parse_group(line: &str) -> Option<Group> {
    let mut fields = line.trim().split(':');
    let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
    let (_password, gid, members) = (fields.next()?, fields.next()?, fields.next());
    let members = members.unwrap_or_default().split(',').filter(|member| !member.is_empty());
    Some(Group {
        name: name.to_owned(),
        gid: gid.parse().ok()?,
        members: members.map(str::to_owned).collect(),
    })
}

/// The text of a regular file; what cannot be read counts as empty. Does not block on a fifo or device
/// that an image has put there.
fn read_text(path: &Path) -> String {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let Ok(file) = rustix::fs::open(path, flags, Mode::empty()).map(File::from) else { return String::new() };
    if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return String::new();
    }
    let mut bytes = Vec::new();
    match file.take(MAX_FILE).read_to_end(&mut bytes) {
        Ok(_) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
                          # comment:x:1:1::/:\n\
                          broken line\n\
                          web:x:33:34:web:/var/www:/bin/false\n\
                          1000:x:77:77:a name of digits:/home/digits:\n\
                          bare:x:5:6\n\
                          high:x:4294967295:0::/:\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\naudio:x:29:web,root\nvideo:x:44:root\nnogid:x::web\n";

    fn database() -> Database {
        Database::parse(PASSWD, GROUP)
    }

    fn resolved(user: &str) -> (u32, u32, Vec<u32>, String) {
        let identity = database().resolve(user).unwrap();
        (identity.uid, identity.gid, identity.groups, identity.home)
    }

    #[test]
    fn names_and_numbers_find_their_groups_and_home() {
        let web = (33, 34, vec![34, 29], "/var/www".to_owned());
        assert_eq!(resolved("web"), web);
        assert_eq!(resolved("33"), web);
        assert_eq!(resolved(""), (0, 0, vec![0, 29, 44], "/root".into()));
        assert_eq!(resolved("0"), resolved("root"));
        assert_eq!(resolved("bare"), (5, 6, vec![6], "/".into()));
    }

    #[test]
    fn a_number_is_a_uid_even_if_a_user_has_it_as_name() {
        assert_eq!(resolved("1000"), (1000, 0, vec![0], "/".into()));
    }

    #[test]
    fn a_group_given_replaces_the_users_groups() {
        assert_eq!(resolved("web:audio"), (33, 29, vec![29], "/var/www".into()));
        assert_eq!(resolved("web:12345"), (33, 12345, vec![12345], "/var/www".into()));
        assert_eq!(resolved("70000:70001"), (70000, 70001, vec![70001], "/".into()));
        assert_eq!(resolved("web:"), resolved("web"));
        assert_eq!(resolved(":audio").1, 29);
    }

    #[test]
    fn unknown_names_and_ids_out_of_range_are_refused_in_dockers_words() {
        for (user, message) in [
            ("nosuch", "unable to find user nosuch: no matching entries in passwd file"),
            ("web:nosuch", "unable to find group nosuch: no matching entries in group file"),
            ("2147483648", "uids and gids must be in range 0-2147483647"),
            ("high", "uids and gids must be in range 0-2147483647"),
            ("0:4294967295", "uids and gids must be in range 0-2147483647"),
        ] {
            assert_eq!(database().resolve(user).unwrap_err().message, message, "{user}");
        }
    }

    #[test]
    fn additional_groups_are_appended_once() {
        let mut identity = database().resolve("web").unwrap();
        identity.add_groups([29, 7, 7]).unwrap();
        assert_eq!(identity.groups, [34, 29, 7]);
        assert!(identity.add_groups(0..70_000).is_err());
    }

    proptest! {
        #[test]
        fn no_file_and_no_user_string_panics(passwd in ".*", group in ".*", user in ".*") {
            let _ = Database::parse(&passwd, &group).resolve(&user);
        }

        #[test]
        fn what_passwd_says_is_what_its_name_resolves_to(
            name in "[a-z_][a-z0-9_-]{0,20}", uid in 0u32..=MAX_ID, gid in 0u32..=MAX_ID,
        ) {
            let database = Database::parse(&format!("{name}:x:{uid}:{gid}::/h:/s"), "");
            let identity = database.resolve(&name).unwrap();
            prop_assert_eq!((identity.uid, identity.gid, identity.groups), (uid, gid, vec![gid]));
        }
    }
}
