//! The host's end of a network device.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// Bytes of the header before every frame, both ways: `struct virtio_net_hdr_v1` (virtio 1.3, 5.1.6).
pub(super) const HEADER: u32 = 12;

/// Why a descriptor cannot be a network device's tap. The slot is as it was.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The slot has a tap.
    #[error("the slot has a tap already")]
    Occupied,
    /// Not a unicast address, or an MTU of less than 68.
    #[error("not a unicast MAC address, or an MTU of less than 68")]
    Identity,
    /// Not a tap with `IFF_NO_PI` and `IFF_VNET_HDR`.
    #[error("not a tap opened with IFF_NO_PI and IFF_VNET_HDR")]
    NotATap,
    /// The kernel refused to set it up.
    #[error("{context}")]
    Setup {
        /// What was refused.
        context: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

/// What the guest takes care of itself: frames may reach it with partial checksums, or be longer than its
/// MTU, when the driver has said so.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Offloads {
    pub(super) checksum: bool,
    pub(super) tso4: bool,
    pub(super) tso6: bool,
}

/// Where frames come from and go to: one frame behind one header a call, never blocking.
pub(super) trait Link: AsFd + Send {
    /// Tells it what it may send.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;
}

/// A socket in a tap's place: each datagram is one header with its frame.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) struct Cable(pub(super) std::os::unix::net::UnixDatagram);

#[cfg(any(test, feature = "fuzzing"))]
impl AsFd for Cable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(any(test, feature = "fuzzing"))]
impl Link for Cable {
    fn set_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }
}

/// A tap device.
pub(super) struct Tap(OwnedFd);

impl Tap {
    /// Checks the descriptor and makes it ready: non-blocking, with headers of [`HEADER`] bytes.
    pub(super) fn new(fd: OwnedFd) -> Result<Self, AttachError> {
        let flags = interface_flags(fd.as_fd()).map_err(|_| AttachError::NotATap)?;
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if i32::from(flags) & wanted != wanted {
            return Err(AttachError::NotATap);
        }
        let setup = |context| move |source| AttachError::Setup { context, source };
        set_header_size(fd.as_fd()).map_err(setup("TUNSETVNETHDRSZ"))?;
        let status = fcntl_getfl(&fd).map_err(io::Error::from).map_err(setup("F_GETFL"))?;
        let status = status | OFlags::NONBLOCK;
        fcntl_setfl(&fd, status).map_err(io::Error::from).map_err(setup("F_SETFL"))?;
        Ok(Self(fd))
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Link for Tap {
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let mut bits = 0;
        // Segmentation needs partial checksums (virtio 1.3, 5.1.3.1).
        if offloads.checksum {
            bits |= libc::TUN_F_CSUM;
            bits |= if offloads.tso4 { libc::TUN_F_TSO4 } else { 0 };
            bits |= if offloads.tso6 { libc::TUN_F_TSO6 } else { 0 };
        }
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(bits)) })
    }
}

/// The flags with which a tap was opened. An error where the descriptor is something else.
fn interface_flags(fd: BorrowedFd<'_>) -> io::Result<libc::c_short> {
    // SAFETY: zero is a valid ifreq: no name, no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes at most an ifreq to where its argument points.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
    // SAFETY: the kernel has set the flags; every bit pattern is one.
    Ok(unsafe { request.ifr_ifru.ifru_flags })
}

fn set_header_size(fd: BorrowedFd<'_>) -> io::Result<()> {
    let size = libc::c_int::try_from(HEADER).unwrap_or(0);
    // SAFETY: TUNSETVNETHDRSZ reads one int from where its argument points.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
