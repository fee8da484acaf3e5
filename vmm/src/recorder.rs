//! The flight recorder: what happened last in a machine, for the report of its end.
//!
//! ```text
//!   frequent (kicks, throttling)  ──▶ a ring of atomics: no lock, no allocation
//!   rare (status, attach, refusal) ─▶ a ring behind a mutex
//!                                          └─▶ recent(): both, by time, as text
//! ```
//! Two rings, so that a guest that kicks without end does not push out what explains its end. Everything is
//! formatted when it is read; a guest can fill the rings and no more.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use bulkhead_vmm_api::{RECENT, Recorded};

const FREQUENT: usize = RECENT / 4;
const RARE: usize = RECENT - FREQUENT;

/// The longest text of an event, in bytes.
const MAX_TEXT: usize = 200;

/// An event of the hot path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Frequent {
    /// The worker took a kick of a queue; the number is its index.
    Kick = 1,
    /// Something waits for its rate limit; the number counts the device's waits.
    Throttled = 2,
}

/// An event that may cost a lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rare {
    /// The driver has set the device up, with these features.
    Activated(u64),
    /// The driver has reset it.
    Reset,
    /// The driver wrote its status, to no other effect.
    Status(u32),
    /// It is beyond use.
    Failed(Box<str>),
    /// The daemon asked for something that was done.
    Done(Box<str>),
    /// The daemon asked for something that was refused.
    Refused(Box<str>),
}

impl Rare {
    /// A value as an event's text, no longer than is told of it.
    pub fn text(value: &impl fmt::Debug) -> Box<str> {
        let mut text = format!("{value:?}");
        text.truncate(text.floor_char_boundary(MAX_TEXT));
        text.into()
    }
}

/// What a device is called in the recorder: an index of its names.
type Source = u8;

/// Events without a device.
const MACHINE: Source = u8::MAX;

/// The recorder of one machine.
#[derive(Debug)]
pub struct Recorder {
    begun: Instant,
    names: Mutex<Vec<String>>,
    frequent: Ring,
    rare: Mutex<VecDeque<(u64, Source, Rare)>>,
}

impl Recorder {
    /// An empty recorder; times are told from `begun` on.
    #[must_use]
    pub fn new(begun: Instant) -> Arc<Self> {
        let (names, rare) = (Mutex::default(), Mutex::new(VecDeque::with_capacity(RARE)));
        Arc::new(Self { begun, names, frequent: Ring::default(), rare })
    }

    /// Something of the machine as a whole.
    pub fn machine(&self, event: Rare) {
        self.rare(MACHINE, event);
    }

    /// What happened last, oldest first.
    #[must_use]
    pub fn recent(&self) -> Vec<Recorded> {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let name = |source: Source| names.get(usize::from(source)).map_or("", String::as_str);
        let mut events: Vec<(u64, String)> = self
            .frequent
            .read()
            .into_iter()
            .map(|entry| (entry.at_us, format!("{}: {}", name(entry.source), frequent_text(&entry))))
            .collect();
        let rare = self.rare.lock().unwrap_or_else(PoisonError::into_inner);
        events.extend(rare.iter().map(|(at_us, source, event)| {
            let text = rare_text(event);
            (*at_us, if *source == MACHINE { text } else { format!("{}: {text}", name(*source)) })
        }));
        events.sort_by_key(|(at_us, _)| *at_us);
        let capped = |mut text: String| {
            text.truncate(text.floor_char_boundary(MAX_TEXT));
            text
        };
        events.into_iter().map(|(at_us, text)| Recorded { at_us, text: capped(text) }).collect()
    }

    fn rare(&self, source: Source, event: Rare) {
        let at = self.now();
        let mut rare = self.rare.lock().unwrap_or_else(PoisonError::into_inner);
        if rare.len() >= RARE {
            rare.pop_front();
        }
        rare.push_back((at, source, event));
    }

    fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

fn frequent_text(entry: &Entry) -> String {
    let number = entry.number;
    let what = match entry.kind {
        kind if kind == Frequent::Kick as u8 => format!("queue {number} kicked"),
        _ => format!("held back by its rate limit, wait {number}"),
    };
    match entry.times {
        1 => what,
        times => format!("{what}, {times} times"),
    }
}

fn rare_text(event: &Rare) -> String {
    match event {
        Rare::Activated(features) => format!("set up by the driver, features {features:#x}"),
        Rare::Reset => "reset by the driver".into(),
        Rare::Status(value) => format!("status {value:#x} written by the driver"),
        Rare::Failed(why) => format!("failed: {why}"),
        Rare::Done(what) => format!("done: {what}"),
        Rare::Refused(what) => format!("refused: {what}"),
    }
}

/// A device's place in a recorder. Until it has one, nothing is recorded.
#[derive(Debug, Default)]
pub struct Place(OnceLock<(Arc<Recorder>, Source)>);

impl Place {
    /// Gives the device its place, once. Devices beyond what a byte can name have none.
    pub fn join(&self, recorder: &Arc<Recorder>, name: &str) {
        let mut names = recorder.names.lock().unwrap_or_else(PoisonError::into_inner);
        let source = Source::try_from(names.len()).unwrap_or(MACHINE);
        if source != MACHINE && self.0.set((Arc::clone(recorder), source)).is_ok() {
            names.push(name.to_owned());
        }
    }

    /// Records an event of the hot path.
    pub fn frequent(&self, event: Frequent, number: u32) {
        if let Some((recorder, source)) = self.0.get() {
            recorder.frequent.write(recorder.now(), *source, event, number);
        }
    }

    /// Records an event that may cost a lock.
    pub fn rare(&self, event: Rare) {
        if let Some((recorder, source)) = self.0.get() {
            recorder.rare(*source, event);
        }
    }
}

/// A ring that several threads write without waiting for one another. A slot is two words, each with the low
/// bits of the entry's number, so that a reader knows a slot that is being written and leaves it out.
#[derive(Debug)]
struct Ring {
    /// Entries written so far.
    head: AtomicU64,
    slots: [[AtomicU64; 2]; FREQUENT],
}

impl Default for Ring {
    fn default() -> Self {
        Self { head: AtomicU64::new(0), slots: std::array::from_fn(|_| [const { AtomicU64::new(0) }; 2]) }
    }
}

/// What a slot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    at_us: u64,
    source: Source,
    kind: u8,
    number: u32,
    /// How often the same happened in a row, up to this time.
    times: u64,
}

/// Bits of an entry's number in each word; what is left holds nine years of microseconds, or the event.
const TAG: u32 = 16;
const TAG_MASK: u64 = (1 << TAG) - 1;

impl Ring {
    fn write(&self, at_us: u64, source: Source, event: Frequent, number: u32) {
        let index = self.head.fetch_add(1, Ordering::Relaxed);
        let tag = index.wrapping_add(1) & TAG_MASK;
        let what = u64::from(source) << 40 | u64::from(event as u8) << 32 | u64::from(number);
        let Some([first, second]) =
            usize::try_from(index % FREQUENT as u64).ok().and_then(|at| self.slots.get(at))
        else {
            return;
        };
        first.store(at_us << TAG | tag, Ordering::Relaxed);
        second.store(what << TAG | tag, Ordering::Release);
    }

    /// What is there, oldest first; the same in a row is one entry, of the last time.
    fn read(&self) -> Vec<Entry> {
        let head = self.head.load(Ordering::Acquire);
        let mut entries: Vec<Entry> = Vec::new();
        for index in head.saturating_sub(FREQUENT as u64)..head {
            let tag = index.wrapping_add(1) & TAG_MASK;
            let slot = usize::try_from(index % FREQUENT as u64).ok().and_then(|at| self.slots.get(at));
            let Some([first, second]) = slot else { continue };
            let (what, at) = (second.load(Ordering::Acquire), first.load(Ordering::Acquire));
            if what & TAG_MASK != tag || at & TAG_MASK != tag {
                continue;
            }
            let (what, at_us) = (what >> TAG, at >> TAG);
            let entry = Entry {
                at_us,
                source: (what >> 40 & 0xff) as Source,
                kind: (what >> 32 & 0xff) as u8,
                number: (what & 0xffff_ffff) as u32,
                times: 1,
            };
            match entries.last_mut() {
                Some(last)
                    if (last.source, last.kind, last.number) == (entry.source, entry.kind, entry.number) =>
                {
                    last.at_us = at_us;
                    last.times += 1;
                }
                _ => entries.push(entry),
            }
        }
        entries
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn texts(recorder: &Recorder) -> Vec<String> {
        recorder.recent().into_iter().map(|event| event.text).collect()
    }

    #[test]
    fn events_are_told_by_device_and_in_order() {
        let recorder = Recorder::new(Instant::now());
        let (disk, unnamed) = (Place::default(), Place::default());
        disk.join(&recorder, "block0");
        recorder.machine(Rare::Done("pause".into()));
        disk.rare(Rare::Activated(0x1_0000_0000));
        unnamed.frequent(Frequent::Kick, 9);
        for _ in 0..3 {
            disk.frequent(Frequent::Kick, 0);
        }
        disk.frequent(Frequent::Throttled, 1);
        let mut found = texts(&recorder);
        // Those of one microsecond may come in another order.
        found.sort();
        assert_eq!(
            found,
            [
                "block0: held back by its rate limit, wait 1",
                "block0: queue 0 kicked, 3 times",
                "block0: set up by the driver, features 0x100000000",
                "done: pause",
            ]
        );
        let times: Vec<_> = recorder.recent().iter().map(|event| event.at_us).collect();
        assert!(times.is_sorted());
    }

    #[test]
    fn a_storm_of_kicks_does_not_push_out_what_is_rare() {
        let recorder = Recorder::new(Instant::now());
        let place = Place::default();
        place.join(&recorder, "net0");
        place.rare(Rare::Failed("queue 1: a loop".into()));
        for number in 0..100_000 {
            place.frequent(Frequent::Kick, number);
        }
        let found = texts(&recorder);
        assert_eq!(found.len(), 1 + FREQUENT);
        assert!(found.contains(&"net0: failed: queue 1: a loop".to_owned()));
        assert!(found.contains(&"net0: queue 99999 kicked".to_owned()));
    }

    #[test]
    fn memory_and_text_are_bounded() {
        let recorder = Recorder::new(Instant::now());
        let place = Place::default();
        place.join(&recorder, "fs0");
        for _ in 0..10 * RECENT {
            place.rare(Rare::Refused("ä".repeat(1000).into()));
            place.frequent(Frequent::Kick, 0);
        }
        let found = recorder.recent();
        assert!(found.len() <= RECENT);
        assert!(found.iter().all(|event| event.text.len() <= MAX_TEXT));
    }

    #[test]
    fn writers_do_not_wait_for_one_another_and_readers_see_no_half() {
        let recorder = Recorder::new(Instant::now());
        let places: Vec<Arc<Place>> = (0..4).map(|_| Arc::default()).collect();
        for (index, place) in places.iter().enumerate() {
            place.join(&recorder, &format!("device{index}"));
        }
        thread::scope(|scope| {
            for (index, place) in (0u32..).zip(&places) {
                scope.spawn(move || {
                    for round in 0..20_000u32 {
                        place.frequent(Frequent::Kick, round * 4 + index);
                    }
                });
            }
            for _ in 0..200 {
                for entry in recorder.frequent.read() {
                    // Each writer's numbers carry its index.
                    assert_eq!(u32::from(entry.source), entry.number % 4);
                }
            }
        });
    }
}
