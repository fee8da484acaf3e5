//! One request (virtio 1.3, 5.2.6).
//!
//! ```text
//!  readable:  type u32 │ reserved u32 │ sector u64 │ data (OUT) or segments (DISCARD, WRITE_ZEROES) …
//!  writable:  data (IN, GET_ID) … │ status u8
//! ```
//! How this is cut into buffers is the driver's business (2.7.4.1): the header is the first 16 readable bytes,
//! the status the last writable one.

use std::io;

use super::medium::{Medium, Range};
use crate::{
    devices::virtio::{
        common::Verdict,
        device::GuestMemory,
        iovec::{IoVec, copy_in, copy_out},
        queue::{Buffers, Chain},
    },
    rate_limiter::{Direction, RateLimiter},
};

/// The most segments in one DISCARD.
pub(super) const MAX_DISCARD_SEGMENTS: u32 = 32;
/// The most sectors in one segment of a DISCARD: 1 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// The most segments in one WRITE_ZEROES.
pub(super) const MAX_ZEROES_SEGMENTS: u32 = 1;
/// The most sectors in one WRITE_ZEROES, 16 MiB: they may have to be written one by one.
pub(super) const MAX_ZEROES_SECTORS: u32 = 1 << 15;
/// The most data in one request, in bytes: what a driver that keeps to the limits it is told can reach.
const MAX_DATA: u64 = super::SEG_MAX as u64 * super::SIZE_MAX as u64;
/// The length of the string that GET_ID gets.
pub(super) const ID_BYTES: usize = 20;

const HEADER: u64 = 16;
const SEGMENT: usize = 16;
/// In a segment's flags: the device may unmap.
const UNMAP: u32 = 1;

/// Request types (virtio 1.3, 5.2.6).
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// What a request works on, besides its chain.
pub(super) struct Target<'a> {
    pub(super) medium: Option<&'a Medium>,
    /// The slot's id, padded with zeroes.
    pub(super) id: &'a [u8; ID_BYTES],
    /// DISCARD was negotiated.
    pub(super) discard: bool,
    /// WRITE_ZEROES was negotiated.
    pub(super) write_zeroes: bool,
    /// FLUSH was not negotiated: the driver takes every completed write for stable (5.2.6.2).
    pub(super) write_through: bool,
}

/// What a request that is not done is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    /// VIRTIO_BLK_S_IOERR.
    Io,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported,
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::Unsupported { Self::Unsupported } else { Self::Io }
    }
}

/// What came of a request that was done.
#[derive(Debug, Clone, Copy)]
struct Done {
    /// Data bytes written into the chain.
    written: u64,
    /// Bytes that its rate limit counts.
    moved: u64,
}

/// A request's header.
#[derive(Debug, Clone, Copy)]
struct Header {
    kind: u32,
    sector: u64,
}

impl Header {
    fn read(buffers: &Buffers, memory: &GuestMemory) -> Option<Self> {
        let mut header = [0; HEADER as usize];
        let whole = copy_out(memory, &buffers.readable, 0, &mut header);
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        whole.then_some(Self {
            kind: u32::from_le_bytes([t0, t1, t2, t3]),
            sector: u64::from_le_bytes(sector),
        })
    }

    /// Which limit it counts against; None for what is no request.
    fn direction(self) -> Option<Direction> {
        match self.kind {
            kind::IN | kind::GET_ID => Some(Direction::Read),
            kind::OUT | kind::FLUSH | kind::DISCARD | kind::WRITE_ZEROES => Some(Direction::Write),
            _ => None,
        }
    }
}

/// Runs one request, unless it has to wait for its rate limit.
pub(super) fn serve(
    chain: Chain<'_>,
    memory: &GuestMemory,
    target: &Target<'_>,
    limiter: &mut RateLimiter,
) -> Verdict {
    let Ok(buffers) = Buffers::of(chain) else { return Verdict::Used(0) };
    let Some(status_at) = buffers.writable_bytes().checked_sub(1) else { return Verdict::Used(0) };
    // Read once: what it was admitted as is what it is run as.
    let header = Header::read(&buffers, memory);
    let direction = header.and_then(Header::direction);
    if direction.is_some_and(|direction| !limiter.admit(direction)) {
        return Verdict::Waits;
    }
    let outcome =
        header.map_or(Err(Refusal::Io), |header| execute(header, &buffers, status_at, memory, target));
    if let Some(direction) = direction {
        limiter.charge(direction, outcome.map_or(0, |done| done.moved));
    }
    Verdict::Used(finish(outcome.map(|done| done.written), &buffers, status_at, memory))
}

/// Writes the status, and gives the number of bytes written into the chain.
fn finish(outcome: Result<u64, Refusal>, buffers: &Buffers, status_at: u64, memory: &GuestMemory) -> u32 {
    let status = match outcome {
        Ok(_) => 0,
        Err(Refusal::Io) => 1,
        Err(Refusal::Unsupported) => 2,
    };
    if !copy_in(memory, &buffers.writable, status_at, &[status]) {
        return 0;
    }
    // Everything up to the status was written, or nothing is promised of the data before it.
    match outcome {
        Ok(data) if data == status_at => u32::try_from(data + 1).unwrap_or(u32::MAX),
        Ok(data) => u32::try_from(data).unwrap_or(u32::MAX),
        Err(_) if status_at == 0 => 1,
        Err(_) => 0,
    }
}

/// Does what the request asks.
fn execute(
    Header { kind, sector }: Header,
    buffers: &Buffers,
    room: u64,
    memory: &GuestMemory,
    target: &Target<'_>,
) -> Result<Done, Refusal> {
    let done = |written, moved| Ok(Done { written, moved });
    let data = buffers.readable_bytes() - HEADER;
    if data.max(room) > MAX_DATA {
        return Err(Refusal::Io);
    }
    match kind {
        kind::IN => {
            let medium = target.medium.ok_or(Refusal::Io)?;
            let range = medium.range(sector, room).ok_or(Refusal::Io)?;
            medium.read(range, io_vec(memory, &buffers.writable, 0, room)?)?;
            done(room, room)
        }
        kind::OUT => {
            let medium = target.writable()?;
            let range = medium.range(sector, data).ok_or(Refusal::Io)?;
            medium.write(range, io_vec(memory, &buffers.readable, HEADER, data)?)?;
            target.settle(medium)?;
            done(0, data)
        }
        kind::FLUSH => {
            target.medium.ok_or(Refusal::Io)?.flush()?;
            done(0, 0)
        }
        kind::GET_ID => {
            let length = room.min(ID_BYTES as u64);
            let id = &target.id[..usize::try_from(length).unwrap_or(ID_BYTES)];
            if !copy_in(memory, &buffers.writable, 0, id) {
                return Err(Refusal::Io);
            }
            done(length, 0)
        }
        kind::DISCARD if target.discard => {
            let medium = target.writable()?;
            let limits = (MAX_DISCARD_SEGMENTS, MAX_DISCARD_SECTORS);
            let segments = segments(buffers, data, memory, medium, limits)?;
            if segments.iter().any(|segment| segment.unmap) {
                return Err(Refusal::Unsupported);
            }
            for segment in segments {
                medium.discard(segment.range)?;
            }
            done(0, 0)
        }
        kind::WRITE_ZEROES if target.write_zeroes => {
            let medium = target.writable()?;
            let limits = (MAX_ZEROES_SEGMENTS, MAX_ZEROES_SECTORS);
            let mut moved = 0;
            for segment in segments(buffers, data, memory, medium, limits)? {
                medium.write_zeroes(segment.range, segment.unmap)?;
                moved += segment.range.length();
            }
            target.settle(medium)?;
            done(0, moved)
        }
        _ => Err(Refusal::Unsupported),
    }
}

impl<'a> Target<'a> {
    fn writable(&self) -> Result<&'a Medium, Refusal> {
        self.medium.filter(|medium| !medium.read_only()).ok_or(Refusal::Io)
    }

    /// After a write.
    fn settle(&self, medium: &Medium) -> Result<(), Refusal> {
        if self.write_through {
            medium.flush()?;
        }
        Ok(())
    }
}

fn io_vec<'m>(
    memory: &'m GuestMemory,
    buffers: &[(vm_memory::GuestAddress, u32)],
    skip: u64,
    length: u64,
) -> Result<IoVec<'m>, Refusal> {
    IoVec::new(memory, buffers, skip, length).map_err(|_| Refusal::Io)
}

struct Segment {
    range: Range,
    unmap: bool,
}

/// The segments of a DISCARD or WRITE_ZEROES, all checked before the first is worked on (5.2.6.2).
fn segments(
    buffers: &Buffers,
    data: u64,
    memory: &GuestMemory,
    medium: &Medium,
    (max_segments, max_sectors): (u32, u32),
) -> Result<Vec<Segment>, Refusal> {
    let count = data / SEGMENT as u64;
    if !data.is_multiple_of(SEGMENT as u64) || count == 0 || count > u64::from(max_segments) {
        return Err(Refusal::Io);
    }
    (0..count)
        .map(|index| {
            let mut bytes = [0; SEGMENT];
            if !copy_out(memory, &buffers.readable, HEADER + index * SEGMENT as u64, &mut bytes) {
                return Err(Refusal::Io);
            }
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes(flags);
            if flags & !UNMAP != 0 {
                return Err(Refusal::Unsupported);
            }
            if sectors > max_sectors {
                return Err(Refusal::Io);
            }
            let range =
                medium.range(sector, u64::from(sectors) * super::medium::SECTOR).ok_or(Refusal::Io)?;
            Ok(Segment { range, unmap: flags & UNMAP != 0 })
        })
        .collect()
}
