//! An output stream: a pipe or terminal that is read, a [`Window`] that holds, a connection that is fed.
//!
//! ```text
//!   source ──read──▶ Window ──write──▶ connection ──▶ daemon
//!     │ stops when the window is full      ◀── acknowledgements, u64 each
//!     └─ end: EOF, EIO of a terminal, or the process's exit and all that was readable then
//! ```
//!
//! The source's end does not wait for the connection, nor the process's exit event for either.

use std::os::fd::AsFd;

use rustix::io::Errno;

use super::{
    CHUNK, TURN, hang_up,
    window::{OutOfWindow, Window},
};
use crate::poll::Watched;

/// How much is still taken from a terminal after its process's exit when others hold it open. (A pipe is
/// asked how much it has; a terminal does not know.)
const TERMINAL_REST: usize = 128 << 10;

/// How often others go first when a terminal has something: the writer, the kernel's worker, and one more of each.
const TERMINAL_YIELDS: u32 = 4;

/// More than any pipe or terminal holds for its reader.
const UNREAD: usize = 2 << 20;

/// One output stream.
pub struct Output<K> {
    source: Option<Source<K>>,
    window: Window,
    connection: Option<Connection<K>>,
    keep: bool,
}

struct Source<K> {
    fd: Watched<K>,
    terminal: bool,
    /// Set when the process has exited: how many bytes may still be taken. A grandchild that holds the
    /// other end open must not keep the stream alive.
    rest: Option<usize>,
}

struct Connection<K> {
    fd: Watched<K>,
    sent: u64,
    /// Acknowledgements come in bytes, not in numbers.
    partial: Vec<u8>,
    shut: bool,
}

impl<K> Output<K> {
    /// Begins to read the source, which must not block.
    pub fn new(source: Watched<K>) -> Self {
        let terminal = rustix::termios::isatty(&source);
        let source = Some(Source { fd: source, terminal, rest: None });
        let mut output = Self { source, window: Window::default(), connection: None, keep: true };
        output.update_interest();
        output
    }

    /// Reads the source for nobody, so that a terminal whose output is not wanted never fills.
    pub fn discarding(source: Watched<K>) -> Self {
        Self { keep: false, ..Self::new(source) }
    }

    /// Prepares for a connection that is to be fed from offset `from`, or from the oldest byte that is held.
    /// Answers the offset.
    ///
    /// # Errors
    /// [`OutOfWindow`]; an earlier connection stays.
    pub fn connect(&mut self, from: Option<u64>) -> Result<u64, OutOfWindow> {
        let from = from.unwrap_or(self.window.base());
        self.window.resume(from)?;
        Ok(from)
    }

    /// The second half of [`Output::connect`], after the peer was told that it succeeded; `early` is what it
    /// sent behind its first frame. Replaces an earlier connection.
    pub fn attach(&mut self, from: u64, connection: Watched<K>, early: &[u8]) {
        self.disconnect();
        let mut connection = Connection { fd: connection, sent: from, partial: Vec::new(), shut: false };
        if self.take_acknowledgements(&mut connection, early).is_ok() {
            self.connection = Some(connection);
            self.feed();
        }
        self.update_interest();
    }

    /// Drops the first `known` bytes of the stream, as far as they were written, and counts from 0 after them;
    /// an earlier connection ends. Nobody may be writing to the source.
    pub fn renumber(&mut self, known: u64, scratch: &mut [u8]) {
        self.disconnect();
        let mut missing = self.window.renumber(known);
        let mut budget = UNREAD;
        while missing > 0
            && budget > 0
            && let Some(source) = &mut self.source
        {
            let rest = source.rest.unwrap_or(usize::MAX);
            let limit =
                scratch.len().min(rest).min(budget).min(usize::try_from(missing).unwrap_or(usize::MAX));
            match rustix::io::read(&source.fd, &mut scratch[..limit]) {
                Ok(0) | Err(Errno::AGAIN) => break,
                Ok(count) => {
                    missing -= count as u64;
                    budget -= count;
                    source.rest = source.rest.map(|rest| rest - count);
                }
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        self.update_interest();
    }

    /// The source can be read.
    pub fn source_ready(&mut self, scratch: &mut [u8]) {
        if self.source.as_ref().is_some_and(|source| source.terminal) {
            // A terminal wakes its reader before each end of line. Who is in the middle of a write may finish it, and the
            // kernel's worker bring the rest here, so that a line arrives in one piece.
            (0..TERMINAL_YIELDS).for_each(|_| rustix::thread::sched_yield());
        }
        self.drain(scratch, TURN);
        self.feed();
        self.update_interest();
    }

    /// The connection can be read or written.
    pub fn connection_ready(&mut self, readable: bool, scratch: &mut [u8]) {
        if readable && self.read_acknowledgements().is_err() {
            self.disconnect();
        }
        if self.is_draining() {
            // Of a source that nobody writes to any more there may be no event.
            self.drain(scratch, TURN);
        }
        self.feed();
        self.update_interest();
    }

    /// The process has ended: what is readable now still counts, what others may write later does not.
    pub fn process_exited(&mut self) {
        let Some(source) = &mut self.source else { return };
        source.rest = Some(if source.terminal {
            TERMINAL_REST
        } else {
            rustix::io::ioctl_fionread(&source.fd)
                .map_or(0, |count| usize::try_from(count).unwrap_or(usize::MAX))
        });
    }

    /// Whether a source remains that has still to be read although its process has ended.
    fn is_draining(&self) -> bool {
        self.source.as_ref().is_some_and(|source| source.rest.is_some())
    }

    /// Reads at most `budget` bytes into the window.
    fn drain(&mut self, scratch: &mut [u8], mut budget: usize) {
        while let Some(source) = &mut self.source {
            let rest = source.rest.unwrap_or(usize::MAX);
            if rest == 0 {
                self.source = None;
                return;
            }
            let limit = scratch.len().min(CHUNK).min(budget).min(self.window.room()).min(rest);
            let Some(buffer) = scratch.get_mut(..limit).filter(|buffer| !buffer.is_empty()) else { return };
            match rustix::io::read(&source.fd, &mut *buffer) {
                Ok(0) => self.source = None,
                Ok(count) => {
                    if self.keep {
                        self.window.push(&buffer[..count]);
                    }
                    budget -= count;
                    if let Some(rest) = &mut source.rest {
                        *rest -= count;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if source.rest.is_none() => return,
                // The end: nothing more is readable after the exit, or EIO, a terminal's way to say that
                // nobody holds its other side.
                Err(_) => self.source = None,
            }
        }
    }

    /// Writes what the connection takes, and ends it after the last byte.
    fn feed(&mut self) {
        let Some(connection) = &mut self.connection else { return };
        loop {
            let pending = self.window.pending(connection.sent);
            if pending.is_empty() {
                break;
            }
            match rustix::net::send(&connection.fd, pending, rustix::net::SendFlags::NOSIGNAL) {
                Ok(count) => connection.sent += count as u64,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.disconnect();
                    return;
                }
            }
        }
        if self.source.is_none() && !connection.shut {
            // An error means that the connection is gone, which its next read tells.
            let _ = rustix::net::shutdown(&connection.fd, rustix::net::Shutdown::Write);
            connection.shut = true;
        }
    }

    fn read_acknowledgements(&mut self) -> Result<(), ()> {
        let Some(mut connection) = self.connection.take() else { return Ok(()) };
        let mut buffer = [0; 512];
        loop {
            match rustix::io::read(&connection.fd, &mut buffer) {
                Ok(0) => {
                    hang_up(&connection.fd);
                    return Ok(());
                }
                Ok(count) => self.take_acknowledgements(&mut connection, &buffer[..count])?,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.connection = Some(connection);
                    return Ok(());
                }
                Err(_) => return Err(()),
            }
        }
    }

    /// An acknowledgement of what was not sent breaks the connection.
    fn take_acknowledgements(&mut self, connection: &mut Connection<K>, bytes: &[u8]) -> Result<(), ()> {
        connection.partial.extend(bytes);
        let mut rest = connection.partial.as_slice();
        let mut last = None;
        while let Some((number, tail)) = rest.split_first_chunk::<8>() {
            last = Some(u64::from_le_bytes(*number));
            rest = tail;
        }
        connection.partial = rest.to_vec();
        match last {
            Some(offset) if offset > connection.sent => Err(()),
            Some(offset) => self.window.acknowledge(offset).map_err(|_| ()),
            None => Ok(()),
        }
    }

    fn disconnect(&mut self) {
        if let Some(connection) = self.connection.take() {
            hang_up(&connection.fd);
        }
    }

    fn update_interest(&mut self) {
        let room = self.window.room() > 0;
        // A failure to change the set would mean that the kernel is out of memory; the stream then stands
        // still until its next event.
        if let Some(source) = &self.source {
            let _ = source.fd.want(room, false);
        }
        if let Some(connection) = &self.connection {
            let pending = !self.window.pending(connection.sent).is_empty();
            let _ = connection.fd.want(true, pending);
        }
    }
}

impl<K> AsFd for Source<K> {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::{fd::OwnedFd, unix::net::UnixStream},
        rc::Rc,
        time::Duration,
    };

    use bulkhead_agent_api::OUTPUT_WINDOW;
    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;
    use crate::poll::Poller;

    struct Bench {
        poller: Rc<Poller<char>>,
        output: Output<char>,
        scratch: Vec<u8>,
    }

    impl Bench {
        fn new() -> (Self, std::fs::File) {
            let poller = Poller::new().unwrap();
            let (reader, writer) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).unwrap();
            let output = Output::new(poller.watch(reader, 's'));
            (Self { poller, output, scratch: vec![0; CHUNK] }, writer.into())
        }

        fn connect(&mut self, from: u64) -> UnixStream {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            theirs.set_nonblocking(true).unwrap();
            assert_eq!(self.output.connect(Some(from)).unwrap(), from);
            self.output.attach(from, self.poller.watch(OwnedFd::from(ours), 'c'), &[]);
            theirs
        }

        /// Serves events until there are none.
        fn settle(&mut self) {
            loop {
                let ready = self.poller.wait(Some(Duration::ZERO)).unwrap();
                if ready.is_empty() {
                    return;
                }
                for event in ready {
                    match event.key {
                        's' => self.output.source_ready(&mut self.scratch),
                        _ => self.output.connection_ready(event.readable, &mut self.scratch),
                    }
                }
            }
        }

        fn exit(&mut self) {
            self.output.process_exited();
            self.output.source_ready(&mut self.scratch);
        }
    }

    /// Everything readable, and whether the end was seen.
    fn read(stream: &mut UnixStream) -> (Vec<u8>, bool) {
        let mut bytes = Vec::new();
        let ended = stream.read_to_end(&mut bytes).is_ok();
        (bytes, ended)
    }

    #[test]
    fn output_written_before_the_connection_is_kept_and_then_ended() {
        let (mut bench, mut writer) = Bench::new();
        writer.write_all(b"last words").unwrap();
        drop(writer);
        bench.settle();
        let mut daemon = bench.connect(0);
        bench.settle();
        assert_eq!(read(&mut daemon), (b"last words".to_vec(), true));
    }

    #[test]
    fn a_second_daemon_gets_what_the_first_had_not_acknowledged() {
        let (mut bench, mut writer) = Bench::new();
        let mut first = bench.connect(0);
        writer.write_all(b"0123456789").unwrap();
        bench.settle();
        assert_eq!(read(&mut first).0, b"0123456789");
        first.write_all(&4u64.to_le_bytes()).unwrap();
        bench.settle();
        drop(first);
        bench.settle();
        assert!(bench.output.connect(Some(3)).is_err());
        let mut second = bench.connect(6);
        writer.write_all(b"ab").unwrap();
        drop(writer);
        bench.settle();
        assert_eq!(read(&mut second), (b"6789ab".to_vec(), true));
    }

    #[test]
    fn the_workload_is_held_back_by_a_full_window_and_goes_on_after_an_acknowledgement() {
        let (mut bench, mut writer) = Bench::new();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let mut written = 0;
        while let Ok(count) = writer.write(&[7; 4096]) {
            written += count;
            bench.settle();
        }
        assert!((OUTPUT_WINDOW..2 * OUTPUT_WINDOW).contains(&written), "{written}");
        let mut daemon = bench.connect(0);
        let mut got = 0;
        while got < OUTPUT_WINDOW {
            bench.settle();
            got += read(&mut daemon).0.len();
            daemon.write_all(&(got as u64).to_le_bytes()).unwrap();
        }
        bench.settle();
        assert!(writer.write(&[7; 4096]).is_ok());
    }

    #[test]
    fn a_grandchild_does_not_keep_the_stream_open_after_the_exit() {
        let (mut bench, mut writer) = Bench::new();
        let mut daemon = bench.connect(0);
        writer.write_all(b"mine").unwrap();
        bench.exit();
        bench.settle();
        assert_eq!(read(&mut daemon), (b"mine".to_vec(), true));
        assert!(!bench.output.is_draining());
        assert!(writer.write(b"grandchild's").is_err());
    }

    #[test]
    fn a_copys_output_begins_after_what_is_known() {
        // In the window and in the pipe alike; more than there is means all.
        for (known, rest) in [(0, "0123456789"), (4, "456789"), (10, ""), (u64::MAX, "")] {
            for read in [false, true] {
                let (mut bench, mut writer) = Bench::new();
                let mut original = bench.connect(0);
                writer.write_all(b"0123456789").unwrap();
                if read {
                    bench.settle();
                }
                bench.output.renumber(known, &mut bench.scratch);
                bench.settle();
                let _ = self::read(&mut original);
                let mut daemon = bench.connect(0);
                writer.write_all(b"new").unwrap();
                drop(writer);
                bench.settle();
                let expected = format!("{rest}new").into_bytes();
                assert_eq!(self::read(&mut daemon), (expected, true), "{known} {read}");
            }
        }
    }

    #[test]
    fn an_acknowledgement_of_unsent_bytes_ends_the_connection_and_loses_nothing() {
        let (mut bench, mut writer) = Bench::new();
        let mut liar = bench.connect(0);
        writer.write_all(b"abc").unwrap();
        bench.settle();
        liar.write_all(&99u64.to_le_bytes()).unwrap();
        bench.settle();
        assert_eq!(read(&mut liar), (b"abc".to_vec(), true));
        drop(writer);
        let mut daemon = bench.connect(0);
        bench.settle();
        assert_eq!(read(&mut daemon), (b"abc".to_vec(), true));
    }
}
