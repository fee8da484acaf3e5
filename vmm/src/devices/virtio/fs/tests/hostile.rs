//! A guest that speaks FUSE to do harm.

use proptest::{collection::vec, prelude::*, sample::select, test_runner::TestRunner};

use super::*;

#[test]
fn forged_nodes_are_stale() {
    let mut guest = Guest::new();
    let known = guest.walk("layer/dir/file").nodeid;
    for node in [0, known + 1, u64::MAX, 1 << 63] {
        for opcode in [opcode::LOOKUP, opcode::GETATTR, opcode::READ, opcode::READDIR, opcode::GETXATTR] {
            let body = match opcode {
                opcode::LOOKUP => b"x\0".to_vec(),
                opcode::GETATTR => vec![0; 16],
                opcode::GETXATTR => getxattr(9, "x"),
                _ => read_in(0, 4096),
            };
            assert_eq!(guest.call(opcode, node, &body), Err(Errno::STALE), "{opcode} {node}");
        }
        guest.forget(node, u64::MAX);
    }
}

#[test]
fn a_read_has_a_bound_whatever_it_has_room_for() {
    struct Endless(usize);
    impl Sink for Endless {
        fn room(&self) -> usize {
            usize::MAX
        }
        fn fill(&mut self, _: &OwnedFd, _: u64, length: usize) -> Result<usize, Errno> {
            self.0 = length;
            Ok(length)
        }
    }
    let mut guest = Guest::new();
    let nodeid = guest.walk("layer/large").nodeid;
    let header = wire::InHeader { opcode: opcode::READ, nodeid, ..Default::default() };
    let body = read_in(0, u32::MAX);
    let mut sink = Endless(0);
    let reply = dispatch::serve(&mut guest.server, Request { header, body: &body }, &mut sink);
    assert_eq!((reply, sink.0), (Reply::Filled(1 << 20), 1 << 20));
}

#[test]
fn names_are_single_names() {
    let mut guest = Guest::new();
    let dir = guest.walk("layer").nodeid;
    for node in [dir, wire::ROOT_ID] {
        for name in ["", ".", "..", "dir/file", "/", "/etc/passwd", "../..", "dir/"] {
            assert_eq!(guest.look_up(node, name), Err(Errno::INVAL), "{name}");
        }
        assert_eq!(guest.look_up(node, &"n".repeat(256)), Err(Errno::NAMETOOLONG));
        for body in [&b""[..], b"dir", b"dir\0file\0", b"\0\0", b"dir\0x"] {
            assert_eq!(guest.call(opcode::LOOKUP, node, body), Err(Errno::INVAL), "{}", body.escape_ascii());
        }
    }
}

#[test]
fn cut_structures_are_refused() {
    let mut guest = Guest::new();
    let file = guest.walk("layer/dir/file").nodeid;
    let dir = guest.walk("layer/dir").nodeid;
    let whole = [
        (opcode::INIT, file, 16),
        (opcode::GETATTR, file, 16),
        (opcode::READ, file, 40),
        (opcode::READDIR, dir, 40),
        (opcode::READDIRPLUS, dir, 40),
        (opcode::GETXATTR, file, 9),
        (opcode::LISTXATTR, file, 8),
        (opcode::ACCESS, file, 8),
        (opcode::LSEEK, file, 24),
    ];
    for (opcode, node, length) in whole {
        for cut in 0..length {
            assert_eq!(guest.call(opcode, node, &vec![0; cut]), Err(Errno::INVAL), "{opcode} {cut}");
        }
    }
    for cut in 0..8 {
        assert_eq!(guest.reply(opcode::FORGET, file, &vec![0xff; cut], 0).0, Reply::None);
        assert_eq!(guest.reply(opcode::BATCH_FORGET, file, &vec![0xff; cut], 0).0, Reply::None);
    }
    assert_eq!(guest.read(file, 0, 1).unwrap(), b"0");
}

#[test]
fn counts_and_offsets_that_lie_do_nothing() {
    let mut guest = Guest::new();
    let file = guest.walk("layer/dir/file").nodeid;
    let dir = guest.walk("layer/many").nodeid;
    let batch = [encode(&wire::BatchForgetIn { count: u32::MAX, dummy: 0 }), vec![0; 16 * 100]].concat();
    assert_eq!(guest.reply(opcode::BATCH_FORGET, 0, &batch, 0).0, Reply::None);
    for offset in [1, 12345, u64::from(u32::MAX), i64::MAX as u64, u64::MAX, 1 << 63] {
        for opcode in [opcode::READDIR, opcode::READDIRPLUS] {
            for node in [dir, wire::ROOT_ID] {
                // Anything but a panic, and the next listing is whole again.
                let _ = guest.call(opcode, node, &read_in(offset, u32::MAX));
            }
        }
    }
    assert_eq!(guest.list(dir, false, 4096).len(), 302);
    assert_eq!(guest.read(file, 0, u32::MAX).unwrap(), b"0123456789");
}

#[test]
fn a_reply_without_room_is_an_error() {
    let mut guest = Guest::new();
    let dir = guest.walk("layer/dir").nodeid;
    for room in [0, 1, 127] {
        let (reply, _) = guest.reply(opcode::LOOKUP, dir, b"file\0", room);
        assert_eq!(reply, Reply::Error(Errno::INVAL));
    }
    let file = guest.walk("layer/dir/file").nodeid;
    assert_eq!(guest.reply(opcode::READ, file, &read_in(0, 10), 0).0, Reply::Filled(0));
    assert_eq!(guest.reply(opcode::READ, file, &read_in(0, 10), 4).0, Reply::Filled(4));
}

/// Random requests, likely enough to be understood: no panic, no reply over its room, no change on the host.
#[test]
fn random_requests_are_answered() {
    let layers = Rc::new(Layers::new());
    let names = select(vec!["layer", "dir", "file", "..", "a/b", "gone", "many"]);
    let request = (0..60_u32, 0..320_u64, vec(any::<u8>(), 0..64), 0..5000_usize, names);
    let run = |requests: Vec<(u32, u64, Vec<u8>, usize, &str)>| {
        let mut guest = Guest::over(Rc::clone(&layers));
        let before = tree(&guest);
        guest.walk("layer/dir/file");
        for (opcode, node, mut body, room, name) in requests {
            if opcode == opcode::LOOKUP {
                body = [name.as_bytes(), &[0]].concat();
            }
            let (reply, filled) = guest.reply(opcode, node, &body, room);
            match reply {
                Reply::Bytes(bytes) => prop_assert!(bytes.len() <= room),
                Reply::Filled(length) => prop_assert!(length <= room && length == filled.len()),
                Reply::Error(_) | Reply::None => {}
            }
        }
        prop_assert_eq!(tree(&guest), before);
        prop_assert_eq!(guest.walk("layer/dir/file").attr.size, 10);
        Ok(())
    };
    TestRunner::default().run(&vec(request, 1..60), run).unwrap();
}

fn tree(guest: &Guest) -> Vec<(std::path::PathBuf, u64)> {
    fn walk(dir: &std::path::Path, found: &mut Vec<(std::path::PathBuf, u64)>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let stat = path.symlink_metadata().unwrap();
            if stat.is_dir() {
                walk(&path, found);
            }
            found.push((path, stat.len()));
        }
    }
    let mut found = Vec::new();
    walk(&guest.layers.store.path(&guest.layers.id), &mut found);
    found.sort();
    found
}

#[test]
fn a_body_is_never_longer_than_what_is_copied() {
    let mut guest = Guest::new();
    assert_eq!(guest.call(opcode::LOOKUP, wire::ROOT_ID, &[b'x'; MAX_BODY]), Err(Errno::INVAL));
}
