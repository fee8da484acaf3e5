//! The engine's methods for containers: each finds the container and asks its actor, or looks at its view.

use std::sync::Arc;

use bulkhead_agent_api::Call;
use jiff::Timestamp;
use tokio::sync::mpsc;

use super::{
    Command, Container, Grace, ListOptions, Stop, create, inspect, joining, list, names, prune, signal,
    state::{Running, State},
    top, wiring,
};
use crate::{
    api::types::{self, Filters, container::WaitResponse},
    engine::{
        AttachOptions, Attachment, Engine, Error, Name, Output, Result, WaitCondition,
        logs::{self, Source},
        network::{self, record::Driver},
    },
};

impl Engine {
    fn container(&self, name: Name<'_>) -> Result<Arc<Container>> {
        self.shared.registry.find(name)
    }

    /// Creates a container; nothing is booted.
    ///
    /// # Errors
    /// No such image, a name in use, a request that is not valid or cannot be honoured.
    pub async fn container_create(
        &self,
        name: Option<&str>,
        request: types::container::CreateRequest,
    ) -> Result<types::container::CreateResponse> {
        create::create(&self.shared, name, request).await
    }

    /// Starts it; returns when its workload runs.
    ///
    /// # Errors
    /// `NotModified` if it runs; what hinders the start.
    pub async fn container_start(&self, name: Name<'_>) -> Result<()> {
        self.container(name)?.ask(Command::Start).await?
    }

    /// Stops it; returns when it has ended.
    ///
    /// # Errors
    /// `NotModified` if it does not run; an unknown signal.
    pub async fn container_stop(
        &self,
        name: Name<'_>,
        signal: Option<&str>,
        timeout: Option<i64>,
    ) -> Result<()> {
        let container = self.container(name)?;
        let stop = stop(signal, timeout)?;
        container.ask(|reply| Command::Stop(stop, reply)).await?
    }

    /// Stops it if it runs, and starts it.
    ///
    /// # Errors
    /// An unknown signal; what hinders the start.
    pub async fn container_restart(
        &self,
        name: Name<'_>,
        signal: Option<&str>,
        timeout: Option<i64>,
    ) -> Result<()> {
        let container = self.container(name)?;
        let stop = stop(signal, timeout)?;
        container.ask(|reply| Command::Restart(stop, reply)).await?
    }

    /// Sends a signal, SIGKILL without one; of SIGKILL it waits for the end.
    ///
    /// # Errors
    /// It does not run; an unknown signal.
    pub async fn container_kill(&self, name: Name<'_>, signal: Option<&str>) -> Result<()> {
        let container = self.container(name)?;
        let signal = match signal {
            None | Some("") => libc::SIGKILL,
            Some(signal) => signal::parse(signal)?,
        };
        container.ask(|reply| Command::Kill(signal, reply)).await?.map_err(|error| Error {
            message: format!("cannot kill container: {name}: {}", error.message),
            ..error
        })
    }

    /// Freezes its processes (true), or lets them run on.
    ///
    /// # Errors
    /// It does not run; it is so already; the guest does not answer.
    pub async fn container_pause(&self, name: Name<'_>, pause: bool) -> Result<()> {
        self.container(name)?.ask(|reply| Command::Pause(pause, reply)).await?
    }

    /// Removes it, and with `volumes` those that were made for it and that nobody has named.
    ///
    /// # Errors
    /// It runs and `force` is not set.
    pub async fn container_remove(&self, name: Name<'_>, force: bool, volumes: bool) -> Result<()> {
        let container = self.container(name)?;
        let record = container.view().record;
        container.ask(|reply| Command::Remove { force, reply }).await??;
        if volumes {
            self.shared.remove_anonymous(&record).await;
        }
        Ok(())
    }

    /// Takes away a link of the default bridge, `PARENT/ALIAS`. What it linked stays as it is.
    ///
    /// # Errors
    /// No such container or link; a name that is no link's.
    pub async fn container_unlink(&self, name: Name<'_>) -> Result<()> {
        let Some((parent, alias)) = name.strip_prefix('/').unwrap_or(name).split_once('/') else {
            self.container(name)?;
            return Err(Error::conflict("Conflict, cannot remove the default link name of the container"));
        };
        let unknown = |_| Error::not_found(format!("No such container: {name}"));
        let parent = self.container(parent).map_err(unknown)?;
        parent.ask(|reply| Command::Unlink(alias.to_owned(), reply)).await??;
        wiring::tell_links(&self.shared, &parent).await;
        Ok(())
    }

    /// Gives it another name.
    ///
    /// # Errors
    /// The name is not valid or in use.
    pub async fn container_rename(&self, name: Name<'_>, new: &str) -> Result<()> {
        let container = self.container(name)?;
        if new.is_empty() {
            return Err(Error::invalid("Neither old nor new names may be empty"));
        }
        let old = container.view().record.name.clone();
        if names::check(new)? == old {
            return Err(Error::invalid("Renaming a container with the same name as its current name"));
        }
        let reserved = self.shared.registry.reserve(new, container.id())?;
        let renamed =
            container.ask(|reply| Command::Rename(reserved.clone(), reply)).await.and_then(|done| done);
        if renamed.is_err() {
            self.shared.registry.release(&reserved, container.id());
        }
        renamed
    }

    /// Puts it into a network, running or not.
    ///
    /// # Errors
    /// No such container or network; what cannot be had there.
    pub async fn network_connect(
        &self,
        network: Name<'_>,
        request: types::network::ConnectRequest,
    ) -> Result<()> {
        let network = self.shared.networks.find(network)?;
        let container = self.container(&request.container)?;
        let record = container.view().record;
        if network.driver == Driver::Host {
            return Err(Error::invalid(
                "cannot connect container to host network - container must be created in host network mode",
            ));
        }
        if joining::is_guest(&record.host_config) {
            return Err(joining::shared_network());
        }
        let others: Vec<_> = record.networks.keys().filter(|name| **name != network.name).collect();
        let in_none = others.iter().any(|name| *name == "none");
        if in_none || (network.driver == Driver::Null && !others.is_empty()) {
            return Err(Error::invalid(
                "container cannot be connected to multiple networks with one of the networks in private (none) mode",
            ));
        }
        let settings = request.endpoint_config.unwrap_or_default();
        let attachment = network::attach::attachment(&network, &settings)?;
        container.ask(|reply| Command::Connect(network, Box::new(attachment), reply)).await?
    }

    /// Takes it out of a network, running or not.
    ///
    /// # Errors
    /// No such container or network; it is not in it.
    pub async fn network_disconnect(
        &self,
        network: Name<'_>,
        request: types::network::DisconnectRequest,
    ) -> Result<()> {
        // One that was removed may still stand in a record.
        let found = self.shared.networks.find(network);
        let container = self.container(&request.container)?;
        let name = match found {
            Ok(network) => network.name.clone(),
            Err(_) if container.view().record.networks.contains_key(network) => network.to_owned(),
            Err(error) => return Err(error),
        };
        let force = request.force;
        container.ask(|reply| Command::Disconnect { network: name, force, reply }).await?
    }

    /// Sets its terminal's size.
    ///
    /// # Errors
    /// It does not run; the agent's.
    pub async fn container_resize(&self, name: Name<'_>, rows: u16, columns: u16) -> Result<()> {
        let view = self.container(name)?.view();
        let workload = view.running()?;
        let call = Call::Resize { process: workload.init(), rows, columns };
        workload.sandbox.call(call).await.map_err(|error| Error::internal(error.to_string()))?;
        let size = [("height".to_owned(), rows.to_string()), ("width".to_owned(), columns.to_string())];
        self.shared.publish(&view.record, "resize", size);
        Ok(())
    }

    /// Everything about it.
    ///
    /// # Errors
    /// No such container.
    pub async fn container_inspect(&self, name: Name<'_>, size: bool) -> Result<types::container::Inspect> {
        let container = self.container(name)?;
        let view = container.view();
        let record = &view.record;
        let log_path = match record.host_config.log_config.kind.as_str() {
            kind if kind != "json-file" => String::new(),
            _ => self.shared.layout().container_log(&record.id).display().to_string(),
        };
        let exec_ids = self.shared.execs.running_in(&record.id);
        let running = matches!(record.life.state, State::Running(_));
        let networks = self.shared.networks.settings(record, running);
        let mut inspect = inspect::inspect(&view, log_path, exec_ids, networks);
        inspect.host_config.links = crate::engine::network::links::shown(&self.shared, record);
        if size {
            let (own, root) = self.shared.sizes(record).await;
            (inspect.size_rw, inspect.size_root_fs) = (Some(own), Some(root));
        }
        Ok(inspect)
    }

    /// Those that the options select, the latest first.
    ///
    /// # Errors
    /// A filter that is not valid.
    pub async fn container_list(&self, options: ListOptions) -> Result<Vec<types::container::Summary>> {
        let views = list::select(&self.shared, &options)?;
        let now = Timestamp::now();
        let mut summaries = Vec::with_capacity(views.len());
        for view in &views {
            let mut summary = list::summary(view, &self.shared, now);
            if options.size {
                (summary.size_rw, summary.size_root_fs) = self.shared.sizes(&view.record).await;
            }
            summaries.push(summary);
        }
        Ok(summaries)
    }

    /// Its processes.
    ///
    /// # Errors
    /// It does not run; arguments that are not understood.
    pub async fn container_top(&self, name: Name<'_>, ps_args: &str) -> Result<types::container::Top> {
        let view = self.container(name)?.view();
        let processes = view.running()?.processes().await?;
        let top = top::top(&processes, ps_args, Timestamp::now())?;
        self.shared.publish(&view.record, "top", []);
        Ok(top)
    }

    /// Waits for its exit or removal. Registered when this returns.
    ///
    /// # Errors
    /// No such container.
    pub async fn container_wait(
        &self,
        name: Name<'_>,
        condition: WaitCondition,
    ) -> Result<impl Future<Output = WaitResponse> + Send + use<>> {
        let receiver = self.container(name)?.ask(|reply| Command::Wait(condition, reply)).await?;
        Ok(async move {
            receiver.await.unwrap_or_else(|_| WaitResponse {
                error: Some(types::container::WaitError { message: "the daemon is going down".into() }),
                status_code: -1,
            })
        })
    }

    /// Attaches a client to its stdio, also before its start.
    ///
    /// # Errors
    /// No such container; a log that cannot be read.
    pub async fn container_attach(&self, name: Name<'_>, options: AttachOptions) -> Result<Attachment> {
        let container = self.container(name)?;
        let view = container.view();
        if let State::Running(Running { paused: true, .. }) = &view.record.life.state {
            return Err(Error::conflict(format!(
                "container {name} is paused, unpause the container before attach"
            )));
        }
        let hub = container.hub();
        let attachment = match (&view.workload, options) {
            (_, AttachOptions { stream: false, logs, .. }) => {
                let nothing =
                    Attachment { terminal: hub.kind().terminal, stdin: None, output: mpsc::channel(1).1 };
                match logs {
                    true => prepend(self.log_source(&container).read(replay(options))?, Vec::new(), nothing),
                    false => nothing,
                }
            }
            (_, AttachOptions { logs: false, .. }) => hub.attach(options),
            // In one moment, so that everything comes once: from the log or live.
            (Some(workload), _) => {
                let (live, (lines, unfinished)) =
                    hub.attach_at(options, || workload.log.snapshot(Timestamp::now()));
                prepend(lines.read(replay(options))?, wanted(unfinished, options), live)
            }
            (None, _) => {
                prepend(self.log_source(&container).read(replay(options))?, Vec::new(), hub.attach(options))
            }
        };
        self.shared.publish(&view.record, "attach", []);
        Ok(attachment)
    }

    /// A user left its terminal with the keys for it.
    pub fn container_detached(&self, name: Name<'_>) {
        // One that has gone in the meantime has nobody who cares.
        if let Ok(container) = self.container(name) {
            self.shared.publish(&container.view().record, "detach", []);
        }
    }

    /// Reads its log; the flag is whether it has a terminal, which decides the wire form.
    ///
    /// # Errors
    /// No such container; a driver that cannot be read.
    pub async fn container_logs(
        &self,
        name: Name<'_>,
        options: logs::ReadOptions,
    ) -> Result<(bool, mpsc::Receiver<logs::Record>)> {
        let container = self.container(name)?;
        let records = self.log_source(&container).read(options)?;
        Ok((container.hub().kind().terminal, records))
    }

    fn log_source(&self, container: &Container) -> Source {
        let view = container.view();
        match (&view.record.life.state, &view.workload) {
            (State::Running(_), Some(workload)) => workload.log.source(),
            _ => Source::stopped(
                view.record.host_config.log_config.kind != "none",
                &self.shared.layout().container_log(container.id()),
            ),
        }
    }

    /// Removes what does not run.
    ///
    /// # Errors
    /// A filter that is not valid.
    pub async fn container_prune(&self, filters: &Filters) -> Result<types::container::PruneResponse> {
        prune::prune(&self.shared, filters).await
    }
}

/// Those of the streams that are asked for.
fn wanted(mut records: Vec<logs::Record>, options: AttachOptions) -> Vec<logs::Record> {
    records.retain(|record| match record.stream {
        logs::Stream::Stderr => options.stderr,
        _ => options.stdout,
    });
    records
}

fn stop(signal: Option<&str>, timeout: Option<i64>) -> Result<Stop> {
    let signal = signal.filter(|signal| !signal.is_empty()).map(signal::parse).transpose()?;
    Ok(Stop { signal, grace: timeout.map(Grace::from_seconds) })
}

fn replay(options: AttachOptions) -> logs::ReadOptions {
    logs::ReadOptions { stdout: options.stdout, stderr: options.stderr, ..logs::ReadOptions::default() }
}

/// Puts a log and its unfinished lines before what comes.
fn prepend(
    mut past: mpsc::Receiver<logs::Record>,
    unfinished: Vec<logs::Record>,
    attachment: Attachment,
) -> Attachment {
    let (sender, output) = mpsc::channel(16);
    let Attachment { terminal, stdin, output: mut live } = attachment;
    tokio::spawn(async move {
        let mut unfinished = unfinished.into_iter();
        while let Some(record) = past.recv().await.or_else(|| unfinished.next()) {
            if sender.send(Output { stream: record.stream, bytes: record.bytes }).await.is_err() {
                return;
            }
        }
        while let Some(output) = live.recv().await {
            if sender.send(output).await.is_err() {
                return;
            }
        }
    });
    Attachment { terminal, stdin, output }
}
