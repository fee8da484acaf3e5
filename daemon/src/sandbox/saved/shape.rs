//! What a machine is made of, and whether a saved one can go on here.

use std::{
    io,
    path::PathBuf,
    sync::{LazyLock, OnceLock},
};

use bulkhead_vmm_api::DeviceConfig;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::digest::Digests;
use crate::sandbox::Confinement;

/// The programs and numbers that a machine is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineSpec {
    /// The VMM's executable.
    pub program: PathBuf,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The initramfs with the agent.
    pub initramfs: PathBuf,
    /// The guest kernel's command line.
    pub cmdline: String,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// The device set.
    pub devices: DeviceConfig,
    /// `/dev/kvm`.
    pub kvm: PathBuf,
    /// How the VMM that makes it is confined; no part of the shape.
    pub confinement: Confinement,
}

/// Everything that must be equal for a machine to go on from a saved one: contents, not paths.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    vmm: String,
    kernel: String,
    initramfs: String,
    cmdline: String,
    vcpus: u8,
    memory_mib: u32,
    devices: DeviceConfig,
    /// The processor as KVM shows it to guests.
    cpu: String,
    /// The host kernel's release: what its KVM saves, another's need not take back.
    host: String,
}

impl Shape {
    /// The shape of a machine whose files have been read before; costs a few stats.
    pub(crate) fn known(spec: &MachineSpec, digests: &Digests) -> Option<Self> {
        let [vmm, kernel, initramfs] =
            [&spec.program, &spec.kernel, &spec.initramfs].map(|path| digests.known(path));
        Some(Self::of(spec, [vmm?, kernel?, initramfs?], CPU.get()?.clone()))
    }

    /// The shape of a machine; its files are read if need be. Blocks.
    ///
    /// # Errors
    /// A file that cannot be read, or no usable KVM.
    pub(crate) fn read(spec: &MachineSpec, digests: &Digests) -> io::Result<Self> {
        let files =
            [digests.read(&spec.program)?, digests.read(&spec.kernel)?, digests.read(&spec.initramfs)?];
        Ok(Self::of(spec, files, cpu()?))
    }

    /// Makes [`Shape::known`] answer for machines of these files. Blocks.
    ///
    /// # Errors
    /// As of [`Shape::read`].
    pub(crate) fn warm_up(files: &[PathBuf], digests: &Digests) -> io::Result<()> {
        files.iter().try_for_each(|path| digests.read(path).map(drop))?;
        cpu().map(drop)
    }

    fn of(spec: &MachineSpec, [vmm, kernel, initramfs]: [String; 3], cpu: String) -> Self {
        Self {
            vmm,
            kernel,
            initramfs,
            cmdline: spec.cmdline.clone(),
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            devices: spec.devices.clone(),
            cpu,
            host: HOST.clone(),
        }
    }

    /// The name of this shape's template in a tenant's domain.
    pub(crate) fn key(&self, domain: Option<&str>) -> String {
        let mut digest = Sha256::new();
        let shape = serde_json::to_vec(self).unwrap_or_default();
        digest.update((shape.len() as u64).to_le_bytes());
        digest.update(&shape);
        // "No domain" is not the domain of an empty name.
        digest.update([u8::from(domain.is_some())]);
        digest.update(domain.unwrap_or_default());
        hex::encode(digest.finalize())
    }

    /// In words, the first thing in which a machine here differs from this one so that this one cannot go on.
    /// None: nothing. (What it was booted from is in its memory, and may have changed since.)
    pub fn difference(&self, here: &Self) -> Option<&'static str> {
        [
            (self.vmm != here.vmm, "the VMM"),
            (self.vcpus != here.vcpus, "the number of vCPUs"),
            (self.memory_mib != here.memory_mib, "the guest's memory"),
            (self.devices != here.devices, "the device set"),
            (self.cpu != here.cpu, "the host's processor"),
            (self.host != here.host, "the host's kernel"),
        ]
        .into_iter()
        .find_map(|(differs, what)| differs.then_some(what))
    }

    /// The guest's memory in MiB.
    pub fn memory_mib(&self) -> u32 {
        self.memory_mib
    }

    /// The number of vCPUs.
    pub fn vcpus(&self) -> u8 {
        self.vcpus
    }
}

fn cpu() -> io::Result<String> {
    if let Some(cpu) = CPU.get() {
        return Ok(cpu.clone());
    }
    let cpu = crate::check::guest_cpu()?;
    Ok(CPU.get_or_init(|| cpu).clone())
}

/// It does not change while this process runs.
static CPU: OnceLock<String> = OnceLock::new();

static HOST: LazyLock<String> =
    LazyLock::new(|| rustix::system::uname().release().to_string_lossy().into_owned());

/// A shape for tests.
#[cfg(test)]
pub(crate) fn sample(vcpus: u8) -> Shape {
    let spec = MachineSpec {
        program: "/vmm".into(),
        kernel: "/kernel".into(),
        initramfs: "/initramfs".into(),
        cmdline: "quiet".into(),
        vcpus,
        memory_mib: 128,
        devices: DeviceConfig::default(),
        kvm: "/dev/kvm".into(),
        confinement: Confinement::default(),
    };
    Shape::of(&spec, ["a".into(), "b".into(), "c".into()], "cpu".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_differs_has_another_key_and_is_named() {
        let shape = sample(1);
        let key = shape.key(None);
        assert_eq!(shape.clone().key(None), key);
        assert_eq!(shape.difference(&shape), None);
        type Change = (fn(&mut Shape), Option<&'static str>);
        let changes: [Change; 9] = [
            (|shape| shape.vmm.push('x'), Some("the VMM")),
            (|shape| shape.kernel.push('x'), None),
            (|shape| shape.initramfs.push('x'), None),
            (|shape| shape.cmdline.push('x'), None),
            (|shape| shape.vcpus += 1, Some("the number of vCPUs")),
            (|shape| shape.memory_mib += 1, Some("the guest's memory")),
            (|shape| shape.devices.rng = true, Some("the device set")),
            (|shape| shape.cpu.push('x'), Some("the host's processor")),
            (|shape| shape.host.push('x'), Some("the host's kernel")),
        ];
        for (change, what) in changes {
            let mut other = shape.clone();
            change(&mut other);
            assert_ne!(other.key(None), key, "{what:?}");
            assert_eq!(shape.difference(&other), what);
        }
        let keys = [shape.key(Some("")), shape.key(Some("a")), shape.key(Some("b"))];
        assert!(!keys.contains(&key) && keys[0] != keys[1] && keys[1] != keys[2]);
    }
}
