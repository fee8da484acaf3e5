//! The file system device: FUSE that no kernel would speak.
//!
//! The test's share is named `share` and holds `file` (ten digits), `link` (to `/etc/passwd`) and `dir` with the
//! files `n0` to `n299`.

use super::scratch;
use crate::{
    memory,
    virtio::{Desc, Driver, Kind, Machine, Random, buffer},
};

const REQUESTS: u32 = 1;
const ROOT: u64 = 1;
const OUT_HEADER: u32 = 16;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SYMLINK: u32 = 6;
const READ: u32 = 15;
const READLINK: u32 = 5;
const INIT: u32 = 26;
const READDIR: u32 = 28;
const BATCH_FORGET: u32 = 42;
const READDIRPLUS: u32 = 44;

const EINVAL: i32 = 22;
const EROFS: i32 = 30;
const ENOSYS: i32 = 38;

/// Where a reply's data begin.
fn reply() -> u64 {
    buffer(4) + u64::from(OUT_HEADER)
}

fn put_header(length: u32, opcode: u32, node: u64) {
    let at = buffer(0);
    memory::fill(at, 40, 0);
    memory::write(at, length);
    memory::write(at + 4, opcode);
    memory::write(at + 8, 0x1234_5678u64);
    memory::write(at + 16, node);
}

/// One request as it should be; gives its error number, 0 for success.
fn call(driver: &mut Driver, opcode: u32, node: u64, body: &[u8]) -> i32 {
    put_header(40 + body.len() as u32, opcode, node);
    memory::put(buffer(0) + 40, body);
    memory::fill(buffer(4), 64, 0xee);
    let table =
        [Desc::readable(buffer(0), 40 + body.len() as u32).then(1), Desc::writable(buffer(4), 0x1_0000)];
    let written = driver.request(REQUESTS, &table);
    assert!((16..=0x1_0000).contains(&written), "{written} bytes in answer to FUSE request {opcode}");
    assert!(memory::read::<u64>(buffer(4) + 8) == 0x1234_5678, "an answer to another request");
    -memory::read::<i32>(buffer(4) + 4)
}

fn init(driver: &mut Driver) {
    let mut body = [0; 64];
    (body[0], body[4]) = (7, 41);
    assert!(call(driver, INIT, 0, &body) == 0, "INIT");
}

/// Looks a name up; 0 where it is not there.
fn look_up(driver: &mut Driver, parent: u64, name: &[u8]) -> u64 {
    let mut body = [0; 300];
    body[..name.len()].copy_from_slice(name);
    match call(driver, LOOKUP, parent, &body[..=name.len()]) {
        0 => memory::read(reply()),
        _ => 0,
    }
}

fn share(driver: &mut Driver) -> u64 {
    init(driver);
    let share = look_up(driver, ROOT, b"share");
    assert!(share > ROOT, "the share is not there");
    share
}

fn read_in(offset: u64, size: u32) -> [u8; 40] {
    let mut body = [0; 40];
    body[8..16].copy_from_slice(&offset.to_le_bytes());
    body[16..20].copy_from_slice(&size.to_le_bytes());
    body
}

/// Mounts, so to speak, and reads the file.
pub(super) fn works(driver: &mut Driver) {
    let share = share(driver);
    let file = look_up(driver, share, b"file");
    assert!(file > ROOT, "the file is not there");
    assert!(call(driver, READ, file, &read_in(0, 4096)) == 0, "READ");
    let (low, high): (u64, u16) = (memory::read(reply()), memory::read(reply() + 8));
    assert!(low.to_le_bytes() == *b"01234567" && high.to_le_bytes() == *b"89", "the file is not what it was");
}

/// Every operation with headers that lie, bodies that are cut or garbage, and too little room.
pub(super) fn opcodes(machine: &Machine, seed: u64) {
    let mut driver = machine.find(Kind::Fs).up();
    let known = share(&mut driver);
    let mut random = Random(seed + 17);
    for round in 0..3000u64 {
        let opcode = match round % 64 {
            63 => [4096, 0x8000_0000, u32::MAX, 1000][random.below(4) as usize],
            other => other as u32,
        };
        let there = [0, 1, 39, 40, 41, 48, 56, 64, 80, 104, 300, 0x1_0027, 0x1_0028, 0x1_0029]
            [random.below(14) as usize];
        let named =
            [there, there, there, 0, 39, 40, there + 1, 0x7fff_ffff, u32::MAX][random.below(9) as usize];
        let node = [0, ROOT, known, known + 1, u64::MAX, random.any()][random.below(6) as usize];
        for word in (40..400).step_by(8) {
            memory::write(buffer(0) + word, [0, u64::MAX, random.any(), known][random.below(4) as usize]);
        }
        put_header(named, opcode, node);
        let room = [0, 1, 15, 16, 17, 24, 144, 160, 4096, 0x10_0010][random.below(10) as usize];
        let queue = (random.below(8) != 0).into();
        let table = [Desc::readable(buffer(0), there).then(1), Desc::writable(scratch(), room)];
        let written = driver.request(queue, &table);
        assert!(
            written <= room && (written == 0 || written >= OUT_HEADER),
            "{written} bytes, opcode {opcode}"
        );
    }
    works(&mut driver);
}

/// Names that are no names, and such that would lead out of the share.
pub(super) fn names(machine: &Machine, _: u64) {
    let mut driver = machine.find(Kind::Fs).up();
    let share = share(&mut driver);
    let (file, link, dir) = (
        look_up(&mut driver, share, b"file"),
        look_up(&mut driver, share, b"link"),
        look_up(&mut driver, share, b"dir"),
    );
    for parent in [ROOT, share, dir] {
        for name in [
            &b"\0"[..],
            b".\0",
            b"..\0",
            b"/\0",
            b"//\0",
            b"../..\0",
            b"../../../../../../etc/passwd\0",
            b"/etc/passwd\0",
            b"dir/n0\0",
            b"dir/\0",
            b"./file\0",
            b"share/../..\0",
            b"",
            b"file",
            b"file\0file\0",
            b"\0\0",
        ] {
            let error = call(&mut driver, LOOKUP, parent, name);
            assert!(error == EINVAL, "LOOKUP of {name:?} in {parent}: {error}");
        }
        for length in [256, 1024, 4095, 4096] {
            let mut long = [b'n'; 4097];
            long[length] = 0;
            assert!(call(&mut driver, LOOKUP, parent, &long[..=length]) != 0);
        }
    }
    // Through what is no directory, and through a link: its target is a text for the guest, no way for the server.
    for parent in [file, link] {
        assert!(call(&mut driver, LOOKUP, parent, b"x\0") != 0);
        assert!(call(&mut driver, READDIR, parent, &read_in(0, 4096)) != 0);
    }
    assert!(call(&mut driver, READLINK, link, &[]) == 0);
    assert!(call(&mut driver, READ, link, &read_in(0, 4096)) != 0, "a link was followed");
    works(&mut driver);
}

/// Everything that would change something, CVE-2026-47243's raw SYMLINK with an absolute path among it: a share of
/// layers is read-only, whoever asks.
pub(super) fn changes(machine: &Machine, _: u64) {
    let mut driver = machine.find(Kind::Fs).up();
    let share = share(&mut driver);
    let dir = look_up(&mut driver, share, b"dir");
    let file = look_up(&mut driver, share, b"file");
    for name in [
        &b"pwned\0/etc/passwd\0"[..],
        b"/tmp/pwned\0/etc/passwd\0",
        b"../pwned\0/\0",
        b"/proc/self/root/pwned\0/etc\0",
        b"pwned\0../../../../../../../tmp/pwned\0",
    ] {
        for parent in [ROOT, share, dir, file, 0, u64::MAX] {
            let error = call(&mut driver, SYMLINK, parent, name);
            assert!(error == EROFS, "SYMLINK {name:?} in {parent}: {error}");
        }
    }
    // SETATTR to COPY_FILE_RANGE, with bodies as the protocol has them: fixed part, then names or data.
    for (opcode, fixed) in [
        (4, 88),
        (8, 16),
        (9, 8),
        (10, 0),
        (11, 0),
        (12, 8),
        (13, 8),
        (16, 40),
        (21, 16),
        (24, 0),
        (35, 16),
        (43, 32),
        (45, 16),
        (47, 56),
        (51, 16),
    ] {
        let mut body = [0; 128];
        body[..8].copy_from_slice(&file.to_le_bytes());
        body[fixed..fixed + 12].copy_from_slice(b"pwned\0owned\0");
        for node in [ROOT, share, dir, file] {
            let error = call(&mut driver, opcode, node, &body[..fixed + 12]);
            assert!([EROFS, ENOSYS].contains(&error), "request {opcode} on {node}: {error}");
        }
    }
    works(&mut driver);
}

/// Look-ups by the thousand that are never forgotten, of names that are there and that are not.
pub(super) fn lookups(machine: &Machine, _: u64) {
    let mut driver = machine.find(Kind::Fs).up();
    let share = share(&mut driver);
    let dir = look_up(&mut driver, share, b"dir");
    for round in 0..8 {
        for number in 0..300u32 {
            let mut name = [b'n', 0, 0, 0, 0];
            let digits = digits(number, &mut name[1..4]);
            let found = look_up(&mut driver, dir, &name[..=digits]);
            assert!(found > ROOT, "n{number} is not there in round {round}");
            if round == 0 {
                name[0] = b'x';
                assert!(look_up(&mut driver, dir, &name[..=digits]) == 0);
            }
        }
        assert!(call(&mut driver, READDIRPLUS, dir, &read_in(0, 0xffff)) == 0);
    }
    works(&mut driver);
}

fn digits(number: u32, into: &mut [u8]) -> usize {
    let (hundreds, tens, ones) = (number / 100, number / 10 % 10, number % 10);
    let length = if hundreds > 0 {
        3
    } else if tens > 0 {
        2
    } else {
        1
    };
    for (slot, digit) in into.iter_mut().zip([hundreds, tens, ones].into_iter().skip(3 - length)) {
        *slot = b'0' + digit as u8;
    }
    length
}

/// Forgetting more than was ever known, and what cannot be forgotten.
pub(super) fn forgets(machine: &Machine, _: u64) {
    let mut driver = machine.find(Kind::Fs).up();
    let share = share(&mut driver);
    let file = look_up(&mut driver, share, b"file");
    let forget = |driver: &mut Driver, queue, opcode, node, body: &[u8], named: u32| {
        put_header(named, opcode, node);
        memory::put(buffer(0) + 40, body);
        let table =
            [Desc::readable(buffer(0), 40 + body.len() as u32).then(1), Desc::writable(buffer(4), 4096)];
        driver.request(queue, &table)
    };
    for queue in [0, 1] {
        for node in [0, ROOT, share, file, file + 1, u64::MAX] {
            for count in [0, 1, 2, u64::MAX, 1 << 63] {
                let written = forget(&mut driver, queue, FORGET, node, &count.to_le_bytes(), 48);
                assert!(written == 0, "FORGET was answered");
            }
        }
        let file = look_up(&mut driver, ROOT, b"share");
        let mut batch = [0xff; 8 + 16 * 64];
        for count in [0, 1, 63, 64, 65, u32::MAX] {
            batch[..4].copy_from_slice(&count.to_le_bytes());
            batch[8..16].copy_from_slice(&file.to_le_bytes());
            let named = [40, 48, 40 + batch.len() as u32, u32::MAX][count as usize % 4];
            let _ = forget(&mut driver, queue, BATCH_FORGET, 0, &batch, named);
        }
    }
    // What was forgotten is stale; what is asked for anew is there.
    assert!(call(&mut driver, GETATTR, file, &[0; 16]) != 0);
    works(&mut driver);
}

/// Listings from cookies that were never given, with room for anything and nothing.
pub(super) fn listings(machine: &Machine, seed: u64) {
    let mut driver = machine.find(Kind::Fs).up();
    let share = share(&mut driver);
    let dir = look_up(&mut driver, share, b"dir");
    let mut random = Random(seed + 23);
    for _ in 0..400 {
        let opcode = [READDIR, READDIRPLUS][random.below(2) as usize];
        let node = [ROOT, share, dir][random.below(3) as usize];
        let offset = [0, 1, 2, u64::MAX, 1 << 63, i64::MAX as u64, random.any(), random.below(4000)]
            [random.below(8) as usize];
        let size = [0, 1, 24, 152, 4096, u32::MAX][random.below(6) as usize];
        let room = [16, 40, 168, 4096, 0x1_0000][random.below(5) as usize];
        put_header(80, opcode, node);
        memory::put(buffer(0) + 40, &read_in(offset, size));
        let table = [Desc::readable(buffer(0), 80).then(1), Desc::writable(buffer(4), room)];
        let written = driver.request(REQUESTS, &table);
        assert!(written <= room, "{written} bytes of a listing, room for {room}");
    }
    works(&mut driver);
}
