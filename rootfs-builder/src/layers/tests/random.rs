//! Random layers: whatever they hold, nothing is written outside the store and the tree keeps its form.

use proptest::{collection::vec, prelude::*, sample::select};

use super::*;

fn entry() -> impl Strategy<Value = (u8, String, String, Vec<u8>)> {
    // Few names, so that entries meet each other in every way.
    let part = select(vec!["a", "b", "c", "..", ".", "", ".wh.a", ".wh.b", ".wh..wh..opq", "victim"]);
    let path = || {
        (any::<bool>(), vec(part.clone(), 0..4))
            .prop_map(|(absolute, parts)| format!("{}{}", if absolute { "/" } else { "" }, parts.join("/")))
    };
    let kind = select(b"00000555222211134560".to_vec());
    (kind, path(), path(), vec(any::<u8>(), 0..20))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn random_layers_stay_inside(entries in vec(entry(), 0..25)) {
        let fixture = Fixture::new();
        let victim = fixture.dir.path().join("victim");
        fs::write(&victim, "host").unwrap();
        let mut archive = Archive::new();
        for (kind, name, link, data) in entries {
            let data = if kind == b'0' { &data[..] } else { b"" };
            archive = archive.entry(kind, &name, &link, data);
        }
        match fixture.import(archive) {
            Ok(info) => {
                let _ = tree(&fixture.store.path(&info.diff_id));
            }
            Err(error) => {
                prop_assert_eq!(error.kind(), LayerErrorKind::Invalid, "{}", error);
                prop_assert!(fixture.store.list().unwrap().is_empty());
            }
        }
        let mut left: Vec<_> = fs::read_dir(fixture.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        prop_assert_eq!(left, ["layers", "victim"]);
        prop_assert_eq!(fs::read(&victim).unwrap(), b"host");
        prop_assert_eq!(fs::metadata(&victim).unwrap().nlink(), 1);
        prop_assert_eq!(fs::read_dir(fixture.dir.path().join("layers/tmp")).unwrap().count(), 0);
    }

    #[test]
    fn random_damage_never_panics(
        flips in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        fix_checksums in any::<bool>(),
    ) {
        let fixture = Fixture::new();
        let mut archive = Archive::new()
            .dir("d")
            .pax(&[("path", b"d/long"), ("size", b"3"), ("SCHILY.xattr.user.x", b"1")])
            .file("x", b"abc")
            .entry(b'L', "l", "", b"d/other\0")
            .symlink("y", "d")
            .hard_link("z", "d/long")
            .finish();
        for (index, byte) in flips {
            let at = index.index(archive.len());
            archive[at] = byte;
        }
        if fix_checksums {
            for block in archive.chunks_exact_mut(512).filter(|block| block[257..262] == *b"ustar") {
                let mut header = tar::Header::new_gnu();
                header.as_mut_bytes().copy_from_slice(block);
                header.set_cksum();
                block.copy_from_slice(header.as_bytes());
            }
        }
        if let Err(error) = fixture.store.import(&archive[..], &Limits::default()) {
            prop_assert_eq!(error.kind(), LayerErrorKind::Invalid, "{}", error);
            fixture.assert_empty();
        }
    }
}
