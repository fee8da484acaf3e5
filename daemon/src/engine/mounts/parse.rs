//! From `-v` and `--mount` to what they want. Pure.

use super::super::{Error, Result, spec::clean_target, volume};
use crate::api::types::container::Mount as Request;

/// A mount that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) destination: String,
    pub(super) source: WantedSource,
    pub(super) read_only: bool,
    pub(super) mode: String,
    pub(super) cached: bool,
}

/// Of what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum WantedSource {
    /// A volume; None: one without a name.
    Volume {
        name: Option<String>,
        no_copy: bool,
        subpath: String,
        labels: Option<std::collections::BTreeMap<String, String>>,
        options: Option<std::collections::BTreeMap<String, String>>,
    },
    /// A file of the host.
    Bind { path: String, create: bool, non_recursive: bool, propagation: String },
}

impl WantedSource {
    pub(super) fn volume(name: Option<String>) -> Self {
        Self::Volume { name, no_copy: false, subpath: String::new(), labels: None, options: None }
    }
}

/// A `-v` with a source: `source:target[:mode]`.
pub(super) fn bind(text: &str) -> Result<Wanted> {
    let invalid = || Error::invalid(format!("invalid volume specification: '{text}'"));
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, mode) = match parts.as_slice() {
        [target] => ("", *target, ""),
        // Nothing without a source has a mode.
        [_, mode] if Mode::parse(mode).is_ok() => return Err(invalid()),
        [source, target] => (*source, *target, ""),
        [source, target, mode] => (*source, *target, *mode),
        _ => return Err(invalid()),
    };
    if target.is_empty() || (source.is_empty() && parts.len() > 1) {
        return Err(invalid());
    }
    let parsed = Mode::parse(mode).map_err(|()| Error::invalid(format!("invalid mode: {mode}")))?;
    let destination = clean_target(target)?;
    let source = if source.starts_with('/') {
        if parsed.no_copy {
            return Err(Error::invalid(format!("invalid mode: {mode}")));
        }
        let propagation = propagation(parsed.propagation.unwrap_or_default())?;
        WantedSource::Bind { path: clean(source)?, create: true, non_recursive: false, propagation }
    } else if source.is_empty() {
        WantedSource::volume(None)
    } else {
        if parsed.propagation.is_some() {
            return Err(Error::invalid(format!("invalid mode: {mode}")));
        }
        volume::store::check_name(source)?;
        let mut wanted = WantedSource::volume(Some(source.to_owned()));
        if let WantedSource::Volume { no_copy, .. } = &mut wanted {
            *no_copy = parsed.no_copy;
        }
        wanted
    };
    let shown = match (&source, mode) {
        // As Docker shows it.
        (WantedSource::Volume { name: Some(_), .. }, "") => "z",
        (_, mode) => mode,
    };
    let (read_only, cached) = (parsed.read_only, parsed.cached);
    Ok(Wanted { destination, source, read_only, mode: shown.to_owned(), cached })
}

/// A `--mount` of type bind or volume; None for a tmpfs.
pub(super) fn mount(request: &Request) -> Result<Option<Wanted>> {
    let kind = request.kind.as_str();
    let wrong = |what: &str| Error::invalid(format!("invalid mount config for type \"{kind}\": {what}"));
    let source = match kind {
        "tmpfs" => return Ok(None),
        "bind" => {
            if request.volume_options.is_some() || request.tmpfs_options.is_some() {
                return Err(wrong("field VolumeOptions or TmpfsOptions must not be specified"));
            }
            if request.source.is_empty() {
                return Err(wrong("field Source must not be empty"));
            }
            if !request.source.starts_with('/') {
                return Err(wrong(&format!(
                    "invalid mount path: '{}' mount path must be absolute",
                    request.source
                )));
            }
            let options = request.bind_options.clone().unwrap_or_default();
            WantedSource::Bind {
                path: clean(&request.source)?,
                create: options.create_mountpoint,
                non_recursive: options.non_recursive,
                propagation: propagation(&options.propagation)?,
            }
        }
        "volume" => {
            if request.bind_options.is_some() || request.tmpfs_options.is_some() {
                return Err(wrong("field BindOptions or TmpfsOptions must not be specified"));
            }
            let options = request.volume_options.clone().unwrap_or_default();
            let driver = options.driver_config.unwrap_or_default();
            volume::check_driver(&driver.name)?;
            let name = (!request.source.is_empty()).then(|| request.source.clone());
            if let Some(name) = &name {
                volume::store::check_name(name)?;
            } else if !options.subpath.is_empty() {
                return Err(wrong("must not set Subpath when using anonymous volumes"));
            }
            if options.subpath.starts_with('/') || options.subpath.split('/').any(|part| part == "..") {
                return Err(wrong("subpath must be a relative path within the volume"));
            }
            WantedSource::Volume {
                name,
                no_copy: options.no_copy,
                subpath: options.subpath,
                labels: options.labels,
                options: driver.options,
            }
        }
        "image" | "cluster" | "npipe" => {
            return Err(Error::not_implemented(format!("mounts of type {kind} are not supported")));
        }
        _ => return Err(Error::invalid(format!("mount type unknown: {kind:?}"))),
    };
    if request.target.is_empty() {
        return Err(wrong("field Target must not be empty"));
    }
    let destination = clean_target(&request.target)?;
    let mode = if kind == "volume" { "z" } else { "" };
    let cached = matches!(request.consistency.as_str(), "cached" | "delegated");
    Ok(Some(Wanted { destination, source, read_only: request.read_only, mode: mode.to_owned(), cached }))
}

/// A `--volumes-from`: the container, and whether read-only.
pub(super) fn volumes_from(text: &str) -> Result<(&str, bool)> {
    let wrong = || Error::invalid(format!("malformed volumes-from specification: {text}"));
    match text.split_once(':').unwrap_or((text, "rw")) {
        ("", _) => Err(wrong()),
        (container, mode) => match Mode::parse(mode) {
            Ok(Mode { propagation: None, no_copy: false, read_only, .. }) => Ok((container, read_only)),
            _ => Err(Error::invalid(format!("invalid mode: {mode}"))),
        },
    }
}

/// A mount that spreads what is mounted later, to or from the host, cannot cross into another kernel.
fn propagation(text: &str) -> Result<String> {
    match text {
        "" => Ok("rprivate".into()),
        "private" | "rprivate" => Ok(text.to_owned()),
        "shared" | "rshared" | "slave" | "rslave" => Err(Error::invalid(format!(
            "the bind propagation {text} cannot be honoured: mounts do not spread between kernels"
        ))),
        _ => Err(Error::invalid(format!("invalid propagation mode: {text}"))),
    }
}

fn clean(path: &str) -> Result<String> {
    if path.contains('\0') {
        return Err(Error::invalid("a path contains a NUL byte"));
    }
    // The host's root may be a source, though no target.
    Ok(if path.split('/').all(|part| matches!(part, "" | ".")) { "/".into() } else { clean_target(path)? })
}

/// The words of a `-v`'s mode.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Mode<'a> {
    read_only: bool,
    no_copy: bool,
    cached: bool,
    propagation: Option<&'a str>,
}

impl<'a> Mode<'a> {
    fn parse(text: &'a str) -> Result<Self, ()> {
        let mut mode = Self::default();
        if text.is_empty() {
            return Ok(mode);
        }
        // Each subject once.
        let mut seen = [false; 5];
        for word in text.split(',') {
            let subject = match word {
                "ro" | "rw" => {
                    mode.read_only = word == "ro";
                    0
                }
                "z" | "Z" => 1,
                "nocopy" => {
                    mode.no_copy = true;
                    2
                }
                "cached" | "delegated" | "consistent" => {
                    mode.cached = word != "consistent";
                    3
                }
                "shared" | "rshared" | "slave" | "rslave" | "private" | "rprivate" => {
                    mode.propagation = Some(word);
                    4
                }
                _ => return Err(()),
            };
            match seen.get_mut(subject) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(()),
            }
        }
        Ok(mode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::container::{BindOptions, VolumeOptions};

    #[test]
    fn a_bind_says_where_from_where_to_and_how() {
        let found = bind("/host/./dir:/data/:ro,cached").unwrap();
        assert_eq!((found.destination.as_str(), found.read_only, found.cached), ("/data", true, true));
        assert!(matches!(found.source, WantedSource::Bind { path, create: true, .. } if path == "/host/dir"));
        let volume = bind("data:/data:nocopy").unwrap();
        assert!(matches!(
            volume.source,
            WantedSource::Volume { name: Some(name), no_copy: true, .. } if name == "data"
        ));
        assert_eq!(bind("data:/data").unwrap().mode, "z");
        assert!(matches!(bind("/:/host").unwrap().source, WantedSource::Bind { path, .. } if path == "/"));
        assert_eq!(bind("/only").unwrap().source, WantedSource::volume(None));
    }

    #[test]
    fn refusals_are_dockers() {
        for (text, message) in [
            ("", "invalid volume specification: ''"),
            ("/foo:rw", "invalid volume specification: '/foo:rw'"),
            ("a:b:c:d", "invalid volume specification: 'a:b:c:d'"),
            (":/data", "invalid volume specification: ':/data'"),
            ("/a:/b:rx", "invalid mode: rx"),
            ("/a:/b:ro,rw", "invalid mode: ro,rw"),
            ("/a:/b:nocopy", "invalid mode: nocopy"),
            ("vol:/b:rprivate", "invalid mode: rprivate"),
            ("vol:b", "invalid mount path: 'b' mount path must be absolute"),
            ("/a:/", "invalid specification: destination can't be '/'"),
        ] {
            assert_eq!(bind(text).unwrap_err().message, message);
        }
        assert!(bind("/a:/b:rshared").unwrap_err().message.contains("cannot be honoured"));
        assert!(bind("../a:/b").unwrap_err().message.contains("use absolute path"));
    }

    #[test]
    fn a_mount_is_checked_by_its_type() {
        let request = |kind: &str, source: &str, target: &str| Request {
            kind: kind.into(),
            source: source.into(),
            target: target.into(),
            ..Request::default()
        };
        let found = mount(&request("bind", "/h", "/t")).unwrap().unwrap();
        assert!(matches!(found.source, WantedSource::Bind { create: false, .. }));
        assert_eq!(mount(&request("tmpfs", "", "/t")).unwrap(), None);
        for (kind, source, target, message) in [
            ("bind", "", "/t", "invalid mount config for type \"bind\": field Source must not be empty"),
            ("volume", "v1", "", "invalid mount config for type \"volume\": field Target must not be empty"),
            ("what", "", "/t", "mount type unknown: \"what\""),
        ] {
            assert_eq!(mount(&request(kind, source, target)).unwrap_err().message, message);
        }
        let options = VolumeOptions { subpath: "../x".into(), ..VolumeOptions::default() };
        let outside = Request { volume_options: Some(options), ..request("volume", "v1", "/t") };
        assert!(mount(&outside).is_err());
        let options = BindOptions { propagation: "rslave".into(), ..BindOptions::default() };
        let spread = Request { bind_options: Some(options), ..request("bind", "/h", "/t") };
        assert!(mount(&spread).is_err());
    }

    #[test]
    fn volumes_from_has_a_mode() {
        assert_eq!(volumes_from("c1").unwrap(), ("c1", false));
        assert_eq!(volumes_from("c1:ro").unwrap(), ("c1", true));
        assert_eq!(volumes_from("c1:z").unwrap(), ("c1", false));
        assert!(volumes_from("").is_err() && volumes_from("c1:what").is_err());
    }
}
