use std::{io::Write, os::fd::IntoRawFd};

use bulkhead_vmm_api::{FsServer, MemoryDeviceConfig, VsockConfig};
use rustix::net::{SocketAddrUnix, bind, listen, socket};

use super::*;

fn file() -> FdNumber {
    tempfile::tempfile().unwrap().into_raw_fd()
}

fn device() -> FdNumber {
    File::options().read(true).write(true).open("/dev/null").unwrap().into_raw_fd()
}

fn listener(kind: SocketType) -> FdNumber {
    let directory = tempfile::tempdir().unwrap();
    let fd = socket(AddressFamily::UNIX, kind, None).unwrap();
    bind(&fd, &SocketAddrUnix::new(directory.path().join("socket")).unwrap()).unwrap();
    listen(&fd, 1).unwrap();
    fd.into_raw_fd()
}

fn boot(kernel: FdNumber, initramfs: Option<FdNumber>) -> Start {
    Start::Boot { kernel, initramfs, cmdline: "quiet".to_owned() }
}

fn valid() -> VmConfig {
    VmConfig {
        version: VERSION,
        name: "test".to_owned(),
        vcpus: 2,
        memory_mib: 128,
        start: boot(file(), Some(file())),
        control: listener(SocketType::SEQPACKET),
        report: file(),
        kvm: device(),
        jail: Jail::Process,
        console: None,
        devices: DeviceConfig {
            block: vec![BlockConfig { id: "root".to_owned(), late: false }],
            fs: vec![FsConfig {
                tag: "layers".to_owned(),
                server: FsServer::Vmm,
                late: false,
                window_mib: 0,
            }],
            vsock: Some(VsockConfig { cid: 3, listener: listener(SocketType::STREAM) }),
            net: vec![NetConfig { id: "net0".to_owned() }],
            rng: true,
            balloon: true,
            memory: Some(MemoryDeviceConfig { region_mib: 1024 }),
        },
    }
}

/// The error that `valid` with a change leads to.
fn refused(change: impl FnOnce(&mut VmConfig)) -> String {
    let mut config = valid();
    change(&mut config);
    let mut inherited = Inherited::default();
    match take_report(&config, &mut inherited).and_then(|_| check(config, &mut inherited)) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_valid_configuration_is_taken() {
    let text = serde_json::to_vec(&valid()).unwrap();
    let mut source = tempfile::tempfile().unwrap();
    source.write_all(&text).unwrap();
    std::io::Seek::rewind(&mut source).unwrap();
    let mut inherited = Inherited::default();
    let config = read(source.into_raw_fd(), &mut inherited).unwrap();
    take_report(&config, &mut inherited).unwrap();
    let config = check(config, &mut inherited).unwrap();
    assert_eq!((config.vcpus, config.memory), (2, 128 << 20));
    let StartFiles::Boot { kernel, .. } = &config.start else { panic!() };
    assert!(fcntl_getfd(kernel).unwrap().contains(FdFlags::CLOEXEC));
    assert_eq!(config.devices.vsock.unwrap().0, 3);
}

#[test]
fn values_outside_the_contract_are_refused() {
    for (field, change) in [
        ("version", (|c| c.version = VERSION + 1) as fn(&mut VmConfig)),
        ("memory.region_mib", |c| c.devices.memory = Some(MemoryDeviceConfig { region_mib: 0 })),
        ("memory.region_mib", |c| c.devices.memory = Some(MemoryDeviceConfig { region_mib: 129 })),
        ("memory.region_mib", |c| c.devices.memory = Some(MemoryDeviceConfig { region_mib: u32::MAX - 1 })),
        ("name", |c| c.name = "x".repeat(65)),
        ("vcpus", |c| c.vcpus = 0),
        ("vcpus", |c| c.vcpus = 65),
        ("memory_mib", |c| c.memory_mib = 31),
        ("memory_mib", |c| c.memory_mib = u32::MAX),
        ("block", |c| c.devices.block.push(BlockConfig { id: "root".to_owned(), late: false })),
        ("block", |c| c.devices.block[0].id = "x".repeat(21)),
        ("fs", |c| c.devices.fs[0].tag = String::new()),
        ("fs", |c| c.devices.fs[0].late = true),
        ("vsock", |c| c.devices.vsock.as_mut().unwrap().cid = 2),
        ("net", |c| c.devices.net.push(NetConfig { id: "net0".to_owned() })),
        ("net", |c| c.devices.net[0].id = String::new()),
    ] {
        let error = refused(change);
        assert!(error.starts_with(field), "{field}: {error}");
    }
}

#[test]
fn descriptors_of_the_wrong_kind_are_refused() {
    assert!(refused(|c| c.start = boot(9999, None)).contains("9999 is not open"));
    assert!(refused(|c| c.start = boot(1, None)).contains("standard stream"));
    let twice = file();
    assert!(refused(|c| c.start = boot(twice, Some(twice))).contains("named twice"));
    assert!(refused(|c| c.start = boot(listener(SocketType::STREAM), None)).contains("not a regular file"));
    assert!(
        refused(|c| c.start = Start::Restore { state: file(), memory: listener(SocketType::STREAM) })
            .contains("not a regular file")
    );
    assert!(refused(|c| c.control = listener(SocketType::STREAM)).contains("right type"));
    assert!(refused(|c| c.control = file()).contains("right type"));
    assert!(refused(|c| c.console = Some(listener(SocketType::STREAM))).contains("file or pipe"));
    assert!(
        refused(|c| {
            let mut full = tempfile::tempfile().unwrap();
            full.write_all(b"x").unwrap();
            c.report = full.into_raw_fd();
        })
        .contains("not empty")
    );
    assert!(refused(|c| c.kvm = file()).contains("character device"));
    assert!(refused(|c| c.report = File::open("/proc/self/exe").unwrap().into_raw_fd()).contains("writable"));
}

#[test]
fn malformed_text_is_refused() {
    for text in ["", "{}", "[1", r#"{"version":2,"surprise":true}"#] {
        let mut source = tempfile::tempfile().unwrap();
        source.write_all(text.as_bytes()).unwrap();
        std::io::Seek::rewind(&mut source).unwrap();
        let result = read(source.into_raw_fd(), &mut Inherited::default());
        assert!(matches!(result, Err(ConfigError::Malformed(_))), "{text}");
    }
}
