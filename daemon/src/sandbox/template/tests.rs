use std::{os::unix::fs::FileExt, path::Path};

use super::*;
use crate::sandbox::saved::{Writing, sample};

type Told = Arc<Mutex<Vec<(String, News)>>>;

fn open(base: &Path, bounds: Bounds) -> (Arc<Templates>, Told) {
    let told = Told::default();
    let listener = {
        let told = Arc::clone(&told);
        move |key: &str, news: &News| told.lock().unwrap().push((key.to_owned(), news.clone()))
    };
    (Templates::open(base.join("t"), base.join("s"), bounds, Arc::default(), listener).unwrap(), told)
}

/// A finished template of `vcpus`; its key.
fn put(base: &Path, vcpus: u8) -> String {
    let (shape, path) = (sample(vcpus), base.join("t"));
    std::fs::create_dir_all(&path).unwrap();
    let writing = Writing::create(path.join(format!("{UNFINISHED}{vcpus}"))).unwrap();
    writing.memory.write_all_at(&[vcpus; 4096], 0).unwrap();
    let key = shape.key(None);
    writing.commit(shape, &path.join(&key)).unwrap();
    key
}

fn keys(store: &Templates) -> Vec<String> {
    let mut keys = store.with(|entries| {
        entries
            .iter()
            .filter(|(_, entry)| matches!(entry, Entry::Ready { .. }))
            .map(|(key, _)| key.clone())
            .collect::<Vec<_>>()
    });
    keys.sort();
    keys
}

#[tokio::test]
async fn what_is_whole_is_taken_up_and_the_rest_removed() {
    let base = tempfile::tempdir().unwrap();
    let whole = put(base.path(), 1);
    let cut = put(base.path(), 2);
    std::fs::remove_file(base.path().join("t").join(&cut).join("memory")).unwrap();
    std::fs::create_dir(base.path().join("t").join("new-half")).unwrap();
    std::fs::create_dir(base.path().join("t").join("stray")).unwrap();
    let (store, told) = open(base.path(), Bounds::default());
    assert_eq!(keys(&store), std::slice::from_ref(&whole));
    store.close().await;
    assert!(matches!(&told.lock().unwrap()[..], [(key, News::Discarded(_))] if *key == cut));
    let left: Vec<_> =
        std::fs::read_dir(base.path().join("t")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, [std::ffi::OsString::from(whole)]);
}

#[tokio::test]
async fn damage_that_leaves_size_and_time_alone_is_found_in_the_background() {
    let base = tempfile::tempdir().unwrap();
    let key = put(base.path(), 1);
    let memory = base.path().join("t").join(&key).join("memory");
    let before = std::fs::metadata(&memory).unwrap().modified().unwrap();
    std::fs::set_permissions(&memory, std::fs::Permissions::from_mode(0o600)).unwrap();
    let file = File::options().write(true).open(&memory).unwrap();
    file.write_all_at(b"x", 100).unwrap();
    file.set_modified(before).unwrap();
    let (store, told) = open(base.path(), Bounds::default());
    assert_eq!(keys(&store), std::slice::from_ref(&key));
    store.tasks.close();
    store.tasks.wait().await;
    assert!(keys(&store).is_empty() && !memory.exists());
    assert!(matches!(&told.lock().unwrap()[..], [(of, News::Discarded(_))] if *of == key));
    // It is not built again at once, nor by two.
    assert_eq!(store.claim(&key), None);
    store.with(|entries| {
        let until = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
        entries.insert(key.clone(), Entry::Failed { until, pause: FIRST_PAUSE })
    });
    assert_eq!(store.claim(&key), Some(2 * FIRST_PAUSE));
    assert_eq!(store.claim(&key), None);
}

#[tokio::test]
async fn a_store_stays_within_its_bounds_and_keeps_what_was_used_last() {
    let base = tempfile::tempdir().unwrap();
    let made: Vec<String> = (1..=3).map(|vcpus| put(base.path(), vcpus)).collect();
    for (age, key) in [(10, &made[0]), (30, &made[1]), (20, &made[2])] {
        let directory = File::open(base.path().join("t").join(key)).unwrap();
        directory.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
    }
    let (store, told) = open(base.path(), Bounds { count: 2, bytes: u64::MAX });
    store.close().await;
    let mut kept = vec![made[0].clone(), made[2].clone()];
    kept.sort();
    assert_eq!(keys(&store), kept);
    assert_eq!(*told.lock().unwrap(), [(made[1].clone(), News::Pruned)]);
}

#[test]
fn room_is_made_by_number_and_by_bytes() {
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let ready = [(at(1), "a".to_owned(), 50), (at(2), "b".to_owned(), 30), (at(3), "c".to_owned(), 40)];
    let gone = |count, bytes, keep| excess(&ready, Bounds { count, bytes }, keep).concat();
    assert_eq!(gone(3, 120, ""), "");
    assert_eq!(gone(2, 120, ""), "a");
    assert_eq!(gone(2, 120, "a"), "b");
    assert_eq!(gone(3, 69, ""), "ab");
    assert_eq!(gone(0, 0, "b"), "ac");
}
