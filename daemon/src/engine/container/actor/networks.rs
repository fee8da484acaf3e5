//! Changes of a container's networks, one after the other; those of a running one in a task.

use std::sync::Arc;

use super::{
    super::{Command, Reply, record::Record, state::State, wiring},
    Actor, Report, answer,
};
use crate::engine::{
    Error, Result,
    network::{
        links,
        record::{Attachment, Endpoint, Network},
    },
};

/// What has come of a change of networks.
pub(super) enum Wired {
    Connected(Arc<Network>, Box<Attachment>, Result<Option<Endpoint>>, Reply<()>),
    /// With the endpoint that has its published ports now, if it is another.
    Disconnected(String, Result<Option<(String, Endpoint)>>, Reply<()>),
}

impl Actor {
    /// Begins a change of networks; of a running container in a task, one after the other.
    pub(super) async fn wire(&mut self, command: Command) {
        if self.wiring {
            self.wires.push_back(command);
            return;
        }
        let refusal = match &self.record.life.state {
            State::Removing(_) | State::Dead(_) => Some(Error::forbidden(format!(
                "Container {} is marked for removal and cannot be connected or disconnected to the network",
                self.record.id
            ))),
            State::Starting(_) => {
                Some(Error::conflict(format!("container {} is being started", self.record.id)))
            }
            _ => None,
        };
        match (command, refusal) {
            (Command::Connect(.., reply) | Command::Disconnect { reply, .. }, Some(error)) => {
                answer(reply, Err(error));
            }
            (Command::Connect(network, attachment, reply), None) => {
                self.connect(network, attachment, reply).await;
            }
            (Command::Disconnect { network, force, reply }, None) => {
                self.disconnect(network, force, reply).await;
            }
            _ => {}
        }
    }

    /// Takes a link away.
    pub(super) async fn unlink(&mut self, alias: &str) -> Result<()> {
        // Its record is being deleted: it must not be written anew.
        let removing = matches!(self.record.life.state, State::Removing(_) | State::Dead(_));
        let host_config = links::without(&self.record, alias)
            .filter(|_| !removing)
            .ok_or_else(|| Error::not_found(format!("No such container: {}/{alias}", self.record.name)))?;
        self.keep(Record { host_config, ..self.record.clone() }).await
    }

    async fn connect(&mut self, network: Arc<Network>, attachment: Box<Attachment>, reply: Reply<()>) {
        if self.record.networks.contains_key(&network.name) && self.workload.is_some() {
            return answer(
                reply,
                Err(Error::forbidden(format!(
                    "endpoint with name {} already exists in network {}",
                    self.record.name, network.name
                ))),
            );
        }
        let mut next = self.record.clone();
        next.networks.insert(network.name.clone(), (*attachment).clone());
        let Some(workload) = self.workload.clone() else {
            return answer(reply, self.keep(next).await);
        };
        self.wiring = true;
        let (shared, reporter, turn) = (Arc::clone(&self.shared), self.reporter.clone(), self.turn);
        tokio::spawn(async move {
            let result = wiring::connect(&shared, &next, &workload, &network).await;
            let id = network.id.clone();
            let wired = Wired::Connected(network, attachment, result, reply);
            if reporter.send(Report::Wired(turn, wired)).await.is_err() {
                shared.networks.leave_network(&next.id, &id).await;
            }
        });
    }

    async fn disconnect(&mut self, network: String, force: bool, reply: Reply<()>) {
        let mut next = self.record.clone();
        let Some(attachment) = next.networks.remove(&network) else {
            return answer(
                reply,
                Err(Error::forbidden(format!(
                    "container {} is not connected to network {network}",
                    self.record.id
                ))),
            );
        };
        let (Some(workload), Some(endpoint)) = (self.workload.clone(), attachment.endpoint) else {
            return answer(reply, self.keep(next).await);
        };
        self.wiring = true;
        let (shared, reporter, turn) = (Arc::clone(&self.shared), self.reporter.clone(), self.turn);
        tokio::spawn(async move {
            let place = (attachment.network.as_str(), &endpoint);
            let result = wiring::disconnect(&shared, &next, &workload, place, force).await;
            // Its drop answers for an actor that is gone.
            let _ = reporter.send(Report::Wired(turn, Wired::Disconnected(network, result, reply))).await;
        });
    }

    pub(super) async fn wired(&mut self, turn: u64, wired: Wired) {
        let current = turn == self.turn && matches!(self.record.life.state, State::Running(_));
        match wired {
            Wired::Connected(network, attachment, Ok(endpoint), reply) => {
                if !current {
                    // The run is over, and what it had was given back before this was had.
                    self.shared.networks.leave_network(&self.record.id, &network.id).await;
                    return answer(
                        reply,
                        Err(Error::conflict(format!("container {} is not running", self.record.id))),
                    );
                }
                let mut next = self.record.clone();
                let attachment = Attachment { endpoint, ..*attachment };
                next.networks.insert(network.name.clone(), attachment);
                let kept = self.keep(next).await;
                self.shared.networks.tell_connected(&network, &self.record.id);
                answer(reply, kept);
            }
            Wired::Disconnected(network, Ok(published), reply) => {
                let mut next = self.record.clone();
                next.networks.remove(&network);
                if let Some((name, endpoint)) = published.filter(|_| current)
                    && let Some(attachment) = next.networks.get_mut(&name)
                {
                    attachment.endpoint = Some(endpoint);
                }
                answer(reply, self.keep(next).await);
            }
            Wired::Connected(_, _, Err(error), reply) | Wired::Disconnected(_, Err(error), reply) => {
                answer(reply, Err(error));
            }
        }
    }
}
