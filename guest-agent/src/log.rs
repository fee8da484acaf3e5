//! The agent's own words, on the kernel's log: they reach the machine's console and its report.

use std::{fmt::Display, fs::OpenOptions, io::Write};

/// One line, for something that should not have happened.
pub fn warn(message: impl Display) {
    write('4', &message.to_string());
}

fn write(level: char, message: &str) {
    let line = message.replace('\n', " ");
    // One write is one record, at most about 1000 bytes.
    let cut = line.char_indices().nth(900).map_or(line.len(), |(at, _)| at);
    let record = format!("<{level}>bulkhead-agent: {}\n", &line[..cut]);
    let log = OpenOptions::new().write(true).open("/dev/kmsg");
    let written = std::process::id() == 1 && log.and_then(|mut log| log.write_all(record.as_bytes())).is_ok();
    if !written {
        // Without a kernel log there is no better place, and nothing to do if this fails too.
        let _ = std::io::stderr().write_all(&record.as_bytes()[3..]);
    }
}
