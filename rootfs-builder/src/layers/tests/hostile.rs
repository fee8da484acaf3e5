//! Layers made to do harm: each is refused in words, or does none.

use super::*;
use crate::layers::decompress;

#[test]
fn names_that_leave_the_layer_are_refused() {
    let fixture = Fixture::new();
    let outside = "lies outside the root";
    for name in ["..", "../x", "/../x", "a/../../x", "./../../../../../../tmp/x"] {
        fixture.refuses(&Archive::new().file(name, b"x").finish(), outside);
        fixture.refuses(&Archive::new().dir(name).finish(), outside);
        fixture.refuses(&Archive::new().hard_link("x", name).finish(), outside);
        fixture.refuses(&Archive::new().pax(&[("path", name.as_bytes())]).file("x", b"").finish(), outside);
    }
    fixture.refuses(&Archive::new().file("../.wh.x", b"").finish(), outside);
    fixture.refuses(&Archive::new().file(".wh..", b"").finish(), "whiteout of no file");
    fixture.refuses(&Archive::new().file("a/.wh...", b"").finish(), "whiteout of no file");
    fixture.refuses(&Archive::new().file(".wh.", b"").finish(), "whiteout of no file");
}

#[test]
fn a_symbolic_link_leads_nowhere_but_into_the_layer() {
    let fixture = Fixture::new();
    let victim = fixture.dir.path().join("victim");
    fs::create_dir(&victim).unwrap();
    fs::write(victim.join("file"), "host").unwrap();
    let victim_text = victim.to_str().unwrap();
    let up = format!("{}{victim_text}", "../".repeat(30));
    for target in [victim_text, &up] {
        let archive = Archive::new()
            .entry(b'K', "", "", target.as_bytes())
            .symlink("link", "")
            .file("link/file", b"evil")
            .file("link/new", b"evil")
            .file("link/.wh.file2", b"")
            .file("link/d/.wh..wh..opq", b"");
        let tree = fixture.tree(archive);
        // The same path below the layer's root was made, as in a chroot.
        let inside = victim_text.trim_start_matches('/');
        assert_eq!(tree[&format!("{inside}/file")].content, b"evil");
        assert_eq!(tree["link"].content, target.as_bytes());
    }
    assert_eq!(fs::read(victim.join("file")).unwrap(), b"host");
    assert_eq!(fs::read_dir(&victim).unwrap().count(), 1);
}

#[test]
fn hard_links_reach_nothing_outside_the_layer() {
    let fixture = Fixture::new();
    let missing = "is not in this layer";
    fixture.refuses(&Archive::new().hard_link("x", "/etc/passwd").finish(), missing);
    fixture.refuses(&Archive::new().symlink("l", "/etc").hard_link("x", "l/passwd").finish(), missing);
    fixture.refuses(&Archive::new().file("f", b"").hard_link("x", "f/y").finish(), missing);
    fixture.refuses(&Archive::new().hard_link("x", "x").finish(), missing);
    let directory = "is a directory";
    fixture.refuses(&Archive::new().dir("d").hard_link("x", "d").finish(), directory);
    fixture.refuses(&Archive::new().hard_link("x", "").finish(), directory);
    fixture.refuses(&Archive::new().hard_link("", "x").finish(), directory);
}

#[test]
fn names_that_lead_through_a_file_are_refused() {
    let fixture = Fixture::new();
    let problem = "is not a directory in this layer";
    fixture.refuses(&Archive::new().file("f", b"").file("f/x", b"").finish(), problem);
    fixture.refuses(&Archive::new().file("f", b"").symlink("l", "f").file("l/x", b"").finish(), problem);
    fixture.refuses(&Archive::new().device(b'3', "n", 1, 3).file("n/x", b"").finish(), problem);
}

#[test]
fn links_in_circles_end() {
    let circle = Archive::new().symlink("a", "b").symlink("b", "a").file("a/x", b"");
    Fixture::new().refuses(&circle.finish(), "too many symbolic links");
    let grows = Archive::new().symlink("a", "a/a/a/a").file("a/x", b"");
    Fixture::new().refuses(&grows.finish(), "too many symbolic links");
    let wanders =
        Archive::new().dir("d").pax(&[("linkpath", &b"d/../".repeat(800))]).symlink("a", "").file("a/x", b"");
    Fixture::new().refuses(&wanders.finish(), "too many symbolic links");
    let itself = Archive::new().symlink("a", ".").file("a/x", b"1");
    assert_eq!(Fixture::new().tree(itself)["x"].content, b"1");
}

#[test]
fn the_root_stays_a_directory() {
    let fixture = Fixture::new();
    let problem = "root must be a directory";
    for name in ["", ".", "/", "a/.."] {
        fixture.refuses(&Archive::new().file(name, b"x").finish(), problem);
        fixture.refuses(&Archive::new().symlink(name, "/etc").finish(), problem);
        fixture.refuses(&Archive::new().device(b'3', name, 0, 0).finish(), problem);
    }
}

#[test]
fn lengths_are_capped() {
    let fixture = Fixture::new();
    let long = |name: String| Archive::new().pax(&[("path", name.as_bytes())]).file("x", b"").finish();
    fixture.refuses(&long("n".repeat(256)), "longer than 255 bytes");
    fixture.refuses(&long("n/".repeat(2048)), "longer than 4095 bytes");
    fixture.refuses(&long("n/".repeat(300)), "more than 256 directories deep");
    let target = Archive::new().pax(&[("linkpath", &b"t".repeat(4096))]).symlink("x", "");
    fixture.refuses(&target.finish(), "target is longer than 4095 bytes");
    fixture.refuses(&Archive::new().symlink("x", "").finish(), "symbolic link to nothing");
    let xattr = Archive::new().pax(&[("SCHILY.xattr.user.x", &[1; 4000])]).file("x", b"");
    fixture.refuses(&xattr.finish(), "extended attributes need");
    let name = format!("SCHILY.xattr.user.{}", "x".repeat(255));
    fixture.refuses(&Archive::new().pax(&[(&name, b"")]).file("x", b"").finish(), "no valid name");
    let huge = Archive::new().custom(b'x', b"x", b"", b"", |header| header.size = *b"77777777777\0");
    fixture.refuses(&huge.finish(), "over the limit");
    let huge = Archive::new().custom(b'L', b"x", b"", b"", |header| header.size = *b"77777777777\0");
    fixture.refuses(&huge.finish(), "over the limit");
}

#[test]
fn numbers_are_checked() {
    let fixture = Fixture::new();
    let with = |change: fn(&mut tar::GnuHeader)| Archive::new().custom(b'0', b"x", b"", b"", change).finish();
    fixture.refuses(
        &with(|header| header.size = *b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
        "negative",
    );
    fixture.refuses(
        &with(|header| header.size = *b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
        "not a number",
    );
    fixture.refuses(&with(|header| header.uid = *b"\x80\0\0\x01\0\0\0\0"), "over 32 bits");
    fixture.refuses(&with(|header| header.gid = *b"hello\0\0\0"), "not a number");
    fixture.refuses(&with(|header| header.mtime = *b"99999999999\0"), "not a number");
    fixture.refuses(&Archive::new().device(b'3', "x", 4096, 0).finish(), "out of Linux's range");
    fixture.refuses(&Archive::new().device(b'4', "x", 0, 1 << 20).finish(), "out of Linux's range");
    let pax = |key: &str, value: &str| Archive::new().pax(&[(key, value.as_bytes())]).file("x", b"").finish();
    fixture.refuses(&pax("size", "-1"), "not valid");
    fixture.refuses(&pax("size", "99999999999999999999"), "not valid");
    fixture.refuses(&pax("uid", "4294967296"), "over 32 bits");
    fixture.refuses(&pax("path", "a\0b"), "not valid");
    fixture.refuses(&pax("mtime", "yesterday"), "not valid");
    // Far future and past are times all the same.
    let old = Archive::new().custom(b'0', b"x", b"", b"", |header| header.mtime = [0xff; 12]);
    assert_eq!(fixture.tree(old)["x"].mtime, (-1, 0));
}

#[test]
fn what_is_not_supported_is_named() {
    let fixture = Fixture::new();
    fixture.refuses(&Archive::new().entry(b'S', "x", "", b"").finish(), "sparse");
    let sparse = Archive::new().pax(&[("GNU.sparse.major", b"1")]).file("x", b"");
    fixture.refuses(&sparse.finish(), "sparse");
    fixture.refuses(&Archive::new().entry(b'Z', "x", "", b"").finish(), "type 'Z' is not known");
}

#[test]
fn damaged_archives_are_refused() {
    let fixture = Fixture::new();
    let whole = Archive::new().dir("d").file("d/f", &[7; 1000]).unfinished();
    for cut in [1, 511, 513, 1025, 1536, 1536 + 488 - 1] {
        fixture.refuses(&whole[..cut], "ends in the middle");
    }
    fixture.refuses(&[7; 512], "not a number");
    let mut flipped = whole.clone();
    flipped[0] ^= 1;
    fixture.refuses(&flipped, "checksum");
    fixture.refuses(&Archive::new().raw(&[0; 512]).file("x", b"").finish(), "lone zero block");
    fixture.refuses(&Archive::new().entry(b'x', "x", "", b"12 path=a").finish(), "malformed");
}

#[test]
fn a_failing_reader_is_not_the_layers_fault() {
    struct Cut<'a>(&'a [u8]);
    impl Read for Cut<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.0.is_empty() { Err(io::ErrorKind::ConnectionReset.into()) } else { self.0.read(buffer) }
        }
    }
    let fixture = Fixture::new();
    let archive = Archive::new().file("a", &[1; 4000]).finish();
    for cut in [0, 700, archive.len()] {
        let error = fixture.store.import(Cut(&archive[..cut]), &Limits::default()).unwrap_err();
        assert_eq!(error.kind(), LayerErrorKind::Source);
        fixture.assert_empty();
    }
}

#[test]
fn a_layer_over_its_limits_is_refused() {
    let fixture = Fixture::new();
    let archive = Archive::new().file("a/b/c", &[1; 4000]).file("d", b"").finish();
    let import = |stream_bytes, entries| {
        fixture.store.import(&archive[..], &Limits { stream_bytes, entries }).map(|_| ())
    };
    let length = archive.len() as u64;
    let error = import(length - 1, 100).unwrap_err();
    assert!(matches!(error, LayerError::Limit { what: "bytes", .. }), "{error}");
    // Two entries, two directories that they imply.
    let error = import(length, 3).unwrap_err();
    assert!(matches!(error, LayerError::Limit { what: "entries", limit: 3 }), "{error}");
    fixture.assert_empty();
    import(length, 4).unwrap();
}

/// Gives the same bytes for ever, and counts them.
struct Endless<'a> {
    block: &'a [u8],
    read: &'a std::cell::Cell<u64>,
}

impl Read for Endless<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let at = usize::try_from(self.read.get() % self.block.len() as u64).map_err(io::Error::other)?;
        let length = (&self.block[at..]).read(buffer)?;
        self.read.set(self.read.get() + length as u64);
        Ok(length)
    }
}

#[test]
fn what_inflates_a_thousandfold_is_left_at_its_limit() {
    let fixture = Fixture::new();
    let limits = Limits { stream_bytes: 8 << 20, entries: 100 };
    // A file that says it has half a GiB, of zeros: what there is of it fits into a tenth of a MiB.
    let header = Archive::new().custom(b'0', b"bomb", b"", b"", |header| header.size = *b"04000000000\0");
    let content = io::repeat(0).take(32 << 20);
    let plain = io::Cursor::new(header.unfinished()).chain(content);
    let mut gzip = Vec::new();
    let mut reader = flate2::read::GzEncoder::new(plain, flate2::Compression::default());
    reader.read_to_end(&mut gzip).unwrap();
    assert!(gzip.len() < 100 << 10, "{}", gzip.len());
    let mut zstd = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    io::copy(&mut decompress(&gzip[..]).unwrap(), &mut zstd).unwrap();
    let zstd = zstd.finish().unwrap();
    for bomb in [gzip, zstd] {
        let error = fixture.store.import(decompress(&bomb[..]).unwrap(), &limits).unwrap_err();
        assert!(matches!(error, LayerError::Limit { what: "bytes", .. }), "{error}");
        fixture.assert_empty();
    }
}

#[test]
fn entries_without_end_are_left_at_their_limit() {
    let fixture = Fixture::new();
    let limits = Limits { entries: 5000, ..Limits::default() };
    // Files with names of their own; the same file again and again; names that lead deeper and deeper in and out.
    let mut files = Archive::new();
    for number in 0..6000 {
        files = files.file(&format!("{number}"), b"");
    }
    let again = Archive::new().file("again", b"x").unfinished();
    let deep = Archive::new().file(&format!("{}x", "d/".repeat(40)), b"").unfinished();
    for block in [files.unfinished(), again, deep] {
        let read = std::cell::Cell::new(0);
        let endless = Endless { block: &block, read: &read };
        let error = fixture.store.import(endless, &limits).unwrap_err();
        assert!(matches!(error, LayerError::Limit { what: "entries", limit: 5000 }), "{error}");
        assert!(read.get() < 64 << 20, "{} bytes were read", read.get());
        fixture.assert_empty();
    }
}
