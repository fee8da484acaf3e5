//! The writing side of a container's log.

use std::{
    borrow::Cow,
    fs::File,
    io::{self, BufRead, BufReader, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use tokio::sync::watch;

use super::{Record, Settings, Source, Stream, files, format, forward::Forward};

/// A line longer than this is written in parts.
const MAX_TEXT: usize = 16 << 10;

/// How many bytes of each stream of the present run are in the log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Durable {
    /// Of stdout.
    pub stdout: u64,
    /// Of stderr.
    pub stderr: u64,
}

/// How far the log has come, for those who follow it.
#[derive(Debug, Clone)]
pub(super) struct Progress {
    /// The current file; None: nothing is kept.
    pub(super) file: Option<Arc<File>>,
    /// Its number, which it has when it is full.
    pub(super) number: u64,
    /// Bytes of the current file that are whole lines.
    pub(super) committed: u64,
    /// Whether a run is under way.
    pub(super) running: bool,
}

/// A container's log while it runs. Shared; writes are short and to the page cache.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    settings: Settings,
    /// [`Settings::attributes`] as JSON, or nothing.
    attributes: String,
    packing: Arc<Mutex<()>>,
    forward: Option<Forward>,
    state: Mutex<State>,
    progress: watch::Sender<Progress>,
}

#[derive(Debug)]
struct State {
    /// None: the driver `none`, which only counts.
    file: Option<Arc<File>>,
    number: u64,
    committed: u64,
    stdout: Line,
    stderr: Line,
    scratch: Vec<u8>,
}

/// A stream's unfinished line.
#[derive(Debug, Default, Clone)]
struct Line {
    /// Bytes of the stream in the file.
    durable: u64,
    /// Bytes that wait for the line's end.
    text: Vec<u8>,
    /// When the first part of a long line was written.
    began: Option<Timestamp>,
}

impl Log {
    /// Opens the log for a run that is about to begin, and creates it if need be. The number is the run's
    /// place in the file: to be stored before the process starts, and given to [`Log::resume`].
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn begin(settings: &Settings, path: &Path) -> io::Result<(Self, u64)> {
        let forward = settings.target.as_ref().map(Forward::open).transpose()?;
        if !settings.keeps() {
            return Ok((Self::new(settings, path, None, (0, 0), Durable::default()), 0));
        }
        files::forget_had(path)?;
        let mut file = files::current(path)?;
        let end = cut_torn_line(&mut file, 0)?;
        let number = next_number(path)?;
        let log = Self::new(settings, path, Some(file), (number, end), Durable::default());
        Ok((Self { forward, ..log }, end))
    }

    /// Opens the log of a run that another daemon began at `run`, and counts what is in it.
    ///
    /// With the driver `none` nothing is known: everything counts as not yet had.
    ///
    /// # Errors
    /// The file cannot be opened or read.
    pub fn resume(settings: &Settings, path: &Path, run: u64) -> io::Result<(Self, Durable)> {
        if !settings.keeps() {
            return Ok((Self::new(settings, path, None, (0, 0), Durable::default()), Durable::default()));
        }
        let mut file = files::current(path)?;
        // Of a run whose beginning is in a file that is full, all of the current one is.
        let (had, run) = match files::had(path, &file)? {
            Some(had) => (had, 0),
            None => (Durable::default(), run),
        };
        let end = cut_torn_line(&mut file, run)?;
        let counted = count(&mut file, run, end)?;
        let durable = Durable {
            stdout: had.stdout.saturating_add(counted.stdout),
            stderr: had.stderr.saturating_add(counted.stderr),
        };
        let number = next_number(path)?;
        // A run that is under way is not ended because the host's log has gone.
        let forward = settings.target.as_ref().and_then(|target| match Forward::open(target) {
            Ok(forward) => Some(forward),
            Err(error) => {
                tracing::warn!(%error, "the host's log cannot be reached; the local files have a container's lines");
                None
            }
        });
        let log = Self::new(settings, path, Some(file), (number, end), durable);
        Ok((Self { forward, ..log }, durable))
    }

    fn new(
        settings: &Settings,
        path: &Path,
        file: Option<File>,
        (number, committed): (u64, u64),
        durable: Durable,
    ) -> Self {
        let line = |durable| Line { durable, ..Line::default() };
        let (stdout, stderr) = (line(durable.stdout), line(durable.stderr));
        let file = file.map(Arc::new);
        let progress = Progress { file: file.clone(), number, committed, running: true };
        let state = State { file, number, committed, stdout, stderr, scratch: Vec::new() };
        let attributes = match settings.attributes.is_empty() {
            true => String::new(),
            // Strings alone: they can always be written.
            false => serde_json::to_string(&settings.attributes).unwrap_or_default(),
        };
        Self {
            path: path.to_owned(),
            settings: settings.clone(),
            attributes,
            packing: Arc::default(),
            forward: None,
            state: Mutex::new(state),
            progress: watch::Sender::new(progress),
        }
    }

    /// Takes what a process wrote, and answers how many bytes of that stream are safe now, those of the
    /// run's beginning included.
    ///
    /// # Errors
    /// The file could not be written (no space). Then nothing has changed: the same bytes can be given
    /// again.
    pub fn append(&self, stream: Stream, bytes: &[u8], now: Timestamp) -> io::Result<u64> {
        self.write(stream, bytes, now, false)
    }

    /// The stream has ended: what is left of an unfinished line is written. Answers as [`Log::append`].
    ///
    /// # Errors
    /// As [`Log::append`].
    pub fn end(&self, stream: Stream, now: Timestamp) -> io::Result<u64> {
        self.write(stream, b"", now, true)
    }

    /// The run has ended: both streams end, and followers get what is left and stop.
    ///
    /// # Errors
    /// As [`Log::append`]; followers stop all the same.
    pub fn finish(&self, now: Timestamp) -> io::Result<()> {
        let ended = self.end(Stream::Stdout, now).and(self.end(Stream::Stderr, now));
        self.progress.send_modify(|progress| progress.running = false);
        ended.map(drop)
    }

    /// What readers need.
    pub fn source(&self) -> Source {
        let readable = self.lock().file.is_some();
        Source {
            path: readable.then(|| self.path.clone()),
            progress: Some(self.progress.subscribe()),
            frozen: None,
        }
    }

    /// What was appended until now, and nothing of what comes: a source of the lines, and the unfinished ones.
    pub fn snapshot(&self, now: Timestamp) -> (Source, Vec<Record>) {
        let state = self.lock();
        let path = state.file.is_some().then(|| self.path.clone());
        let unfinished = [(Stream::Stdout, &state.stdout), (Stream::Stderr, &state.stderr)];
        let unfinished = unfinished.into_iter().filter(|(_, line)| !line.text.is_empty());
        let records = unfinished.map(|(stream, line)| Record {
            stream,
            time: line.began.unwrap_or(now),
            bytes: line.text.clone().into(),
            attributes: self.settings.attributes.clone(),
        });
        let frozen = Progress {
            file: state.file.clone(),
            number: state.number,
            committed: state.committed,
            running: false,
        };
        (Source { path, progress: None, frozen: Some(frozen) }, records.collect())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while it was held cannot have left it half-changed: it is changed after the write.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, stream: Stream, bytes: &[u8], now: Timestamp, ended: bool) -> io::Result<u64> {
        let mut state = self.lock();
        let changed = self.change_when_full(&mut state)?;
        let State { file, number, committed, stdout, stderr, scratch } = &mut *state;
        let line = if stream == Stream::Stderr { stderr } else { stdout };
        let Some(file) = file else {
            line.durable += bytes.len() as u64;
            return Ok(line.durable);
        };
        let text = if line.text.is_empty() {
            Cow::Borrowed(bytes)
        } else {
            Cow::Owned([&line.text, bytes].concat())
        };
        scratch.clear();
        let place = Place { stream, now, ended, attributes: &self.attributes };
        let (taken, began) = encode_lines(scratch, &place, &text, line.began);
        let mut writer: &File = file;
        if let Err(error) = writer.write_all(scratch) {
            // Whatever part of it got there must not stay: the same bytes will come again.
            file.set_len(*committed)?;
            writer.seek(SeekFrom::Start(*committed))?;
            return Err(error);
        }
        *committed += scratch.len() as u64;
        if let Some(forward) = &self.forward {
            forward.send(stream, text.get(..taken).unwrap_or_default(), now);
        }
        let rest = text.get(taken..).unwrap_or_default().to_vec();
        *line = Line { durable: line.durable + taken as u64, text: rest, began };
        let (durable, committed, wrote) = (line.durable, *committed, !scratch.is_empty());
        let (file, number) = (Arc::clone(file), *number);
        scratch.shrink_to(1 << 20);
        drop(state);
        if wrote || changed {
            self.progress.send_modify(|progress| {
                // Two streams are written at once: what is told must not go back.
                if (number, committed) >= (progress.number, progress.committed) {
                    (progress.number, progress.committed) = (number, committed);
                    progress.file = Some(file);
                }
            });
        }
        Ok(durable)
    }

    /// Begins a new file when the current one is full. Whether it did.
    fn change_when_full(&self, state: &mut State) -> io::Result<bool> {
        let (Some(full), Some(file)) = (self.settings.max_size, &state.file) else { return Ok(false) };
        if state.committed < full {
            return Ok(false);
        }
        let durable = Durable { stdout: state.stdout.durable, stderr: state.stderr.durable };
        let new = files::change(&self.path, file, state.number, durable)?;
        state.file = Some(Arc::new(new));
        state.number += 1;
        state.committed = 0;
        if let Err(error) = files::discard(&self.path, self.settings.max_files.saturating_sub(1)) {
            tracing::warn!(path = %self.path.display(), %error, "full files of a log could not be removed");
        }
        if self.settings.compress {
            self.pack();
        }
        Ok(true)
    }
}

impl Log {
    /// Compresses the full files, in a thread of its own where there is one: nobody's output waits for it.
    fn pack(&self) {
        let (path, packing) = (self.path.clone(), Arc::clone(&self.packing));
        let pack = move || {
            let _one_at_a_time = packing.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = files::pack(&path) {
                tracing::warn!(path = %path.display(), %error, "full files of a log could not be compressed");
            }
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(pack)),
            Err(_) => pack(),
        }
    }

    /// Waits for what is being compressed.
    #[cfg(test)]
    pub(super) fn settle(&self) {
        drop(self.packing.lock().unwrap());
    }
}

/// The number of the current file.
fn next_number(path: &Path) -> io::Result<u64> {
    Ok(files::numbers(path)?.last().map_or(1, |last| last.saturating_add(1)))
}

/// What lines are written with.
struct Place<'a> {
    stream: Stream,
    now: Timestamp,
    ended: bool,
    attributes: &'a str,
}

/// Encodes the whole lines of `text`, and at its end the rest too. Answers how many bytes were taken, and
/// when the unfinished line of which a part was taken began.
fn encode_lines(
    out: &mut Vec<u8>,
    place: &Place<'_>,
    text: &[u8],
    mut began: Option<Timestamp>,
) -> (usize, Option<Timestamp>) {
    let Place { stream, now, ended, attributes } = *place;
    let now_text = now.to_string();
    let mut taken = 0;
    loop {
        let rest = &text[taken..];
        let window = &rest[..rest.len().min(MAX_TEXT)];
        let newline = window.iter().position(|&byte| byte == b'\n');
        let length = match newline {
            Some(at) => at + 1,
            // A newline right after a full window belongs to it no more: so does Docker.
            None if window.len() == MAX_TEXT => MAX_TEXT,
            None if ended && !rest.is_empty() => rest.len(),
            None => return (taken, began),
        };
        match began {
            Some(time) => format::encode(out, stream, &time.to_string(), &rest[..length], attributes),
            None => format::encode(out, stream, &now_text, &rest[..length], attributes),
        }
        began = if newline.is_some() { None } else { began.or(Some(now)) };
        taken += length;
    }
}

/// Cuts what follows the last newline (from `from` on) off, and leaves the file at its end.
fn cut_torn_line(file: &mut File, from: u64) -> io::Result<u64> {
    let end = file.seek(SeekFrom::End(0))?;
    let whole = super::reader::last_line_end(file, from.min(end), end)?;
    if whole < end {
        file.set_len(whole)?;
    }
    file.seek(SeekFrom::Start(whole))
}

/// Counts the raw bytes of the lines from `from` to `end`, and leaves the file at `end`.
fn count(file: &mut File, from: u64, end: u64) -> io::Result<Durable> {
    file.seek(SeekFrom::Start(from.min(end)))?;
    let mut durable = Durable::default();
    let mut reader = BufReader::with_capacity(1 << 16, &mut *file);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        match format::raw_length(&line) {
            Some((Stream::Stderr, length)) => durable.stderr += length,
            Some((_, length)) => durable.stdout += length,
            None => {}
        }
        line.clear();
    }
    file.seek(SeekFrom::Start(end))?;
    Ok(durable)
}
