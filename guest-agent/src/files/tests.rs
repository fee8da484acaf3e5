//! Trees into archives and back, in directories of this machine.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
};

use bulkhead_agent_api::ErrorKind;
use bulkhead_tar::{Entry, Kind, Writer};

use super::{
    Failure,
    pack::{Mounts, pack},
    root::Root,
    unpack::{Options, Target},
};

const ANY: Options<'_> = Options { keep_kinds: false, owner: None };

fn unpack(root: &Path, path: &str, options: Options<'_>, archive: &[u8]) -> Result<(), String> {
    let root = Root::of(root);
    let target = Target::open(&root, path, options, false).map_err(|error| error.message)?;
    target.unpack(archive).map_err(|failure| match failure {
        Failure::Told(error) => error.message,
        Failure::Peer(error) => error.to_string(),
    })
}

/// An archive of entries that are this user's.
fn archive(entries: &[(&str, Kind, &[u8])]) -> Vec<u8> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let mut writer = Writer::new(Vec::new());
    for (name, kind, content) in entries {
        let mode = if *kind == Kind::Directory { 0o755 } else { 0o640 };
        let (name, kind) = (name.as_bytes().to_vec(), kind.clone());
        let entry = Entry { name, kind, mode, uid, gid, mtime: (1_000_000_000, 0), xattrs: vec![] };
        writer.entry(&entry, content.len() as u64).unwrap();
        writer.data(content).unwrap();
    }
    writer.finish().unwrap()
}

#[test]
fn a_tree_goes_into_an_archive_and_back() {
    let base = tempfile::tempdir().unwrap();
    let (from, to) = (base.path().join("from"), base.path().join("to"));
    fs::create_dir_all(from.join("dir/deep")).unwrap();
    fs::create_dir_all(to.join("in")).unwrap();
    fs::write(from.join("dir/file"), "content").unwrap();
    fs::set_permissions(from.join("dir/file"), fs::Permissions::from_mode(0o751)).unwrap();
    fs::hard_link(from.join("dir/file"), from.join("dir/deep/again")).unwrap();
    symlink("../file", from.join("dir/deep/link")).unwrap();
    let mut holes = vec![0; 1 << 20];
    holes[1 << 19] = 1;
    fs::write(from.join("dir/holes"), &holes).unwrap();

    let root = Root::of(&from);
    let (file, stat) = root.look("/dir").unwrap();
    let mut bytes = Vec::new();
    pack(&root, &file, &stat.name, Mounts::Ordinary, &mut bytes).unwrap();
    unpack(&to, "/in", ANY, &bytes).unwrap();
    let got = to.join("in/dir");
    assert_eq!(fs::read_to_string(got.join("file")).unwrap(), "content");
    let (one, two) = (fs::metadata(got.join("file")).unwrap(), fs::metadata(got.join("deep/again")).unwrap());
    assert_eq!((one.ino(), one.mode() & 0o7777), (two.ino(), 0o751));
    assert_eq!(one.mtime(), fs::metadata(from.join("dir/file")).unwrap().mtime());
    assert_eq!(fs::read_link(got.join("deep/link")).unwrap(), Path::new("../file"));
    assert!(fs::read(got.join("holes")).unwrap() == holes);
    assert!(fs::metadata(got.join("holes")).unwrap().blocks() < 1024, "zeros are holes");
}

#[test]
fn an_archive_stays_below_the_root_and_keeps_kinds_when_asked() {
    let base = tempfile::tempdir().unwrap();
    let root = base.path().join("root");
    fs::create_dir_all(root.join("t")).unwrap();
    fs::create_dir_all(root.join("u/full")).unwrap();
    symlink("../../../../u", root.join("t/out")).unwrap();
    let file = |name: &'static str| (name, Kind::File, b"x".as_slice());
    unpack(&root, "/t", ANY, &archive(&[file("out/in"), file("/abs"), file("a/b/c")])).unwrap();
    for path in ["u/in", "t/abs", "t/a/b/c"] {
        assert!(root.join(path).exists(), "{path}");
    }
    assert!(!base.path().join("u").exists() && !root.join("abs").exists());
    for bad in ["../evil", "a/../../evil"] {
        assert!(unpack(&root, "/t", ANY, &archive(&[file(bad)])).is_err(), "{bad}");
    }
    let hard = ("hard", Kind::HardLink(b"../u/in".to_vec()), b"".as_slice());
    assert!(unpack(&root, "/t", ANY, &archive(&[hard])).is_err());

    let keep = Options { keep_kinds: true, owner: None };
    let error = unpack(&root, "/u", keep, &archive(&[file("full")])).unwrap_err();
    assert!(error.starts_with("cannot overwrite directory"), "{error}");
    let directory = [("in", Kind::Directory, b"".as_slice())];
    let error = unpack(&root, "/u", keep, &archive(&directory)).unwrap_err();
    assert!(error.starts_with("cannot overwrite non-directory"), "{error}");
    unpack(&root, "/u", ANY, &archive(&[file("full")])).unwrap();
    assert!(root.join("u/full").is_file());
    assert_eq!(
        unpack(&root, "/u/in", ANY, &archive(&[])).unwrap_err(),
        "extraction point is not a directory"
    );
    let opened = Root::of(&root);
    let error = Target::open(&opened, "/none", ANY, false).err().unwrap();
    assert_eq!(error.kind, ErrorKind::NotFound);
    assert!(Target::open(&opened, "/t", ANY, true).is_err(), "a read-only root");
}
