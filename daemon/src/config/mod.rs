//! Flags and `daemon.json` → one validated [`Config`].
//!
//! ```text
//!  command line ─▶ Options ─┐  same names, same forms; an option in both is an error,
//!                           ├▶ Options ─▶ Config: typed, defaults filled in, checked
//!  daemon.json  ─▶ Options ─┘  and so is a key that is none
//! ```

mod confinement;
mod host;
mod options;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

pub use host::Host;
pub use options::Options;

use ipnet::IpNet;

use crate::{
    api::types::container::Ulimit,
    engine::network::{
        egress::policy::{Policy, PolicyError},
        ipam::PoolSpec,
    },
    layout::Layout,
    sandbox::Confinement,
};

/// The daemon's settings, valid and complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where the API is served, at least one.
    pub hosts: Vec<Host>,
    /// TLS of TCP hosts.
    pub tls: Tls,
    /// The group that may use Unix sockets: a name or number. The flag is whether the user chose it: then it
    /// must exist.
    pub group: (String, bool),
    /// Every path of the daemon's.
    pub layout: Layout,
    /// Where the daemon's pid is written.
    pub pidfile: PathBuf,
    /// More in the log and in `docker info`.
    pub debug: bool,
    /// The least level that is logged.
    pub log_level: tracing::Level,
    /// Whether the log is JSON, an object a line.
    pub log_json: bool,
    /// Where metrics are served besides the API.
    pub metrics: Option<String>,
    /// Plugins that are asked before every request and every answer, in this order.
    pub authorization_plugins: Vec<String>,
    /// Mirrors of Docker Hub, URLs without a trailing slash.
    pub registry_mirrors: Vec<String>,
    /// Hosts (`host[:port]`) and CIDR networks whose registries need no TLS.
    pub insecure_registries: Vec<String>,
    /// Layers that are fetched at once.
    pub max_concurrent_downloads: usize,
    /// How often a layer is tried.
    pub max_download_attempts: usize,
    /// The daemon's own labels, `name=value`.
    pub labels: Vec<String>,
    /// Containers' default log driver.
    pub log_driver: String,
    /// Its default options.
    pub log_opts: BTreeMap<String, String>,
    /// Run an init as PID 1 of containers that do not say.
    pub init: bool,
    /// Containers get no new privileges unless they say.
    pub no_new_privileges: bool,
    /// Bytes of containers' `/dev/shm`.
    pub shm_size: u64,
    /// Containers' resource limits.
    pub ulimits: BTreeMap<String, Ulimit>,
    /// Whether there is a default bridge network.
    pub bridge: bool,
    /// The default bridge's own address with its network's prefix; None: of the pools.
    pub bip: Option<IpNet>,
    /// MTU of networks that do not say, in bytes.
    pub mtu: u16,
    /// Blocks that networks' subnets are cut from; empty: Docker's.
    pub address_pools: Vec<PoolSpec>,
    /// What containers may reach that do not say; None: everything.
    pub egress: Option<Policy>,
    /// Name servers of containers; empty: the host's.
    pub dns: Vec<String>,
    /// Options of `resolv.conf`.
    pub dns_opts: Vec<String>,
    /// Search domains of `resolv.conf`.
    pub dns_search: Vec<String>,
    /// How microVMs are made.
    pub vm: VmDefaults,
}

/// What a microVM is made of when its container does not say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmDefaults {
    /// The VMM's executable.
    pub vmm: PathBuf,
    /// The guest kernel, an uncompressed `vmlinux`.
    pub kernel: PathBuf,
    /// The initramfs with the guest agent.
    pub initramfs: PathBuf,
    /// KVM's device.
    pub kvm: PathBuf,
    /// How VMMs are confined.
    pub confinement: Confinement,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// How much of the host's memory, in percent, must be available for guests to keep their page cache.
    pub reclaim_below_percent: u8,
    /// Size of the writable layer in GiB.
    pub disk_gib: u32,
    /// MiB of guest addresses at which a guest can map files of layers; 0: it reads them.
    pub window_mib: u32,
    /// Whether microVMs are clones of saved ones where they can be.
    pub templates: bool,
    /// The label of containers whose value tells tenants apart; None: there is one tenant.
    pub template_domain_label: Option<String>,
}

/// TLS of TCP hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tls {
    /// None was asked for: TCP hosts are refused.
    Unset,
    /// Refused by the user in so many words: TCP hosts are plain.
    Off,
    /// On.
    On {
        /// The server's certificate chain, PEM.
        cert: PathBuf,
        /// Its private key, PEM.
        key: PathBuf,
        /// Whose clients are let in, PEM; None: everyone's.
        client_ca: Option<PathBuf>,
    },
}

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("unable to configure the daemon with file {}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The file is not what it should be, or disagrees with the flags.
    #[error("unable to configure the daemon with file {}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        message: String,
    },
    /// An option's value is not valid.
    #[error("{0}")]
    Value(String),
}

/// Where `daemon.json` is looked for.
pub const DEFAULT_CONFIG_FILE: &str = "/etc/bulkhead/daemon.json";

impl Config {
    /// From flags and the file: `config_file`, or the default one if it exists.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(flags: &Options, config_file: Option<&Path>) -> Result<Self, ConfigError> {
        let path = config_file.unwrap_or(Path::new(DEFAULT_CONFIG_FILE));
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && config_file.is_none() => Vec::new(),
            Err(error) => return Err(ConfigError::Read { path: path.to_owned(), error }),
        };
        let options = options::merge(flags, &text)
            .map_err(|message| ConfigError::File { path: path.to_owned(), message })?;
        let nowhere = options.hosts.is_empty();
        let mut config = Self::from_options(options).map_err(ConfigError::Value)?;
        if nowhere && host::activated() {
            config.hosts = vec![Host::Fd(None)];
        }
        Ok(config)
    }

    fn from_options(options: Options) -> Result<Self, String> {
        let layout = Layout {
            data_root: absolute("data-root", options.data_root.clone(), "/var/lib/bulkhead")?,
            exec_root: absolute("exec-root", options.exec_root.clone(), "/run/bulkhead")?,
        };
        let confinement = confinement::from(&options, &layout)?;
        let tls = tls(options.tls, options.tlsverify, options.tlscacert, options.tlscert, options.tlskey);
        let hosts = hosts(&options.hosts, &tls)?;
        let debug = options.debug.unwrap_or(false);
        let log_level = log_level(options.log_level.as_deref(), debug)?;
        let log_driver = options.log_driver.unwrap_or_else(|| "json-file".into());
        if !crate::engine::logs::DRIVERS.contains(&log_driver.as_str()) {
            return Err(format!("logger: no log driver named '{log_driver}' is registered"));
        }
        let shm_size = match options.default_shm_size {
            Some(text) => crate::units::size(&text).ok_or_else(|| format!("invalid size: '{text}'"))?,
            None => 64 << 20,
        };
        Ok(Self {
            hosts,
            tls,
            group: (options.group.clone().unwrap_or_else(|| "docker".into()), options.group.is_some()),
            pidfile: options.pidfile.unwrap_or_else(|| layout.pidfile()),
            layout,
            debug,
            log_level,
            log_json: match options.log_format.as_deref() {
                None | Some("" | "text") => false,
                Some("json") => true,
                Some(other) => return Err(format!("invalid log format: {other}")),
            },
            metrics: options.metrics_addr.map(|address| host::tcp_address(&address)).transpose()?,
            authorization_plugins: options.authorization_plugins,
            registry_mirrors: options.registry_mirrors.iter().map(|m| mirror(m)).collect::<Result<_, _>>()?,
            insecure_registries: options
                .insecure_registries
                .iter()
                .map(|registry| insecure_registry(registry))
                .collect::<Result<_, _>>()?,
            max_concurrent_downloads: positive(
                "max concurrent downloads",
                options.max_concurrent_downloads,
                3,
            )?,
            max_download_attempts: positive("max download attempts", options.max_download_attempts, 5)?,
            labels: options.labels.into_iter().map(label).collect::<Result<_, _>>()?,
            log_driver,
            log_opts: options.log_opts.unwrap_or_default(),
            init: options.init.unwrap_or(false),
            no_new_privileges: options.no_new_privileges.unwrap_or(false),
            shm_size,
            ulimits: options.default_ulimits.unwrap_or_default(),
            bridge: bridge(options.bridge.as_deref())?,
            bip: options.bip.as_deref().map(bip).transpose()?,
            egress: options
                .egress
                .as_deref()
                .map(str::parse)
                .transpose()
                .map_err(|error: PolicyError| error.to_string())?,
            mtu: range("mtu", options.mtu.map(u32::from), 1500, 68..=65_535)?.try_into().unwrap_or(1500),
            address_pools: options
                .default_address_pools
                .iter()
                .map(|pool| PoolSpec::new(pool.base, pool.size))
                .collect::<Result<_, _>>()?,
            dns: addresses(options.dns)?,
            dns_opts: options.dns_opts,
            dns_search: options.dns_search,
            vm: VmDefaults {
                vmm: options.vmm.unwrap_or_else(default_vmm),
                kernel: options.kernel.unwrap_or_else(|| "/usr/lib/bulkhead/vmlinux".into()),
                initramfs: options.initramfs.unwrap_or_else(|| "/usr/lib/bulkhead/initramfs.cpio".into()),
                kvm: "/dev/kvm".into(),
                confinement,
                memory_mib: range("default-memory-mib", options.default_memory_mib, 512, 64..=1 << 20)?,
                vcpus: range("default-vcpus", options.default_vcpus.map(u32::from), default_vcpus(), 1..=64)?
                    .try_into()
                    .unwrap_or(1),
                reclaim_below_percent: range(
                    "reclaim-below-percent",
                    options.reclaim_below_percent.map(u32::from),
                    10,
                    0..=100,
                )?
                .try_into()
                .unwrap_or(10),
                disk_gib: range("default-disk-gib", options.default_disk_gib, 10, 1..=16 << 10)?,
                window_mib: window(options.layer_window_mib)?,
                templates: options.templates.unwrap_or(true),
                template_domain_label: domain_label(options.template_domain_label)?,
            },
        })
    }
}

/// See the ADR on layers in guests for the figures. The guest needs a page structure for each page of the window, 1/64 of
/// it, of memory that containers do not pay for: at most 8 MiB.
const DEFAULT_WINDOW_MIB: u32 = 0;
const MAX_WINDOW_MIB: u32 = 512;

/// A window is made of pieces of 2 MiB.
fn window(mib: Option<u32>) -> Result<u32, String> {
    let mib = range("layer-window-mib", mib, DEFAULT_WINDOW_MIB, 0..=MAX_WINDOW_MIB)?;
    if mib.is_multiple_of(2) { Ok(mib) } else { Err(format!("layer-window-mib: {mib} is odd")) }
}

/// vCPUs of a microVM when nobody says how many: two run a workload beside its kernel's work, and cost little
/// while idle.
fn default_vcpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(1)).min(2)
}

fn hosts(texts: &[String], tls: &Tls) -> Result<Vec<Host>, String> {
    let mut hosts = Vec::new();
    for text in texts {
        let host = Host::parse(text, matches!(tls, Tls::On { .. }))?;
        if matches!(host, Host::Tcp(_)) && *tls == Tls::Unset {
            return Err(format!(
                "refusing to serve the API on {text} without TLS, since whoever reaches it is root on this machine: \
                 use --tlsverify with --tlscacert, --tlscert and --tlskey, or say --tls=false"
            ));
        }
        if !hosts.contains(&host) {
            hosts.push(host);
        }
    }
    // Each of the sockets is taken once.
    if hosts.contains(&Host::Fd(None)) && hosts.iter().any(|host| matches!(host, Host::Fd(Some(_)))) {
        return Err("fd:// is every socket that systemd passes: no other fd:// can stand beside it".into());
    }
    if hosts.is_empty() {
        hosts.push(Host::default());
    }
    Ok(hosts)
}

fn tls(
    tls: Option<bool>,
    verify: Option<bool>,
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
) -> Tls {
    let default = |file: &str| Path::new("/etc/bulkhead").join(file);
    let verify_on = verify == Some(true);
    if verify_on || tls == Some(true) {
        let client_ca = verify_on.then(|| ca.unwrap_or_else(|| default("ca.pem")));
        let cert = cert.unwrap_or_else(|| default("cert.pem"));
        Tls::On { cert, key: key.unwrap_or_else(|| default("key.pem")), client_ca }
    } else if tls == Some(false) || verify == Some(false) {
        Tls::Off
    } else {
        Tls::Unset
    }
}

fn log_level(text: Option<&str>, debug: bool) -> Result<tracing::Level, String> {
    use tracing::Level;
    Ok(match text.map(str::to_lowercase).as_deref() {
        None | Some("info") if debug => Level::DEBUG,
        None | Some("info") => Level::INFO,
        Some("panic" | "fatal" | "error") => Level::ERROR,
        Some("warn") => Level::WARN,
        Some("debug") => Level::DEBUG,
        Some("trace") => Level::TRACE,
        Some(other) => return Err(format!("invalid logging level: {other}")),
    })
}

fn absolute(name: &str, path: Option<PathBuf>, default: &str) -> Result<PathBuf, String> {
    let path = path.unwrap_or_else(|| default.into());
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(format!("{name} must be an absolute path: {}", path.display()))
    }
}

fn mirror(text: &str) -> Result<String, String> {
    let uri: http::Uri =
        text.parse().map_err(|_| format!("invalid mirror: {text:?} is not a valid registry mirror"))?;
    match uri.scheme_str() {
        Some("http" | "https") => {}
        _ => {
            return Err(format!(
                "invalid mirror: no scheme specified for {text:?}: must use either 'https://' or 'http://'"
            ));
        }
    }
    if uri.query().is_some() || text.contains('#') {
        return Err(format!("invalid mirror: query or fragment at end of the URI {text:?}"));
    }
    if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err("invalid mirror: username/password not allowed in URI".into());
    }
    Ok(text.trim_end_matches('/').to_owned())
}

fn insecure_registry(text: &str) -> Result<String, String> {
    if text.contains("://") {
        return Err(format!("insecure registry {text} should not contain '://'"));
    }
    if text.is_empty() || text.starts_with('-') || text.ends_with('-') {
        return Err(format!("invalid insecure registry: {text:?}"));
    }
    Ok(text.to_owned())
}

fn label(text: String) -> Result<String, String> {
    match text.split_once('=') {
        Some((name, _)) if !name.is_empty() => Ok(text),
        _ => Err(format!("bad attribute format: {text}")),
    }
}

fn domain_label(key: Option<String>) -> Result<Option<String>, String> {
    match key {
        Some(key) if key.is_empty() || key.contains('=') => {
            Err(format!("invalid template-domain-label {key:?}: the key of a label is expected"))
        }
        key => Ok(key),
    }
}

fn addresses(texts: Vec<String>) -> Result<Vec<String>, String> {
    match texts.iter().find(|text| text.parse::<std::net::IpAddr>().is_err()) {
        Some(wrong) => Err(format!("{wrong} is not an ip address")),
        None => Ok(texts),
    }
}

/// `--bridge`: there is none, or the daemon's own; one that others have made is theirs.
fn bridge(text: Option<&str>) -> Result<bool, String> {
    match text {
        None | Some("") => Ok(true),
        Some("none") => Ok(false),
        Some(other) => Err(format!("invalid bridge {other:?}: the daemon makes its own, or none")),
    }
}

/// `--bip`: an address and its network.
fn bip(text: &str) -> Result<IpNet, String> {
    let net: IpNet =
        text.parse().map_err(|_| format!("invalid bip: {text:?} is not an address with a prefix"))?;
    if net.addr().is_ipv6() || net.addr() == net.network() || net.prefix_len() > 30 {
        return Err(format!("invalid bip: {text:?} is not an IPv4 address in a network"));
    }
    Ok(net)
}

fn positive(name: &str, value: Option<i64>, default: usize) -> Result<usize, String> {
    match value {
        None | Some(0) => Ok(default),
        Some(value) => usize::try_from(value).map_err(|_| format!("invalid {name}: {value}")),
    }
}

fn range(
    name: &str,
    value: Option<u32>,
    default: u32,
    valid: std::ops::RangeInclusive<u32>,
) -> Result<u32, String> {
    let value = value.unwrap_or(default);
    if valid.contains(&value) {
        Ok(value)
    } else {
        Err(format!("invalid {name} {value}: must be between {} and {}", valid.start(), valid.end()))
    }
}

/// The VMM that lies beside this executable, since they are installed and built together.
fn default_vmm() -> PathBuf {
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("bulkhead-vmm")));
    beside.unwrap_or_else(|| "/usr/bin/bulkhead-vmm".into())
}

#[cfg(test)]
mod tests;
