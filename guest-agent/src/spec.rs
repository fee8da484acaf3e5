//! What the agent takes from an OCI spec, and what it refuses: nothing is silently left out.

use bulkhead_agent_api::{GROUP_ADD_ANNOTATION, INIT_ANNOTATION};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Process, Spec};

use crate::{
    error::{Result, invalid},
    seccomp::{self, Filter},
};

/// A spec that was checked, with what is derived from it.
#[derive(Debug)]
pub struct Checked {
    /// As it came.
    pub spec: Spec,
    /// The seccomp profile, compiled once for all processes.
    pub seccomp: Option<Filter>,
    /// Whether PID 1 is the agent's own init.
    pub init: bool,
    /// Names or numbers of further groups.
    pub group_add: Vec<String>,
}

impl Checked {
    /// Checks a spec.
    ///
    /// # Errors
    /// Of kind `Invalid`, naming what cannot be honoured.
    pub fn new(spec: Spec) -> Result<Self> {
        check_process(process(&spec)?)?;
        check_unsupported(&spec)?;
        let profile = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
        let seccomp = profile.map(seccomp::compile).transpose()?;
        let annotation = |name: &str| spec.annotations().as_ref().and_then(|all| all.get(name)).cloned();
        let init = annotation(INIT_ANNOTATION).is_some_and(|value| value == "true");
        let groups = annotation(GROUP_ADD_ANNOTATION).unwrap_or_default();
        let group_add = groups.split(',').filter(|group| !group.is_empty()).map(str::to_owned).collect();
        Ok(Self { spec, seccomp, init, group_add })
    }

    /// The container's own process.
    pub fn process(&self) -> Result<&Process> {
        process(&self.spec)
    }

    /// A namespace that the spec asks for.
    pub fn namespace(&self, kind: LinuxNamespaceType) -> Option<&LinuxNamespace> {
        let linux = self.spec.linux().as_ref()?;
        linux.namespaces().as_ref()?.iter().find(|namespace| namespace.typ() == kind)
    }
}

fn process(spec: &Spec) -> Result<&Process> {
    spec.process().as_ref().ok_or_else(|| invalid("the spec has no process"))
}

/// Checks a process, a container's own or an exec's.
///
/// # Errors
/// Of kind `Invalid`.
pub fn check_process(process: &Process) -> Result<()> {
    let args = process.args().as_deref().unwrap_or_default();
    if args.is_empty() {
        return Err(invalid("the process has no arguments"));
    }
    let env = process.env().as_deref().unwrap_or_default();
    if args.iter().chain(env).any(|text| text.contains('\0')) {
        return Err(invalid("an argument or environment variable contains a NUL"));
    }
    if !process.cwd().is_absolute() {
        return Err(invalid("Cwd must be an absolute path"));
    }
    let given = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    refuse(&[
        ("an AppArmor profile", given(process.apparmor_profile())),
        ("an SELinux label", given(process.selinux_label())),
        ("a scheduler policy", process.scheduler().is_some()),
        ("an I/O priority", process.io_priority().is_some()),
        ("a processor affinity", process.exec_cpu_affinity().is_some()),
    ])
}

fn check_unsupported(spec: &Spec) -> Result<()> {
    refuse(&[("hooks", spec.hooks().is_some())])?;
    let Some(linux) = spec.linux() else { return Err(invalid("the spec has no Linux part")) };
    refuse(&[
        ("user mappings", linux.uid_mappings().as_ref().is_some_and(|list| !list.is_empty())),
        ("group mappings", linux.gid_mappings().as_ref().is_some_and(|list| !list.is_empty())),
        ("Intel RDT", linux.intel_rdt().is_some()),
        ("a memory policy", linux.memory_policy().is_some()),
        ("network devices", linux.net_devices().as_ref().is_some_and(|map| !map.is_empty())),
        ("time offsets", linux.time_offsets().as_ref().is_some_and(|map| !map.is_empty())),
        ("a mount label", linux.mount_label().as_ref().is_some_and(|label| !label.is_empty())),
    ])?;
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    if !namespaces
        .iter()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Mount && namespace.path().is_none())
    {
        return Err(invalid("a container needs a mount namespace of its own"));
    }
    for namespace in namespaces {
        if matches!(namespace.typ(), LinuxNamespaceType::User | LinuxNamespaceType::Time) {
            return Err(invalid(format!("a {} namespace is not supported", namespace.typ())));
        }
    }
    Ok(())
}

fn refuse(features: &[(&str, bool)]) -> Result<()> {
    match features.iter().find(|(_, asked)| *asked) {
        Some((feature, _)) => Err(invalid(format!("{feature} cannot be had in the guest"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str) -> Result<Checked> {
        Checked::new(serde_json::from_str(json).unwrap())
    }

    const PROCESS: &str = r#""process":{"user":{},"cwd":"/","args":["a"]}"#;

    #[test]
    fn annotations_are_read() {
        let checked = check(&format!(
            r#"{{{PROCESS},"linux":{{"namespaces":[{{"type":"mount"}}]}},"annotations":
               {{"org.bulkhead.init":"true","org.bulkhead.group-add":"audio,44,"}}}}"#
        ))
        .unwrap();
        assert!(checked.init);
        assert_eq!(checked.group_add, ["audio", "44"]);
        assert!(checked.namespace(LinuxNamespaceType::Pid).is_none());
    }

    #[test]
    fn what_cannot_be_honoured_is_named() {
        for (json, expected) in [
            (r#"{"linux":{"namespaces":[{"type":"mount"}]}}"#.to_owned(), "no process"),
            (format!("{{{PROCESS}}}"), "no Linux part"),
            (format!(r#"{{{PROCESS},"linux":{{}}}}"#), "mount namespace"),
            (
                format!(r#"{{{PROCESS},"linux":{{"namespaces":[{{"type":"mount"}},{{"type":"user"}}]}}}}"#),
                "user namespace",
            ),
            (format!(r#"{{{PROCESS},"hooks":{{}},"linux":{{}}}}"#), "hooks"),
            (
                r#"{"process":{"user":{},"cwd":"here","args":["a"]},"linux":{}}"#.to_owned(),
                "Cwd must be an absolute path",
            ),
            (r#"{"process":{"user":{},"cwd":"/","args":[]},"linux":{}}"#.to_owned(), "no arguments"),
            (
                r#"{"process":{"user":{},"cwd":"/","args":["a"],"apparmorProfile":"x"},"linux":{}}"#
                    .to_owned(),
                "AppArmor",
            ),
        ] {
            let message = check(&json).unwrap_err().message;
            assert!(message.contains(expected), "{message:?} for {json}");
        }
    }
}
