//! What happens, told to whoever asks: a ring of the last events for `since`, and a broadcast.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use jiff::Timestamp;
use tokio::sync::broadcast::{self, error::RecvError};

use crate::api::types::{
    Filters,
    event::{Actor, Message},
};

/// How many past events are kept (Docker keeps 256).
const KEPT: usize = 1024;

/// How far a subscriber may lag behind before it is cut off.
const LAG: usize = 4096;

/// The keys that events can be filtered by.
pub const FILTER_KEYS: [&str; 14] = [
    "config",
    "container",
    "daemon",
    "event",
    "image",
    "label",
    "network",
    "node",
    "plugin",
    "scope",
    "secret",
    "service",
    "type",
    "volume",
];

/// The bus.
#[derive(Debug)]
pub struct Events {
    past: Mutex<VecDeque<Arc<Message>>>,
    live: broadcast::Sender<Arc<Message>>,
    published: AtomicU64,
}

impl Default for Events {
    fn default() -> Self {
        Self { past: Mutex::default(), live: broadcast::Sender::new(LAG), published: AtomicU64::new(0) }
    }
}

/// What a subscriber wants.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Past events from this time on; None: no past events, unless `until` is given.
    pub since: Option<Timestamp>,
    /// Nothing after this time.
    pub until: Option<Timestamp>,
    /// Keys out of [`FILTER_KEYS`].
    pub filters: Filters,
}

impl Events {
    /// Tells everybody, at this moment's time. `kind` is `container`, `image`…; `attributes` are the
    /// object's labels and what belongs to the action.
    pub fn publish(&self, kind: &str, action: &str, id: &str, attributes: BTreeMap<String, String>) {
        let now = Timestamp::now();
        let mut message = Message {
            kind: kind.to_owned(),
            action: action.to_owned(),
            scope: "local".to_owned(),
            time: now.as_second(),
            time_nano: i64::try_from(now.as_nanosecond()).unwrap_or(i64::MAX),
            ..Message::default()
        };
        if matches!(kind, "container" | "image") {
            message.status = action.to_owned();
            message.id = id.to_owned();
        }
        if kind == "container" {
            message.from = attributes.get("image").cloned().unwrap_or_default();
        }
        message.actor = Actor { id: id.to_owned(), attributes };
        self.publish_message(message);
    }

    fn publish_message(&self, message: Message) {
        let message = Arc::new(message);
        // Held over both, so that a subscriber gets each event once: from the past or live.
        let mut past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        if past.len() == KEPT {
            past.pop_front();
        }
        past.push_back(Arc::clone(&message));
        self.published.fetch_add(1, Ordering::Relaxed);
        // It fails when nobody listens.
        let _ = self.live.send(message);
    }

    /// Past events and what comes. Registered when this returns.
    pub fn subscribe(&self, selection: Selection) -> Subscription {
        let past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        let live = self.live.subscribe();
        let past = if selection.since.is_none() && selection.until.is_none() {
            VecDeque::new()
        } else {
            past.iter().filter(|message| selection.includes(message)).cloned().collect()
        };
        Subscription { past, live, selection }
    }

    /// How many events there were.
    pub fn published(&self) -> u64 {
        self.published.load(Ordering::Relaxed)
    }

    /// How many subscribers there are.
    pub fn subscribers(&self) -> usize {
        self.live.receiver_count()
    }
}

/// A subscriber's place in the stream of events.
#[derive(Debug)]
pub struct Subscription {
    past: VecDeque<Arc<Message>>,
    live: broadcast::Receiver<Arc<Message>>,
    selection: Selection,
}

impl Subscription {
    /// The next event, None when `until` has passed or when the subscriber was too slow: rather than to
    /// leave events out without a word, its stream ends.
    pub async fn next(&mut self) -> Option<Arc<Message>> {
        if let Some(message) = self.past.pop_front() {
            return Some(message);
        }
        loop {
            let next = match self.selection.until {
                None => self.live.recv().await,
                Some(until) => {
                    // What was sent before `until` still counts, however late it is read.
                    let left = until.duration_since(Timestamp::now()).try_into().unwrap_or_default();
                    tokio::time::timeout(left, self.live.recv()).await.ok()?
                }
            };
            match next {
                Ok(message) if self.selection.includes(&message) => return Some(message),
                Ok(_) => {}
                Err(RecvError::Lagged(missed)) => {
                    tracing::warn!(missed, "a client reads events too slowly: its stream is ended");
                    return None;
                }
                Err(RecvError::Closed) => return None,
            }
        }
    }
}

impl Selection {
    fn includes(&self, message: &Message) -> bool {
        let time = i128::from(message.time_nano);
        self.since.is_none_or(|since| time >= since.as_nanosecond())
            && self.until.is_none_or(|until| time <= until.as_nanosecond())
            && matches(&self.filters, message)
    }
}

/// Docker's rules: an object's key is matched with the id and the name of *any* event by prefix, `event` by
/// prefix only for those actions that carry a text after a colon, labels among the attributes.
fn matches(filters: &Filters, message: &Message) -> bool {
    const OBJECTS: [&str; 9] =
        ["config", "container", "daemon", "network", "node", "plugin", "secret", "service", "volume"];
    let attributes = &message.actor.attributes;
    let attribute = |name| attributes.get(name).map(String::as_str).unwrap_or_default();
    let by_prefix =
        filters.get("event").any(|event| matches!(event, "health_status" | "exec_create" | "exec_start"));
    let event = if by_prefix {
        filters.prefix("event", &message.action)
    } else {
        filters.exact("event", &message.action)
    };
    let image = attribute(if message.kind == "image" { "name" } else { "image" });
    event
        && filters.exact("type", &message.kind)
        && filters.exact("scope", &message.scope)
        && OBJECTS
            .iter()
            .all(|key| filters.prefix(key, &message.actor.id) || filters.prefix(key, attribute("name")))
        && [message.actor.id.as_str(), image]
            .iter()
            .any(|name| filters.exact("image", name) || filters.exact("image", without_tag(name)))
        && filters.labels("label", attributes)
}

/// An image's name as people write it, without tag and digest.
fn without_tag(name: &str) -> &str {
    let name = name.split_once('@').map_or(name, |(name, _)| name);
    let name = match name.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => name,
        _ => name,
    };
    let name = name.strip_prefix("docker.io/").unwrap_or(name);
    name.strip_prefix("library/").unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributes(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn busy() -> Events {
        let events = Events::default();
        let container = attributes(&[("name", "web"), ("image", "docker.io/library/nginx:1"), ("team", "a")]);
        events.publish("container", "create", "c0ffee", container.clone());
        events.publish("container", "exec_create: sh", "c0ffee", container);
        events.publish("image", "pull", "nginx:1", attributes(&[("name", "nginx")]));
        events.publish("network", "create", "beef", attributes(&[("name", "net")]));
        events
    }

    async fn past(events: &Events, filters: &str) -> Vec<String> {
        let filters = Filters::parse(filters, &FILTER_KEYS).unwrap();
        let selection =
            Selection { since: Some(Timestamp::UNIX_EPOCH), until: Some(Timestamp::now()), filters };
        let mut subscription = events.subscribe(selection);
        let mut found = Vec::new();
        while let Some(message) = subscription.next().await {
            found.push(format!("{} {}", message.kind, message.action));
        }
        found
    }

    #[tokio::test]
    async fn filters() {
        let events = busy();
        let (create, exec, pull, network) =
            ("container create", "container exec_create: sh", "image pull", "network create");
        for (filters, expected) in [
            ("", &[create, exec, pull, network][..]),
            (r#"{"type":["container"]}"#, &[create, exec]),
            (r#"{"event":["create"]}"#, &[create, network]),
            (r#"{"event":["exec_create"]}"#, &[exec]),
            (r#"{"container":["web"]}"#, &[create, exec]),
            (r#"{"container":["c0f"]}"#, &[create, exec]),
            (r#"{"container":["other"]}"#, &[]),
            (r#"{"image":["nginx"]}"#, &[create, exec, pull]),
            (r#"{"image":["nginx:1"]}"#, &[pull]),
            (r#"{"label":["team=a"]}"#, &[create, exec]),
            (r#"{"label":["team=b"]}"#, &[]),
            (r#"{"scope":["swarm"]}"#, &[]),
        ] {
            assert_eq!(past(&events, filters).await, expected, "{filters}");
        }
    }

    #[tokio::test]
    async fn a_subscriber_gets_the_past_only_when_it_asks_and_then_each_event_once() {
        let events = busy();
        let mut live = events.subscribe(Selection::default());
        let mut all =
            events.subscribe(Selection { since: Some(Timestamp::UNIX_EPOCH), ..Selection::default() });
        assert_eq!(events.subscribers(), 2);
        events.publish("container", "die", "c0ffee", attributes(&[("exitCode", "0")]));
        assert_eq!(live.next().await.unwrap().action, "die");
        for action in ["create", "exec_create: sh", "pull", "create", "die"] {
            assert_eq!(all.next().await.unwrap().action, action);
        }
    }

    #[tokio::test]
    async fn the_ring_forgets_the_oldest_and_a_slow_reader_is_cut_off() {
        let events = Events::default();
        let mut slow = events.subscribe(Selection::default());
        for number in 0..=LAG {
            events.publish("daemon", "reload", &number.to_string(), BTreeMap::new());
        }
        assert!(slow.next().await.is_none());
        assert_eq!(past(&events, "").await.len(), KEPT);
    }

    #[test]
    fn a_message_is_that_of_docker() {
        let events = Events::default();
        events.publish("container", "die", "c0ffee", attributes(&[("image", "busybox"), ("exitCode", "7")]));
        let past = events.past.lock().unwrap();
        let mut message = (*past[0]).clone();
        assert_eq!(message.time, message.time_nano / 1_000_000_000);
        (message.time, message.time_nano) = (1, 1_000_000_002);
        insta::assert_json_snapshot!(message);
    }

    #[test]
    fn names_without_tags() {
        for (name, expected) in [
            ("nginx", "nginx"),
            ("nginx:1", "nginx"),
            ("docker.io/library/nginx:1", "nginx"),
            ("host:5000/a/b:2@sha256:00", "host:5000/a/b"),
            ("host:5000/a", "host:5000/a"),
        ] {
            assert_eq!(without_tag(name), expected);
        }
    }
}
