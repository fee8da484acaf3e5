//! bollard, the library that Rust programs use, with types of its own for everything that comes and goes.

use std::collections::HashMap;

use bollard::Docker;
use bollard::exec::{CreateExecOptions, StartExecResults};
use bollard::models::{ContainerCreateBody, HealthConfig, HostConfig};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, EventsOptionsBuilder, ListContainersOptionsBuilder, LogsOptionsBuilder,
    RemoveContainerOptionsBuilder, StatsOptionsBuilder, WaitContainerOptions,
};
use bulkhead_tests::Suite;
use futures_util::{StreamExt, TryStreamExt};

use super::Test;

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

#[test]
fn a_rust_program_runs_a_container_from_create_to_remove() -> Test {
    let socket = Suite::from_env()?.docker_socket;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let docker = Docker::connect_with_unix(&socket, 300, bollard::API_DEFAULT_VERSION)?
            .negotiate_version()
            .await?;
        assert_eq!(docker.version().await?.os.as_deref(), Some("linux"));
        assert_eq!(docker.info().await?.os_type.as_deref(), Some("linux"));
        let name = format!("bollard-{}", std::process::id());
        let config = ContainerCreateBody {
            image: Some("busybox".into()),
            cmd: Some(
                words("sh -c")
                    .into_iter()
                    .chain(["echo out; echo err >&2; while [ ! -e /go ]; do sleep 0.1; done; exit 5".into()])
                    .collect(),
            ),
            labels: Some(HashMap::from([("kind".to_owned(), "bollard".to_owned())])),
            healthcheck: Some(HealthConfig { test: Some(words("CMD true")), ..HealthConfig::default() }),
            host_config: Some(HostConfig { network_mode: Some("none".into()), ..HostConfig::default() }),
            ..ContainerCreateBody::default()
        };
        let options = CreateContainerOptionsBuilder::default().name(&name).build();
        let created = docker.create_container(Some(options), config).await?;
        docker.start_container(&name, None).await?;
        let inspect = docker.inspect_container(&name, None).await?;
        let state = inspect.state.unwrap_or_default();
        assert_eq!(state.running, Some(true));
        assert_eq!(
            state.health.and_then(|health| health.status).map(|status| status.to_string()),
            Some("starting".into())
        );

        let exec = CreateExecOptions {
            cmd: Some(words("echo from exec")),
            attach_stdout: Some(true),
            ..CreateExecOptions::default()
        };
        let exec = docker.create_exec(&name, exec).await?;
        let StartExecResults::Attached { output, .. } = docker.start_exec(&exec.id, None).await? else {
            anyhow::bail!("the exec is detached");
        };
        let output: Vec<String> = output.map_ok(|line| line.to_string()).try_collect().await?;
        assert_eq!(output.concat(), "from exec\n");
        assert_eq!(docker.inspect_exec(&exec.id).await?.exit_code, Some(0));

        let filters = HashMap::from([("label", vec!["kind=bollard"])]);
        let list = ListContainersOptionsBuilder::default().filters(&filters).build();
        let listed = docker.list_containers(Some(list)).await?;
        assert!(listed.iter().any(|container| container.id.as_deref() == Some(created.id.as_str())));
        let top = docker.top_processes(&name, None::<bollard::query_parameters::TopOptions>).await?;
        assert!(top.processes.is_some_and(|rows| !rows.is_empty()));
        let once = StatsOptionsBuilder::default().stream(false).one_shot(true).build();
        let stats = docker.stats(&name, Some(once)).next().await.transpose()?;
        assert!(stats.is_some_and(|stats| stats.pids_stats.is_some()));

        let waiting = docker.wait_container(&name, None::<WaitContainerOptions>);
        let go = CreateExecOptions { cmd: Some(words("touch /go")), ..CreateExecOptions::default() };
        let go = docker.create_exec(&name, go).await?;
        docker
            .start_exec(&go.id, Some(bollard::exec::StartExecOptions { detach: true, ..Default::default() }))
            .await?;
        // An exit code other than 0 is an error to bollard.
        match waiting.try_collect::<Vec<_>>().await {
            Err(bollard::errors::Error::DockerContainerWaitError { code, .. }) => assert_eq!(code, 5),
            other => anyhow::bail!("{other:?}"),
        }
        let logs = LogsOptionsBuilder::default().stdout(true).stderr(true).build();
        let mut logs: Vec<String> =
            docker.logs(&name, Some(logs)).map_ok(|line| line.to_string()).try_collect().await?;
        logs.sort();
        assert_eq!(logs, ["err\n", "out\n"]);

        let filters = HashMap::from([("container", vec![name.as_str()]), ("event", vec!["die"])]);
        let events = EventsOptionsBuilder::default().since("1").filters(&filters).build();
        let event = docker.events(Some(events)).next().await.transpose()?.unwrap_or_default();
        let code = event.actor.and_then(|actor| actor.attributes?.get("exitCode").cloned());
        assert_eq!(code.as_deref(), Some("5"));
        docker
            .remove_container(&name, Some(RemoveContainerOptionsBuilder::default().force(true).build()))
            .await?;
        assert!(docker.inspect_container(&name, None).await.is_err());
        Ok(())
    })
}
