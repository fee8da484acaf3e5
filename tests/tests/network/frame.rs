//! A program for containers: sends raw frames, or prints those that come. Built by the tests that put it into an
//! image, with nothing but the C library.
//!
//!   frame send INTERFACE HEX…        sends each
//!   frame listen INTERFACE HEX       prints "listening", then each frame in hex, until one contains HEX
//!   frame echo PORT                  answers each datagram with itself
//!   frame ask ADDRESS:PORT TEXT      sends a datagram again and again until it is answered; prints the answer
//!   frame names ADDRESS:PORT IPV4    a name server: every name leads to this address

use std::{
    ffi::{CString, c_char, c_int, c_uint, c_void},
    net::{Ipv4Addr, UdpSocket},
    time::Duration,
};

// SAFETY: as the C library declares them.
unsafe extern "C" {
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn bind(socket: c_int, address: *const c_void, length: c_uint) -> c_int;
    fn send(socket: c_int, bytes: *const c_void, length: usize, flags: c_int) -> isize;
    fn recv(socket: c_int, bytes: *mut c_void, length: usize, flags: c_int) -> isize;
    fn if_nametoindex(name: *const c_char) -> c_uint;
}

const AF_PACKET: c_int = 17;
const SOCK_RAW: c_int = 3;
const ETH_P_ALL: u16 = 3;

/// `struct sockaddr_ll`.
#[repr(C)]
struct Address {
    family: u16,
    protocol: u16,
    index: c_int,
    rest: [u8; 12],
}

fn open(interface: &str) -> c_int {
    let name = CString::new(interface).expect("a name");
    // SAFETY: the name ends with a zero.
    let index = unsafe { if_nametoindex(name.as_ptr()) };
    assert!(index > 0, "no interface {interface}");
    let protocol = ETH_P_ALL.to_be();
    // SAFETY: takes numbers.
    let socket = unsafe { socket(AF_PACKET, SOCK_RAW, c_int::from(protocol)) };
    assert!(socket >= 0, "no raw socket");
    let address = Address { family: AF_PACKET as u16, protocol, index: index as c_int, rest: [0; 12] };
    let length = size_of::<Address>() as c_uint;
    // SAFETY: address and length belong together.
    assert_eq!(unsafe { bind(socket, (&raw const address).cast(), length) }, 0, "bind");
    socket
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["send", interface, frames @ ..] => {
            let socket = open(interface);
            for hex in frames {
                let frame: Vec<u8> = (0..hex.len() / 2)
                    .map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).expect("hex"))
                    .collect();
                // SAFETY: the frame is as long as said.
                let sent = unsafe { send(socket, frame.as_ptr().cast(), frame.len(), 0) };
                assert_eq!(sent, frame.len() as isize, "send: {}", std::io::Error::last_os_error());
            }
        }
        ["listen", interface, last] => {
            let socket = open(interface);
            println!("listening");
            loop {
                let mut frame = vec![0u8; 65536];
                // SAFETY: the buffer is as long as said.
                let length = unsafe { recv(socket, frame.as_mut_ptr().cast(), frame.len(), 0) };
                frame.truncate(usize::try_from(length).expect("recv"));
                let hex: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
                println!("{hex}");
                if hex.contains(last) {
                    return;
                }
            }
        }
        ["echo", port] => {
            let socket = UdpSocket::bind(format!("0.0.0.0:{port}")).expect("bind");
            let mut datagram = [0; 2048];
            loop {
                let (length, from) = socket.recv_from(&mut datagram).expect("recv");
                socket.send_to(&datagram[..length], from).expect("send");
            }
        }
        ["ask", address, text] => {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("bind");
            socket.connect(address).expect("connect");
            socket.set_read_timeout(Some(Duration::from_millis(500))).expect("timeout");
            let mut answer = [0; 2048];
            loop {
                // Refused, or lost: again.
                let _ = socket.send(text.as_bytes());
                if let Ok(length) = socket.recv(&mut answer) {
                    println!("{}", String::from_utf8_lossy(&answer[..length]));
                    return;
                }
            }
        }
        ["names", address, lead] => {
            let socket = UdpSocket::bind(address).expect("bind");
            let lead: Ipv4Addr = lead.parse().expect("an address");
            let mut message = [0; 2048];
            loop {
                let (length, from) = socket.recv_from(&mut message).expect("recv");
                let mut answer = message[..length].to_vec();
                // The question's end: its name's, its type, its class.
                let mut end = 12;
                while answer[end] != 0 {
                    end += 1 + usize::from(answer[end]);
                }
                end += 5;
                let is_address = answer[end - 4..end - 2] == [0, 1];
                answer.truncate(end);
                answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(is_address), 0, 0, 0, 0]);
                if is_address {
                    answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4]);
                    answer.extend(lead.octets());
                }
                socket.send_to(&answer, from).expect("send");
            }
        }
        _ => panic!("see the program's documentation"),
    }
}
