//! Where the time of a container's create, start and end goes: recorded for every one, always, since the slow one is
//! never the one that somebody watches.
//!
//! ```text
//!  create: resolved ─ disk ─ recorded
//!  run:    prepared ─ spawned ─ attached ─ (restored) ─ greeted ─ personalised ─ (networked) ─ created
//!          ─ started ─ connected ─ running ─ exited ─ drained ─ ended ─ gone ─ removed
//! ```
//!
//! Whoever reaches a stage marks it: one atomic store. The last [`KEPT`] timelines are kept, those of removed
//! containers included; each is written to the debug log when its start and when its end is complete.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::metrics::Histogram;
use jiff::Timestamp;
use serde::{Serialize, Serializer, ser::SerializeStruct};

/// How many timelines are kept: some 70 KiB.
pub const KEPT: usize = 256;

macro_rules! stages {
    ($($(#[$doc:meta])* $name:ident $text:literal,)*) => {
        /// What has been reached.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Stage { $($(#[$doc])* $name,)* }

        impl Stage {
            /// All, in the order in which they come.
            pub const ALL: &'static [Stage] = &[$(Stage::$name,)*];

            /// Its name for programs.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Stage::$name => $text,)* }
            }
        }
    };
}

stages! {
    /// Create: the image is found, the request is merged with it and checked.
    Resolved "resolved",
    /// Create: the writable disk is there.
    Disk "disk",
    /// Create: the record is on disk; the create is answered.
    Recorded "recorded",
    /// Start: the host was looked at, log and disk are open, the runtime spec is built.
    Prepared "prepared",
    /// The VMM's process exists.
    Spawned "spawned",
    /// The VMM answers and has the disk and the layers.
    Attached "attached",
    /// A saved machine goes on; not of one that boots.
    Restored "restored",
    /// The guest's kernel has booted, or was restored, and the agent has said Hello.
    Greeted "greeted",
    /// The guest has what is its own: its clock, and a clone its identity.
    Personalised "personalised",
    /// Its interfaces are set up; not where it has none.
    Networked "networked",
    /// The container's root is mounted.
    Created "created",
    /// The workload was executed.
    Started "started",
    /// Its streams are open.
    Connected "connected",
    /// The state is on disk; the start is answered.
    Running "running",
    /// The agent has told of the workload's end.
    Exited "exited",
    /// All of its output is in the log.
    Drained "drained",
    /// The end is on disk; who waits for it is answered.
    Ended "ended",
    /// The VMM has ended and its directory is removed.
    Gone "gone",
    /// The container is removed.
    Removed "removed",
}

impl Stage {
    /// Whether it is a stage of a create or start, and not of what the workload makes of its time.
    #[must_use]
    pub const fn is_of_a_start(self) -> bool {
        self as usize <= Self::Running as usize
    }
}

/// How long stages took, of everything since the daemon began.
#[derive(Debug, Default)]
pub struct Histograms {
    stages: [Histogram; Stage::ALL.len()],
    create: Histogram,
    start: Histogram,
}

impl Histograms {
    /// From the stage before it to this one.
    #[must_use]
    pub fn of(&self, stage: Stage) -> &Histogram {
        // Every stage has its place.
        self.stages.get(stage as usize).unwrap_or(&self.start)
    }

    /// From the beginning to the answer.
    #[must_use]
    pub fn whole(&self, kind: TimelineKind) -> &Histogram {
        match kind {
            TimelineKind::Create => &self.create,
            TimelineKind::Run => &self.start,
        }
    }
}

/// What a timeline is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TimelineKind {
    /// A create.
    Create,
    /// A start, its run and its end.
    Run,
}

/// One create or run.
pub struct Timeline {
    container: String,
    kind: TimelineKind,
    at: Timestamp,
    began: Instant,
    /// By stage: microseconds since it began, plus one; 0 is not reached.
    reached: [AtomicU64; Stage::ALL.len()],
    histograms: Option<Arc<Histograms>>,
}

impl Timeline {
    /// One that begins now and is in nobody's collection.
    #[must_use]
    pub fn begin(container: &str, kind: TimelineKind) -> Arc<Self> {
        Arc::new(Self::new(container, kind, None))
    }

    fn new(container: &str, kind: TimelineKind, histograms: Option<Arc<Histograms>>) -> Self {
        Self {
            container: container.to_owned(),
            kind,
            at: Timestamp::now(),
            began: Instant::now(),
            reached: std::array::from_fn(|_| AtomicU64::new(0)),
            histograms,
        }
    }

    /// The stage is reached now. The first time counts.
    pub fn mark(&self, stage: Stage) {
        let now = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX - 1).saturating_add(1);
        let before = self.reached.iter().map(|at| at.load(Ordering::Relaxed)).max().unwrap_or(0).max(1);
        if let Some(reached) = self.reached.get(stage as usize)
            && reached.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
            && let Some(histograms) = self.histograms.as_ref().filter(|_| stage.is_of_a_start())
        {
            histograms.of(stage).observe(Duration::from_micros(now.saturating_sub(before)));
            if matches!(stage, Stage::Recorded | Stage::Running) {
                histograms.whole(self.kind).observe(Duration::from_micros(now - 1));
            }
        }
    }

    /// What was reached so far, in the order of time: when, and how long after what was reached before it.
    #[must_use]
    pub fn steps(&self) -> Vec<Step> {
        let mut reached: Vec<(u64, Stage)> = Stage::ALL
            .iter()
            .zip(&self.reached)
            .filter_map(|(stage, at)| Some((at.load(Ordering::Relaxed).checked_sub(1)?, *stage)))
            .collect();
        reached.sort_by_key(|(at, _)| *at);
        let mut before = 0;
        reached
            .into_iter()
            .map(|(at, stage)| {
                let step =
                    Step { stage, at: Duration::from_micros(at), took: Duration::from_micros(at - before) };
                before = at;
                step
            })
            .collect()
    }
}

/// A stage that was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Which.
    pub stage: Stage,
    /// Since the timeline began.
    pub at: Duration,
    /// Since the step before it.
    pub took: Duration,
}

impl Serialize for Step {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut step = serializer.serialize_struct("Step", 3)?;
        step.serialize_field("Stage", self.stage.name())?;
        step.serialize_field("AtUs", &self.at.as_micros())?;
        step.serialize_field("TookUs", &self.took.as_micros())?;
        step.end()
    }
}

impl Serialize for Timeline {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut timeline = serializer.serialize_struct("Timeline", 4)?;
        timeline.serialize_field("Container", &self.container)?;
        timeline.serialize_field("Kind", &self.kind)?;
        timeline.serialize_field("Began", &self.at)?;
        timeline.serialize_field("Steps", &self.steps())?;
        timeline.end()
    }
}

impl fmt::Debug for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of {}: {self}", self.kind, self.container)
    }
}

/// `spawned 2.1 attached +0.4 …`, in milliseconds.
impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Step { stage, took, .. }) in self.steps().iter().enumerate() {
            let space = if index == 0 { "" } else { " " };
            write!(f, "{space}{}+{:.1}ms", stage.name(), took.as_secs_f64() * 1e3)?;
        }
        Ok(())
    }
}

/// The last [`KEPT`] timelines.
#[derive(Debug, Default)]
pub struct Timelines {
    kept: Mutex<VecDeque<Arc<Timeline>>>,
    histograms: Arc<Histograms>,
}

impl Timelines {
    /// How long stages took, of those that are no longer kept too.
    #[must_use]
    pub fn histograms(&self) -> &Histograms {
        &self.histograms
    }

    /// One that begins now.
    pub fn begin(&self, container: &str, kind: TimelineKind) -> Arc<Timeline> {
        let timeline = Arc::new(Timeline::new(container, kind, Some(Arc::clone(&self.histograms))));
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(Arc::clone(&timeline));
        timeline
    }

    /// Those that are kept, oldest first; of one container, or of all.
    #[must_use]
    pub fn of(&self, container: Option<&str>) -> Vec<Arc<Timeline>> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().filter(|timeline| container.is_none_or(|id| timeline.container == id)).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_in_the_order_of_time_and_the_first_mark_counts() {
        let timeline = Timeline::begin("c", TimelineKind::Run);
        // The exit of a short run is seen while its start is still being recorded.
        timeline.mark(Stage::Exited);
        let first = timeline.steps();
        timeline.mark(Stage::Running);
        timeline.mark(Stage::Exited);
        let steps = timeline.steps();
        assert_eq!(steps.iter().filter(|step| step.stage == Stage::Exited).count(), 1);
        assert_eq!(steps.iter().find(|step| step.stage == Stage::Exited).unwrap().at, first[0].at);
        assert!(steps.is_sorted_by_key(|step| step.at));
        let sum: Duration = steps.iter().map(|step| step.took).sum();
        assert_eq!(sum, steps.last().unwrap().at);
    }

    #[test]
    fn as_many_are_kept_as_was_said() {
        let timelines = Timelines::default();
        for index in 0..KEPT + 5 {
            timelines.begin(&format!("c{}", index % 2), TimelineKind::Create);
        }
        assert_eq!(timelines.of(None).len(), KEPT);
        assert_eq!(timelines.of(Some("c0")).len() + timelines.of(Some("c1")).len(), KEPT);
        assert!(timelines.of(Some("c2")).is_empty());
    }

    #[test]
    fn programs_read_stages_by_name() {
        let timeline = Timeline::begin("c", TimelineKind::Run);
        timeline.mark(Stage::Spawned);
        let json = serde_json::to_value(&*timeline).unwrap();
        assert_eq!((&json["Container"], &json["Kind"]), (&"c".into(), &"run".into()));
        assert_eq!(json["Steps"][0]["Stage"], "spawned");
        assert_eq!(json["Steps"][0]["AtUs"], json["Steps"][0]["TookUs"]);
        let mut names: Vec<_> = Stage::ALL.iter().map(|stage| stage.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Stage::ALL.len());
    }
}
