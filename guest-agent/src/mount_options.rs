//! The options of an OCI mount: flags of the mount, its propagation, and data for the file system.

use rustix::mount::{MountFlags, MountPropagationFlags};

use crate::error::{Result, invalid};

/// The longest data string that the kernel takes, one page less its end.
const MAX_DATA: usize = 4095;

/// Parsed options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountOptions {
    /// Flags of the mount.
    pub flags: MountFlags,
    /// A bind mount, and whether with the mounts below.
    pub bind: Option<Bind>,
    /// The flags hold for the mounts below too (`rro` and its like).
    pub recursive: bool,
    /// To be set after mounting, in order.
    pub propagation: Vec<MountPropagationFlags>,
    /// What is not known here is for the file system, joined by commas.
    pub data: String,
}

/// What a bind mount takes along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bind {
    /// One mount.
    One,
    /// All below it too.
    Recursive,
}

/// Name, flag, and whether the option sets or clears it.
const FLAGS: [(&str, MountFlags, bool); 22] = [
    ("async", MountFlags::SYNCHRONOUS, false),
    ("atime", MountFlags::NOATIME, false),
    ("dev", MountFlags::NODEV, false),
    ("diratime", MountFlags::NODIRATIME, false),
    ("dirsync", MountFlags::DIRSYNC, true),
    ("exec", MountFlags::NOEXEC, false),
    ("iversion", MountFlags::empty(), true),
    ("noatime", MountFlags::NOATIME, true),
    ("nodev", MountFlags::NODEV, true),
    ("nodiratime", MountFlags::NODIRATIME, true),
    ("noexec", MountFlags::NOEXEC, true),
    ("norelatime", MountFlags::RELATIME, false),
    ("nostrictatime", MountFlags::STRICTATIME, false),
    ("nosuid", MountFlags::NOSUID, true),
    ("nosymfollow", MountFlags::NOSYMFOLLOW, true),
    ("relatime", MountFlags::RELATIME, true),
    ("ro", MountFlags::RDONLY, true),
    ("rw", MountFlags::RDONLY, false),
    ("strictatime", MountFlags::STRICTATIME, true),
    ("suid", MountFlags::NOSUID, false),
    ("symfollow", MountFlags::NOSYMFOLLOW, false),
    ("sync", MountFlags::SYNCHRONOUS, true),
];

/// The same for a mount and all below it.
const RECURSIVE: [(&str, MountFlags, bool); 8] = [
    ("rro", MountFlags::RDONLY, true),
    ("rrw", MountFlags::RDONLY, false),
    ("rnosuid", MountFlags::NOSUID, true),
    ("rsuid", MountFlags::NOSUID, false),
    ("rnodev", MountFlags::NODEV, true),
    ("rdev", MountFlags::NODEV, false),
    ("rnoexec", MountFlags::NOEXEC, true),
    ("rexec", MountFlags::NOEXEC, false),
];

impl MountOptions {
    /// Parses the options of one mount.
    ///
    /// # Errors
    /// Of kind `Invalid`: an option that cannot be honoured here, or too much data.
    pub fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut parsed = Self {
            flags: MountFlags::empty(),
            bind: None,
            recursive: false,
            propagation: Vec::new(),
            data: String::new(),
        };
        for option in options {
            parsed.take(option)?;
        }
        if parsed.data.len() > MAX_DATA {
            return Err(invalid("the options of a mount are too long"));
        }
        Ok(parsed)
    }

    fn take(&mut self, option: &str) -> Result<()> {
        if let Some((_, flag, set)) = FLAGS.iter().find(|(name, ..)| *name == option) {
            self.flags.set(*flag, *set);
        } else if let Some((_, flag, set)) = RECURSIVE.iter().find(|(name, ..)| *name == option) {
            self.flags.set(*flag, *set);
            self.recursive = true;
        } else if let Some(propagation) = propagation(option) {
            self.propagation.push(propagation);
        } else {
            match option {
                "bind" => self.bind = Some(self.bind.unwrap_or(Bind::One)),
                "rbind" => self.bind = Some(Bind::Recursive),
                "defaults" | "" => {}
                "tmpcopyup" | "idmap" | "ridmap" | "remount" | "move" => {
                    return Err(invalid(format!("the mount option {option:?} is not supported")));
                }
                _ if option.contains([',', '\0']) => {
                    return Err(invalid(format!("the mount option {option:?} is not valid")));
                }
                _ => {
                    if !self.data.is_empty() {
                        self.data.push(',');
                    }
                    self.data.push_str(option);
                }
            }
        }
        Ok(())
    }
}

/// `private`, `rshared` and their like.
pub fn propagation(option: &str) -> Option<MountPropagationFlags> {
    let (kind, recursive) = match option.strip_prefix('r') {
        Some(kind) => (kind, MountPropagationFlags::REC),
        None => (option, MountPropagationFlags::empty()),
    };
    let flag = match kind {
        "private" => MountPropagationFlags::PRIVATE,
        "shared" => MountPropagationFlags::SHARED,
        "slave" => MountPropagationFlags::DOWNSTREAM,
        "unbindable" => MountPropagationFlags::UNBINDABLE,
        _ => return None,
    };
    Some(flag | recursive)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn dockers_tmpfs_options_are_split_into_flags_and_data() {
        let options = ["nosuid", "strictatime", "mode=755", "size=65536k", "noexec", "exec"];
        let parsed = MountOptions::parse(options).unwrap();
        assert_eq!(parsed.flags, MountFlags::NOSUID | MountFlags::STRICTATIME);
        assert_eq!(parsed.data, "mode=755,size=65536k");
        assert_eq!(parsed.bind, None);
    }

    #[test]
    fn binds_and_propagation_are_recognised() {
        let parsed = MountOptions::parse(["rbind", "bind", "rro", "rprivate"]).unwrap();
        assert_eq!(parsed.bind, Some(Bind::Recursive));
        assert!(parsed.recursive && parsed.flags.contains(MountFlags::RDONLY));
        assert_eq!(parsed.propagation, [MountPropagationFlags::PRIVATE | MountPropagationFlags::REC]);
        assert_eq!(propagation("slave"), Some(MountPropagationFlags::DOWNSTREAM));
        assert_eq!(propagation("rubbish"), None);
    }

    #[test]
    fn what_would_be_ignored_or_smuggled_is_refused() {
        for option in ["tmpcopyup", "idmap", "size=1,exec", "a\0b"] {
            assert!(MountOptions::parse([option]).is_err(), "{option:?}");
        }
        let long = "x".repeat(5000);
        assert!(MountOptions::parse([long.as_str()]).is_err());
    }

    proptest! {
        #[test]
        fn the_last_of_two_opposites_wins(order in prop::collection::vec(prop::bool::ANY, 1..8)) {
            let options = order.iter().map(|ro| if *ro { "ro" } else { "rw" });
            let parsed = MountOptions::parse(options).unwrap();
            prop_assert_eq!(Some(&parsed.flags.contains(MountFlags::RDONLY)), order.last());
        }
    }
}
