//! What comes from the daemon's side as JSON.

use std::{
    fs::File,
    os::{
        fd::{FromRawFd, IntoRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener},
    },
    sync::atomic::{AtomicU64, Ordering},
};

use bulkhead_vmm_api::{FdNumber, Request, Response, Start, VERSION, VmConfig};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::config::{self, Inherited};

/// Requests and, since a compromised VMM writes them, responses: understood and written again, or refused.
pub(super) fn control(bytes: &[u8]) {
    if let Ok(request) = serde_json::from_slice::<Request>(bytes) {
        let text = serde_json::to_vec(&request).expect("JSON");
        assert_eq!(serde_json::from_slice::<Request>(&text).expect("its own JSON"), request);
    }
    // Lossy numbers do not come back as they were; that they are read without harm is enough.
    let _ = serde_json::from_slice::<Response>(bytes);
}

/// A configuration whose text is anything. Descriptors are made for it, since its numbers are this process's own.
pub(super) fn config(bytes: &[u8]) {
    let Ok(mut config) = serde_json::from_slice::<VmConfig>(bytes) else { return };
    let mut made = Descriptors::default();
    config.version = if config.version == 0 { 0 } else { VERSION };
    match &mut config.start {
        Start::Boot { kernel, initramfs, .. } => {
            made.put(kernel, memory_file());
            if let Some(initramfs) = initramfs {
                made.put(initramfs, memory_file());
            }
        }
        Start::Restore { state, memory } => {
            made.put(state, memory_file());
            made.put(memory, memory_file());
        }
    }
    made.put(&mut config.control, seqpacket());
    made.put(&mut config.kvm, null());
    made.put(&mut config.report, memory_file());
    if let Some(console) = &mut config.console {
        made.put(console, memory_file());
    }
    if let Some(vsock) = &mut config.devices.vsock {
        made.put(&mut vsock.listener, stream());
    }
    let mut inherited = Inherited::default();
    let taken = config::take_report(&config, &mut inherited)
        .and_then(|_| config::check(config.clone(), &mut inherited));
    match taken {
        Ok(taken) => assert_eq!((taken.vcpus, &taken.name), (config.vcpus, &config.name)),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    made.close(&inherited);
}

/// Descriptors that were made.
#[derive(Default)]
struct Descriptors(Vec<FdNumber>);

impl Descriptors {
    /// A number divisible by four stands for a descriptor that is missing or wrong, and stays one.
    fn put(&mut self, number: &mut FdNumber, fd: OwnedFd) {
        *number = if *number & 3 == 0 { *number & 1 } else { fd.into_raw_fd() };
        if *number > 2 {
            self.0.push(*number);
        }
    }
}

impl Descriptors {
    /// Closes those that nobody took.
    fn close(self, inherited: &Inherited) {
        for number in self.0.into_iter().filter(|number| !inherited.numbers().contains(number)) {
            // SAFETY: it was made here, its owner was given up in `put`, and nobody else has become one.
            drop(unsafe { OwnedFd::from_raw_fd(number) });
        }
    }
}

fn memory_file() -> OwnedFd {
    rustix::fs::memfd_create("bulkhead-fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a memory file")
}

fn null() -> OwnedFd {
    File::options().read(true).write(true).open("/dev/null").expect("/dev/null").into()
}

fn stream() -> OwnedFd {
    UnixListener::bind_addr(&address()).expect("a listener").into()
}

fn seqpacket() -> OwnedFd {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let socket = socket.expect("a socket");
    let name = format!("bulkhead-fuzz-control-{}-{}", std::process::id(), next());
    let address = rustix::net::SocketAddrUnix::new_abstract_name(name.as_bytes()).expect("an address");
    rustix::net::bind(&socket, &address).expect("bound");
    rustix::net::listen(&socket, 1).expect("listening");
    socket
}

fn address() -> SocketAddr {
    SocketAddr::from_abstract_name(format!("bulkhead-fuzz-vsock-{}-{}", std::process::id(), next()))
        .expect("an address")
}

fn next() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
