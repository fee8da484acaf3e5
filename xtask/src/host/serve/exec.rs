//! Runs one program for a client.
//!
//! Four parties: a thread for each output (one with a terminal) that sends frames, the thread that reads the
//! client's frames, and this one, which waits for the program. When the program has ended, the outputs are
//! drained of what is there, not until EOF: a daemon left in the background keeps the pipes open, and must not
//! keep the client waiting. When the client goes away first, the program's process group is killed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use nix::pty::Winsize;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use crate::host::wire::{self, Ending, Exec, Tag, WindowSize};

pub(crate) fn serve(mut connection: TcpStream, request: &Exec) -> Result<()> {
    let program = match Program::start(request) {
        Ok(program) => program,
        Err(error) => {
            // As a shell does: the reason on stderr, the kind in the code.
            let code = if error.kind() == io::ErrorKind::PermissionDenied { 126 } else { 127 };
            let name =
                request.argv.first().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            wire::write_frame(&mut connection, Tag::Accepted, &[])?;
            wire::write_frame(&mut connection, Tag::Stderr, format!("{name}: {error}\n").as_bytes())?;
            return send_ending(&mut connection, Ending::Code(code));
        }
    };
    wire::write_frame(&mut connection, Tag::Accepted, &[])?;
    program.attend(connection)
}

/// A started program and its ends of the streams.
struct Program {
    child: Child,
    group: Group,
    stdin: Option<File>,
    outputs: Vec<(Tag, File)>,
    terminal: Option<File>,
}

impl Program {
    fn start(request: &Exec) -> io::Result<Program> {
        let (name, arguments) = request
            .argv
            .split_first()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no program given"))?;
        check_directory(&request.cwd)?;
        let mut command = Command::new(name);
        command
            .args(arguments)
            .env_clear()
            .envs(request.env.iter().map(|(k, v)| (k, v)))
            .current_dir(&request.cwd);
        match request.tty {
            Some(size) => Program::start_on_terminal(command, size),
            None => Program::start_on_pipes(command),
        }
    }

    fn start_on_pipes(mut command: Command) -> io::Result<Program> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn()?;
        let stdin = child.stdin.take().map(|pipe| File::from(OwnedFd::from(pipe)));
        let stdout = child.stdout.take().map(|pipe| (Tag::Stdout, File::from(OwnedFd::from(pipe))));
        let stderr = child.stderr.take().map(|pipe| (Tag::Stderr, File::from(OwnedFd::from(pipe))));
        let outputs = stdout.into_iter().chain(stderr).collect();
        Ok(Program { group: Group::of(&child), child, stdin, outputs, terminal: None })
    }

    fn start_on_terminal(mut command: Command, size: WindowSize) -> io::Result<Program> {
        let pair = nix::pty::openpty(&winsize(size), None)?;
        let stdio = || pair.slave.try_clone().map(Stdio::from);
        command.stdin(stdio()?).stdout(stdio()?).stderr(stdio()?);
        // SAFETY: between fork and exec the closure makes two system calls and neither allocates nor locks.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                Ok(())
            });
        }
        let child = command.spawn()?;
        let master = File::from(pair.master);
        Ok(Program {
            group: Group::of(&child),
            child,
            stdin: Some(master.try_clone()?),
            outputs: vec![(Tag::Stdout, master.try_clone()?)],
            terminal: Some(master),
        })
    }

    fn attend(mut self, connection: TcpStream) -> Result<()> {
        let ended = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let sink = Arc::new(Mutex::new(connection.try_clone()?));
        let pumps: Vec<JoinHandle<()>> = self
            .outputs
            .drain(..)
            .map(|(tag, from)| {
                let (ended, sink) = (ended.clone(), sink.clone());
                thread::spawn(move || pump(from, tag, &ended, &sink))
            })
            .collect();
        let input =
            Input { stdin: self.stdin.take(), terminal: self.terminal.take(), group: self.group.clone() };
        thread::spawn(move || input.follow(connection));

        let ending = self.group.reap(&mut self.child)?;
        rustix::io::write(&*ended, &1u64.to_ne_bytes())?;
        for pump in pumps {
            let _ = pump.join();
        }
        let mut connection = lock(&sink);
        send_ending(&mut connection, ending)?;
        // Wakes the thread that reads the client's frames.
        Ok(connection.shutdown(std::net::Shutdown::Both)?)
    }
}

/// The program's process group, killable until the program is reaped: after that the number may be another's.
#[derive(Clone)]
struct Group(Arc<Mutex<Option<Pid>>>);

impl Group {
    fn of(child: &Child) -> Group {
        Group(Arc::new(Mutex::new(Some(Pid::from_child(child)))))
    }

    fn kill(&self) {
        if let Some(leader) = *lock(&self.0) {
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }

    fn reap(&self, child: &mut Child) -> Result<Ending> {
        let leader = Pid::from_child(child);
        while let Err(error) = waitid(WaitId::Pid(leader), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
            if error != rustix::io::Errno::INTR {
                return Err(error).context("wait for the program");
            }
        }
        *lock(&self.0) = None;
        let status = child.wait()?;
        Ok(match (status.code(), status.signal()) {
            (Some(code), _) => Ending::Code(code),
            (None, signal) => Ending::Signal(signal.unwrap_or(0)),
        })
    }
}

/// What comes from the client.
struct Input {
    stdin: Option<File>,
    terminal: Option<File>,
    group: Group,
}

impl Input {
    fn follow(mut self, mut connection: TcpStream) {
        while let Ok(Some((tag, payload))) = wire::read_frame(&mut connection) {
            match tag {
                // A program that does not read its stdin loses it, and its client is not bothered.
                Tag::Stdin => {
                    if self.stdin.as_mut().is_some_and(|stdin| stdin.write_all(&payload).is_err()) {
                        self.stdin = None;
                    }
                }
                Tag::StdinEof => self.stdin = None,
                Tag::Resize => self.resize(&payload),
                _ => break,
            }
        }
        self.group.kill();
    }

    fn resize(&self, payload: &[u8]) {
        let size = serde_json::from_slice::<WindowSize>(payload).ok();
        if let (Some(terminal), Some(size)) = (&self.terminal, size) {
            let _ = rustix::termios::tcsetwinsize(
                terminal,
                rustix::termios::Winsize {
                    ws_row: size.rows,
                    ws_col: size.columns,
                    ws_xpixel: 0,
                    ws_ypixel: 0,
                },
            );
        }
    }
}

/// Sends an output on until its end, or until the program has ended and nothing more is there.
fn pump(mut from: File, tag: Tag, ended: &OwnedFd, sink: &Mutex<TcpStream>) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let mut fds =
            [PollFd::new(&from, PollFlags::IN), PollFd::from_borrowed_fd(ended.as_fd(), PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return,
        }
        if fds[0].revents().is_empty() {
            return;
        }
        match from.read(&mut buffer) {
            // A terminal whose last user has left reads as EIO.
            Ok(0) | Err(_) => return,
            Ok(count) => {
                let data = buffer.get(..count).unwrap_or_default();
                if wire::write_frame(&mut *lock(sink), tag, data).is_err() {
                    return;
                }
            }
        }
    }
}

fn send_ending(connection: &mut TcpStream, ending: Ending) -> Result<()> {
    Ok(wire::write_frame(connection, Tag::Exited, &serde_json::to_vec(&ending)?)?)
}

fn check_directory(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("no directory {} in the test host", dir.display())))
}

fn winsize(size: WindowSize) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
