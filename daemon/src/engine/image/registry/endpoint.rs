//! Which servers hold a repository, and which of them need not prove who they are.

use std::net::IpAddr;

use http::Uri;

use crate::engine::image::reference::HUB;

const HUB_SERVER: &str = "registry-1.docker.io";

/// A server to ask, in the order of asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// `http` or `https`.
    pub scheme: &'static str,
    /// Host, and port if it is given.
    pub authority: String,
    /// What comes before `/v2/`, without a slash at its end; mostly empty.
    pub prefix: String,
    /// A mirror: it may fail, and gets no credentials.
    pub mirror: bool,
    /// Its certificate is not checked, and it may be spoken to in the clear.
    pub insecure: bool,
}

impl Endpoint {
    /// The URL of `path` below `/v2/`.
    pub fn url(&self, path: &str) -> String {
        format!("{}://{}{}/v2/{path}", self.scheme, self.authority, self.prefix)
    }
}

/// Registries that need not prove who they are: hosts by name, addresses by subnet. Loopback always is one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Insecure {
    hosts: Vec<String>,
    subnets: Vec<Subnet>,
}

#[derive(Debug, Clone, Copy)]
struct Subnet {
    address: IpAddr,
    length: u32,
}

/// Why a setting was refused, in dockerd's words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SettingError(String);

impl Insecure {
    /// From `insecure-registries`: hosts with or without port, and subnets.
    ///
    /// # Errors
    /// One is neither.
    pub(crate) fn parse(settings: &[String]) -> Result<Self, SettingError> {
        let mut insecure = Self::default();
        for setting in settings {
            let bare = setting
                .strip_prefix("http://")
                .or_else(|| setting.strip_prefix("https://"))
                .unwrap_or(setting)
                .trim_end_matches('/');
            if bare.contains("://") {
                return Err(SettingError(format!("insecure registry {setting} should not contain '://'")));
            }
            if let Some(subnet) = Subnet::parse(bare) {
                insecure.subnets.push(subnet);
            } else if bare.parse::<http::uri::Authority>().is_ok_and(|a| !a.as_str().contains('@')) {
                insecure.hosts.push(bare.to_ascii_lowercase());
            } else {
                let text = format!("insecure registry {setting} is not valid: invalid host {bare:?}");
                return Err(SettingError(text));
            }
        }
        Ok(insecure)
    }

    /// Whether `authority` (host, and port if given) is one. A name counts as the addresses it has only if
    /// subnets were configured.
    pub(crate) async fn contains(&self, authority: &str) -> bool {
        let authority = authority.to_ascii_lowercase();
        if self.hosts.contains(&authority) {
            return true;
        }
        let host = host_of(&authority);
        if host == "localhost" {
            return true;
        }
        if let Ok(address) = host.parse::<IpAddr>() {
            return self.contains_address(address);
        }
        if self.subnets.is_empty() {
            return false;
        }
        let Ok(addresses) = tokio::net::lookup_host((host, 0)).await else { return false };
        let addresses: Vec<_> = addresses.map(|address| address.ip()).collect();
        // One address inside is enough for Docker; all of them is what "this host is in that subnet" means.
        !addresses.is_empty() && addresses.into_iter().all(|address| self.contains_address(address))
    }

    fn contains_address(&self, address: IpAddr) -> bool {
        address.to_canonical().is_loopback() || self.subnets.iter().any(|subnet| subnet.contains(address))
    }
}

impl Subnet {
    fn parse(text: &str) -> Option<Self> {
        let (address, length) = text.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        let length = length.parse().ok().filter(|length| *length <= bits(address).1)?;
        Some(Self { address, length })
    }

    fn contains(&self, address: IpAddr) -> bool {
        let ((ours, width), (theirs, other)) = (bits(self.address), bits(address.to_canonical()));
        let shift = width - self.length;
        width == other && (shift == 128 || ours >> shift == theirs >> shift)
    }
}

fn bits(address: IpAddr) -> (u128, u32) {
    match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()), 32),
        IpAddr::V6(address) => (address.to_bits(), 128),
    }
}

/// The host of `host[:port]`, an IPv6 address without its brackets.
pub(super) fn host_of(authority: &str) -> &str {
    match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    }
}

/// Reads `registry-mirrors`.
///
/// # Errors
/// One is no plain http or https URL.
pub(super) fn parse_mirrors(settings: &[String]) -> Result<Vec<Endpoint>, SettingError> {
    let mut mirrors: Vec<Endpoint> = Vec::new();
    for setting in settings {
        let bad = |problem: &str| SettingError(format!("invalid mirror: {problem}"));
        let must = "must use either 'https://' or 'http://'";
        let Some((scheme, _)) = setting.split_once("://").filter(|(scheme, _)| !scheme.is_empty()) else {
            return Err(bad(&format!("no scheme specified for \"{setting}\": {must}")));
        };
        let scheme = match scheme {
            "http" => "http",
            "https" => "https",
            other => return Err(bad(&format!("unsupported scheme \"{other}\" in \"{setting}\": {must}"))),
        };
        if setting.contains(['?', '#']) {
            return Err(bad(&format!("query or fragment at end of the URI \"{setting}\"")));
        }
        let uri: Uri = setting.parse().map_err(|_| bad(&format!("\"{setting}\" is not a valid URI")))?;
        let authority = uri.authority().map(ToString::to_string).unwrap_or_default();
        if authority.contains('@') {
            return Err(bad("username/password not allowed in URI"));
        }
        let prefix = uri.path().trim_end_matches('/').to_owned();
        let mirror = Endpoint { scheme, authority, prefix, mirror: true, insecure: scheme == "http" };
        if !mirrors.contains(&mirror) {
            mirrors.push(mirror);
        }
    }
    Ok(mirrors)
}

/// The servers to ask for a repository of `domain`: for Docker Hub its mirrors, then itself; for an insecure
/// registry with TLS first, then in the clear.
pub(super) async fn endpoints(domain: &str, mirrors: &[Endpoint], insecure: &Insecure) -> Vec<Endpoint> {
    let plain = |scheme, authority: &str, insecure| Endpoint {
        scheme,
        authority: authority.to_owned(),
        prefix: String::new(),
        mirror: false,
        insecure,
    };
    if domain == HUB {
        let mut all = Vec::with_capacity(mirrors.len() + 1);
        for mirror in mirrors {
            let insecure = mirror.insecure || insecure.contains(&mirror.authority).await;
            all.push(Endpoint { insecure, ..mirror.clone() });
        }
        all.push(plain("https", HUB_SERVER, false));
        return all;
    }
    if insecure.contains(domain).await {
        vec![plain("https", domain, true), plain("http", domain, true)]
    } else {
        vec![plain("https", domain, false)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(ToString::to_string).collect()
    }

    #[tokio::test]
    async fn insecure_registries_are_those_configured_and_loopback() {
        let insecure = Insecure::parse(&strings(&[
            "10.0.0.0/8",
            "Reg.example:5000",
            "http://old.example",
            "2001:db8::/32",
        ]))
        .unwrap();
        for (authority, expected) in [
            ("127.0.0.1:5000", true),
            ("127.9.9.9", true),
            ("localhost:1", true),
            ("[::1]:5000", true),
            ("10.1.2.3:80", true),
            ("11.0.0.1", false),
            ("reg.example:5000", true),
            ("reg.invalid", false),
            ("old.example", true),
            ("[2001:db8::5]:1", true),
            ("[2001:db9::5]:1", false),
        ] {
            assert_eq!(insecure.contains(authority).await, expected, "{authority}");
        }
        assert!(Insecure::parse(&strings(&["0.0.0.0/0"])).unwrap().contains("8.8.8.8").await);
        assert!(!Insecure::default().contains("8.8.8.8").await);
    }

    #[test]
    fn bad_settings_are_refused() {
        for setting in ["ftp://x", "a b", "10.0.0.0/33", "user@host"] {
            assert!(Insecure::parse(&strings(&[setting])).is_err(), "{setting}");
        }
        for (setting, part) in [
            ("mirror.example", "no scheme specified"),
            ("ftp://mirror.example", "unsupported scheme"),
            ("https://a.example?x", "query or fragment"),
            ("https://u:p@a.example", "username/password not allowed"),
            ("https://", "not a valid URI"),
        ] {
            let error = parse_mirrors(&strings(&[setting])).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[tokio::test]
    async fn mirrors_come_before_the_hub() {
        let mirrors = parse_mirrors(&strings(&["http://127.0.0.1:5000/", "https://m.example/hub/"])).unwrap();
        let insecure = Insecure::default();
        let urls: Vec<_> =
            endpoints(HUB, &mirrors, &insecure).await.iter().map(|endpoint| endpoint.url("")).collect();
        assert_eq!(
            urls,
            ["http://127.0.0.1:5000/v2/", "https://m.example/hub/v2/", "https://registry-1.docker.io/v2/"]
        );
        let own = endpoints("127.0.0.1:5000", &mirrors, &insecure).await;
        assert_eq!(
            own.iter().map(|e| (e.scheme, e.mirror)).collect::<Vec<_>>(),
            [("https", false), ("http", false)]
        );
        assert_eq!(endpoints("r.example", &mirrors, &insecure).await.len(), 1);
    }
}
