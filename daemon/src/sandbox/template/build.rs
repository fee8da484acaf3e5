//! Builds one template: boots a machine with nothing attached, makes its agent quiet, saves it, ends it.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::phases::{Timeline, TimelineKind};

use super::super::{
    BootError, HostLimits, Leave, MachineSpec, Memory, Origin, SandboxSpec, SaveError, SaveOptions, new_id,
    plan, saved::Writing,
};

/// Why a template was not made. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub(super) enum BuildError {
    /// Its machine did not boot.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Its machine could not be saved.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// The files could not be finished.
    #[error("the template's files: {0}")]
    Store(#[source] io::Error),
}

/// When this returns the machine is gone, and `unfinished` holds what it saved.
pub(super) async fn build(
    machine: &MachineSpec,
    sandboxes: &Path,
    unfinished: PathBuf,
) -> Result<Writing, BuildError> {
    let spec = SandboxSpec {
        id: new_id(),
        parent: sandboxes.to_owned(),
        program: machine.program.clone(),
        vcpus: machine.vcpus,
        memory: Memory { base_mib: machine.memory_mib, plugged_mib: 0 },
        kernel: machine.kernel.clone(),
        initramfs: machine.initramfs.clone(),
        cmdline: machine.cmdline.clone(),
        disk: None,
        disks: Vec::new(),
        layers: Vec::new(),
        window_mib: machine.devices.fs.iter().map(|fs| fs.window_mib).max().unwrap_or(0),
        shares: Vec::new(),
        kvm: machine.kvm.clone(),
        limits: HostLimits::default(),
        confinement: machine.confinement.clone(),
        timeline: Timeline::begin("", TimelineKind::Run),
        origin: Origin::Cold,
    };
    let (sandbox, _events) = Box::pin(plan::boot(spec)).await?;
    let ends = plan::Ends::new(sandbox);
    let options = SaveOptions { into: unfinished, leave: Leave::Paused };
    let saved = ends.save(options, || Ok(())).await;
    // Not powered off: what it would still write is of no use to anybody.
    ends.destroy().await;
    Ok(saved?.0)
}
