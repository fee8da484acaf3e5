//! Lists of CPUs and memory nodes: `0-3,7`.

use std::{collections::BTreeSet, fs, sync::OnceLock};

/// The highest number that a list may have: more than any Linux has CPUs.
const MAX: u32 = 8192;

/// A set of CPUs or memory nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Set(BTreeSet<u32>);

impl Set {
    /// From a list as the kernel and Docker write it.
    ///
    /// # Errors
    /// In dockerd's words.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("invalid format: {text}");
        let mut set = BTreeSet::new();
        for part in text.split(',').filter(|_| !text.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |text: &str| text.trim().parse::<u32>().map_err(|_| wrong());
            let (first, last) = (number(first)?, number(last)?);
            if last < first {
                return Err(wrong());
            }
            if last > MAX {
                return Err(format!("value of out range, maximum is {MAX}"));
            }
            set.extend(first..=last);
        }
        Ok(Self(set))
    }

    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn within(&self, other: &Self) -> bool {
        self.0.is_subset(&other.0)
    }
}

/// What the host has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Host {
    /// The CPUs on line, as the kernel lists them.
    pub(super) cpus: String,
    /// The memory nodes on line, likewise.
    pub(super) mems: String,
}

impl Host {
    /// This one, as it was when it was first asked.
    pub(super) fn this() -> &'static Self {
        static HOST: OnceLock<Host> = OnceLock::new();
        HOST.get_or_init(|| {
            let list = |path: &str| {
                let text = fs::read_to_string(path).unwrap_or_default();
                Some(text.trim().to_owned()).filter(|text| Set::parse(text).is_ok_and(|set| set.len() > 0))
            };
            let parallelism = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            Self {
                cpus: list("/sys/devices/system/cpu/online")
                    .unwrap_or_else(|| format!("0-{}", parallelism() - 1)),
                mems: list("/sys/devices/system/node/online").unwrap_or_else(|| "0".into()),
            }
        })
    }

    /// How many CPUs.
    pub(super) fn count(&self) -> u32 {
        Set::parse(&self.cpus).map_or(1, |set| set.len().max(1))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        let numbers = |text: &str| Set::parse(text).map(|set| set.0.into_iter().collect::<Vec<_>>());
        assert_eq!(numbers(""), Ok(vec![]));
        assert_eq!(numbers("0-2,7,1"), Ok(vec![0, 1, 2, 7]));
        for wrong in ["a", "1-", "-1", "3-1", "1,,2", "0-1-2", "1;2"] {
            assert_eq!(numbers(wrong), Err(format!("invalid format: {wrong}")));
        }
        assert!(numbers("0-4294967295").unwrap_err().contains("out range"));
    }

    #[test]
    fn this_host_has_a_cpu_and_a_node() {
        let host = Host::this();
        assert!(host.count() > 0 && Set::parse(&host.mems).unwrap().len() > 0);
    }

    proptest! {
        #[test]
        fn no_text_is_too_much(text in "[0-9,a -]{0,40}") {
            if let Ok(set) = Set::parse(&text) {
                prop_assert!(set.len() <= MAX + 1);
            }
        }
    }
}
