//! Brings up the test host's two interfaces: loopback, and QEMU's user network, on which the outer machine
//! reaches the command server.

use std::mem;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use rustix::net::{AddressFamily, SocketType, socket};

/// What QEMU's user network expects of its only guest.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);

pub(crate) fn bring_up() -> Result<()> {
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    set_up_flag(&socket, "lo").context("lo")?;
    set_address(&socket, "eth0", libc::SIOCSIFADDR, ADDRESS).context("address of eth0")?;
    set_address(&socket, "eth0", libc::SIOCSIFNETMASK, NETMASK).context("netmask of eth0")?;
    set_up_flag(&socket, "eth0").context("eth0")
}

fn set_address(socket: &OwnedFd, name: &str, request: libc::Ioctl, address: Ipv4Addr) -> Result<()> {
    let mut req = request_for(name);
    let sin = libc::sockaddr_in {
        sin_family: u16::try_from(libc::AF_INET)?,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.octets()) },
        sin_zero: [0; 8],
    };
    // SAFETY: sockaddr_in and sockaddr have the same size and both are plain data; the kernel reads the
    // structure back by its family.
    req.ifr_ifru.ifru_addr = unsafe { mem::transmute::<libc::sockaddr_in, libc::sockaddr>(sin) };
    ioctl(socket, request, &mut req)
}

fn set_up_flag(socket: &OwnedFd, name: &str) -> Result<()> {
    let mut req = request_for(name);
    ioctl(socket, libc::SIOCGIFFLAGS, &mut req)?;
    // SAFETY: SIOCGIFFLAGS has just filled in this member of the union.
    let flags = unsafe { req.ifr_ifru.ifru_flags };
    req.ifr_ifru.ifru_flags = flags | i16::try_from(libc::IFF_UP)?;
    ioctl(socket, libc::SIOCSIFFLAGS, &mut req)
}

fn request_for(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain data for which all zeroes is a value.
    let mut req: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in req.ifr_name.iter_mut().zip(name.bytes()).take(libc::IFNAMSIZ - 1) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    req
}

fn ioctl(socket: &OwnedFd, request: libc::Ioctl, req: &mut libc::ifreq) -> Result<()> {
    // SAFETY: the descriptor is open for the call, and all requests used here take an ifreq that the
    // kernel reads or writes within its size.
    if unsafe { libc::ioctl(socket.as_raw_fd(), request, req) } < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}
