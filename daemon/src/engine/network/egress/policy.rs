//! What a container may reach: the text of a label or of the daemon's setting → targets. Pure.
//!
//! ```text
//!   deny
//!   allow:TARGET,…      TARGET  example.org           the name, port 443
//!                               *.example.org:5432    every name below it, that port
//!                               example.org:*         every TCP port
//!                               internal:git.corp     the same of a name that leads to addresses that are not public
//!                               10.1.0.0/16           everything there, by whatever protocol
//!                               10.1.2.3:5432         that port, TCP and UDP
//!                               [fd00::/64]:53
//! ```

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
};

use ipnet::IpNet;

/// The label of a container.
pub const LABEL: &str = "bulkhead.egress";

/// More is a mistake: each is a rule.
const MAX_TARGETS: usize = 256;

/// The port of a name without one.
pub const HTTPS: u16 = 443;

/// What may be reached. Everything else may not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    targets: Vec<Target>,
}

/// One thing that may be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Target {
    Network(IpNet, Option<u16>),
    Name(NameTarget),
}

/// A name that may be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NameTarget {
    /// In lower case, without `*.` and without a final dot.
    name: String,
    /// Whether it is the names below that are meant.
    below: bool,
    /// None: every one.
    pub port: Option<u16>,
    /// Whether it may lead to addresses that are not public.
    pub internal: bool,
}

/// Why a policy makes no sense; for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid egress policy: {0}")]
pub struct PolicyError(String);

impl NameTarget {
    /// Whether a name, in lower case and without a final dot, is meant.
    pub fn is(&self, name: &str) -> bool {
        if self.below {
            name.strip_suffix(&self.name).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
        } else {
            name == self.name
        }
    }

    /// Whether it may lead to an address.
    pub fn may_lead_to(&self, address: IpAddr) -> bool {
        self.internal || is_public(address)
    }
}

impl Policy {
    /// The networks that may be reached, with their ports.
    pub fn networks(&self) -> impl Iterator<Item = (IpNet, Option<u16>)> {
        self.targets.iter().filter_map(|target| match target {
            Target::Network(network, port) => Some((*network, *port)),
            Target::Name(_) => None,
        })
    }

    /// The targets that a name is meant by.
    pub fn names<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a NameTarget> {
        self.targets.iter().filter_map(move |target| match target {
            Target::Name(target) if target.is(name) => Some(target),
            _ => None,
        })
    }

    /// Whether any target is a name.
    pub fn has_names(&self) -> bool {
        self.targets.iter().any(|target| matches!(target, Target::Name(_)))
    }
}

impl FromStr for Policy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let text = text.trim();
        if text == "deny" {
            return Ok(Self::default());
        }
        let wrong = || PolicyError(format!("{text:?} is neither \"deny\" nor \"allow:\" and a list"));
        let list = text.strip_prefix("allow:").ok_or_else(wrong)?;
        let targets = list.split(',').map(|target| target.trim().parse());
        let targets = targets.collect::<Result<Vec<Target>, _>>()?;
        if targets.len() > MAX_TARGETS {
            return Err(PolicyError(format!(
                "{} targets, of which there may be {MAX_TARGETS}",
                targets.len()
            )));
        }
        Ok(Self { targets })
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.targets.is_empty() {
            return f.write_str("deny");
        }
        for (index, target) in self.targets.iter().enumerate() {
            f.write_str(if index == 0 { "allow:" } else { "," })?;
            match target {
                Target::Network(network, None) => write!(f, "{network}")?,
                Target::Network(network, Some(port)) if network.addr().is_ipv6() => {
                    write!(f, "[{network}]:{port}")?;
                }
                Target::Network(network, Some(port)) => write!(f, "{network}:{port}")?,
                Target::Name(NameTarget { name, below, port, internal }) => {
                    let (internal, below) =
                        (if *internal { "internal:" } else { "" }, if *below { "*." } else { "" });
                    let port = port.map_or_else(|| "*".to_owned(), |port| port.to_string());
                    write!(f, "{internal}{below}{name}:{port}")?;
                }
            }
        }
        Ok(())
    }
}

impl FromStr for Target {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let wrong = |why: &str| PolicyError(format!("{text:?}: {why}"));
        if let Some(network) = network(text) {
            return Ok(Self::Network(network, None));
        }
        let port = |port: &str| match port.parse::<u16>() {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(wrong("not a port")),
        };
        if let Some((address, rest)) = text.strip_prefix('[').and_then(|text| text.split_once(']')) {
            let network = network(address).ok_or_else(|| wrong("not an address or a network"))?;
            let rest = rest.strip_prefix(':').ok_or_else(|| wrong("a port is missing"))?;
            return Ok(Self::Network(network, Some(port(rest)?)));
        }
        if let Some((address, rest)) = text.rsplit_once(':')
            && let Some(network) = network(address)
        {
            return Ok(Self::Network(network, Some(port(rest)?)));
        }
        let (internal, text) = match text.strip_prefix("internal:") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let (name, port) = match text.split_once(':') {
            None => (text, Some(HTTPS)),
            Some((name, "*")) => (name, None),
            Some((name, number)) => (name, Some(port(number)?)),
        };
        let (below, name) = match name.strip_prefix("*.") {
            Some(name) => (true, name),
            None => (false, name),
        };
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        if !is_domain(&name) {
            return Err(wrong("neither a network nor a domain's name"));
        }
        Ok(Self::Name(NameTarget { name, below, port, internal }))
    }
}

fn network(text: &str) -> Option<IpNet> {
    let network: IpNet = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).ok()?;
    // What has bits that its prefix does not have was meant otherwise.
    (network.trunc() == network).then_some(network)
}

fn is_domain(name: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    // One of digits and dots alone is an address that is none.
    name.len() <= 253 && name.split('.').all(is_label) && name.bytes().any(|byte| byte.is_ascii_alphabetic())
}

/// Whether an address is one of the internet's, and so nobody's of this site: an allowed name must not be a way to
/// what is inside, whatever its owner makes it lead to.
pub fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            let [a, b, c, _] = address.octets();
            !(address.is_private()
                || address.is_loopback()
                || address.is_link_local()
                || address.is_multicast()
                || address.is_broadcast()
                || address.is_documentation()
                || a == 0
                || a >= 240
                // Carriers' own, protocol assignments, benchmarks.
                || (a == 100 && (64..128).contains(&b))
                || (a, b, c) == (192, 0, 0)
                || (a == 198 && (18..20).contains(&b)))
        }
        // 2000::/3 is what is given out; of that, those that stand for an IPv4 address count as it.
        IpAddr::V6(address) => match address.segments() {
            [0x2002, high, low, ..] | [0x0064, 0xff9b, 0, 0, 0, 0, high, low] => {
                is_public(IpAddr::from([high.to_be_bytes(), low.to_be_bytes()].concat_four()))
            }
            [0x2001, 0 | 0x0db8, ..] => false,
            _ => address.to_ipv4_mapped().is_none() && is_global(address),
        },
    }
}

fn is_global(address: Ipv6Addr) -> bool {
    address.segments()[0] & 0xe000 == 0x2000
}

trait ConcatFour {
    fn concat_four(self) -> [u8; 4];
}

impl ConcatFour for [[u8; 2]; 2] {
    fn concat_four(self) -> [u8; 4] {
        let [[a, b], [c, d]] = self;
        [a, b, c, d]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_policy_is_read() {
        let text = "allow:Example.org, *.deb.example:80,internal:git:*,10.0.0.0/8,1.2.3.4:53,[fd00::/64]:443";
        let policy: Policy = text.parse().unwrap();
        assert_eq!(
            policy.to_string(),
            "allow:example.org:443,*.deb.example:80,internal:git:*,10.0.0.0/8,1.2.3.4/32:53,[fd00::/64]:443"
        );
        let ports = |name: &str| policy.names(name).map(|target| target.port).collect::<Vec<_>>();
        assert_eq!(ports("example.org"), [Some(443)]);
        assert_eq!(ports("a.deb.example"), [Some(80)]);
        assert_eq!(ports("a.b.deb.example"), [Some(80)]);
        assert_eq!(ports("git"), [None]);
        for other in ["www.example.org", "deb.example", "evildeb.example", ".deb.example", "org", ""] {
            assert_eq!(ports(other), [], "{other}");
        }
        assert_eq!(policy.networks().count(), 3);
        assert_eq!("deny".parse(), Ok(Policy::default()));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for text in [
            "",
            "allow",
            "allow:",
            "example.org",
            "allow:a,,b",
            "allow:10.0.0.1/8",
            "allow:1.2.3",
            "allow:1.2.3.4:0",
            "allow:1.2.3.4:x",
            "allow:name:70000",
            "allow:[fd00::1]",
            "allow:[nonsense]:1",
            "allow:a b",
            "allow:*",
            "allow:*.",
            "allow:a.*.b",
            "allow:http://example.org",
            "deny,example.org",
        ] {
            assert!(text.parse::<Policy>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn what_is_inside_is_not_public() {
        for inside in [
            "10.0.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "192.168.0.1",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "fe80::1",
            "fd00::1",
            "ff02::1",
            "::ffff:8.8.8.8",
            "2002:0a00:0001::",
            "64:ff9b::10.0.0.1",
            "2001:db8::1",
        ] {
            assert!(!is_public(inside.parse().unwrap()), "{inside}");
        }
        for outside in
            ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1", "2002:0808:0808::", "64:ff9b::8.8.8.8"]
        {
            assert!(is_public(outside.parse().unwrap()), "{outside}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_a_panic_and_what_is_read_is_shown_as_it_is_read(text in "(deny|allow:[a-c0-9.*:/,\\[\\]internal]{0,40}|.*)") {
            if let Ok(policy) = text.parse::<Policy>() {
                prop_assert_eq!(policy.to_string().parse(), Ok(policy));
            }
        }
    }
}
