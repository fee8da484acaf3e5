//! Holds a running container to its limits, at its start and when they change.
//!
//! ```text
//!   start:   boot ─▶ create ─▶ before_start ─▶ the workload runs
//!   update:  merge ─▶ restrain ─▶ record ─▶ answer      memory is plugged before the guest's limit rises
//!                        └ refused ─▶ the old limits again ─▶ error
//! ```
//! Before the workload nothing is held back: a boot is to be quick, and the guest's own mounts are not the
//! workload's.

use std::path::Path;

use bulkhead_agent_api::Call;

use super::{Container, memory, record::Record, state::State, workload::Workload};
use crate::{
    api::types::container::{HostConfig, UpdateResponse},
    engine::{Engine, Error, Name, Result, Shared, limits, spec},
    sandbox::{HostLimits, Rates, Sandbox},
};

/// Holds a sandbox that has been booted to a container's limits, as far as its creation has not done so.
///
/// # Errors
/// What is refused, in words.
pub(super) async fn before_start(sandbox: &Sandbox, record: &Record, data_root: &Path) -> Result<(), String> {
    let host = limits::host_limits(&record.host_config);
    if host != HostLimits::default() {
        sandbox.limit_cpus(&record.id, &host).map_err(|error| error.to_string())?;
    }
    let rates = limits::rates(&record.config, &record.host_config, data_root);
    if rates != Rates::default() {
        sandbox.set_rates(&record.id, rates).await.map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Holds a workload to limits that were changed while it was being started.
pub(super) async fn catch_up(shared: &Shared, workload: &Workload, record: &Record) {
    if let Err(error) = restrain(shared, workload, record, &record.host_config).await {
        tracing::error!(container = record.id, %error, "limits changed during the start do not hold yet");
    }
}

/// Holds a running workload to limits.
async fn restrain(shared: &Shared, workload: &Workload, record: &Record, host: &HostConfig) -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| Error::internal(error.to_string());
    let resources = Box::new(spec::updated_resources(host)?);
    let call = Call::Update { container: workload.guest().to_owned(), resources };
    let limit = async { workload.sandbox.call(call).await.map(drop).map_err(|error| failed(&error)) };
    let (sandbox, id) = (&workload.sandbox, &record.id);
    memory::resize((sandbox, id), host, &shared.config.vm, limit).await?;
    sandbox.limit_cpus(id, &limits::host_limits(host)).map_err(|error| failed(&error))?;
    let rates = limits::rates(&record.config, host, &shared.layout().data_root);
    sandbox.set_rates(id, rates).await.map_err(|error| failed(&error))
}

impl Engine {
    /// Changes its limits and its restart policy, of a running one at once.
    ///
    /// # Errors
    /// In dockerd's words; then nothing is changed.
    pub async fn container_update(&self, name: Name<'_>, request: HostConfig) -> Result<UpdateResponse> {
        let container = self.shared.registry.find(name)?;
        let data_root = &self.shared.layout().data_root;
        let record = container.view().record;
        spec::check_restart(&HostConfig { auto_remove: false, ..request.clone() })?;
        let mut warnings = limits::check(&record.config, &request, data_root, true)?;
        let cannot = |error: Error| Error {
            message: format!("Cannot update container {}: {}", container.id(), error.message),
            ..error
        };
        // One at a time: the last to be answered is the last to be in force.
        let _turn = container.updates().lock().await;
        let vcpus = self.update(&container, &request).await.map_err(cannot)?;
        warnings.extend(vcpus);
        Ok(UpdateResponse { warnings: Some(warnings).filter(|warnings| !warnings.is_empty()) })
    }

    async fn update(&self, container: &Container, request: &HostConfig) -> Result<Option<String>> {
        let view = container.view();
        let record = &view.record;
        if matches!(record.life.state, State::Removing(_) | State::Dead(_)) {
            return Err(Error::conflict("container is marked for removal and cannot be \"update\""));
        }
        let next = limits::merge(&record.host_config, request)?;
        if let Some(workload) = &view.workload
            && let Err(error) = restrain(&self.shared, workload, record, &next).await
        {
            // What was changed of it is taken back as far as it can be.
            if let Err(error) = restrain(&self.shared, workload, record, &record.host_config).await {
                tracing::warn!(container = record.id, %error, "old limits were not put back");
            }
            return Err(error);
        }
        let default = self.shared.config.vm.vcpus;
        let vcpus = |host: &HostConfig| limits::vcpus(host, default);
        let warning = view
            .workload
            .as_ref()
            .and_then(|_| limits::vcpus_warning(vcpus(&record.host_config), vcpus(&next)));
        container.ask(|reply| super::Command::Update(Box::new(next), reply)).await??;
        Ok(warning)
    }
}
