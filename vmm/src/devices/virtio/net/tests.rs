use std::{
    os::{fd::AsFd, fd::BorrowedFd, unix::net::UnixDatagram},
    sync::{Arc, Mutex},
};

use super::{
    super::{
        hostile,
        testing::{Bench, Desc},
    },
    *,
};

/// A link whose other end is a datagram socket: each datagram is one header with its frame.
struct Cable {
    socket: UnixDatagram,
    offloads: Arc<Mutex<Option<Offloads>>>,
}

impl AsFd for Cable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Link for Cable {
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        *self.offloads.lock().unwrap() = Some(offloads);
        Ok(())
    }
}

const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x20_0000;

const IDENTITY: NetIdentity = NetIdentity { mac: [2, 0, 0, 1, 2, 3], mtu: 1500 };

/// A device whose link is down.
fn unplugged() -> Net {
    let mut net = Net::new().unwrap();
    net.identity = Some(IDENTITY);
    net
}

fn cable() -> (Box<Cable>, UnixDatagram) {
    let (here, there) = UnixDatagram::pair().unwrap();
    here.set_nonblocking(true).unwrap();
    there.set_nonblocking(true).unwrap();
    (Box::new(Cable { socket: here, offloads: Arc::default() }), there)
}

fn connected(features: u64) -> (Bench<Net>, UnixDatagram) {
    let mut bench = Bench::new(unplugged());
    let (cable, far) = cable();
    bench.device.attach_link(cable, IDENTITY).unwrap();
    bench.activate(features);
    (bench, far)
}

fn active() -> Bench<Net> {
    let (cable, far) = cable();
    // Never read, never closed.
    std::mem::forget(far);
    let mut bench = Bench::new(unplugged());
    bench.device.attach_link(cable, IDENTITY).unwrap();
    bench.activate(FEATURES);
    bench
}

/// A header (of zeroes) and a frame of `length` bytes.
fn packet(length: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER as usize];
    packet.extend((0..length).map(|index| (index % 251) as u8));
    packet
}

/// Offers `count` receive buffers of `length` bytes from descriptor `first` on.
fn provide(bench: &mut Bench<Net>, first: u16, count: u16, length: u32) {
    for index in first..first + count {
        let at = RX_BUFFERS + u64::from(index) * u64::from(length);
        bench.queue(RX).table(index, &[Desc::writable(at, length)]);
        bench.queue(RX).offer(index);
    }
}

fn transmits(bench: &mut Bench<Net>, far: &UnixDatagram) {
    let sent = packet(100);
    bench.write(TX_BUFFERS, &sent);
    let length = sent.len() as u32;
    let (first, rest) = (Desc::readable(TX_BUFFERS, 5), Desc::readable(TX_BUFFERS + 5, length - 5));
    bench.queue(TX).table(0, &[first.next(1), rest]);
    bench.queue(TX).offer(0);
    bench.kick(TX).unwrap();
    assert_eq!(bench.queue(TX).used(), [(0, 0)]);
    let mut got = [0; 256];
    let count = far.recv(&mut got).unwrap();
    assert_eq!(got[..count], sent);
    assert!(far.recv(&mut got).is_err(), "one frame, once");
}

#[test]
fn frames_go_out() {
    let (mut bench, far) = connected(FEATURES);
    transmits(&mut bench, &far);
    assert!(bench.interrupted());
}

#[test]
fn frames_come_in() {
    let (mut bench, far) = connected(FEATURES & !(feature::GUEST_TSO4 | feature::GUEST_TSO6));
    far.send(&packet(60)).unwrap();
    bench.device.source_event(0).unwrap();
    assert_eq!(bench.queue(RX).used(), [], "there is no buffer yet");
    provide(&mut bench, 0, 4, 2048);
    bench.kick(RX).unwrap();
    assert_eq!(bench.queue(RX).used(), [(0, 72)]);
    let mut expected = packet(60);
    expected[10] = 1;
    assert_eq!(bench.read(RX_BUFFERS, 72), expected);
    assert!(bench.interrupted());

    // The next one uses the next buffer, without a kick.
    far.send(&packet(1514)).unwrap();
    far.send(&packet(14)).unwrap();
    bench.device.source_event(0).unwrap();
    assert_eq!(bench.queue(RX).used(), [(1, 1526), (2, 26)]);
    assert_eq!(bench.device.receiver.held(), 1);
}

#[test]
fn a_large_frame_spans_buffers_that_appear_at_once() {
    let (mut bench, far) = connected(FEATURES);
    provide(&mut bench, 0, 50, 1536);
    bench.kick(RX).unwrap();
    let sent = packet(60_000);
    far.send(&sent).unwrap();
    bench.device.source_event(0).unwrap();
    let used = bench.queue(RX).used();
    let count = sent.len().div_ceil(1536);
    assert_eq!(used.len(), count);
    assert_eq!(used.iter().map(|(_, length)| *length as usize).sum::<usize>(), sent.len());
    assert!(used.iter().zip(0..).all(|((head, _), index)| *head == index));
    let mut expected = sent;
    expected[10..12].copy_from_slice(&(count as u16).to_le_bytes());
    let got = bench.read(RX_BUFFERS, expected.len());
    assert!(got == expected);

    // What is left does not do for the longest frame, so the next waits for more.
    far.send(&packet(60)).unwrap();
    bench.device.source_event(0).unwrap();
    assert_eq!(bench.queue(RX).used(), []);
    provide(&mut bench, 50, 40, 1536);
    bench.kick(RX).unwrap();
    assert_eq!(bench.queue(RX).used(), [(count as u16, 72)]);
}

#[test]
fn without_mergeable_buffers_a_frame_has_one() {
    let (mut bench, far) = connected(FEATURES & !feature::MRG_RXBUF);
    provide(&mut bench, 0, 2, 64);
    bench.kick(RX).unwrap();
    far.send(&packet(200)).unwrap();
    far.send(&packet(20)).unwrap();
    bench.device.source_event(0).unwrap();
    assert_eq!(bench.queue(RX).used(), [(0, 64), (1, 32)], "cut to the buffer");
    assert_eq!(bench.read(RX_BUFFERS + 64 + 10, 2), [1, 0]);
}

#[test]
fn the_driver_is_told_when_its_event_index_is_passed() {
    let (mut bench, far) = connected(FEATURES);
    bench.queue(RX).set_used_event(20);
    provide(&mut bench, 0, 100, 1536);
    bench.kick(RX).unwrap();
    far.send(&packet(1500)).unwrap();
    bench.device.source_event(0).unwrap();
    bench.queue(RX).used();
    assert!(!bench.interrupted());
    // Passes 20 in the middle of a frame's buffers.
    far.send(&packet(50_000)).unwrap();
    bench.device.source_event(0).unwrap();
    assert!(bench.queue(RX).used().len() > 20);
    assert!(bench.interrupted());
}

#[test]
fn runts_and_giants_are_not_sent() {
    let (mut bench, far) = connected(FEATURES);
    for length in [0, 1, 12, LONGEST as u32 + 1, 0x10_0000u32] {
        bench.queue(TX).table(0, &[Desc::readable(TX_BUFFERS, length)]);
        bench.queue(TX).offer(0);
        bench.kick(TX).unwrap();
        assert_eq!(bench.queue(TX).used(), [(0, 0)], "{length}");
        assert!(far.recv(&mut [0; 16]).is_err(), "{length}");
    }
    // Writable buffers are not read.
    bench.queue(TX).table(0, &[Desc::writable(TX_BUFFERS, 100)]);
    bench.queue(TX).offer(0);
    bench.kick(TX).unwrap();
    assert_eq!(bench.queue(TX).used(), [(0, 0)]);
    assert!(far.recv(&mut [0; 16]).is_err());
    transmits(&mut bench, &far);
}

#[test]
fn a_frame_of_many_parts_is_sent_whole() {
    let (mut bench, far) = connected(FEATURES);
    let table: Vec<Desc> = (0..1024u16)
        .map(|index| Desc::readable(TX_BUFFERS + u64::from(index), 1))
        .zip(1..)
        .map(|(desc, next)| if next < 1024 { desc.next(next) } else { desc })
        .collect();
    bench.queue(TX).write_table(0x2_0000, &table);
    bench.queue(TX).table(0, &[Desc::indirect(0x2_0000, 1024 * 16)]);
    bench.queue(TX).offer(0);
    bench.kick(TX).unwrap();
    assert_eq!(bench.queue(TX).used(), [(0, 0)]);
    let mut got = [0; 2048];
    assert_eq!(far.recv(&mut got).unwrap(), 1024);
    transmits(&mut bench, &far);
}

#[test]
fn the_link_is_down_until_there_is_a_tap() {
    let mut bench = Bench::new(unplugged());
    bench.activate(FEATURES);
    let mut configuration = [0; 12];
    bench.device.read_config(0, &mut configuration);
    assert_eq!(configuration, [2, 0, 0, 1, 2, 3, 0, 0, 1, 0, 0xdc, 5]);
    // Frames go nowhere, and their buffers come back.
    bench.write(TX_BUFFERS, &packet(60));
    bench.queue(TX).table(0, &[Desc::readable(TX_BUFFERS, 72)]);
    bench.queue(TX).offer(0);
    bench.kick(TX).unwrap();
    assert_eq!(bench.queue(TX).used(), [(0, 0)]);
    provide(&mut bench, 0, 60, 2048);
    bench.kick(RX).unwrap();
    bench.interrupted();

    let (cable, far) = cable();
    let offloads = Arc::clone(&cable.offloads);
    far.send(&packet(60)).unwrap();
    bench.device.attach_link(cable, IDENTITY).unwrap();
    assert_eq!(bench.interrupt.status(), 2);
    assert_eq!(*offloads.lock().unwrap(), Some(Offloads { checksum: true, tso4: true, tso6: true }));
    bench.device.read_config(6, &mut configuration[..2]);
    assert_eq!(configuration[..2], [1, 0]);
    bench.device.source_event(0).unwrap();
    assert_eq!(bench.queue(RX).used(), [(0, 72)]);
    transmits(&mut bench, &far);
}

#[test]
fn only_what_the_driver_takes_is_offloaded() {
    let mut bench = Bench::new(unplugged());
    let (cable, _far) = cable();
    let offloads = Arc::clone(&cable.offloads);
    bench.device.attach_link(cable, IDENTITY).unwrap();
    assert_eq!(*offloads.lock().unwrap(), None);
    bench.activate(VIRTIO_F_VERSION_1 | feature::GUEST_CSUM | feature::GUEST_TSO6);
    assert_eq!(*offloads.lock().unwrap(), Some(Offloads { checksum: true, tso4: false, tso6: true }));
}

#[test]
fn only_taps_are_attached() {
    let mut net = unplugged();
    for file in ["/dev/null", "/proc/self/exe"] {
        let fd = std::fs::File::open(file).unwrap().into();
        assert!(matches!(net.attach(fd, IDENTITY), Err(AttachError::NotATap)), "{file}");
    }
    for identity in [
        NetIdentity { mtu: 67, ..IDENTITY },
        NetIdentity { mac: [1, 0, 0, 0, 0, 1], ..IDENTITY },
        NetIdentity { mac: [0; 6], ..IDENTITY },
    ] {
        assert!(matches!(net.attach_link(cable().0, identity), Err(AttachError::Identity)));
    }
}

#[test]
fn a_slot_holds_a_device_from_the_first_tap_until_its_driver_has_let_go() {
    let mut bench = Bench::new(Net::new().unwrap());
    assert!(!bench.device.present());
    assert!(!bench.device.detach());
    bench.device.attach_link(cable().0, IDENTITY).unwrap();
    assert!(bench.device.present());
    bench.activate(FEATURES);
    assert!(bench.device.detach());
    assert!(bench.device.present(), "its driver is there");
    let mut status = [9; 2];
    bench.device.read_config(6, &mut status);
    assert_eq!(status, [0, 0]);
    bench.device.reset();
    assert!(!bench.device.present());

    // The next one is another device.
    let other = NetIdentity { mac: [2, 9, 9, 9, 9, 9], mtu: 9000 };
    bench.device.attach_link(cable().0, other).unwrap();
    let mut configuration = [0; 12];
    bench.device.read_config(0, &mut configuration);
    assert_eq!(configuration, [2, 9, 9, 9, 9, 9, 1, 0, 1, 0, 0x28, 0x23]);
}

#[test]
fn a_restored_device_takes_the_address_of_its_new_tap() {
    let (bench, _far) = connected(FEATURES);
    let state = bench.device.save().unwrap();
    let mut empty = Net::new().unwrap();
    empty.restore(&state, bench.resources()).unwrap();
    assert_eq!(empty.identity, Some(IDENTITY));
    let other = NetIdentity { mac: [2, 9, 9, 9, 9, 9], mtu: 1400 };
    let mut plugged = Net::new().unwrap();
    plugged.attach_link(cable().0, other).unwrap();
    plugged.restore(&state, bench.resources()).unwrap();
    assert_eq!(plugged.identity, Some(other));
}

#[test]
fn hostile_drivers_are_survived() {
    let (mut bench, far) = connected(FEATURES);
    hostile::survives_malformed(&mut bench, TX, |bench| transmits(bench, &far));
    hostile::notices_corrupt_rings(TX, active);
    hostile::notices_corrupt_rings(RX, || {
        let (cable, far) = cable();
        far.send(&packet(60)).unwrap();
        let mut bench = Bench::new(unplugged());
        bench.device.attach_link(cable, IDENTITY).unwrap();
        bench.activate(FEATURES);
        bench
    });
    hostile::survives_anything(|| {
        let (cable, far) = cable();
        for length in [14, 60, 1500, 40_000] {
            far.send(&packet(length)).unwrap();
        }
        let mut bench = Bench::new(unplugged());
        bench.device.attach_link(cable, IDENTITY).unwrap();
        bench.activate(FEATURES);
        bench
    });
}

#[test]
fn malformed_receive_buffers_come_back_empty() {
    let (mut bench, far) = connected(FEATURES & !(feature::GUEST_TSO4 | feature::GUEST_TSO6));
    far.send(&packet(60)).unwrap();
    for (name, table, indirect) in hostile::malformed() {
        bench.queue(RX).write_table(0x2_0000, &indirect);
        bench.queue(RX).table(0, &table);
        bench.queue(RX).offer(0);
        bench.kick(RX).unwrap();
        assert_eq!(bench.queue(RX).used(), [(0, 0)], "{name}");
    }
    provide(&mut bench, 0, 1, 2048);
    bench.kick(RX).unwrap();
    assert_eq!(bench.queue(RX).used(), [(0, 72)]);
}

#[test]
fn held_buffers_are_saved_as_not_taken() {
    let fresh = unplugged().save().unwrap();
    let (mut bench, far) = connected(FEATURES);
    unplugged().restore(&fresh, bench.resources()).unwrap();

    provide(&mut bench, 0, 100, 1536);
    far.send(&packet(60)).unwrap();
    bench.kick(RX).unwrap();
    assert_eq!(bench.queue(RX).used(), [(0, 72)]);
    assert!(bench.device.receiver.held() > 1);
    let state = bench.device.save().unwrap();

    let resources = bench.resources();
    bench.device = unplugged();
    bench.device.restore(&state, resources).unwrap();
    let (cable, far) = cable();
    bench.device.attach_link(cable, IDENTITY).unwrap();
    far.send(&packet(100)).unwrap();
    bench.device.source_event(0).unwrap();
    assert_eq!(bench.queue(RX).used(), [(1, 112)]);
    transmits(&mut bench, &far);
    assert!(unplugged().restore(&state[1..], bench.resources()).is_err());
}

#[test]
fn a_reset_forgets_what_is_held() {
    let (mut bench, far) = connected(FEATURES);
    provide(&mut bench, 0, 50, 1536);
    far.send(&packet(60)).unwrap();
    bench.kick(RX).unwrap();
    bench.device.reset();
    assert_eq!(bench.device.receiver.held(), 0);
    far.send(&packet(60)).unwrap();
    bench.device.source_event(0).unwrap();
    bench.kick(RX).unwrap();
    bench.kick(TX).unwrap();
}

/// Through the kernel's own tap. Needs root; elsewhere it says that it was left out.
#[test]
fn a_real_tap_carries_frames() {
    use std::os::fd::{AsRawFd, FromRawFd};

    // SAFETY: geteuid has no preconditions.
    if unsafe { libc::geteuid() } != 0 || !std::path::Path::new("/dev/net/tun").exists() {
        eprintln!("SKIPPED a_real_tap_carries_frames: needs root and /dev/net/tun");
        return;
    }
    // A namespace of this thread's own, so that nothing of the machine's network is touched.
    // SAFETY: unshare of the network namespace concerns the calling thread alone.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        eprintln!("SKIPPED a_real_tap_carries_frames: no network namespace: {}", io::Error::last_os_error());
        return;
    }
    let tap = std::fs::File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (byte, name) in request.ifr_name.iter_mut().zip(b"tap0") {
        *byte = *name as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the ioctl reads and writes one ifreq.
    let made = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if made != 0 {
        eprintln!("SKIPPED a_real_tap_carries_frames: TUNSETIFF: {}", io::Error::last_os_error());
        return;
    }
    // SAFETY: a socket of our own, owned from here on.
    let control = unsafe { OwnedFd::from_raw_fd(libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0)) };
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the ioctl reads one ifreq.
    assert_eq!(unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) }, 0);
    // Every frame of our ethertype, as the host sees it.
    let protocol = u16::to_be(0x88b5);
    let socket = unsafe {
        // SAFETY: a socket of our own, owned from here on.
        OwnedFd::from_raw_fd(libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(protocol)))
    };
    // SAFETY: the name was set by TUNSETIFF and ends with zero.
    let index = unsafe { libc::if_nametoindex(request.ifr_name.as_ptr()) };
    // SAFETY: zero is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index as i32;
    let length = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: address and length belong together.
    assert_eq!(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) }, 0);

    let mut bench = Bench::new(unplugged());
    bench.device.attach(tap.into(), IDENTITY).unwrap();
    bench.activate(FEATURES);
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 1, 2, 3, 0x88, 0xb5]);
    frame.extend([0x42; 100]);

    // Guest to host.
    bench.write(TX_BUFFERS, &[&[0; 12][..], &frame].concat());
    bench.queue(TX).table(0, &[Desc::readable(TX_BUFFERS, 12 + frame.len() as u32)]);
    bench.queue(TX).offer(0);
    bench.kick(TX).unwrap();
    let mut got = [0; 256];
    let count = rustix::io::read(&socket, &mut got).unwrap();
    assert_eq!(got[..count], frame);

    // Host to guest.
    provide(&mut bench, 0, 100, 1536);
    rustix::io::write(&socket, &frame).unwrap();
    let mut found = false;
    // The kernel sends frames of its own, too.
    for _ in 0..1000 {
        bench.device.source_event(0).unwrap();
        bench.kick(RX).unwrap();
        for (head, length) in bench.queue(RX).used() {
            let at = RX_BUFFERS + u64::from(head) * 1536;
            found |= bench.read(at + 12, length as usize - 12) == frame;
        }
        if found {
            break;
        }
        std::thread::yield_now();
    }
    assert!(found);
}

fn bytes(per_second: u64, burst: u64) -> bulkhead_vmm_api::RateLimit {
    let bytes = Some(bulkhead_vmm_api::Bucket { per_second, burst });
    bulkhead_vmm_api::RateLimit { bytes, operations: None }
}

#[test]
fn frames_over_the_limit_wait_in_the_queue() {
    let (mut bench, far) = connected(FEATURES);
    bench.device.limit(RateLimits { write: bytes(1, 1), ..RateLimits::default() });
    let sent = packet(1000);
    bench.write(TX_BUFFERS, &sent);
    for head in 0..3 {
        bench.queue(TX).table(head, &[Desc::readable(TX_BUFFERS, sent.len() as u32)]);
        bench.queue(TX).offer(head);
    }
    bench.kick(TX).unwrap();
    bench.device.source_event(0).unwrap();
    let mut got = [0; 2048];
    assert_eq!((far.recv(&mut got).unwrap(), bench.queue(TX).used()), (sent.len(), vec![(0, 0)]));
    assert!(far.recv(&mut got).is_err());
    let [_, write] = bench.device.traffic().unwrap();
    assert_eq!((write.bytes, write.operations, write.throttled), (1000, 1, 1));

    bench.device.limit(RateLimits::default());
    bench.device.source_event(0).unwrap();
    assert_eq!(bench.queue(TX).used(), [(1, 0), (2, 0)]);
}

#[test]
fn frames_over_the_limit_wait_in_the_link() {
    let (mut bench, far) = connected(FEATURES & !(feature::GUEST_TSO4 | feature::GUEST_TSO6));
    bench.device.limit(RateLimits { read: bytes(1, 1), ..RateLimits::default() });
    provide(&mut bench, 0, 4, 2048);
    for _ in 0..3 {
        far.send(&packet(1000)).unwrap();
    }
    bench.device.source_event(0).unwrap();
    bench.kick(RX).unwrap();
    assert_eq!(bench.queue(RX).used(), [(0, 1012)]);
    // What it sends is not held back by that.
    transmits(&mut bench, &far);

    bench.device.limit(RateLimits::default());
    bench.device.source_event(0).unwrap();
    assert_eq!(bench.queue(RX).used(), [(1, 1012), (2, 1012)]);
    assert_eq!(bench.device.traffic().unwrap()[0].bytes, 3000);
}
