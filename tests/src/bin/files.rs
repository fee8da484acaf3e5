//! Measures a file system from inside, for the benchmark: prints `NAME NANOSECONDS` for each thing done.
//!
//! `files TREE LARGE [WRITE]`: a directory of small files, a large file, and a name for what is written.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Instant;

const WRITTEN_MIB: usize = 64;
const SYNCS: usize = 100;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, tree, large, rest @ ..] = &arguments[..] else { panic!("files TREE LARGE [WRITE]") };
    let mut count = 0;
    timed("walk", || count = walk(Path::new(tree), &mut |_| ()));
    timed("walk-again", || assert_eq!(walk(Path::new(tree), &mut |_| ()), count));
    let mut buffer = vec![0; 1 << 20];
    for name in ["read", "read-again"] {
        timed(name, || {
            walk(Path::new(tree), &mut |path| {
                read(path, &mut buffer);
            });
        });
    }
    for name in ["read-large", "read-large-again"] {
        timed(name, || assert!(read(Path::new(large), &mut buffer) > 0));
    }
    let [write] = rest else { return };
    let mut file = File::create(write).expect("create");
    timed("write", || {
        for _ in 0..WRITTEN_MIB {
            file.write_all(&buffer).expect("write");
        }
        file.sync_all().expect("fsync");
    });
    timed("fsync", || {
        file.seek(SeekFrom::Start(0)).expect("seek");
        for _ in 0..SYNCS {
            file.write_all(&buffer[..4096]).expect("write");
            file.sync_all().expect("fsync");
        }
    });
}

fn timed(name: &str, what: impl FnOnce()) {
    let start = Instant::now();
    what();
    println!("{name} {}", start.elapsed().as_nanos());
}

/// How many files there are; each is asked for its size.
fn walk(directory: &Path, each: &mut impl FnMut(&Path)) -> usize {
    let mut count = 0;
    for entry in fs::read_dir(directory).expect("read_dir") {
        let path = entry.expect("entry").path();
        let metadata = fs::symlink_metadata(&path).expect("stat");
        if metadata.is_dir() {
            count += walk(&path, each);
        } else {
            each(&path);
            count += 1;
        }
    }
    count
}

fn read(path: &Path, buffer: &mut [u8]) -> usize {
    let mut file = File::open(path).expect("open");
    let mut total = 0;
    loop {
        match file.read(buffer).expect("read") {
            0 => return total,
            count => total += count,
        }
    }
}
