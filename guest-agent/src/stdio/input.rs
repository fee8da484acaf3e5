//! An input stream: a connection that is read, a small buffer, a pipe or terminal that is written.
//!
//! The end of the connection is not the end of the input, since the daemon may have died. The input ends
//! when [`Input::close`] was asked for *and* the connection has ended *and* all of it was delivered, in
//! whatever order these come.

use rustix::io::Errno;

use super::{CHUNK, TURN, hang_up};
use crate::poll::Watched;

/// One input stream.
pub struct Input<K> {
    /// None: the input has ended, or the process has closed its side.
    sink: Option<Watched<K>>,
    connection: Option<Watched<K>>,
    /// Read and not yet written; the connection is not read again before it is empty.
    buffer: Vec<u8>,
    written: usize,
    close: bool,
    terminal: bool,
}

impl<K> Input<K> {
    /// An input that writes to `sink`, which must not block.
    pub fn new(sink: Watched<K>, terminal: bool) -> Self {
        Self { sink: Some(sink), connection: None, buffer: Vec::new(), written: 0, close: false, terminal }
    }

    /// The daemon's connection; `early` is what it sent behind its first frame. Replaces an earlier one.
    pub fn attach(&mut self, connection: Watched<K>, early: &[u8]) {
        self.disconnect();
        self.buffer.extend(early);
        self.connection = Some(connection);
        self.flush();
        self.settle();
    }

    /// Ends the input once all that its connection brings is delivered. A terminal's input does not end:
    /// its hang-up is a signal, not an end of file.
    pub fn close(&mut self) {
        self.close = !self.terminal;
        self.settle();
    }

    /// The connection can be read.
    pub fn connection_ready(&mut self, scratch: &mut [u8]) {
        let mut budget = TURN;
        while self.buffer.is_empty() && budget > 0 {
            let Some(connection) = &self.connection else { break };
            let limit = scratch.len().min(CHUNK).min(budget);
            match rustix::io::read(connection, &mut scratch[..limit]) {
                Ok(0) => self.disconnect(),
                Ok(count) => {
                    self.buffer.extend(&scratch[..count]);
                    budget -= count;
                    self.flush();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => self.disconnect(),
            }
        }
        self.settle();
    }

    /// The sink can be written.
    pub fn sink_ready(&mut self) {
        self.flush();
        self.settle();
    }

    /// The process has ended; nobody will read.
    pub fn process_exited(&mut self) {
        self.abandon();
    }

    fn flush(&mut self) {
        while let Some(sink) = &self.sink {
            let rest = self.buffer.get(self.written..).unwrap_or_default();
            if rest.is_empty() {
                break;
            }
            match rustix::io::write(sink, rest) {
                Ok(count) => self.written += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.abandon();
                    return;
                }
            }
        }
        self.buffer.clear();
        self.written = 0;
        if self.sink.is_none() {
            self.abandon();
        }
    }

    /// The process has closed its side: the daemon learns it by the connection's end.
    fn abandon(&mut self) {
        self.sink = None;
        self.buffer = Vec::new();
        self.written = 0;
        self.disconnect();
    }

    fn disconnect(&mut self) {
        if let Some(connection) = self.connection.take() {
            hang_up(&connection);
        }
    }

    fn settle(&mut self) {
        let empty = self.buffer.is_empty();
        if self.close && empty && self.connection.is_none() {
            self.sink = None;
        }
        // As for outputs: a failure leaves the stream standing still.
        if let Some(connection) = &self.connection {
            let _ = connection.want(empty, false);
        }
        if let Some(sink) = &self.sink {
            let _ = sink.want(false, !empty);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::Shutdown,
        os::{fd::OwnedFd, unix::net::UnixStream},
        rc::Rc,
        time::Duration,
    };

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;
    use crate::poll::Poller;

    struct Bench {
        poller: Rc<Poller<char>>,
        input: Input<char>,
        scratch: Vec<u8>,
    }

    impl Bench {
        fn new() -> (Self, std::fs::File) {
            let poller = Poller::new().unwrap();
            let (reader, writer) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).unwrap();
            let input = Input::new(poller.watch(writer, 's'), false);
            (Self { poller, input, scratch: vec![0; CHUNK] }, reader.into())
        }

        fn connect(&mut self, early: &[u8]) -> UnixStream {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            theirs.set_nonblocking(true).unwrap();
            self.input.attach(self.poller.watch(OwnedFd::from(ours), 'c'), early);
            theirs
        }

        fn settle(&mut self) {
            loop {
                let ready = self.poller.wait(Some(Duration::ZERO)).unwrap();
                if ready.is_empty() {
                    return;
                }
                for event in ready {
                    match event.key {
                        's' => self.input.sink_ready(),
                        _ => self.input.connection_ready(&mut self.scratch),
                    }
                }
            }
        }
    }

    fn read(reader: &mut std::fs::File) -> (Vec<u8>, bool) {
        let mut bytes = Vec::new();
        let ended = reader.read_to_end(&mut bytes).is_ok();
        (bytes, ended)
    }

    #[test]
    fn the_end_of_the_connection_is_not_the_end_of_the_input() {
        let (mut bench, mut process) = Bench::new();
        let mut daemon = bench.connect(b"early ");
        daemon.write_all(b"bird").unwrap();
        drop(daemon);
        bench.settle();
        assert_eq!(read(&mut process), (b"early bird".to_vec(), false));
        let mut second = bench.connect(&[]);
        second.write_all(b"again").unwrap();
        bench.settle();
        assert_eq!(read(&mut process), (b"again".to_vec(), false));
    }

    #[test]
    fn a_close_that_overtakes_the_bytes_waits_for_them() {
        let (mut bench, mut process) = Bench::new();
        let mut daemon = bench.connect(&[]);
        bench.input.close();
        bench.settle();
        assert_eq!(read(&mut process), (vec![], false));
        daemon.write_all(b"late").unwrap();
        daemon.shutdown(Shutdown::Write).unwrap();
        bench.settle();
        assert_eq!(read(&mut process), (b"late".to_vec(), true));
    }

    #[test]
    fn a_slow_reader_gets_everything_and_then_the_end() {
        let (mut bench, mut process) = Bench::new();
        let mut daemon = bench.connect(&[]);
        let data: Vec<u8> = (0..1_000_000u32).map(|index| (index % 253) as u8).collect();
        let (mut sent, mut got) = (0, Vec::new());
        let mut ended = false;
        while !ended {
            if sent < data.len() {
                sent += daemon.write(&data[sent..]).unwrap_or(0);
            } else {
                let _ = daemon.shutdown(Shutdown::Write);
                bench.input.close();
            }
            bench.settle();
            let (bytes, end) = read(&mut process);
            got.extend(bytes);
            ended = end;
        }
        assert!(got == data);
    }

    #[test]
    fn a_process_that_closed_its_stdin_ends_the_connection() {
        let (mut bench, process) = Bench::new();
        let mut daemon = bench.connect(&[]);
        drop(process);
        daemon.write_all(b"for nobody").unwrap();
        bench.settle();
        assert_eq!(daemon.read(&mut [0; 8]).unwrap(), 0);
    }
}
