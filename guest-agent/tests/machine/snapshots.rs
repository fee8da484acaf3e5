//! Machines that are saved and go on elsewhere, with the agent in them.

use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    time::Instant,
};

use bulkhead_agent_api::{Answer, Call, StreamKind};
use bulkhead_vmm_api::{ExitReason, Request, Response};
use serde_json::json;

use super::{
    PIPES, check_disk, delete, exec, execs, memory_limit, output, output_and_exit_code,
    sandbox::{From, Layer, Machine, Needs, Shape, USUAL, Vmm, new_disk},
    sh, start, terminal, writes_stay,
};

type Test = fn(&Needs);

pub(crate) const TESTS: [(&str, Test); 5] = [
    ("snapshot_clones_work", clones_work),
    ("snapshot_of_a_snapshot_with_two_vcpus", generations),
    ("snapshot_of_a_running_container", running_container),
    ("snapshot_damaged_is_refused", damaged),
    ("snapshot_many_at_once", many),
];

/// A directory for machines and snapshots of one test.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("directory"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A directory of that name.
    fn make(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir(&path).expect("directory");
        path
    }
}

/// Boots a machine that nothing is attached to.
fn idle(needs: &Needs, place: &Place, shape: Shape) -> Machine {
    Machine::awaited(Vmm::start(&needs.vmm, &place.make("parent"), From::Kernel(needs), shape))
}

/// A machine restored from `snapshot` in a directory `name`, with a layer and a fresh disk, running.
fn clone(needs: &Needs, place: &Place, name: &str, snapshot: &Path, shape: Shape) -> Machine {
    let directory = place.make(name);
    let layer = Layer::unpack(needs, &directory);
    let begun = Instant::now();
    let vmm = Vmm::start(&needs.vmm, &directory, From::Snapshot(snapshot), shape);
    assert!(vmm.status().paused);
    vmm.attach_disk(&new_disk(&directory));
    vmm.attach_layer(&layer);
    let attached = begun.elapsed();
    vmm.request(&Request::Resume, &[]);
    let mut machine = Machine::known(vmm);
    println!("  {name}: attached {attached:?}, agent {:?}, {:?}", begun.elapsed(), machine.vmm.status());
    machine.layer = layer.name;
    machine
}

fn clones_work(needs: &Needs) {
    let place = Place::new();
    let mut parent = idle(needs, &place, USUAL);
    let template = place.path("template");
    assert!(matches!(parent.vmm.ask(&Request::Snapshot, &[]), Response::Error { .. }));
    parent.vmm.snapshot(&template);
    println!("  parent: {:?}", parent.vmm.status());
    // The file is as sparse as the guest's memory.
    let memory = fs::metadata(template.join("memory")).unwrap();
    let state = fs::metadata(template.join("state")).unwrap();
    println!("  state {} bytes, memory {} KiB of {}", state.len(), memory.blocks() / 2, memory.len() >> 10);
    assert!(memory.blocks() * 512 < memory.len() / 2, "{} blocks", memory.blocks());

    let mut clone = clone(needs, &place, "clone", &template, USUAL);
    output_and_exit_code(&mut clone);
    writes_stay(&mut clone);
    execs(&mut clone);
    terminal(&mut clone);
    memory_limit(&mut clone);
    let report = clone.shut_down();
    assert_eq!(report.reason, ExitReason::PoweredOff, "{report:?}");
    check_disk(&place.path("clone/disk"));

    // The parent goes on as if nothing had been.
    parent.vmm.request(&Request::Resume, &[]);
    assert!(matches!(parent.call(Call::State), Ok(Answer::State { .. })));
    assert_eq!(parent.shut_down().reason, ExitReason::PoweredOff);
}

fn generations(needs: &Needs) {
    const SMP: Shape = (2, 160);
    let place = Place::new();
    let first = place.path("first");
    idle(needs, &place, SMP).vmm.snapshot(&first);
    let mut child = clone(needs, &place, "child", &first, SMP);
    let both =
        "cat /proc/stat | grep -c '^cpu[0-9]'; yes >/dev/null & yes >/dev/null & sleep 1; kill %1 %2; nproc";
    assert_eq!(output(&mut child, sh(both)), "2\n2\n");
    let second = place.path("second");
    child.vmm.snapshot(&second);
    drop(child);
    // Its share and disk are known to it, and come back under their names.
    let directory = place.make("grandchild");
    let layer = Layer::unpack(needs, &directory);
    fs::copy(place.path("child/disk"), directory.join("disk")).expect("disk");
    let vmm = Vmm::start(&needs.vmm, &directory, From::Snapshot(&second), SMP);
    vmm.attach_layer(&layer);
    vmm.attach_disk(&directory.join("disk"));
    let third = place.path("third");
    // Saved before it has run at all, and so before its guest has heard of the first reset.
    vmm.snapshot(&third);
    vmm.request(&Request::Resume, &[]);
    let mut grandchild = Machine::known(vmm);
    grandchild.layer = layer.name;
    assert_eq!(output(&mut grandchild, sh("nproc")), "2\n");
    drop(grandchild);

    let directory = place.make("last");
    let layer = Layer::unpack(needs, &directory);
    let vmm = Vmm::start(&needs.vmm, &directory, From::Snapshot(&third), SMP);
    vmm.attach_layer(&layer);
    vmm.attach_disk(&place.path("child/disk"));
    vmm.request(&Request::Resume, &[]);
    let mut last = Machine::known(vmm);
    last.layer = layer.name;
    assert_eq!(output(&mut last, sh(both)), "2\n2\n");
    assert_eq!(last.shut_down().reason, ExitReason::PoweredOff);
}

/// Counts to a file and to its output without a gap, over a snapshot and the death of its VMM.
fn running_container(needs: &Needs) {
    let place = Place::new();
    let directory = place.make("parent");
    let mut parent = Machine::boot(needs, &directory);
    let disk = new_disk(&directory);
    parent.vmm.attach_disk(&disk);
    let script = "i=0; while :; do i=$((i+1)); echo $i; echo $i >> /count; sleep 0.05; done";
    let process = start(&mut parent, "c", sh(script), PIPES);
    let mut out = parent.stream(&process, StreamKind::Stdout, 0).unwrap();
    read_until(&mut out, "20\n");
    let saved = place.path("saved");
    parent.vmm.snapshot(&saved);
    fs::copy(&disk, place.path("disk")).expect("disk");
    let layer_name = parent.layer.clone();
    drop(parent);

    let directory = place.make("child");
    let layer = Layer::unpack(needs, &directory);
    assert_eq!(layer.name, layer_name);
    let vmm = Vmm::start(&needs.vmm, &directory, From::Snapshot(&saved), USUAL);
    vmm.attach_layer(&layer);
    vmm.attach_disk(&place.path("disk"));
    vmm.request(&Request::Resume, &[]);
    let mut child = Machine::known(vmm);
    // Nothing was acknowledged: all of it is still there.
    let mut out = child.stream(&process, StreamKind::Stdout, 0).unwrap();
    let text = read_until(&mut out, "60\n");
    let numbers: Vec<u32> = text.lines().map(|line| line.parse().expect(line)).collect();
    assert!(numbers.iter().copied().eq(1..=numbers.len() as u32), "{numbers:?}");
    // Files that it knew and files that it did not, of its layer and of its disk.
    let script =
        "cat /etc/shells; stat -c %s /etc/group; tail -n 1 /count | wc -l; echo more > /more; cat /more";
    let late = exec(&mut child, "late", json!({"args": ["sh", "-c", script]}), PIPES).unwrap();
    assert_eq!(child.exit(&late).code, 0);
    let said = String::from_utf8(child.read_all(&late, StreamKind::Stdout)).unwrap();
    assert_eq!(said, "/bin/sh\n35\n1\nmore\n");
    child.call(Call::Signal { process: process.clone(), signal: 9 }).unwrap();
    assert_eq!(child.exit(&process).code, 137);
    delete(&mut child, "c");
    // The file of the former container went with it; the disk has survived being copied.
    child.layer = layer.name;
    output(&mut child, sh("echo done"));
    assert_eq!(child.shut_down().reason, ExitReason::PoweredOff);
    check_disk(&place.path("disk"));
}

/// Reads whole lines up to and with `last`.
fn read_until(stream: &mut impl Read, last: &str) -> String {
    let (mut text, mut byte) = (String::new(), [0]);
    while !(text == last || text.ends_with(&format!("\n{last}"))) {
        stream.read_exact(&mut byte).expect("read");
        text.push(byte[0].into());
    }
    text
}

fn damaged(needs: &Needs) {
    let place = Place::new();
    let good = place.path("good");
    idle(needs, &place, USUAL).vmm.snapshot(&good);
    let other = place.path("other");
    clone(needs, &place, "other-machine", &good, USUAL).vmm.snapshot(&other);

    type Damage = fn(&Path);
    let cases: [(&str, Shape, Damage, &str); 8] = [
        ("byte", USUAL, |at| overwrite(&at.join("state"), 500, &[0xa5; 8]), "checksum"),
        ("magic", USUAL, |at| overwrite(&at.join("state"), 0, b"x"), "not the state of a machine"),
        ("version", USUAL, |at| overwrite(&at.join("state"), 8, &[9]), "format version 9"),
        ("cut", USUAL, |at| shorten(&at.join("state")), "bytes and says that it has"),
        ("memory", USUAL, |at| shorten(&at.join("memory")), "the memory file has"),
        ("vcpus", (2, 128), |_| (), "1 vCPUs, and is to have 2"),
        ("size", (1, 256), |_| (), "the machine had memory at"),
        (
            "mixed",
            USUAL,
            |at| drop(fs::copy(at.with_file_name("other/memory"), at.join("memory"))),
            "another snapshot",
        ),
    ];
    for (name, shape, damage, message) in cases {
        let bad = place.make(name);
        for file in ["state", "memory"] {
            fs::copy(good.join(file), bad.join(file)).unwrap();
        }
        damage(&bad);
        let vmm = Vmm::start(&needs.vmm, &bad, From::Snapshot(&bad), shape);
        let ExitReason::Setup { message: said } = vmm.report().reason else { panic!("{name}") };
        assert!(said.contains(message), "{name}: {said}");
        fs::remove_dir_all(bad).unwrap();
    }
}

fn overwrite(path: &Path, at: u64, bytes: &[u8]) {
    File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

fn shorten(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
}

/// Twenty clones of one template, all restored before any of them is spoken to.
fn many(needs: &Needs) {
    let place = Place::new();
    let template = place.path("template");
    idle(needs, &place, USUAL).vmm.snapshot(&template);
    let layer = Layer::unpack(needs, &place.make("image"));
    let vmms: Vec<Vmm> = (0..20)
        .map(|index| {
            let directory = place.make(&format!("clone{index}"));
            Vmm::start(&needs.vmm, &directory, From::Snapshot(&template), USUAL)
        })
        .collect();
    for (index, vmm) in vmms.iter().enumerate() {
        vmm.attach_layer(&layer);
        vmm.attach_disk(&new_disk(&place.path(&format!("clone{index}"))));
        vmm.request(&Request::Resume, &[]);
    }
    let mut machines: Vec<Machine> = vmms.into_iter().map(Machine::known).collect();
    for (index, machine) in machines.iter_mut().enumerate() {
        machine.layer.clone_from(&layer.name);
        let text = format!("clone {index}");
        assert_eq!(output(machine, json!({"process": {"args": ["echo", text]}})), format!("{text}\n"));
    }
    for machine in machines {
        assert_eq!(machine.shut_down().reason, ExitReason::PoweredOff);
    }
}
