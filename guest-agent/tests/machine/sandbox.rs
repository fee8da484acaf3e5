//! A real machine around the agent: a VMM process, a layer, a disk, and the daemon's side of the wire.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{IoSlice, IoSliceMut, Read, Seek, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
};

use bulkhead_agent_api::{
    AgentError, Answer, CONTROL_PORT, Call, Event, Exit, FromAgent, Hello, ProcessId, STREAM_PORT,
    StreamKind, StreamOpen, StreamReady, ToAgent, frame,
};
use bulkhead_rootfs::{disk, layers};
use bulkhead_vmm_api::{self as vmm, share};
use rustix::{
    fs::{MemfdFlags, Mode, OFlags, SealFlags},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
        SocketAddrUnix, SocketFlags, SocketType,
    },
};

/// What a run needs from outside; the names are those of environment variables.
pub(crate) struct Needs {
    pub(crate) vmm: PathBuf,
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    pub(crate) busybox: PathBuf,
}

impl Needs {
    /// None, and the reason, when something is missing.
    pub(crate) fn from_environment() -> Result<Self, String> {
        let file = |name: &str| -> Result<PathBuf, String> {
            let path = std::env::var_os(name).ok_or(format!("{name} is not set"))?;
            let path = PathBuf::from(path);
            if path.is_file() { Ok(path) } else { Err(format!("{name}: {} is not a file", path.display())) }
        };
        Ok(Self {
            vmm: file("BULKHEAD_VMM")?,
            kernel: file("BULKHEAD_KERNEL")?,
            initramfs: file("BULKHEAD_INITRAMFS")?,
            busybox: std::env::var_os("BULKHEAD_BUSYBOX")
                .map_or_else(|| "/bin/busybox".into(), PathBuf::from),
        })
    }
}

pub(crate) const DISK: &str = "disk0";
pub(crate) const DISK_SIZE: u64 = 256 << 20;
pub(crate) const TAG: &str = "layers";
/// A disk's slot and a share device's that are empty, and no devices, until somebody joins.
pub(crate) const LATE_DISK: &str = "late0";
pub(crate) const LATE_TAG: &str = "late";

/// vCPUs and MiB of memory.
pub(crate) type Shape = (u8, u32);

pub(crate) const USUAL: Shape = (1, 128);

/// Where a machine comes from.
#[derive(Clone, Copy)]
pub(crate) enum From<'a> {
    Kernel(&'a Needs),
    /// A directory with a snapshot's two files.
    Snapshot(&'a Path),
}

/// A VMM, and its control socket.
pub(crate) struct Vmm {
    program: PathBuf,
    directory: PathBuf,
    process: Child,
    control: OwnedFd,
    ended: bool,
}

impl Vmm {
    pub(crate) fn start(
        program: &Path,
        directory: &Path,
        from: From<'_>,
        (vcpus, memory_mib): Shape,
    ) -> Self {
        let control_path = directory.join("control");
        let vsock_path = directory.join("vsock");
        let control = listen_seqpacket(&control_path);
        let vsock: OwnedFd = UnixListener::bind(&vsock_path).expect("vsock socket").into();
        let open = |path: &Path| OwnedFd::from(File::open(path).expect("open"));
        let report: OwnedFd = File::create(directory.join("report")).expect("report").into();
        let console: OwnedFd = File::create(directory.join("console")).expect("console").into();
        let kvm = File::options().read(true).write(true).open("/dev/kvm").expect("/dev/kvm");
        let kvm: OwnedFd = kvm.into();
        let number = |fd: &OwnedFd| {
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).expect("inherit");
            fd.as_raw_fd()
        };
        let (first, second) = match from {
            From::Kernel(needs) => (open(&needs.kernel), open(&needs.initramfs)),
            From::Snapshot(snapshot) => (open(&snapshot.join("state")), open(&snapshot.join("memory"))),
        };
        let start = match from {
            From::Kernel(_) => vmm::Start::Boot {
                kernel: number(&first),
                initramfs: Some(number(&second)),
                cmdline: "console=ttyS0 quiet panic=-1 reboot=k mitigations=off rdinit=/init".into(),
            },
            From::Snapshot(_) => vmm::Start::Restore { state: number(&first), memory: number(&second) },
        };
        let config = vmm::VmConfig {
            version: vmm::VERSION,
            name: "agent-test".into(),
            vcpus,
            memory_mib,
            start,
            control: number(&control),
            report: number(&report),
            kvm: number(&kvm),
            jail: vmm::Jail::Process,
            console: Some(number(&console)),
            devices: vmm::DeviceConfig {
                block: vec![
                    vmm::BlockConfig { id: DISK.into(), late: false },
                    vmm::BlockConfig { id: LATE_DISK.into(), late: true },
                ],
                fs: vec![
                    vmm::FsConfig { tag: TAG.into(), server: vmm::FsServer::Vmm, late: false, window_mib: 0 },
                    vmm::FsConfig {
                        tag: LATE_TAG.into(),
                        server: vmm::FsServer::Process,
                        late: true,
                        window_mib: 0,
                    },
                ],
                vsock: Some(vmm::VsockConfig { cid: 3, listener: number(&vsock) }),
                net: vec![],
                rng: true,
                balloon: false,
                memory: None,
            },
        };
        let config_path = directory.join("config");
        fs::write(&config_path, serde_json::to_vec(&config).expect("json")).expect("config");
        let config = open(&config_path);
        let process = Command::new(program)
            .arg("--config-fd")
            .arg(number(&config).to_string())
            .stdin(Stdio::null())
            .spawn()
            .expect("VMM");
        let control = connect_seqpacket(&control_path);
        let (program, directory) = (program.to_owned(), directory.to_owned());
        Self { program, directory, process, control, ended: false }
    }

    /// Asks; the answer must be Ok.
    pub(crate) fn request(&self, request: &vmm::Request, descriptors: &[&OwnedFd]) {
        assert_eq!(self.ask(request, descriptors), vmm::Response::Ok, "{request:?}");
    }

    pub(crate) fn ask(&self, request: &vmm::Request, descriptors: &[&OwnedFd]) -> vmm::Response {
        let text = serde_json::to_vec(request).expect("json");
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        if !descriptors.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
        }
        rustix::net::sendmsg(&self.control, &[IoSlice::new(&text)], &mut ancillary, SendFlags::empty())
            .expect("send");
        let mut buffer = vec![0; vmm::MAX_MESSAGE];
        let mut none = RecvAncillaryBuffer::new(&mut []);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let received =
            rustix::net::recvmsg(&self.control, &mut parts, &mut none, RecvFlags::empty()).expect("receive");
        serde_json::from_slice(&buffer[..received.bytes]).expect("response")
    }

    pub(crate) fn status(&self) -> vmm::Status {
        let vmm::Response::Status(status) = self.ask(&vmm::Request::Status, &[]) else { panic!() };
        status
    }

    /// Puts a disk into the first slot.
    pub(crate) fn attach_disk(&self, disk: &Path) {
        self.attach_disk_to(DISK, disk);
    }

    /// Puts a disk into a slot.
    pub(crate) fn attach_disk_to(&self, slot: &str, disk: &Path) {
        let file: OwnedFd = File::options().read(true).write(true).open(disk).expect("disk").into();
        self.request(&vmm::Request::AttachDisk { id: slot.into(), read_only: false }, &[&file]);
    }

    pub(crate) fn attach_layer(&self, layer: &Layer) {
        self.attach_layer_as(layer, &layer.name);
    }

    fn attach_layer_as(&self, layer: &Layer, name: &str) {
        let kind = vmm::ShareKind::Layer;
        let share = vmm::Request::AttachShare { tag: TAG.into(), name: name.into(), kind };
        self.request(&share, &[&layer.root]);
    }

    pub(crate) fn detach_layer(&self, name: &str) {
        self.request(&vmm::Request::DetachShare { tag: TAG.into(), name: name.into() }, &[]);
    }

    /// Starts a share server of a directory, as `data`, and gives it to a device.
    pub(crate) fn serve(&self, tag: &str, directory: &Path) -> ShareServer {
        let (server, channel, area) = ShareServer::start(&self.program, directory);
        self.request(&vmm::Request::AttachServer { tag: tag.into() }, &[&channel, &area]);
        server
    }

    /// Pauses the machine and saves it to two new files in `to`.
    pub(crate) fn snapshot(&self, to: &Path) {
        self.request(&vmm::Request::Pause, &[]);
        fs::create_dir_all(to).expect("directory");
        let file = |name| OwnedFd::from(File::create_new(to.join(name)).expect("file"));
        self.request(&vmm::Request::Snapshot, &[&file("state"), &file("memory")]);
    }

    pub(crate) fn console(&self) -> String {
        fs::read(self.directory.join("console"))
            .map_or_else(|_| String::new(), |text| String::from_utf8_lossy(&text).into_owned())
    }

    /// Waits for its end and gives its report.
    pub(crate) fn report(mut self) -> vmm::Report {
        self.process.wait().expect("wait");
        self.ended = true;
        serde_json::from_slice(&fs::read(self.directory.join("report")).expect("report")).expect("report")
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if !self.ended {
            if std::thread::panicking() {
                let report = fs::read_to_string(self.directory.join("report")).unwrap_or_default();
                eprintln!("--- console\n{}--- report\n{report}\n---", self.console());
            }
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

/// A share server.
pub(crate) struct ShareServer(Child);

impl ShareServer {
    /// The server, and what its VMM is to be given.
    fn start(program: &Path, directory: &Path) -> (Self, OwnedFd, OwnedFd) {
        let inherit = |fd: &OwnedFd| {
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).expect("inherit");
            fd.as_raw_fd()
        };
        let pair =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let (ours, theirs) = pair.expect("channel");
        let area = rustix::fs::memfd_create("area", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
        let area = area.expect("area");
        rustix::fs::ftruncate(&area, share::AREA_SIZE as u64).expect("area");
        rustix::fs::fcntl_add_seals(&area, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW)
            .expect("seal");
        let shared = area.try_clone().expect("dup");
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(directory, flags, Mode::empty()).expect("share");
        let config = share::ShareConfig {
            version: share::VERSION,
            jail: vmm::Jail::Process,
            channel: inherit(&theirs),
            area: inherit(&shared),
            memory_mib: USUAL.1,
            shares: vec![share::Share {
                name: "data".into(),
                root: inherit(&root),
                read_only: false,
                caching: share::Caching::Consistent,
            }],
        };
        let mut file = tempfile::tempfile().expect("config");
        file.write_all(&serde_json::to_vec(&config).expect("json")).expect("config");
        file.rewind().expect("config");
        let file = OwnedFd::from(file);
        let process = Command::new(program)
            .arg("--share-config-fd")
            .arg(inherit(&file).to_string())
            .stdin(Stdio::null())
            .spawn()
            .expect("share server");
        (Self(process), ours, area)
    }

    /// Waits for its end.
    pub(crate) fn wait(mut self) -> ExitStatus {
        self.0.wait().expect("wait")
    }
}

/// An image layer, unpacked.
pub(crate) struct Layer {
    pub(crate) name: String,
    root: OwnedFd,
}

impl Layer {
    pub(crate) fn unpack(needs: &Needs, directory: &Path) -> Self {
        let store = layers::LayerStore::open(directory.join("layers")).expect("layer store");
        let info = store.import(&archive(needs)[..], &layers::Limits::default()).expect("layer");
        Self { name: info.diff_id.hex(), root: store.open_root(&info.diff_id).expect("layer root") }
    }
}

/// A formatted disk.
pub(crate) fn new_disk(directory: &Path) -> PathBuf {
    let (template, disk) = (directory.join("template"), directory.join("disk"));
    disk::template(&template, DISK_SIZE, disk::Purpose::WritableLayer).expect("template");
    disk::clone(&template, &disk).expect("disk");
    disk
}

/// A machine whose agent answers.
pub(crate) struct Machine {
    pub(crate) vmm: Vmm,
    agent: UnixStream,
    incoming: Vec<u8>,
    events: VecDeque<Event>,
    next: u64,
    pub(crate) hello: Hello,
    pub(crate) layer: String,
    /// The layer, of a machine that was booted with it.
    image: Option<Layer>,
}

impl Machine {
    /// Boots, attaches the layer, and waits for the agent. The disk comes by [`Vmm::attach_disk`].
    pub(crate) fn boot(needs: &Needs, directory: &Path) -> Self {
        let layer = Layer::unpack(needs, directory);
        let mut machine = Self::awaited(Vmm::start(&needs.vmm, directory, From::Kernel(needs), USUAL));
        machine.vmm.attach_layer(&layer);
        machine.layer.clone_from(&layer.name);
        machine.image = Some(layer);
        machine
    }

    /// Attaches the layer once more, by another name.
    pub(crate) fn attach_layer_as(&self, name: &str) {
        self.vmm.attach_layer_as(self.image.as_ref().expect("booted with a layer"), name);
    }

    /// The machine of a booting VMM, when its agent has said Hello.
    pub(crate) fn awaited(vmm: Vmm) -> Self {
        let agent = listen_control(&vmm.directory);
        Self::greeted(vmm, agent)
    }

    /// The machine of a VMM whose agent was there before.
    pub(crate) fn known(vmm: Vmm) -> Self {
        let agent = connect_control(&vmm.directory);
        Self::greeted(vmm, agent)
    }

    fn greeted(vmm: Vmm, agent: UnixStream) -> Self {
        let mut machine = Self {
            vmm,
            agent,
            incoming: Vec::new(),
            events: VecDeque::new(),
            next: 0,
            hello: Hello { version: 0, kernel: String::new(), started_us: 0 },
            layer: String::new(),
            image: None,
        };
        machine.hello = machine.frame();
        machine
    }

    /// Hangs up and connects anew, as a restarted daemon does.
    pub(crate) fn reconnect(&mut self) {
        self.agent.shutdown(std::net::Shutdown::Both).expect("hang up");
        self.agent = connect_control(&self.vmm.directory);
        self.incoming.clear();
        self.events.clear();
        self.hello = self.frame();
    }

    fn frame<T: serde::de::DeserializeOwned>(&mut self) -> T {
        loop {
            if let Some((message, used)) = frame::decode(&self.incoming).expect("frame") {
                self.incoming.drain(..used);
                return message;
            }
            let mut buffer = [0; 65536];
            let count = self.agent.read(&mut buffer).expect("read");
            assert!(count > 0, "the agent hung up; console:\n{}", self.vmm.console());
            self.incoming.extend(&buffer[..count]);
        }
    }

    /// Calls without waiting for the answer.
    pub(crate) fn send(&mut self, call: Call) -> u64 {
        self.next += 1;
        let message = frame::encode(&ToAgent { id: self.next, call }).expect("frame");
        self.agent.write_all(&message).expect("write");
        self.next
    }

    /// The answer to a call; events on the way are kept.
    pub(crate) fn answer(&mut self, call: u64) -> Result<Answer, AgentError> {
        loop {
            match self.frame() {
                FromAgent::Answer { id, result } if id == call => return result,
                FromAgent::Answer { id, .. } => panic!("an answer to {id}"),
                FromAgent::Event(event) => self.events.push_back(event),
            }
        }
    }

    pub(crate) fn call(&mut self, call: Call) -> Result<Answer, AgentError> {
        let id = self.send(call);
        self.answer(id)
    }

    /// The next event that fits.
    pub(crate) fn event<T>(&mut self, fits: impl Fn(&Event) -> Option<T>) -> T {
        loop {
            if let Some((index, found)) =
                self.events.iter().enumerate().find_map(|(index, event)| Some((index, fits(event)?)))
            {
                self.events.remove(index);
                return found;
            }
            match self.frame() {
                FromAgent::Event(event) => self.events.push_back(event),
                FromAgent::Answer { id, .. } => panic!("an answer to {id}"),
            }
        }
    }

    pub(crate) fn exit(&mut self, process: &ProcessId) -> Exit {
        self.event(|event| match event {
            Event::Exited { process: of, exit } if of == process => Some(*exit),
            _ => None,
        })
    }

    /// Lets go of events that nobody has asked for.
    pub(crate) fn forget(&mut self, container: &str) {
        self.events.retain(|event| match event {
            Event::Exited { process, .. } => process.container != container,
            Event::Oom { container: of } => of != container,
        });
    }

    /// Opens a stream.
    pub(crate) fn stream(
        &self,
        process: &ProcessId,
        stream: StreamKind,
        from: u64,
    ) -> Result<UnixStream, AgentError> {
        let mut connection = UnixStream::connect(self.vmm.directory.join("vsock")).expect("connect");
        writeln!(connection, "CONNECT {STREAM_PORT}").expect("write");
        assert!(line(&mut connection).starts_with("OK "));
        let open = StreamOpen { process: process.clone(), stream, from: Some(from) };
        connection.write_all(&frame::encode(&open).expect("frame")).expect("write");
        let mut header = [0; 4];
        connection.read_exact(&mut header).expect("read");
        let mut body = vec![0; u32::from_le_bytes(header) as usize];
        connection.read_exact(&mut body).expect("read");
        let ready: StreamReady = serde_json::from_slice(&body).expect("StreamReady");
        ready.error.map_or(Ok(connection), Err)
    }

    /// Everything of an output stream, acknowledged as it comes.
    pub(crate) fn read_all(&self, process: &ProcessId, stream: StreamKind) -> Vec<u8> {
        let mut connection = self.stream(process, stream, 0).expect("stream");
        let mut all = Vec::new();
        let mut buffer = vec![0; 256 << 10];
        loop {
            match connection.read(&mut buffer).expect("read") {
                0 => return all,
                count => all.extend(&buffer[..count]),
            }
            // The agent may have ended the stream meanwhile.
            let _ = connection.write_all(&(all.len() as u64).to_le_bytes());
        }
    }

    /// Shuts down and gives the VMM's report.
    pub(crate) fn shut_down(mut self) -> vmm::Report {
        self.send(Call::Shutdown);
        self.vmm.report()
    }
}

fn connect_control(directory: &Path) -> UnixStream {
    let mut connection = UnixStream::connect(directory.join("vsock")).expect("connect");
    writeln!(connection, "CONNECT {CONTROL_PORT}").expect("write");
    assert!(line(&mut connection).starts_with("OK "));
    connection
}

fn listen_control(directory: &Path) -> UnixStream {
    let mut connection = UnixStream::connect(directory.join("vsock")).expect("connect");
    writeln!(connection, "LISTEN {CONTROL_PORT}").expect("write");
    assert!(line(&mut connection).starts_with("OK "));
    connection
}

fn line(connection: &mut UnixStream) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while byte != *b"\n" {
        connection.read_exact(&mut byte).expect("the VMM hung up");
        text.push(byte[0]);
    }
    String::from_utf8_lossy(&text).into_owned()
}

fn listen_seqpacket(path: &Path) -> OwnedFd {
    let socket = seqpacket();
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).expect("path")).expect("bind");
    rustix::net::listen(&socket, 4).expect("listen");
    socket
}

fn connect_seqpacket(path: &Path) -> OwnedFd {
    let socket = seqpacket();
    rustix::net::connect(&socket, &SocketAddrUnix::new(path).expect("path")).expect("connect");
    socket
}

fn seqpacket() -> OwnedFd {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .expect("socket")
}

/// A small image: busybox, its names, and files for the tests.
fn archive(needs: &Needs) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut entry = |path: &str, mode: u32, data: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(mode);
        header.set_entry_type(if path.ends_with('/') {
            tar::EntryType::Directory
        } else {
            tar::EntryType::Regular
        });
        tar.append_data(&mut header, path, data).expect("tar");
    };
    for directory in ["bin/", "etc/", "proc/", "sys/", "dev/", "tmp/"] {
        entry(directory, 0o755, &[]);
    }
    entry("bin/busybox", 0o755, &fs::read(&needs.busybox).expect("busybox"));
    entry("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n");
    entry("etc/group", 0o644, b"root:x:0:\nweb:x:34:\naudio:x:29:web\n");
    entry("etc/shells", 0o644, b"/bin/sh\n");
    entry("bin/garbage", 0o755, b"\x7fELFgarbage");
    entry("bin/orphan", 0o755, b"#!/nosuch/interpreter\n");
    for applet in [
        "sh",
        "cat",
        "echo",
        "id",
        "ls",
        "sleep",
        "stat",
        "head",
        "sha256sum",
        "hostname",
        "env",
        "stty",
        "ps",
        "mount",
        "kill",
        "touch",
        "mknod",
        "dd",
        "grep",
        "true",
        "readlink",
        "nproc",
        "tail",
        "yes",
        "wc",
        "test",
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        tar.append_link(&mut header, format!("bin/{applet}"), "/bin/busybox").expect("tar");
    }
    tar.into_inner().expect("tar")
}
