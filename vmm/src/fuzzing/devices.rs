//! Running devices, driven as a guest would that knows where its rings are.

use std::{
    fs::File,
    io::{Read, Write},
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream},
    },
    path::Path,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use bulkhead_layer_format::{Meta, XATTR};
use bulkhead_vmm_api::ShareKind;

use super::input::Input;
use crate::devices::virtio::{
    balloon::Balloon,
    block::Block,
    device::{DeviceError, VIRTIO_RING_F_EVENT_IDX, VirtioDevice},
    fs::Fs,
    mem::{BLOCK, Mem},
    net::{Net, NetIdentity},
    rng::Rng,
    testing::{Bench, Desc, MEMORY_SIZE},
    vsock::Vsock,
};

/// Where buffers and indirect tables lie.
const BUFFERS: u64 = 0x8000;
const INDIRECT: u64 = 0x2_0000;
/// The most steps of one run.
const STEPS: usize = 200;
const CID: u64 = 3;

pub(super) fn block(bytes: &[u8]) {
    run(bytes, new_block());
}

pub(super) fn fs(bytes: &[u8]) {
    run(bytes, new_fs());
}

pub(super) fn rng(bytes: &[u8]) {
    run(bytes, new_rng());
}

pub(super) fn balloon(bytes: &[u8]) {
    let mut device = Balloon::new().expect("a balloon");
    device.set_target(512);
    run(bytes, device);
}

/// Its region lies over the memory in which rings and buffers are, so that what is unplugged goes from under them.
pub(super) fn mem(bytes: &[u8]) {
    let mut device = Mem::new(0, 64 * BLOCK).expect("a memory device");
    device.set_requested(8 * BLOCK, 16 * BLOCK);
    run(bytes, device);
}

pub(super) fn net(bytes: &[u8]) {
    let (device, far) = new_net();
    // Frames that wait for the guest: a short one, and one that is longer than it says it can take.
    for length in [12, 60, 1526, 9000] {
        let _ = far.send(&vec![0; length]);
    }
    run(bytes, device);
}

pub(super) fn vsock(bytes: &[u8]) {
    let (device, clients) = new_vsock();
    run(bytes, device);
    drop(clients);
}

pub(super) fn new_block() -> Block {
    let mut device = Block::new("fuzzed").expect("a block device");
    device.attach(disk(), false).expect("a disk");
    device
}

pub(super) fn new_rng() -> Rng {
    Rng::new().expect("an entropy device")
}

pub(super) fn new_fs() -> Fs {
    let mut device = Fs::new("fuzzed").expect("a file system device");
    device.attach_share("share", layer(), ShareKind::Layer).expect("a layer");
    device
}

pub(super) fn new_net() -> (Net, UnixDatagram) {
    let (near, far) = UnixDatagram::pair().expect("a pair of sockets");
    near.set_nonblocking(true).expect("a socket");
    far.set_nonblocking(true).expect("a socket");
    let mut device = Net::new().expect("a network device");
    let identity = NetIdentity { mac: [2, 0, 0, 0, 0, 1], mtu: 1500 };
    device.attach_socket(near, identity).expect("a link");
    (device, far)
}

/// A device with clients that listen, that want to connect, and that say nothing or nonsense.
pub(super) fn new_vsock() -> (Vsock, Vec<UnixStream>) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = format!("bulkhead-fuzz-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let address = SocketAddr::from_abstract_name(name).expect("an address");
    let listener = UnixListener::bind_addr(&address).expect("a listener");
    let device = Vsock::new(CID, listener).expect("a socket device");
    let clients = ["LISTEN 1024\n", "LISTEN 1024\n", "CONNECT 1025\n", "", "LISTEN x\n"].map(|line| {
        let mut client = UnixStream::connect_addr(&address).expect("a client");
        client.set_nonblocking(true).expect("a client");
        // It hears of what it did wrong, or not.
        let _ = client.write_all(line.as_bytes());
        client
    });
    (device, clients.into())
}

/// What came of a step: a corrupt queue is what a hostile driver may reach, and the device is then reset.
fn settle<D: VirtioDevice>(bench: &mut Bench<D>, features: u64, outcome: &Result<(), DeviceError>) {
    if outcome.is_err() {
        bench.device.reset();
        bench.start_again(features);
    }
}

fn run<D: VirtioDevice>(bytes: &[u8], device: D) {
    let mut input = Input::new(bytes);
    let mut bench = Bench::new(device);
    let mut features = bench.offered();
    if input.byte() & 1 == 0 {
        features &= !VIRTIO_RING_F_EVENT_IDX;
    }
    bench.activate(features);
    let queues = bench.device.queue_max_sizes().len();
    for _ in 0..STEPS {
        let Some(step) = input.next() else { break };
        let index = usize::from(step >> 4) % queues;
        match step & 15 {
            0..=3 => {
                let entry = u16::from(input.byte() & 15);
                let desc = descriptor(&mut input);
                bench.queue(index).table(entry, &[desc]);
            }
            4 => {
                let entry = u64::from(input.byte() & 63);
                let desc = descriptor(&mut input);
                bench.queue(index).write_table(INDIRECT + entry * 16, &[desc]);
            }
            5 | 6 => {
                let at = BUFFERS + u64::from(input.u16() & 0x3fff);
                let count = usize::from(input.byte());
                bench.write(at, input.bytes(count));
            }
            7 | 8 => {
                let head = input.byte();
                bench.queue(index).offer(if head == 0xff { input.u16() } else { u16::from(head & 15) });
            }
            9 | 10 => {
                let outcome = bench.kick(index);
                settle(&mut bench, features, &outcome);
            }
            11 => {
                for source in 0..bench.device.event_sources().len() {
                    let outcome = bench.device.source_event(source);
                    settle(&mut bench, features, &outcome);
                }
            }
            12 => {
                let avail = input.u16();
                bench.queue(index).set_avail_idx(avail);
            }
            13 => {
                let (offset, count) = (u64::from(input.u16()), usize::from(input.byte() & 15));
                bench.device.write_config(offset, input.bytes(count));
                bench.device.read_config(offset, &mut [0; 16]);
            }
            14 => {
                let event = input.u16();
                bench.queue(index).set_used_event(event);
            }
            _ => {
                bench.device.reset();
                bench.start_again(features);
            }
        }
    }
    // A paused machine can always be saved.
    bench.device.save().expect("saved");
    bench.device.reset();
}

fn descriptor(input: &mut Input<'_>) -> Desc {
    let how = input.byte();
    let address = match how >> 5 {
        0..=4 => BUFFERS + u64::from(input.u16() & 0x3fff),
        5 => INDIRECT + u64::from(input.byte()) * 16,
        6 => (MEMORY_SIZE as u64).wrapping_add_signed(i64::from(input.byte().cast_signed())),
        _ => input.u64(),
    };
    let length = match how & 3 {
        0 => u32::from(input.byte()),
        1 | 2 => u32::from(input.u16()),
        _ => input.u32(),
    };
    let desc = match (how >> 2) & 3 {
        0 | 1 => Desc::readable(address, length),
        2 => Desc::writable(address, length),
        _ => Desc::indirect(INDIRECT + u64::from(input.byte()) * 16, length),
    };
    if how & 16 != 0 { desc.next(u16::from(input.byte() & 31)) } else { desc }
}

/// Requests in sound chains, each with its length, its room and its bytes.
pub(super) fn fuse(bytes: &[u8]) {
    const REPLY: u64 = 0x10_0000;
    let mut input = Input::new(bytes);
    let mut bench = Bench::new(new_fs());
    bench.activate(bench.offered() & !VIRTIO_RING_F_EVENT_IDX);
    for _ in 0..STEPS {
        let Some(queue) = input.next() else { break };
        let (queue, room) = (usize::from(queue & 1), u32::from(input.u16()) * 4);
        let count = usize::from(input.u16() & 0x1ff);
        let request = input.bytes(count);
        bench.write(BUFFERS, request);
        let length = u32::try_from(request.len()).unwrap_or(0);
        bench.queue(queue).table(0, &[Desc::readable(BUFFERS, length).next(1), Desc::writable(REPLY, room)]);
        bench.queue(queue).offer(0);
        bench.kick(queue).expect("the queue is sound");
        for (head, written) in bench.queue(queue).used() {
            assert!(head == 0 && written <= room, "{written} bytes, room for {room}");
        }
    }
    bench.device.save().expect("saved");
}

/// Packets in sound chains: most of each header is what the fuzzer says, context ids are mostly right.
pub(super) fn packets(bytes: &[u8]) {
    const RX: usize = 0;
    const TX: usize = 1;
    const RECEIVE: u64 = 0x10_0000;
    let mut input = Input::new(bytes);
    let (device, mut clients) = new_vsock();
    let mut bench = Bench::new(device);
    bench.activate(bench.offered() & !VIRTIO_RING_F_EVENT_IDX);
    for index in 0..64u16 {
        bench.queue(RX).table(index, &[Desc::writable(RECEIVE + u64::from(index) * 4096, 4096)]);
        bench.queue(RX).offer(index);
    }
    for _ in 0..STEPS {
        let Some(step) = input.next() else { break };
        match step & 7 {
            6 => {
                let client = usize::from(input.byte()) % clients.len().max(1);
                if let Some(client) = clients.get_mut(client) {
                    let count = usize::from(input.u16());
                    let _ = client.write(input.bytes(count));
                    let _ = client.read(&mut [0; 4096]);
                }
            }
            7 if !clients.is_empty() => {
                let client = usize::from(input.byte()) % clients.len();
                drop(clients.swap_remove(client));
            }
            _ => {
                let mut header = [0; 44];
                let taken = input.bytes(28);
                // Ports, length, type, operation, flags, credit; then the ids around them.
                header[16..16 + taken.len()].copy_from_slice(taken);
                header[..8].copy_from_slice(&CID.to_le_bytes());
                header[8..16].copy_from_slice(&2u64.to_le_bytes());
                if step & 0x80 != 0 {
                    header[..16]
                        .copy_from_slice(&[input.u64().to_le_bytes(), input.u64().to_le_bytes()].concat());
                }
                bench.write(BUFFERS, &header);
                let payload = u32::from(input.u16());
                bench.queue(TX).table(0, &[Desc::readable(BUFFERS, 44 + payload)]);
                bench.queue(TX).offer(0);
                bench.kick(TX).expect("the queue is sound");
                bench.queue(TX).used();
            }
        }
        bench.device.source_event(0).expect("the queue is sound");
        for (head, written) in bench.queue(RX).used() {
            assert!(written == 0 || (44..=4096).contains(&written), "{written} bytes of a packet");
            bench.queue(RX).offer(head);
        }
        bench.kick(RX).expect("the queue is sound");
    }
    bench.device.save().expect("saved");
}

/// A megabyte that is gone with its last descriptor.
fn disk() -> File {
    static DISK: OnceLock<File> = OnceLock::new();
    let disk = DISK.get_or_init(|| {
        let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).expect("a memory file");
        let file = File::from(fd);
        file.set_len(1 << 20).expect("a disk");
        file
    });
    disk.try_clone().expect("a descriptor")
}

/// A small layer, made once and kept until the process ends.
fn layer() -> OwnedFd {
    static LAYER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let layer = LAYER.get_or_init(|| {
        let below_target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
        let parents = [std::env::temp_dir(), below_target];
        let made = parents.iter().find_map(|parent| {
            let dir = tempfile::tempdir_in(parent).ok()?;
            make_layer(dir.path()).ok().map(|()| dir)
        });
        made.expect("a file system with extended attributes of users")
    });
    File::open(layer.path()).expect("the layer").into()
}

fn make_layer(root: &Path) -> std::io::Result<()> {
    let mark = |path: &Path, mode: u32| {
        let meta = Meta { mode, uid: 0, gid: 0, rdev: 0, xattrs: vec![(b"user.a".to_vec(), b"b".to_vec())] };
        let meta = meta.encode().map_err(std::io::Error::other)?;
        Ok::<_, std::io::Error>(rustix::fs::setxattr(path, XATTR, &meta, rustix::fs::XattrFlags::empty())?)
    };
    mark(root, 0o040_755)?;
    std::fs::create_dir(root.join("dir"))?;
    mark(&root.join("dir"), 0o040_755)?;
    for (name, mode, content) in [
        ("file", 0o100_644, &b"0123456789"[..]),
        ("link", 0o120_777, b"/etc/passwd"),
        ("null", 0o020_666, b""),
        ("dir/a", 0o100_644, b"a"),
        ("dir/b", 0o100_644, b"b"),
    ] {
        std::fs::write(root.join(name), content)?;
        mark(&root.join(name), mode)?;
    }
    // Not marked: what does not belong into a layer.
    std::fs::write(root.join("dir/stray"), b"")
}
