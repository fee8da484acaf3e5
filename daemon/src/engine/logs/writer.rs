//! The writing side of a container's log.

use std::{
    borrow::Cow,
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use tokio::sync::watch;

use super::{Record, Source, Stream, format};

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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Progress {
    /// Bytes of the file that are whole lines.
    pub(super) committed: u64,
    /// Whether a run is under way.
    pub(super) running: bool,
}

/// A container's log while it runs. Shared; writes are short and to the page cache.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    state: Mutex<State>,
    progress: watch::Sender<Progress>,
}

#[derive(Debug)]
struct State {
    /// None: the driver `none`, which only counts.
    file: Option<File>,
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
    pub fn begin(driver: &str, path: &Path) -> io::Result<(Self, u64)> {
        let Some(mut file) = open(driver, path)? else {
            return Ok((Self::new(path, None, 0, Durable::default()), 0));
        };
        let end = cut_torn_line(&mut file, 0)?;
        Ok((Self::new(path, Some(file), end, Durable::default()), end))
    }

    /// Opens the log of a run that another daemon began at `run`, and counts what is in it.
    ///
    /// With the driver `none` nothing is known: everything counts as not yet had.
    ///
    /// # Errors
    /// The file cannot be opened or read.
    pub fn resume(driver: &str, path: &Path, run: u64) -> io::Result<(Self, Durable)> {
        let Some(mut file) = open(driver, path)? else {
            return Ok((Self::new(path, None, 0, Durable::default()), Durable::default()));
        };
        let end = cut_torn_line(&mut file, run)?;
        let durable = count(&mut file, run, end)?;
        Ok((Self::new(path, Some(file), end, durable), durable))
    }

    fn new(path: &Path, file: Option<File>, committed: u64, durable: Durable) -> Self {
        let line = |durable| Line { durable, ..Line::default() };
        let (stdout, stderr) = (line(durable.stdout), line(durable.stderr));
        let state = State { file, committed, stdout, stderr, scratch: Vec::new() };
        let progress = watch::Sender::new(Progress { committed, running: true });
        Self { path: path.to_owned(), state: Mutex::new(state), progress }
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
            end: None,
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
        });
        (Source { path, progress: None, end: Some(state.committed) }, records.collect())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while it was held cannot have left it half-changed: it is changed after the write.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, stream: Stream, bytes: &[u8], now: Timestamp, ended: bool) -> io::Result<u64> {
        let mut state = self.lock();
        let State { file, committed, stdout, stderr, scratch } = &mut *state;
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
        let (taken, began) = encode_lines(scratch, stream, &text, line.began, now, ended);
        if let Err(error) = file.write_all(scratch) {
            // Whatever part of it got there must not stay: the same bytes will come again.
            file.set_len(*committed)?;
            file.seek(SeekFrom::Start(*committed))?;
            return Err(error);
        }
        *committed += scratch.len() as u64;
        let rest = text.get(taken..).unwrap_or_default().to_vec();
        *line = Line { durable: line.durable + taken as u64, text: rest, began };
        let (durable, committed, wrote) = (line.durable, *committed, !scratch.is_empty());
        scratch.shrink_to(1 << 20);
        drop(state);
        if wrote {
            self.progress.send_modify(|progress| progress.committed = committed);
        }
        Ok(durable)
    }
}

/// Encodes the whole lines of `text`, and with `ended` the rest too. Answers how many bytes were taken, and
/// when the unfinished line of which a part was taken began.
fn encode_lines(
    out: &mut Vec<u8>,
    stream: Stream,
    text: &[u8],
    mut began: Option<Timestamp>,
    now: Timestamp,
    ended: bool,
) -> (usize, Option<Timestamp>) {
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
            Some(time) => format::encode(out, stream, &time.to_string(), &rest[..length]),
            None => format::encode(out, stream, &now_text, &rest[..length]),
        }
        began = if newline.is_some() { None } else { began.or(Some(now)) };
        taken += length;
    }
}

fn open(driver: &str, path: &Path) -> io::Result<Option<File>> {
    if driver == "none" {
        return Ok(None);
    }
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o640).open(path).map(Some)
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
