//! The reading side of a container's log.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use tokio::sync::{mpsc, watch};

use super::{ReadOptions, Record, Stream, format, writer::Progress};
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
    pub(super) end: Option<u64>,
}

impl Source {
    /// The log of a container that does not run; it need not exist yet.
    pub fn stopped(driver: &str, path: &Path) -> Self {
        Self { path: (driver != "none").then(|| path.to_owned()), progress: None, end: None }
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
        let (progress, end) = (self.progress, self.end);
        tokio::spawn(async move {
            if let Err(error) = run(path, progress, end, options, records).await {
                tracing::warn!(%error, "a log could not be read");
            }
        });
        Ok(receiver)
    }
}

async fn run(
    path: PathBuf,
    mut progress: Option<watch::Receiver<Progress>>,
    fixed_end: Option<u64>,
    options: ReadOptions,
    records: mpsc::Sender<Record>,
) -> io::Result<()> {
    let mut cursor = Cursor { file: None, at: None, options };
    loop {
        let now = progress.as_mut().map(|progress| *progress.borrow_and_update());
        let mut end = fixed_end.or(now.map(|progress| progress.committed));
        // A batch at a time: a client that does not read must not keep a thread.
        loop {
            let read_path = path.clone();
            let batch;
            (cursor, batch) = tokio::task::spawn_blocking(move || {
                let batch = cursor.read_to(&read_path, end);
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
                Then::More(same_end) => end = Some(same_end),
                Then::Pause => break,
                Then::Enough => return Ok(()),
            }
            if records.is_closed() {
                return Ok(());
            }
        }
        if !cursor.options.follow || !now.is_some_and(|progress| progress.running) {
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

/// Waits for a time of the wall clock; for ever when there is none.
async fn sleep_until(time: Option<jiff::Timestamp>) {
    let Some(time) = time else { return std::future::pending().await };
    let left = time.duration_since(jiff::Timestamp::now());
    // A duration that is negative has passed.
    tokio::time::sleep(left.try_into().unwrap_or_default()).await;
}

/// A place in a log, and what is wanted of it.
struct Cursor {
    file: Option<File>,
    /// None before the first read.
    at: Option<u64>,
    options: ReadOptions,
}

/// How many bytes of a log are read at once.
const BATCH: u64 = 1 << 20;

/// Some records, and how to go on.
struct Batch {
    records: Vec<Record>,
    then: Then,
}

enum Then {
    /// There is more before this end.
    More(u64),
    /// All was read up to the end.
    Pause,
    /// The reader wants nothing that is still to come.
    Enough,
}

impl Cursor {
    /// Reads some of what lies between the cursor and `end` (None: the file's last whole line), and moves on.
    fn read_to(&mut self, path: &Path, end: Option<u64>) -> io::Result<Batch> {
        let file = match self.file.take() {
            Some(file) => file,
            None => match File::open(path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Ok(Batch { records: Vec::new(), then: Then::Pause });
                }
                Err(error) => return Err(error),
            },
        };
        let file = self.file.insert(file);
        let end = match end {
            Some(end) => end,
            None => last_line_end(file, 0, file.metadata()?.len())?,
        };
        let start = match (self.at, self.options.tail) {
            (Some(at), _) => at,
            (None, Some(lines)) => tail_start(file, end, lines)?,
            (None, None) => 0,
        };
        file.seek(SeekFrom::Start(start))?;
        let mut reader = BufReader::with_capacity(BLOCK, &*file).take(end.saturating_sub(start));
        let mut line = Vec::new();
        let mut records = Vec::new();
        let mut at = start;
        while at < start.saturating_add(BATCH) {
            let length = read_line(&mut reader, &mut line)?;
            if length == 0 {
                self.at = Some(end);
                return Ok(Batch { records, then: Then::Pause });
            }
            at += length;
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
        self.at = Some(at);
        Ok(Batch { records, then: Then::More(end) })
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
    Ok(newline_from_end(file, from, end, 1)?.unwrap_or(from))
}

/// Where the last `lines` lines before `end` begin.
fn tail_start(file: &File, end: u64, lines: usize) -> io::Result<u64> {
    if lines == 0 {
        return Ok(end);
    }
    Ok(newline_from_end(file, 0, end, lines.saturating_add(1))?.unwrap_or(0))
}

/// The place after the `nth` newline counted from `end` backwards, None when there are fewer after `from`.
fn newline_from_end(file: &File, from: u64, end: u64, nth: usize) -> io::Result<Option<u64>> {
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
                return Ok(Some(begin + offset as u64 + 1));
            }
        }
        at = begin;
    }
    Ok(None)
}
