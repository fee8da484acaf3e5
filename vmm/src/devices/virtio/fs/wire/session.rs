//! What is about the file system and the connection: INIT, INTERRUPT, FORGET, STATFS.

use super::Wire;

wire!(
    /// `struct fuse_forget_in`.
    ForgetIn {
        /// By how much the look-up count falls.
        nlookup: u64,
    }
);

wire!(
    /// `struct fuse_forget_one`.
    ForgetOne {
        /// What is forgotten.
        nodeid: u64,
        /// By how much the look-up count falls.
        nlookup: u64,
    }
);

wire!(
    /// `struct fuse_batch_forget_in`, followed by that many [`ForgetOne`].
    BatchForgetIn {
        /// How many follow.
        count: u32,
        /// Nothing.
        dummy: u32,
    }
);

wire!(
    /// `struct fuse_kstatfs`, the reply to STATFS but for its six spare numbers of 32 bits and padding.
    StatfsOut {
        /// Blocks.
        blocks: u64,
        /// Free blocks.
        bfree: u64,
        /// Free blocks for users.
        bavail: u64,
        /// Inodes.
        files: u64,
        /// Free inodes.
        ffree: u64,
        /// Block size.
        bsize: u32,
        /// The longest name.
        namelen: u32,
        /// Fragment size.
        frsize: u32,
        /// Zero.
        padding: u32,
        /// Zero.
        spare0: u64,
        /// Zero.
        spare1: u64,
        /// Zero.
        spare2: u64,
    }
);

wire!(
    /// `struct fuse_init_in` up to where version 7.36 lengthens it.
    InitIn {
        /// Of the kernel.
        major: u32,
        /// Of the kernel.
        minor: u32,
        /// In bytes.
        max_readahead: u32,
        /// The lower half, see [`super::init`].
        flags: u32,
    }
);

wire!(
    /// `struct fuse_init_out`.
    InitOut {
        /// [`super::MAJOR`].
        major: u32,
        /// [`super::MINOR`].
        minor: u32,
        /// In bytes, at most what was offered.
        max_readahead: u32,
        /// The lower half, see [`super::init`].
        flags: u32,
        /// Requests that may be under way in the background.
        max_background: u16,
        /// From which number on the kernel holds back.
        congestion_threshold: u16,
        /// In bytes.
        max_write: u32,
        /// Granularity of times in nanoseconds.
        time_gran: u32,
        /// Pages that one request may carry.
        max_pages: u16,
        /// For DAX: the alignment of mappings as a power of two.
        map_alignment: u16,
        /// The upper half of the flags.
        flags2: u32,
        /// For passthrough: none.
        max_stack_depth: u32,
        /// Zero.
        unused0: u64,
        /// Zero.
        unused1: u64,
        /// Zero.
        unused2: u64,
    }
);

wire!(
    /// `struct fuse_interrupt_in`.
    InterruptIn {
        /// Of the request that is not to wait any longer.
        unique: u64,
    }
);
