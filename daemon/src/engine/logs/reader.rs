//! The reading side of a container's log.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::sync::{mpsc, watch};

use super::{ReadOptions, Record, Stream, files, format, writer::Progress};
use crate::engine::{Error, Result};

/// Blocks in which a file is searched backwards.
const BLOCK: usize = 64 << 10;

/// A log to read: of a running container from [`super::Log::source`], else from [`Source::stopped`].
#[derive(Debug, Clone)]
pub struct Source {
    /// None: the driver keeps nothing.
    pub(super) path: Option<PathBuf>,
    pub(super) progress: Option<watch::Receiver<Progress>>,
    /// Nothing behind this place is read.
    pub(super) frozen: Option<Progress>,
}

impl Source {
    /// The log of a container that does not run; it need not exist yet.
    pub fn stopped(keeps: bool, path: &Path) -> Self {
        Self { path: keeps.then(|| path.to_owned()), progress: None, frozen: None }
    }

    /// Starts reading; records come in the log's order. It ends when everything asked for was sent, when
    /// the receiver is dropped, and with `follow` when the run ends.
    ///
    /// # Errors
    /// `NotImplemented`: the driver cannot be read.
    pub fn read(self, options: ReadOptions) -> Result<mpsc::Receiver<Record>> {
        let Some(path) = self.path else {
            return Err(Error::not_implemented("configured logging driver does not support reading"));
        };
        let (records, receiver) = mpsc::channel(64);
        let (progress, frozen) = (self.progress, self.frozen);
        tokio::spawn(async move {
            if let Err(error) = run(path, progress, frozen, options, records).await {
                tracing::warn!(%error, "a log could not be read");
            }
        });
        Ok(receiver)
    }
}

async fn run(
    path: PathBuf,
    mut progress: Option<watch::Receiver<Progress>>,
    frozen: Option<Progress>,
    options: ReadOptions,
    records: mpsc::Sender<Record>,
) -> io::Result<()> {
    let mut cursor = Cursor { path: path.clone(), place: None, options };
    loop {
        let now = progress.as_mut().map(|progress| progress.borrow_and_update().clone());
        let running = now.as_ref().is_some_and(|progress| progress.running);
        let end = match frozen.clone().or(now) {
            Some(end) => end,
            None => {
                let path = path.clone();
                let stopped = tokio::task::spawn_blocking(move || end_of_stopped(&path));
                match stopped.await.map_err(io::Error::other)?? {
                    Some(end) => end,
                    None => return Ok(()),
                }
            }
        };
        // A batch at a time: a client that does not read must not keep a thread.
        loop {
            let until = end.clone();
            let batch;
            (cursor, batch) = tokio::task::spawn_blocking(move || {
                let batch = cursor.read_to(&until);
                (cursor, batch)
            })
            .await
            .map_err(io::Error::other)?;
            let batch = batch?;
            for record in batch.records {
                if records.send(record).await.is_err() {
                    return Ok(());
                }
            }
            match batch.then {
                Then::More => {}
                Then::Pause => break,
                Then::Enough => return Ok(()),
            }
            if records.is_closed() {
                return Ok(());
            }
        }
        if !cursor.options.follow || !running {
            return Ok(());
        }
        let Some(progress) = progress.as_mut() else { return Ok(()) };
        tokio::select! {
            changed = progress.changed() => if changed.is_err() { return Ok(()) },
            () = records.closed() => return Ok(()),
            () = sleep_until(cursor.options.until) => return Ok(()),
        }
    }
}

/// Where the log of a container that does not run ends; None: there is none.
fn end_of_stopped(path: &Path) -> io::Result<Option<Progress>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let number = files::numbers(path)?.last().map_or(1, |last| last.saturating_add(1));
    let committed = last_line_end(&file, 0, file.metadata()?.len())?;
    Ok(Some(Progress { file: Some(Arc::new(file)), number, committed, running: false }))
}

/// Waits for a time of the wall clock; for ever when there is none.
async fn sleep_until(time: Option<jiff::Timestamp>) {
    let Some(time) = time else { return std::future::pending().await };
    let left = time.duration_since(jiff::Timestamp::now());
    // A duration that is negative has passed.
    tokio::time::sleep(left.try_into().unwrap_or_default()).await;
}

/// A place in a log, and what is wanted of it.
struct Cursor {
    path: PathBuf,
    /// None before the first read.
    place: Option<Place>,
    options: ReadOptions,
}

/// A place in one of a log's files.
struct Place {
    file: Arc<File>,
    number: u64,
    at: u64,
}

/// How many bytes of a log are read at once.
const BATCH: u64 = 1 << 20;

/// Some records, and how to go on.
struct Batch {
    records: Vec<Record>,
    then: Then,
}

enum Then {
    /// There is more before the end.
    More,
    /// All was read up to the end.
    Pause,
    /// The reader wants nothing that is still to come.
    Enough,
}

impl Cursor {
    /// Reads some of what lies between the cursor and `end`, and moves on.
    fn read_to(&mut self, end: &Progress) -> io::Result<Batch> {
        let nothing = Batch { records: Vec::new(), then: Then::Pause };
        let place = match &mut self.place {
            Some(place) => place,
            empty => match first_place(&self.path, end, self.options.tail)? {
                Some(place) => empty.insert(place),
                None => return Ok(nothing),
            },
        };
        let current = place.number == end.number;
        // A file that is full has nothing but whole lines.
        let stop = if current { end.committed } else { place.file.metadata()?.len() };
        let window = Window { file: &place.file, at: place.at, end: stop };
        let mut reader = BufReader::with_capacity(BLOCK, window);
        let mut line = Vec::new();
        let mut records = Vec::new();
        let start = place.at;
        while place.at < start.saturating_add(BATCH) {
            let length = read_line(&mut reader, &mut line)?;
            if length == 0 {
                return Ok(match current || place.number > end.number {
                    true => Batch { records, then: Then::Pause },
                    false => {
                        let next = next_place(&self.path, place.number, end)?;
                        let then = if next.is_some() { Then::More } else { Then::Pause };
                        self.place = next.or(self.place.take());
                        Batch { records, then }
                    }
                });
            }
            place.at += length;
            // A damaged line is left out; the rest is still worth having.
            let Some(record) = format::decode(&line) else { continue };
            if self.options.until.is_some_and(|until| record.time > until) {
                return Ok(Batch { records, then: Then::Enough });
            }
            let wanted =
                if record.stream == Stream::Stderr { self.options.stderr } else { self.options.stdout };
            let late_enough = self.options.since.is_none_or(|since| record.time >= since);
            if wanted && late_enough {
                records.push(record);
            }
        }
        Ok(Batch { records, then: Then::More })
    }
}

/// Where reading begins: at the oldest file's beginning, or so many lines before the end.
fn first_place(path: &Path, end: &Progress, tail: Option<usize>) -> io::Result<Option<Place>> {
    let Some(file) = &end.file else { return Ok(None) };
    let current = |at| Some(Place { file: Arc::clone(file), number: end.number, at });
    let full = files::numbers(path)?.into_iter().filter(|number| *number < end.number);
    let Some(lines) = tail else {
        for number in full {
            if let Some(file) = files::open_full(path, number)? {
                return Ok(Some(Place { file: Arc::new(file), number, at: 0 }));
            }
        }
        return Ok(current(0));
    };
    let mut left = lines;
    match tail_start(file, end.committed, left)? {
        Ok(at) => return Ok(current(at)),
        Err(found) => left -= found,
    }
    let mut place = current(0);
    let full: Vec<u64> = full.collect();
    for number in full.into_iter().rev() {
        if left == 0 {
            break;
        }
        let Some(file) = files::open_full(path, number)? else { break };
        let length = file.metadata()?.len();
        let (at, found) = match tail_start(&file, length, left)? {
            Ok(at) => (at, left),
            Err(found) => (0, found),
        };
        left -= found;
        place = Some(Place { file: Arc::new(file), number, at });
    }
    Ok(place)
}

/// The beginning of the next file after that of the number, None when there is none yet.
fn next_place(path: &Path, after: u64, end: &Progress) -> io::Result<Option<Place>> {
    for number in files::numbers(path)?.into_iter().filter(|number| *number > after && *number < end.number) {
        if let Some(file) = files::open_full(path, number)? {
            return Ok(Some(Place { file: Arc::new(file), number, at: 0 }));
        }
    }
    let current = |file: &Arc<File>| Place { file: Arc::clone(file), number: end.number, at: 0 };
    Ok(end.file.as_ref().map(current))
}

/// A part of a file that others read and write too: it has a place of its own.
struct Window<'a> {
    file: &'a File,
    at: u64,
    end: u64,
}

impl Read for Window<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let length = left.min(buffer.len());
        let read = self.file.read_at(&mut buffer[..length], self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// The next line, without memory for more than [`format::MAX_LINE`] of it. Answers its length, 0 at the end.
fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<u64> {
    line.clear();
    let mut taken = reader.by_ref().take(format::MAX_LINE as u64).read_until(b'\n', line)?;
    if taken == format::MAX_LINE && line.last() != Some(&b'\n') {
        line.clear();
        taken += reader.skip_until(b'\n')?;
    }
    Ok(taken as u64)
}

/// Where the last whole line between `from` and `end` ends.
pub(super) fn last_line_end(file: &File, from: u64, end: u64) -> io::Result<u64> {
    Ok(newline_from_end(file, from, end, 1)?.0.unwrap_or(from))
}

/// Where the last `lines` lines before `end` begin; an error is how many lines there are, fewer than that.
fn tail_start(file: &File, end: u64, lines: usize) -> io::Result<std::result::Result<u64, usize>> {
    if lines == 0 {
        return Ok(Ok(end));
    }
    let (at, left) = newline_from_end(file, 0, end, lines.saturating_add(1))?;
    // The newline before the first line is none of the file's.
    Ok(at.ok_or(lines.saturating_add(1) - left))
}

/// The place after the `nth` newline counted from `end` backwards, None when there are fewer after `from`; and how
/// many were still to be found.
fn newline_from_end(file: &File, from: u64, end: u64, nth: usize) -> io::Result<(Option<u64>, usize)> {
    let mut block = vec![0; BLOCK];
    let mut left = nth;
    let mut at = end;
    while at > from {
        let begin = at.saturating_sub(BLOCK as u64).max(from);
        let part = &mut block[..usize::try_from(at - begin).unwrap_or(BLOCK)];
        file.read_exact_at(part, begin)?;
        for (offset, _) in part.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n') {
            left -= 1;
            if left == 0 {
                return Ok((Some(begin + offset as u64 + 1), 0));
            }
        }
        at = begin;
    }
    Ok((None, left))
}
