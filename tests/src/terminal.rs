//! A program on a terminal of its own, as a person would use it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use anyhow::{Result, bail};
use nix::pty::Winsize;

/// The terminal and the program on it; the program is killed when this is dropped.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    child: Child,
    seen: String,
}

impl Terminal {
    /// Starts the command on a new terminal of this many rows and columns.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(mut command: Command, rows: u16, columns: u16) -> Result<Terminal> {
        let pair = nix::pty::openpty(&winsize(rows, columns), None)?;
        let stdio = || pair.slave.try_clone().map(Stdio::from);
        command.env("TERM", "xterm").stdin(stdio()?).stdout(stdio()?).stderr(stdio()?);
        // SAFETY: between fork and exec the closure makes two system calls and neither allocates nor locks.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                set_controlling_terminal()
            });
        }
        let child = command.spawn()?;
        Ok(Terminal { master: File::from(pair.master), child, seen: String::new() })
    }

    /// Types the text.
    ///
    /// # Errors
    /// When the program has gone.
    pub fn type_text(&mut self, text: &str) -> Result<()> {
        Ok(self.master.write_all(text.as_bytes())?)
    }

    /// Reads on until the text has been shown, and gives all that was shown since the last call.
    ///
    /// # Errors
    /// When the program ends first, with what it showed.
    pub fn read_until(&mut self, text: &str) -> Result<String> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(at) = self.seen.find(text) {
                let rest = self.seen.split_off(at + text.len());
                return Ok(std::mem::replace(&mut self.seen, rest));
            }
            match self.master.read(&mut buffer) {
                Ok(count) if count > 0 => {
                    self.seen.push_str(&String::from_utf8_lossy(buffer.get(..count).unwrap_or_default()));
                }
                // A terminal whose last user has left reads as EIO.
                _ => bail!("the program ended before it showed {text:?}: {:?}", self.seen),
            }
        }
    }

    /// Makes it another size; the program gets SIGWINCH.
    ///
    /// # Errors
    /// When the terminal refuses.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        // SAFETY: TIOCSWINSZ reads one winsize, which lives through the call, on an open descriptor.
        unsafe { ioctl::set_size(std::os::fd::AsRawFd::as_raw_fd(&self.master), &winsize(rows, columns)) }?;
        Ok(())
    }

    /// Waits for the program's end; its exit code.
    ///
    /// # Errors
    /// When a signal ended it.
    pub fn wait(&mut self) -> Result<i32> {
        let mut rest = Vec::new();
        let _ = self.master.read_to_end(&mut rest);
        match self.child.wait()?.code() {
            Some(code) => Ok(code),
            None => bail!("killed by a signal"),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

mod ioctl {
    #![allow(missing_docs, reason = "the macros write public functions without documentation")]
    use nix::libc::{TIOCSCTTY, TIOCSWINSZ};
    use nix::pty::Winsize;

    nix::ioctl_write_ptr_bad!(set_size, TIOCSWINSZ, Winsize);
    nix::ioctl_write_int_bad!(take_terminal, TIOCSCTTY);
}

fn set_controlling_terminal() -> std::io::Result<()> {
    // SAFETY: TIOCSCTTY takes a number; stdin is the terminal's slave, open in the child.
    unsafe { ioctl::take_terminal(0, 0) }?;
    Ok(())
}

fn winsize(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_sees_a_terminal_and_its_new_size() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "stty size; read line; stty size; echo \"got $line\"; exit 3"]);
        let mut terminal = Terminal::start(shell, 24, 80).unwrap();
        terminal.read_until("24 80").unwrap();
        terminal.resize(40, 100).unwrap();
        terminal.type_text("word\n").unwrap();
        terminal.read_until("40 100").unwrap();
        terminal.read_until("got word").unwrap();
        assert_eq!(terminal.wait().unwrap(), 3);
    }
}
