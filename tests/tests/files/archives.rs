//! Archives that are put into containers and come out of them: hostile ones, and those with everything that a file
//! can be.

use anyhow::Context;
use bulkhead_tests::http::Response;
use bulkhead_tests::{Container, Host, Suite};
use tar::{Builder, EntryType, Header};

use crate::Test;

fn header(kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_700_000_000);
    header.set_size(size);
    header
}

/// An archive whose names and links stand as they are given.
#[derive(Default)]
struct Raw(Vec<u8>);

impl Raw {
    fn entry(mut self, kind: EntryType, name: &str, link: &str, claimed: u64, content: &[u8]) -> Raw {
        let mut header = header(kind, claimed);
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.extend(header.as_bytes());
        self.0.extend(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str, content: &[u8]) -> Raw {
        self.entry(EntryType::Regular, name, "", content.len() as u64, content)
    }

    fn finish(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

fn put(suite: &Suite, container: &Container, path: &str, archive: &[u8]) -> anyhow::Result<Response> {
    let path = format!("/containers/{}/archive?path={path}", container.name());
    suite.api().request("PUT", &path, &[("Content-Type", "application/x-tar")], archive)
}

#[test]
fn hostile_archives_are_refused_or_stay_in_the_container() -> Test {
    let suite = Suite::from_env()?;
    let container =
        suite.docker().run_detached(&["busybox", "sh", "-c", "mkdir /t /u; exec sleep 100000"])?;
    container.exec(&["sh", "-c", "until [ -d /u ]; do sleep 0.1; done"])?;
    let raw = Raw::default;
    let link = |target: &str| raw().entry(EntryType::Symlink, "esc", target, 0, b"");
    let mut many = raw();
    for number in 0..5000 {
        many = many.file(&format!("many/{number}"), b"");
    }
    // What it is, whether it is taken, and what it comes to in the container.
    let corpus: Vec<(&str, Vec<u8>, bool, &str)> = vec![
        ("above", raw().file("../evil", b"x").finish(), false, "! -e /evil"),
        ("above, later", raw().file("a/../../evil", b"x").finish(), false, "! -e /evil"),
        ("absolute", raw().file("/abs-evil", b"x").finish(), true, "-e /t/abs-evil -a ! -e /abs-evil"),
        ("a link, then through it", link("/u").file("esc/in", b"x").finish(), true, "-e /u/in"),
        (
            "far out, through a link",
            link("../../../../../../u").file("esc/far", b"x").finish(),
            true,
            "-e /u/far",
        ),
        ("a link in a loop", link("esc").file("esc/x", b"x").finish(), false, "! -e /u/x"),
        (
            "a hard link out",
            raw().entry(EntryType::Link, "hard", "../../etc/passwd", 0, b"").finish(),
            false,
            "! -e /t/hard",
        ),
        (
            "a hard link to nothing",
            raw().entry(EntryType::Link, "hard", "nothing", 0, b"").finish(),
            false,
            "! -e /t/hard",
        ),
        ("the same name again", raw().file("twice", b"1").file("twice", b"22").finish(), true, "-s /t/twice"),
        (
            "more than there is",
            raw().entry(EntryType::Regular, "bomb", "", 1 << 32, b"short").finish(),
            false,
            "-d /t",
        ),
        ("a NUL", raw().file("nul", b"x").0.iter().map(|byte| byte ^ 0xff).collect(), false, "! -e /t/nul"),
        (
            "a kind that is none",
            raw().entry(EntryType::new(b'Q'), "odd", "", 0, b"").finish(),
            false,
            "! -e /t/odd",
        ),
        ("half a header", raw().file("half", b"x").0[..300].to_vec(), false, "! -e /t/half"),
        ("cut behind a file's content", raw().file("whole", b"x").0[..700].to_vec(), true, "-s /t/whole"),
        ("nothing", Vec::new(), true, "-d /t"),
        ("many", many.finish(), true, "-e /t/many/4999"),
        (
            "a device",
            raw().entry(EntryType::Block, "disk", "", 0, b"").finish(),
            true,
            // A node is a file; to open it is what the container may not.
            "-b /t/disk",
        ),
        ("itself as a file", raw().file(".", b"x").finish(), false, "-d /t"),
    ];
    for (what, archive, taken, comes_to) in corpus {
        let answer = put(&suite, &container, "/t", &archive)?;
        assert_eq!(answer.head.status == 200, taken, "{what}: {}", answer.text());
        assert!(taken || (400..=500).contains(&answer.head.status), "{what}: {}", answer.text());
        let test = format!("[ {comes_to} ]");
        container.exec(&["sh", "-c", &test]).with_context(|| format!("{what}: {test}"))?;
    }
    assert!(container.exec(&["sh", "-c", "cat /t/disk"]).is_err());
    Host::from_env()?.sh("[ ! -e /evil ] && [ ! -e /abs-evil ] && [ ! -e /u ]", &[])?;
    Ok(())
}

#[test]
fn whatever_a_file_is_comes_back_as_it_went() -> Test {
    let suite = Suite::from_env()?;
    let container = suite.docker().run_detached(&["busybox", "sh", "-c", "mkdir /t; exec sleep 100000"])?;
    container.exec(&["sh", "-c", "until [ -d /t ]; do sleep 0.1; done"])?;
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(200));
    let capability: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut builder = Builder::new(Vec::new());
    builder.append_pax_extensions([
        ("SCHILY.xattr.security.capability", capability),
        ("SCHILY.xattr.user.note", b"a=\0b".as_slice()),
        ("uid", b"3000000".as_slice()),
    ])?;
    let mut file = header(EntryType::Regular, 5);
    file.set_mode(0o4755);
    file.set_gid(70_000);
    builder.append_data(&mut file, &long, &b"hello"[..])?;
    builder.append_link(&mut header(EntryType::Link, 0), "hard", &long)?;
    builder.append_link(&mut header(EntryType::Symlink, 0), "soft", "s".repeat(150))?;
    let mut device = header(EntryType::Char, 0);
    device.set_device_major(1)?;
    device.set_device_minor(3)?;
    builder.append_data(&mut device, "null", &b""[..])?;
    builder.append_data(&mut header(EntryType::Fifo, 0), "fifo", &b""[..])?;
    // A megabyte of nothing between two bytes.
    let mut sparse = vec![0; 1 << 20];
    (sparse[0], sparse[(1 << 20) - 1]) = (1, 2);
    builder.append_data(&mut header(EntryType::Regular, sparse.len() as u64), "sparse", sparse.as_slice())?;
    put(&suite, &container, "/t", &builder.into_inner()?)?.success()?;

    let blocks = container.exec(&["stat", "-c", "%b", "/t/sparse"])?;
    assert!(blocks.trim().parse::<u64>()? < 1024, "holes stay holes: {blocks}");
    let check = |of: &str| -> Test {
        let path = format!("/containers/{}/archive?path=/t", container.name());
        let answer = suite.api().request("GET", &path, &[], b"")?.success()?;
        assert!(answer.head.header("X-Docker-Container-Path-Stat").is_some());
        let mut archive = tar::Archive::new(answer.body.as_slice());
        let mut seen = 0;
        for entry in archive.entries()? {
            let mut entry = entry?;
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let kind = entry.header().entry_type();
            let link = entry.link_name_bytes().map(|link| String::from_utf8_lossy(&link).into_owned());
            let pax: Vec<(String, Vec<u8>)> = match entry.pax_extensions()? {
                Some(records) => records
                    .map(|record| {
                        record.map(|r| (r.key().unwrap_or("?").to_owned(), r.value_bytes().to_vec()))
                    })
                    .collect::<Result<_, _>>()?,
                None => Vec::new(),
            };
            let mut content = Vec::new();
            std::io::Read::read_to_end(&mut entry, &mut content)?;
            match name.strip_prefix("t/").unwrap_or(&name) {
                // Of two names the one that comes first is the file.
                short if short == long || short == "hard" => match kind {
                    EntryType::Regular => {
                        assert_eq!(
                            (content.as_slice(), entry.header().mode()?),
                            (&b"hello"[..], 0o4755),
                            "{of}"
                        );
                        let has = |key: &str, value: &[u8]| {
                            assert!(pax.contains(&(key.to_owned(), value.to_vec())), "{key} {of}: {pax:?}");
                        };
                        has("SCHILY.xattr.security.capability", capability);
                        has("SCHILY.xattr.user.note", b"a=\0b");
                        has("uid", b"3000000");
                        assert_eq!(entry.header().gid()?, 70_000, "{of}");
                    }
                    EntryType::Link => assert!(link.is_some_and(|link| link.starts_with("t/")), "{of}"),
                    other => panic!("{name} is a {other:?} {of}"),
                },
                "soft" => assert_eq!((kind, link), (EntryType::Symlink, Some("s".repeat(150))), "{of}"),
                "null" => {
                    let header = entry.header();
                    let number = (header.device_major()?, header.device_minor()?);
                    assert_eq!((kind, number), (EntryType::Char, (Some(1), Some(3))), "{of}");
                }
                "fifo" => assert_eq!(kind, EntryType::Fifo, "{of}"),
                "sparse" => assert!(content == sparse, "{of}"),
                _ => continue,
            }
            seen += 1;
        }
        assert_eq!(seen, 6, "{of}");
        Ok(())
    };
    check("running")?;
    container.docker(&["kill"])?;
    check("stopped")
}
