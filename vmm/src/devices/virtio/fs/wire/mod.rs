//! The FUSE protocol as Linux 6.12 speaks it (7.41; `include/uapi/linux/fuse.h`), byte by byte.
//!
//! ```text
//!  request: InHeader (40 bytes), the operation's fixed part, names or data
//!  reply:   OutHeader (16 bytes), the operation's fixed part, data            (none to FORGET, BATCH_FORGET)
//! ```
//!
//! All numbers are little-endian here, since the guest is. A structure is declared once, by [`wire!`], and
//! read and written field by field: nothing of a request is ever cast.

/// A piece of the protocol with a fixed length.
pub trait Wire: Sized {
    /// Its length in bytes.
    const SIZE: usize;

    /// Takes it off the front of `bytes`; None when they are too short.
    fn take(bytes: &mut &[u8]) -> Option<Self>;

    /// Adds it to `out`.
    fn put(&self, out: &mut Vec<u8>);
}

macro_rules! number {
    ($($type:ty)*) => {$(
        impl Wire for $type {
            const SIZE: usize = size_of::<$type>();

            fn take(bytes: &mut &[u8]) -> Option<Self> {
                let (head, tail) = bytes.split_first_chunk()?;
                *bytes = tail;
                Some(Self::from_le_bytes(*head))
            }

            fn put(&self, out: &mut Vec<u8>) {
                out.extend(self.to_le_bytes());
            }
        }
    )*};
}

number!(u16 u32 u64 i32 i64);

/// Declares a structure whose fields follow each other with no padding but what is declared.
macro_rules! wire {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct $name { $($(#[$field_meta])* pub $field: $type,)* }

        impl Wire for $name {
            const SIZE: usize = 0 $(+ <$type as Wire>::SIZE)*;

            fn take(bytes: &mut &[u8]) -> Option<Self> {
                Some(Self { $($field: Wire::take(bytes)?,)* })
            }

            fn put(&self, out: &mut Vec<u8>) {
                $(self.$field.put(out);)*
            }
        }
    };
}

// Below the macro, since they use it.
mod data;
mod names;
mod numbers;
mod session;

pub use self::data::*;
pub use self::names::*;
pub use self::numbers::*;
pub use self::session::*;

wire!(
    /// `struct fuse_in_header`.
    InHeader {
        /// Of the whole request, this header included.
        len: u32,
        /// See [`opcode`].
        opcode: u32,
        /// Names the request.
        unique: u64,
        /// What it is about.
        nodeid: u64,
        /// Of the process that caused it.
        uid: u32,
        /// Likewise.
        gid: u32,
        /// Likewise.
        pid: u32,
        /// Length of the extensions in 8-byte units.
        total_extlen: u16,
        /// Zero.
        padding: u16,
    }
);

wire!(
    /// `struct fuse_out_header`.
    OutHeader {
        /// Of the whole reply, this header included.
        len: u32,
        /// 0, or a negative error number.
        error: i32,
        /// Of the request.
        unique: u64,
    }
);

/// The bytes of a structure.
pub fn encode<T: Wire>(value: &T) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(T::SIZE);
    value.put(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_lengths() {
        assert_eq!(InHeader::SIZE, 40);
        assert_eq!(OutHeader::SIZE, 16);
        assert_eq!(Attr::SIZE, 88);
        assert_eq!(EntryOut::SIZE, 128);
        assert_eq!(AttrOut::SIZE, 104);
        assert_eq!(StatxIn::SIZE, 24);
        assert_eq!(StatxOut::SIZE + 14 * 8, STATX_OUT_SIZE);
        assert_eq!(ReadIn::SIZE, 40);
        assert_eq!(StatfsOut::SIZE, 80);
        assert_eq!(InitOut::SIZE, 64);
        assert_eq!(LseekIn::SIZE, 24);
        assert_eq!((SetupmappingIn::SIZE, RemovemappingIn::SIZE, RemovemappingOne::SIZE), (40, 4, 16));
        assert_eq!(Dirent::SIZE, 24);
        assert_eq!((SetattrIn::SIZE, CreateIn::SIZE, OpenOut::SIZE), (88, 16, 16));
        assert_eq!((WriteIn::SIZE, LkIn::SIZE, FallocateIn::SIZE), (40, 48, 32));
        assert_eq!((CopyFileRangeIn::SIZE, ReleaseIn::SIZE, FlushIn::SIZE), (56, 24, 24));
        assert_eq!((ForgetOne::SIZE, BatchForgetIn::SIZE, GetattrIn::SIZE), (16, 8, 16));
    }

    #[test]
    fn a_structure_is_read_as_it_was_written_and_not_from_less() {
        let header = InHeader { len: 40, opcode: 1, unique: 2, nodeid: 3, ..InHeader::default() };
        let bytes = encode(&header);
        assert_eq!(bytes[..16], [40, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        let mut rest = &bytes[..];
        assert_eq!((InHeader::take(&mut rest), rest.len()), (Some(header), 0));
        for cut in 0..bytes.len() {
            assert_eq!(InHeader::take(&mut &bytes[..cut]), None);
        }
    }
}
