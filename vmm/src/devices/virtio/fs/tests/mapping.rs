//! A guest that maps files in a window, as Linux does and as it does not.

use std::sync::Arc;

use super::*;
use crate::window::{GRANULE, Window};

const GRANULES: u64 = 4;

/// A server with a window, and the window.
fn server() -> (Server, Arc<Window>) {
    let window = Arc::new(Window::reserve(1 << 40, GRANULES * GRANULE).unwrap());
    let mut server = Server::new();
    server.mappings.set_window(Arc::clone(&window));
    (server, window)
}

fn guest() -> (Guest, Arc<Window>) {
    let mut guest = Guest::new();
    let (mut server, window) = server();
    server.attach("layer", guest.layers.root(), ShareKind::Layer).unwrap();
    guest.server = server;
    (guest, window)
}

fn setup(moffset: u64, foffset: u64, len: u64) -> Vec<u8> {
    encode(&wire::SetupmappingIn { foffset, len, moffset, ..Default::default() })
}

fn remove(count: u32, ranges: &[(u64, u64)]) -> Vec<u8> {
    let mut body = encode(&wire::RemovemappingIn { count });
    ranges.iter().for_each(|&(moffset, len)| wire::RemovemappingOne { moffset, len }.put(&mut body));
    body
}

/// A number of the file `large`, which holds its own index at each, or 0, at a place in the window.
fn number(window: &Window, at: u64) -> u32 {
    let at = usize::try_from(at).unwrap();
    // SAFETY: the tests look within the window, which is mapped.
    unsafe { std::ptr::read_volatile(window.host().wrapping_add(at).cast()) }
}

#[test]
fn large_files_are_named_and_mapped() {
    let (mut guest, window) = guest();
    let upper = u32::try_from(wire::init::HAS_INODE_DAX >> 32).unwrap();
    let out: wire::InitOut = decode(&guest.call(opcode::INIT, 0, &init(u32::MAX)).unwrap());
    // The upper half is offered only by a guest whose INIT has it.
    assert_eq!((out.map_alignment, out.flags2 & upper), (21, upper));
    assert_eq!(guest.walk("layer/dir/file").attr.flags, 0);
    let large = guest.walk("layer/large");
    assert_eq!(large.attr.flags, wire::ATTR_DAX);
    let body = encode(&wire::GetattrIn::default());
    let got: wire::AttrOut = decode(&guest.call(opcode::GETATTR, large.nodeid, &body).unwrap());
    assert_eq!(got.attr, large.attr);

    let two = guest.call(opcode::SETUPMAPPING, large.nodeid, &setup(GRANULE, 0, 2 * GRANULE));
    assert_eq!(two, Err(Errno::INVAL), "one at a time");
    guest.call(opcode::SETUPMAPPING, large.nodeid, &setup(GRANULE, 0, GRANULE)).unwrap();
    assert_eq!((number(&window, GRANULE + 4), number(&window, GRANULE + 4 * 199_999)), (1, 199_999));
    assert_eq!((number(&window, 4), number(&window, GRANULE + 4 * 200_000)), (0, 0));
    // Over what is there, and away; whatever the count says.
    guest.call(opcode::SETUPMAPPING, large.nodeid, &setup(GRANULE, 0, GRANULE)).unwrap();
    guest.call(opcode::SETUPMAPPING, large.nodeid, &setup(0, 0, GRANULE)).unwrap();
    guest.call(opcode::REMOVEMAPPING, 0, &remove(u32::MAX, &[(GRANULE, GRANULE)])).unwrap();
    assert_eq!((number(&window, 4), number(&window, GRANULE + 4)), (1, 0));
    guest.call(opcode::DESTROY, 0, &[]).unwrap();
    assert_eq!(number(&window, 4), 0);
}

#[test]
fn without_a_window_nothing_is_offered() {
    let mut guest = Guest::new();
    let large = guest.walk("layer/large");
    assert_eq!(large.attr.flags, 0);
    assert_eq!(guest.call(opcode::SETUPMAPPING, large.nodeid, &setup(0, 0, GRANULE)), Err(Errno::NOSYS));
    assert_eq!(guest.call(opcode::REMOVEMAPPING, 0, &remove(1, &[(0, GRANULE)])), Err(Errno::NOSYS));
}

#[test]
fn nothing_is_mapped_but_files_in_the_window_to_be_read() {
    let (mut guest, window) = guest();
    let large = guest.walk("layer/large").nodeid;
    guest.call(opcode::SETUPMAPPING, large, &setup(0, 0, GRANULE)).unwrap();
    let end = GRANULES * GRANULE;
    for (moffset, foffset, len) in [
        (end, 0, GRANULE),
        (end - GRANULE, 0, 2 * GRANULE),
        (0, 0, end + GRANULE),
        (0, 0, 0),
        (4096, 0, GRANULE),
        (0, 4096, GRANULE),
        (0, 0, 4096),
        (0, GRANULE, GRANULE),
        (0, u64::MAX - GRANULE + 1, GRANULE),
        (u64::MAX - GRANULE + 1, 0, GRANULE),
        (0, 0, u64::MAX - GRANULE + 1),
    ] {
        let outcome = guest.call(opcode::SETUPMAPPING, large, &setup(moffset, foffset, len));
        assert_eq!(outcome, Err(Errno::INVAL), "{moffset:#x} {foffset:#x} {len:#x}");
        if foffset == 0 {
            let outcome = guest.call(opcode::REMOVEMAPPING, 0, &remove(1, &[(moffset, len)]));
            assert_eq!(outcome, Err(Errno::INVAL), "{moffset:#x} {len:#x}");
        }
    }
    let write = wire::SetupmappingIn { len: GRANULE, flags: wire::SETUPMAPPING_WRITE, ..Default::default() };
    assert_eq!(guest.call(opcode::SETUPMAPPING, large, &encode(&write)), Err(Errno::ROFS));
    for (path, errno) in
        [("layer/dir", Errno::ISDIR), ("layer/link", Errno::INVAL), ("layer/null", Errno::INVAL)]
    {
        let node = guest.walk(path).nodeid;
        assert_eq!(guest.call(opcode::SETUPMAPPING, node, &setup(0, 0, GRANULE)), Err(errno), "{path}");
    }
    for node in [0, 1 << 40] {
        assert_eq!(guest.call(opcode::SETUPMAPPING, node, &setup(0, 0, GRANULE)), Err(Errno::STALE));
    }
    for cut in 0..40 {
        assert_eq!(guest.call(opcode::SETUPMAPPING, large, &vec![0; cut]), Err(Errno::INVAL));
    }
    // Nothing of it has touched what was there.
    assert_eq!(number(&window, 4), 1);
}

#[test]
fn what_was_mapped_is_there_again_or_the_share_is_refused() {
    let (mut guest, first) = guest();
    let large = guest.walk("layer/large").nodeid;
    guest.call(opcode::SETUPMAPPING, large, &setup(2 * GRANULE, 0, GRANULE)).unwrap();
    let saved = postcard::to_stdvec(&state::save(&guest.server)).unwrap();
    assert_eq!(number(&first, 2 * GRANULE + 4), 1, "saving changes nothing");

    let (mut server, window) = server();
    state::restore(&mut server, postcard::from_bytes(&saved).unwrap()).unwrap();
    assert_eq!(number(&window, 2 * GRANULE + 4), 0);
    server.attach("layer", Layers::new().root(), ShareKind::Layer).unwrap();
    assert_eq!(number(&window, 2 * GRANULE + 4), 1);

    let (mut server, _window) = self::server();
    state::restore(&mut server, postcard::from_bytes(&saved).unwrap()).unwrap();
    let layers = Layers::new();
    std::fs::remove_file(layers.store.path(&layers.id).join("large")).unwrap();
    let error = server.attach("layer", layers.root(), ShareKind::Layer).unwrap_err();
    assert!(matches!(error, ShareError::Unusable { .. }), "{error}");

    // A device without the window cannot be what it was.
    let error = state::restore(&mut Server::new(), postcard::from_bytes(&saved).unwrap()).unwrap_err();
    assert!(error.to_string().contains("mappings"), "{error}");
}
