//! Whole layers in, trees out: what lies on disk, and what is refused.

mod archive;
mod hostile;
mod random;

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use archive::Archive;
use bulkhead_layer_format::{Meta, XATTR};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::{DiffId, LayerError, LayerErrorKind, LayerInfo, LayerStore, Limits};

/// A store in a directory of its own.
struct Fixture {
    dir: TempDir,
    store: LayerStore,
}

/// A file of an unpacked layer.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    meta: Meta,
    mtime: (i64, i64),
    content: Vec<u8>,
    links: u64,
}

impl Fixture {
    fn new() -> Self {
        let dir = temp_dir();
        let store = LayerStore::open(dir.path().join("layers")).unwrap();
        Self { dir, store }
    }

    /// Unpacks a layer. One that unpacks gives its archive back, whatever the archive is.
    fn import(&self, archive: Archive) -> Result<LayerInfo, LayerError> {
        let archive = archive.finish();
        let info = self.store.import(&archive[..], &Limits::default())?;
        let mut again = Vec::new();
        self.store.archive(&info.diff_id).unwrap().read_to_end(&mut again).unwrap();
        assert!(again == archive, "the archive is another");
        Ok(info)
    }

    /// The tree of a layer that must unpack.
    #[track_caller]
    fn tree(&self, archive: Archive) -> BTreeMap<String, Found> {
        let info = self.import(archive).unwrap();
        tree(&self.store.path(&info.diff_id))
    }

    /// The layer must be refused with a text that holds `problem`, and leave nothing.
    #[track_caller]
    fn refuses(&self, archive: &[u8], problem: &str) {
        let error = self.store.import(archive, &Limits::default()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(problem), "{text:?} does not say {problem:?}");
        assert_eq!(error.kind(), LayerErrorKind::Invalid, "{text}");
        self.assert_empty();
    }

    #[track_caller]
    fn assert_empty(&self) {
        let mut left: Vec<PathBuf> = paths(self.dir.path());
        left.retain(|path| !["layers", "layers/tmp"].iter().any(|own| path == &self.dir.path().join(own)));
        assert_eq!(left, Vec::<PathBuf>::new());
    }
}

/// A directory on a filesystem with user extended attributes: the usual one for temporary files, else one
/// below the build directory.
fn temp_dir() -> TempDir {
    let below_target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    for parent in [std::env::temp_dir(), below_target] {
        let Ok(dir) = tempfile::tempdir_in(parent) else { continue };
        let flags = rustix::fs::XattrFlags::empty();
        if rustix::fs::setxattr(dir.path(), XATTR, b"x", flags).is_ok() {
            return dir;
        }
    }
    panic!("neither the temporary directory nor target/ has user extended attributes");
}

fn paths(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.symlink_metadata().unwrap().is_dir() {
            found.extend(paths(&path));
        }
        found.push(path);
    }
    found
}

/// Everything in a layer's tree; asserts what holds for every layer.
#[track_caller]
fn tree(root: &Path) -> BTreeMap<String, Found> {
    let mut all = BTreeMap::new();
    for path in paths(root).into_iter().chain([root.to_owned()]) {
        let stat = path.symlink_metadata().unwrap();
        let (mode, content) = if stat.is_dir() {
            (0o755, Vec::new())
        } else {
            assert!(stat.is_file(), "{} is neither a file nor a directory", path.display());
            (0o644, fs::read(&path).unwrap())
        };
        assert_eq!(stat.permissions().mode() & 0o7777, mode, "{}", path.display());
        let mut value = [0; 4096];
        let length = rustix::fs::lgetxattr(&path, XATTR, &mut value[..]).unwrap();
        let meta = Meta::decode(&value[..length]).unwrap();
        let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
        let mtime = (stat.mtime(), stat.mtime_nsec());
        all.insert(name, Found { meta, mtime, content, links: stat.nlink() });
    }
    all
}

fn names(tree: &BTreeMap<String, Found>) -> Vec<&str> {
    tree.keys().map(String::as_str).filter(|name| !name.is_empty()).collect()
}

fn digest(bytes: &[u8]) -> DiffId {
    DiffId::from_bytes(Sha256::digest(bytes).into())
}

#[test]
fn every_kind_of_file_takes_its_form() {
    let tree = Fixture::new().tree(
        Archive::new()
            .dir("./")
            .dir("etc/")
            .file("etc/motd", b"hello")
            .symlink("etc/link", "/../../etc/shadow")
            .hard_link("etc/hard", "etc/motd")
            .device(b'3', "null", 1, 3)
            .device(b'4', "disk", 259, 70_000)
            .entry(b'6', "fifo", "", b""),
    );
    assert_eq!(names(&tree), ["disk", "etc", "etc/hard", "etc/link", "etc/motd", "fifo", "null"]);
    let mode = |name: &str| tree[name].meta.mode;
    assert_eq!(mode(""), 0o040_755);
    assert_eq!(mode("etc"), 0o040_755);
    assert_eq!(mode("etc/motd"), 0o100_644);
    assert_eq!(mode("etc/link"), 0o120_644);
    assert_eq!(mode("null"), 0o020_644);
    assert_eq!(mode("disk"), 0o060_644);
    assert_eq!(mode("fifo"), 0o010_644);
    assert_eq!(tree["null"].meta.rdev, 0x103);
    assert_eq!(tree["disk"].meta.rdev, (70_000 & 0xff) | (259 << 8) | ((70_000 & !0xff) << 12));
    assert_eq!(tree["etc/motd"].content, b"hello");
    assert_eq!(tree["etc/link"].content, b"/../../etc/shadow");
    assert_eq!((tree["etc/motd"].links, tree["etc/hard"].links), (2, 2));
    assert!(tree.values().all(|found| found.mtime == (1_700_000_000, 0)));
}

#[test]
fn pax_and_gnu_give_what_a_header_cannot_hold() {
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(255));
    let tree = Fixture::new().tree(
        Archive::new()
            .pax(&[
                ("path", long.as_bytes()),
                ("uid", b"4294967294"),
                ("gid", b"3000000000"),
                ("mtime", b"1234567890.123456789"),
                ("SCHILY.xattr.user.a", b"1\n2\0"),
                ("SCHILY.xattr.security.capability", b"\x01\0\0\x02"),
                ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
                ("size", b"3"),
            ])
            .custom(b'0', b"short", b"", b"abc", |header| header.size = *b"00000000000\0")
            .entry(b'L', "././@LongLink", "", &[b"g".repeat(250), vec![0]].concat())
            .entry(b'K', "././@LongLink", "", &b"t".repeat(300))
            .symlink("short", "short"),
    );
    let found = &tree[&long];
    assert_eq!((found.meta.uid, found.meta.gid), (4_294_967_294, 3_000_000_000));
    assert_eq!(found.mtime, (1_234_567_890, 123_456_789));
    assert_eq!(found.content, b"abc");
    let xattrs = [(&b"user.a"[..], &b"1\n2\0"[..]), (b"security.capability", b"\x01\0\0\x02")];
    assert_eq!(found.meta.xattrs, xattrs.map(|(name, value)| (name.to_vec(), value.to_vec())));
    assert_eq!(tree[&"g".repeat(250)].content, b"t".repeat(300));
}

#[test]
fn set_id_bits_are_kept_in_the_metadata_alone() {
    let archive = Archive::new().custom(b'0', b"su", b"", b"", |header| header.mode = *b"0106755\0");
    // `tree` asserts that the host's file has mode 0644.
    assert_eq!(Fixture::new().tree(archive)["su"].meta.mode, 0o106_755);
}

#[test]
fn parents_that_are_missing_are_made() {
    let tree = Fixture::new().tree(Archive::new().file("a/b/c", b""));
    assert_eq!(names(&tree), ["a", "a/b", "a/b/c"]);
    for name in ["", "a", "a/b"] {
        let found = &tree[name];
        assert_eq!((found.meta.mode, found.meta.uid, found.mtime), (0o040_755, 0, (0, 0)), "{name}");
    }
}

#[test]
fn a_directorys_time_survives_what_is_made_in_it() {
    let tree = Fixture::new().tree(
        Archive::new()
            .dir("a")
            .dir("a/b")
            .file("a/b/1", b"")
            .file("a/2", b"")
            .file("a/b/3", b"")
            .hard_link("a/b/4", "a/2")
            .file("a/2", b"new")
            .entry(b'0', "a/.wh.gone", "", b"")
            .file("a/b/new/5", b""),
    );
    assert_eq!(tree["a"].mtime, (1_700_000_000, 0));
    assert_eq!(tree["a/b"].mtime, (1_700_000_000, 0));
}

#[test]
fn the_later_entry_wins() {
    let tree = Fixture::new().tree(
        Archive::new()
            .file("file", b"1")
            .file("file", b"2")
            .file("becomes-dir", b"")
            .dir("becomes-dir")
            .file("becomes-dir/x", b"")
            .dir("becomes-file")
            .file("becomes-file/x/y", b"")
            .file("becomes-file", b"3")
            .dir("dir")
            .file("dir/kept", b"")
            .custom(b'5', b"dir", b"", b"", |header| header.mode = *b"0000700\0")
            .file("linked", b"old")
            .hard_link("other", "linked")
            .file("linked", b"new"),
    );
    assert_eq!(tree["file"].content, b"2");
    assert_eq!(tree["becomes-file"].content, b"3");
    assert_eq!(tree["dir"].meta.mode, 0o040_700);
    assert_eq!((&tree["linked"].content[..], &tree["other"].content[..]), (&b"new"[..], &b"old"[..]));
    assert_eq!(
        names(&tree),
        ["becomes-dir", "becomes-dir/x", "becomes-file", "dir", "dir/kept", "file", "linked", "other"]
    );
}

#[test]
fn whiteouts_hide_lower_layers_only() {
    let tree = Fixture::new().tree(
        Archive::new()
            .file(".wh.gone", b"")
            .file("d/.wh.gone", b"")
            .file("opaque/.wh..wh..opq", b"")
            .dir("opaque")
            .file("opaque/x", b"")
            // Present in this layer, whichever comes first.
            .file("mine", b"1")
            .file(".wh.mine", b"")
            .file(".wh.mine2", b"")
            .file("mine2", b"2")
            .dir("dir")
            .file(".wh.dir", b"")
            .file(".wh.dir2", b"")
            .file("dir2/x", b"")
            .file(".wh.dir3", b"")
            .dir("dir3")
            .file(".wh..wh.plnk/1.2", b""),
    );
    for name in ["gone", "d/gone"] {
        assert!(tree[name].meta.is_whiteout() && tree[name].content.is_empty(), "{name}");
    }
    for name in ["opaque", "dir", "dir2", "dir3"] {
        assert!(tree[name].meta.is_opaque(), "{name}");
    }
    assert_eq!((&tree["mine"].content[..], &tree["mine2"].content[..]), (&b"1"[..], &b"2"[..]));
    assert!(!tree["d"].meta.is_opaque());
    assert!(!tree.keys().any(|name| name.contains(".wh.")));
}

#[test]
fn names_lead_through_symbolic_links_inside_the_layer_as_in_docker() {
    let tree = Fixture::new().tree(
        Archive::new()
            .dir("usr/bin")
            .symlink("bin", "usr/bin")
            .symlink("abs", "/usr/../usr/bin/")
            .symlink("up", "../../../usr")
            .file("bin/a", b"a")
            .file("abs/b", b"b")
            .file("up/bin/c", b"c")
            .hard_link("d", "abs/b")
            .symlink("dangling", "made/here")
            .file("dangling/e", b"e"),
    );
    assert_eq!(tree["usr/bin/a"].content, b"a");
    assert_eq!(tree["usr/bin/b"].content, b"b");
    assert_eq!(tree["usr/bin/c"].content, b"c");
    assert_eq!(tree["d"].content, b"b");
    assert_eq!(tree["made/here/e"].content, b"e");
    assert_eq!(tree["usr/bin"].mtime, (1_700_000_000, 0));
}

#[test]
fn hard_links_reach_every_kind_of_file() {
    let tree = Fixture::new().tree(
        Archive::new()
            .symlink("s", "target")
            .hard_link("s2", "/s")
            .device(b'3', "null", 1, 3)
            .hard_link("null2", "./null")
            .hard_link("null2", "null2"),
    );
    assert_eq!(tree["s2"], Found { content: b"target".to_vec(), ..clone(&tree["s"]) });
    assert_eq!(tree["null2"].meta.rdev, 0x103);
    assert_eq!(tree["null2"].links, 2);
}

fn clone(found: &Found) -> Found {
    Found { meta: found.meta.clone(), content: found.content.clone(), ..*found }
}

#[test]
fn the_digest_covers_the_stream_to_its_very_end() {
    let fixture = Fixture::new();
    let archive = [Archive::new().file("a", b"1").finish(), vec![7; 70_001]].concat();
    let wrong = digest(&archive[..archive.len() - 1]);
    let error = fixture.store.unpack(&wrong, &archive[..], &Limits::default()).unwrap_err();
    assert!(matches!(error, LayerError::WrongDigest { expected, actual }
        if expected == wrong && actual == digest(&archive)));
    fixture.assert_empty();
    let info = fixture.store.unpack(&digest(&archive), &archive[..], &Limits::default()).unwrap();
    assert_eq!(
        info,
        LayerInfo { diff_id: digest(&archive), size: 1, entries: 1, stream_bytes: archive.len() as u64 }
    );
}

#[test]
fn a_layer_that_is_there_is_not_read_again() {
    struct Untouchable;
    impl Read for Untouchable {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            panic!("read");
        }
    }
    let fixture = Fixture::new();
    let info = fixture.import(Archive::new().file("a", b"1")).unwrap();
    assert_eq!(fixture.store.unpack(&info.diff_id, Untouchable, &Limits::default()).unwrap(), info);
    // One whose name is not known beforehand is, and ends up the same.
    assert_eq!(fixture.import(Archive::new().file("a", b"1")).unwrap(), info);
}

#[test]
fn layers_are_listed_measured_and_removed() {
    let fixture = Fixture::new();
    let one = fixture.import(Archive::new().file("a", b"12345")).unwrap();
    let two = fixture.import(Archive::new().file("b", b"123").hard_link("c", "b")).unwrap();
    let mut ids = vec![one.diff_id, two.diff_id];
    ids.sort();
    assert_eq!(fixture.store.list().unwrap(), ids);
    assert_eq!(fixture.store.size().unwrap(), 8);
    assert_eq!(fixture.store.info(&two.diff_id).unwrap(), two);
    let root = fixture.store.open_root(&two.diff_id).unwrap();
    assert!(rustix::fs::statat(&root, "b", rustix::fs::AtFlags::empty()).is_ok());

    fixture.store.remove(&one.diff_id).unwrap();
    fixture.store.remove(&one.diff_id).unwrap();
    assert_eq!(fixture.store.list().unwrap(), [two.diff_id]);
    assert!(!fixture.store.contains(&one.diff_id));
    assert!(matches!(fixture.store.info(&one.diff_id), Err(LayerError::NotFound(id)) if id == one.diff_id));
    assert_eq!(fixture.store.open_root(&one.diff_id).unwrap_err().kind(), LayerErrorKind::NotFound);
}

#[test]
fn what_was_left_unfinished_goes_when_the_store_is_opened() {
    let fixture = Fixture::new();
    let info = fixture.import(Archive::new().file("a", b"1")).unwrap();
    let left = fixture.dir.path().join("layers/tmp/7/root/x");
    fs::create_dir_all(&left).unwrap();
    let store = LayerStore::open(fixture.dir.path().join("layers")).unwrap();
    assert!(!left.exists());
    assert_eq!(store.list().unwrap(), [info.diff_id]);
}

#[test]
fn one_of_many_unpacks_at_a_time_wins_and_all_succeed() {
    let fixture = Fixture::new();
    let mut archive = Archive::new();
    for number in 0..50 {
        archive = archive.file(&format!("d{}/{number}", number % 7), &[7; 999]);
    }
    let archive = archive.finish();
    let id = digest(&archive);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| fixture.store.unpack(&id, &archive[..], &Limits::default()).unwrap());
        }
    });
    assert_eq!(fixture.store.list().unwrap(), [id]);
    assert_eq!(tree(&fixture.store.path(&id)).len(), 50 + 7 + 1);
    assert_eq!(fs::read_dir(fixture.dir.path().join("layers/tmp")).unwrap().count(), 0);
}

#[test]
fn an_empty_stream_is_an_empty_layer() {
    let fixture = Fixture::new();
    for stream in [&[][..], &[0; 512], &[0; 1024]] {
        let info = fixture.store.import(stream, &Limits::default()).unwrap();
        assert_eq!(tree(&fixture.store.path(&info.diff_id)).len(), 1);
    }
}

#[test]
fn an_archive_comes_back_whatever_replaced_what() {
    let fixture = Fixture::new();
    let long = vec![7; 200_000];
    let archive = Archive::new()
        .dir("d")
        .file("d/a", b"first")
        .file("d/a", b"second")
        .hard_link("b", "d/a")
        .symlink("link", "d")
        .file("link/c", &long)
        .file("d/a", b"third")
        // A directory gives way to a file, and all in it with it.
        .dir("e/f")
        .file("e/f/g", b"deep")
        .file("e", b"flat")
        .raw(&[0; 1024])
        .raw(b"and something behind the end");
    let info = fixture.import(archive).unwrap();
    let layer = fixture.store.path(&info.diff_id);
    let kept = layer.parent().unwrap().join("kept");
    assert_eq!(fs::read_dir(&kept).unwrap().count(), 3, "what is replaced, and nothing else");

    // What was tampered with does not pass for the archive.
    fs::write(layer.join("d/a"), "THIRD").unwrap();
    let mut archive = fixture.store.archive(&info.diff_id).unwrap();
    assert!(archive.read_to_end(&mut Vec::new()).is_err());
}

#[test]
fn a_layer_without_its_archive_says_so() {
    let fixture = Fixture::new();
    let info = fixture.import(Archive::new().file("a", b"x")).unwrap();
    let layer = fixture.store.path(&info.diff_id);
    assert!(!layer.parent().unwrap().join("kept").exists());
    fs::remove_file(layer.parent().unwrap().join("archive.split")).unwrap();
    assert!(
        matches!(fixture.store.archive(&info.diff_id), Err(LayerError::NoArchive(id)) if id == info.diff_id)
    );
    let none = DiffId::from_bytes([0; 32]);
    assert!(matches!(fixture.store.archive(&none), Err(LayerError::NotFound(_))));
}
