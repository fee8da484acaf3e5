//! The engine as a whole: `docker info` and `docker system df`.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::{
    Engine,
    container::{ListOptions, state::State},
    logs, spec,
};
use crate::{
    api::types::system::{
        Commit, DiskUsage, DiskUsageKinds, IndexInfo, Info, Plugins, RegistryConfig, Runtime, Swarm,
    },
    engine::{Result, image::STORAGE_DRIVER},
};

impl Engine {
    /// What `docker info` shows.
    pub async fn info(&self) -> Info {
        let shared = &self.shared;
        let config = &*shared.live.now();
        let (mut running, mut paused, mut stopped) = (0, 0, 0);
        let containers = shared.registry.all();
        for container in &containers {
            match &container.view().record.life.state {
                State::Running(now) if now.paused => paused += 1,
                State::Running(_) | State::Restarting(_) => running += 1,
                _ => stopped += 1,
            }
        }
        let host = rustix::system::uname();
        let daemon_id = std::fs::read_to_string(shared.layout().daemon_id()).unwrap_or_default();
        Info {
            id: daemon_id.trim().to_owned(),
            containers: count(containers.len()),
            containers_running: running,
            containers_paused: paused,
            containers_stopped: stopped,
            images: count(shared.images.count()),
            driver: STORAGE_DRIVER.into(),
            driver_status: Vec::new(),
            plugins: Plugins {
                volume: vec![super::volume::DRIVER.into()],
                network: ["bridge", "host", "null"].map(str::to_owned).to_vec(),
                authorization: Some(config.authorization_plugins.clone()).filter(|names| !names.is_empty()),
                log: logs::DRIVERS.map(str::to_owned).to_vec(),
            },
            memory_limit: true,
            // Guests have no swap.
            swap_limit: false,
            cpu_cfs_period: true,
            cpu_cfs_quota: true,
            cpu_shares: true,
            cpu_set: true,
            pids_limit: true,
            debug: config.debug,
            open_files: std::fs::read_dir("/proc/self/fd").map_or(-1, |fds| count(fds.count())),
            system_time: Timestamp::now().to_string(),
            logging_driver: config.log_driver.clone(),
            cgroup_driver: "none".into(),
            cgroup_version: "2".into(),
            event_listeners: count(shared.events.subscribers()),
            kernel_version: host.release().to_string_lossy().into_owned(),
            operating_system: operating_system(),
            os_type: "linux".into(),
            architecture: host.machine().to_string_lossy().into_owned(),
            index_server_address: "https://index.docker.io/v1/".into(),
            registry_config: self.registry_config(),
            cpus: std::thread::available_parallelism().map_or(1, |cpus| count(cpus.get())),
            mem_total: memory_total(),
            docker_root_dir: shared.layout().data_root.display().to_string(),
            name: host.nodename().to_string_lossy().into_owned(),
            labels: config.labels.clone(),
            server_version: env!("CARGO_PKG_VERSION").into(),
            runtimes: BTreeMap::from([(spec::RUNTIME.to_owned(), Runtime::default())]),
            default_runtime: spec::RUNTIME.into(),
            swarm: Swarm::default(),
            live_restore_enabled: true,
            // Docker's clients keep checkpoints behind it.
            experimental_build: true,
            containerd_commit: absent(),
            runc_commit: absent(),
            init_commit: absent(),
            security_options: vec!["name=seccomp,profile=builtin".into(), "name=cgroupns".into()],
            ..Info::default()
        }
    }

    fn registry_config(&self) -> RegistryConfig {
        let config = &*self.shared.live.now();
        let (networks, hosts): (Vec<_>, Vec<_>) =
            config.insecure_registries.iter().cloned().partition(|registry| registry.contains('/'));
        let hub = IndexInfo {
            name: "docker.io".into(),
            mirrors: config.registry_mirrors.clone(),
            secure: true,
            official: true,
        };
        let insecure = |name: String| {
            let info = IndexInfo { name: name.clone(), mirrors: Vec::new(), secure: false, official: false };
            (name, info)
        };
        RegistryConfig {
            insecure_registry_cidrs: [networks, vec!["::1/128".into(), "127.0.0.0/8".into()]].concat(),
            index_configs: hosts.into_iter().map(insecure).chain([("docker.io".to_owned(), hub)]).collect(),
            mirrors: config.registry_mirrors.clone(),
        }
    }

    /// What `docker system df` shows.
    ///
    /// # Errors
    /// A store that cannot be read.
    pub async fn disk_usage(&self, kinds: DiskUsageKinds) -> Result<DiskUsage> {
        let mut usage = DiskUsage::default();
        if kinds.images {
            let (layers_size, images) = self.shared.images.usage().await?;
            usage.layers_size = layers_size;
            usage.images = Some(images);
        }
        if kinds.containers {
            let options = ListOptions { all: true, size: true, ..ListOptions::default() };
            usage.containers = Some(self.container_list(options).await?);
        }
        if kinds.volumes {
            usage.volumes = Some(self.volume_usage().await);
        }
        usage.build_cache = kinds.build_cache.then(Vec::new);
        Ok(usage)
    }
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn absent() -> Commit {
    Commit { id: "N/A".into(), expected: String::new() }
}

fn operating_system() -> String {
    let text = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    line.map_or_else(|| "Linux".to_owned(), |name| name.trim_matches('"').to_owned())
}

fn memory_total() -> i64 {
    let info = rustix::system::sysinfo();
    let bytes = info.totalram.saturating_mul(u64::from(info.mem_unit));
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
