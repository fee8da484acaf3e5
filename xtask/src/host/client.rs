//! The outer side of the wire: one connection a request.

use std::io::{self, IsTerminal, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

use super::state::StateDir;
use super::wire::{self, Ending, Exec, Hello, Request, Tag, WindowSize};

/// A test host that is up.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    port: u16,
    token: String,
}

impl Client {
    /// To the test host that was started in `dir`.
    pub(crate) fn of(dir: &StateDir) -> Result<Client> {
        let started = dir.started().context("the test host is not up: `cargo xtask host up` starts it")?;
        Ok(Client { port: started.port, token: dir.token()? })
    }

    /// A connection on which `request` has been accepted.
    pub(crate) fn request(&self, request: Request, answer_within: Option<Duration>) -> Result<TcpStream> {
        let mut connection = TcpStream::connect(("127.0.0.1", self.port)).context(
            "the test host does not answer: it was stopped, or died (`cargo xtask host up` starts it)",
        )?;
        connection.set_nodelay(true)?;
        connection.set_read_timeout(answer_within)?;
        wire::write_hello(
            &mut connection,
            &Hello { version: wire::VERSION, token: self.token.clone(), request },
        )?;
        match wire::read_frame(&mut connection).context("answer of the test host")? {
            Some((Tag::Accepted, _)) => {}
            Some((Tag::Failed, reason)) => bail!("{}", String::from_utf8_lossy(&reason)),
            Some((tag, _)) => bail!("the test host answered with {tag:?}"),
            None => bail!("the test host closed the connection"),
        }
        connection.set_read_timeout(None)?;
        Ok(connection)
    }

    pub(crate) fn ping(&self) -> Result<()> {
        self.request(Request::Ping, Some(Duration::from_secs(20))).map(drop)
    }

    pub(crate) fn power_off(&self) -> Result<()> {
        self.request(Request::PowerOff, Some(Duration::from_secs(20))).map(drop)
    }

    /// Runs a program with this process's stdin, stdout and stderr; gives its exit code.
    pub(crate) fn exec(&self, program: Exec) -> Result<ExitCode> {
        let with_terminal = program.tty.is_some();
        let mut connection = self.request(Request::Exec(program), None)?;
        let sender = Arc::new(Mutex::new(connection.try_clone()?));
        let raw = if with_terminal { RawTerminal::enter(&io::stdin())? } else { None };
        let input = sender.clone();
        thread::spawn(move || send_stdin(&input));
        if with_terminal {
            relay_window_changes(sender)?;
        }
        let ending = receive(&mut connection);
        drop(raw);
        Ok(ExitCode::from(ending?.exit_code()))
    }
}

/// The size of the terminal that stdout is, for a program that is to have one of its own.
pub(crate) fn terminal_size() -> WindowSize {
    let size = tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin()));
    match size {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => {
            WindowSize { rows: size.ws_row, columns: size.ws_col }
        }
        // No terminal, or one that does not know: what terminals have had since there were any.
        _ => WindowSize { rows: 24, columns: 80 },
    }
}

fn send(connection: &Mutex<TcpStream>, tag: Tag, payload: &[u8]) -> io::Result<()> {
    wire::write_frame(&mut *connection.lock().unwrap_or_else(PoisonError::into_inner), tag, payload)
}

/// Runs until stdin ends or the program does; the process's end ends it.
fn send_stdin(connection: &Mutex<TcpStream>) {
    let mut stdin = io::stdin().lock();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stdin.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                if send(connection, Tag::Stdin, buffer.get(..count).unwrap_or_default()).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    let _ = send(connection, Tag::StdinEof, &[]);
}

fn receive(connection: &mut TcpStream) -> Result<Ending> {
    loop {
        match wire::read_frame(connection).context("the test host's connection broke")? {
            Some((Tag::Stdout, data)) => io::stdout().write_all(&data).and_then(|()| io::stdout().flush())?,
            Some((Tag::Stderr, data)) => io::stderr().write_all(&data)?,
            Some((Tag::Exited, ending)) => return Ok(serde_json::from_slice(&ending)?),
            Some((tag, _)) => bail!("unexpected {tag:?} from the test host"),
            None => bail!("the test host went away while the program ran"),
        }
    }
}

/// The terminal in raw mode until dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter(terminal: &impl AsFd) -> Result<Option<RawTerminal>> {
        if !isatty(terminal) {
            return Ok(None);
        }
        let before = tcgetattr(terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(terminal, OptionalActions::Now, &raw)?;
        Ok(Some(RawTerminal(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Sends the terminal's size each time SIGWINCH tells of a new one.
fn relay_window_changes(connection: Arc<Mutex<TcpStream>>) -> Result<()> {
    use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
    if !io::stdout().is_terminal() && !io::stdin().is_terminal() {
        return Ok(());
    }
    let mut set = SigSet::empty();
    set.add(Signal::SIGWINCH);
    // Blocked here, hence in the thread too, which then takes them one by one.
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
    thread::spawn(move || {
        while set.wait().is_ok() {
            let Ok(size) = serde_json::to_vec(&terminal_size()) else { return };
            if send(&connection, Tag::Resize, &size).is_err() {
                return;
            }
        }
    });
    Ok(())
}
