//! What the guest says on its console: the last bytes for reports, everything for a file or pipe, and
//! whether its kernel panicked.
//!
//! The guest writes as much as it likes. Memory is bounded by [`CONSOLE_TAIL`] and [`MAX_LINE`], the file by
//! [`SINK_LIMIT`], and a pipe that nobody reads costs the guest nothing: what does not fit is dropped.

use std::{
    collections::VecDeque,
    fs::File,
    io::Write,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bulkhead_vmm_api::CONSOLE_TAIL;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Most bytes that are written to the console's file or pipe.
pub const SINK_LIMIT: usize = 1 << 20;

/// The longest part that is told at once, in bytes: with every one escaped by JSON it still fits a message.
const MAX_PART: usize = 8 << 10;

/// A line is handed on when it is ended or this long. Not above PIPE_BUF, so that a pipe said to be writable
/// takes it whole.
const MAX_LINE: usize = 512;

const PANIC: &str = "Kernel panic";

/// The console's memory.
#[derive(Debug, Default)]
pub struct Console {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    tail: VecDeque<u8>,
    /// Bytes that were ever written: the tail's are the last of them.
    heard: u64,
    line: Vec<u8>,
    panic: Option<String>,
    sink: Option<File>,
    written: usize,
}

impl Console {
    /// A console that copies what it hears to `sink`.
    #[must_use]
    pub fn new(sink: Option<File>) -> Self {
        Self { state: Mutex::new(State { sink, ..State::default() }) }
    }

    /// The guest wrote bytes.
    pub fn write(&self, bytes: &[u8]) {
        let mut state = self.lock();
        state.heard = state.heard.saturating_add(bytes.len() as u64);
        for byte in bytes {
            if state.tail.len() == CONSOLE_TAIL {
                state.tail.pop_front();
            }
            state.tail.push_back(*byte);
            state.line.push(*byte);
            if *byte == b'\n' || state.line.len() == MAX_LINE {
                state.end_line();
            }
        }
    }

    /// The last [`CONSOLE_TAIL`] bytes as lossy UTF-8.
    #[must_use]
    pub fn tail(&self) -> String {
        let mut state = self.lock();
        String::from_utf8_lossy(state.tail.make_contiguous()).into_owned()
    }

    /// The console from byte `from` on, or from the oldest that is kept, as lossy UTF-8; and the first byte that
    /// is not in it. Asked again from there until nothing comes, it gives everything there is.
    #[must_use]
    pub fn part(&self, from: u64) -> (String, u64) {
        let mut state = self.lock();
        let oldest = state.heard.saturating_sub(state.tail.len() as u64);
        let from = from.clamp(oldest, state.heard);
        let bytes = state.tail.make_contiguous();
        let rest = usize::try_from(from - oldest).ok().and_then(|skip| bytes.get(skip..)).unwrap_or_default();
        let part = rest.get(..MAX_PART).unwrap_or(rest);
        (String::from_utf8_lossy(part).into_owned(), from + part.len() as u64)
    }

    /// The kernel's panic line, from "Kernel panic" on, if there was one; an unfinished last line is handed
    /// on first.
    #[must_use]
    pub fn panic(&self) -> Option<String> {
        let mut state = self.lock();
        state.end_line();
        state.panic.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        if self.panic.is_none() {
            self.panic = panic_message(&String::from_utf8_lossy(&line));
        }
        self.copy(&line);
    }

    fn copy(&mut self, line: &[u8]) {
        let Some(sink) = &mut self.sink else { return };
        let line = line.get(..line.len().min(SINK_LIMIT - self.written)).unwrap_or(line);
        let mut fds = [PollFd::new(sink, PollFlags::OUT)];
        let writable = poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready == 1)
            && fds.iter().all(|fd| fd.revents().contains(PollFlags::OUT));
        if writable && !line.is_empty() && sink.write_all(line).is_err() {
            self.sink = None;
            return;
        }
        self.written += line.len();
        if self.written == SINK_LIMIT {
            self.sink = None;
        }
    }
}

/// How long a panic's message may be, in characters: many times what the kernel has to say.
const MAX_MESSAGE: usize = 512;

/// A line's panic message: it begins the line, after the timestamp that the kernel may put before it. It is shown to
/// people, on terminals too, so the control characters that a guest may have put into it are replaced.
fn panic_message(line: &str) -> Option<String> {
    let text = match line.strip_prefix('[').and_then(|rest| rest.split_once("] ")) {
        Some((stamp, text)) if stamp.chars().all(|c| c.is_ascii_digit() || c == '.' || c == ' ') => text,
        _ => line,
    };
    let printable = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
    text.starts_with(PANIC).then(|| text.trim_end().chars().take(MAX_MESSAGE).map(printable).collect())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    #[test]
    fn the_tail_is_bounded() {
        let console = Console::default();
        for _ in 0..CONSOLE_TAIL {
            console.write(b"ab");
        }
        console.write(b"c");
        let tail = console.tail();
        assert_eq!(tail.len(), CONSOLE_TAIL);
        assert!(tail.ends_with("abc"));
    }

    #[test]
    fn invalid_utf8_is_replaced() {
        let console = Console::default();
        console.write(b"x\xff\n");
        assert_eq!(console.tail(), "x\u{fffd}\n");
    }

    #[test]
    fn a_panic_is_recognised_and_outlives_the_tail() {
        let console = Console::default();
        console.write(b"[    0.512345] Kernel panic - not syncing: Attempted to kill init!\r\n");
        for _ in 0..CONSOLE_TAIL {
            console.write(b"call trace\n");
        }
        assert_eq!(console.panic().as_deref(), Some("Kernel panic - not syncing: Attempted to kill init!"));
    }

    #[test]
    fn only_a_line_that_begins_so_is_a_panic() {
        for line in ["a Kernel panic\n", "[init] Kernel panic\n", "[   1.0]Kernel panic\n"] {
            let console = Console::default();
            console.write(line.as_bytes());
            assert_eq!(console.panic(), None, "{line}");
        }
        let console = Console::default();
        console.write(b"Kernel panic - unfinished");
        assert_eq!(console.panic().as_deref(), Some("Kernel panic - unfinished"));
    }

    #[test]
    fn a_panic_cannot_speak_to_a_terminal() {
        let console = Console::default();
        console.write(b"Kernel panic - \x1b[2Jgone\x07\n");
        assert_eq!(console.panic().as_deref(), Some("Kernel panic - \u{fffd}[2Jgone\u{fffd}"));
    }

    #[test]
    fn the_file_is_bounded() {
        let mut file = tempfile::tempfile().unwrap();
        let console = Console::new(Some(file.try_clone().unwrap()));
        let line = [b'x'; 1000];
        for _ in 0..2000 {
            console.write(&line);
        }
        let mut copied = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut copied).unwrap();
        assert_eq!(copied.len(), SINK_LIMIT);
    }

    #[test]
    fn a_full_pipe_does_not_block() {
        let (_reader, writer) = std::io::pipe().unwrap();
        let console = Console::new(Some(File::from(std::os::fd::OwnedFd::from(writer))));
        for _ in 0..1000 {
            console.write(&[b'x'; 512]);
        }
        assert!(console.tail().ends_with('x'));
    }

    #[test]
    fn parts_follow_one_another_without_a_gap() {
        let console = Console::default();
        assert_eq!(console.part(0), (String::new(), 0));
        console.write(b"hello ");
        console.write(b"world");
        assert_eq!(console.part(0), ("hello world".to_owned(), 11));
        assert_eq!(console.part(6), ("world".to_owned(), 11));
        assert_eq!(console.part(11), (String::new(), 11));
        // A number from another machine's life does no harm.
        assert_eq!(console.part(u64::MAX), (String::new(), 11));

        console.write(&vec![b'x'; 3 * CONSOLE_TAIL]);
        let (mut from, mut length) = (0, 0);
        loop {
            let (text, next) = console.part(from);
            if text.is_empty() {
                break;
            }
            assert!(text.len() <= MAX_PART);
            length += text.len();
            from = next;
        }
        assert_eq!((from, length), (11 + 3 * CONSOLE_TAIL as u64, CONSOLE_TAIL));
    }
}
