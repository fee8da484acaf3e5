use std::{
    io::{Seek, Write},
    path::PathBuf,
};

use proptest::prelude::*;

use super::*;

struct Fixture {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

fn fixture() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x-json.log");
    Fixture { _directory: directory, path }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + second).unwrap()
}

const BOTH: ReadOptions =
    ReadOptions { stdout: true, stderr: true, since: None, until: None, tail: None, follow: false };

async fn collect(mut records: tokio::sync::mpsc::Receiver<Record>) -> Vec<Record> {
    let mut all = Vec::new();
    while let Some(record) = records.recv().await {
        all.push(record);
    }
    all
}

async fn texts(source: Source, options: ReadOptions) -> Vec<String> {
    let records = collect(source.read(options).unwrap()).await;
    records.iter().map(|record| String::from_utf8_lossy(&record.bytes).into_owned()).collect()
}

#[test]
fn the_file_is_that_of_docker() {
    let fixture = fixture();
    let (log, run) = Log::begin(&Settings::plain("json-file"), &fixture.path).unwrap();
    assert_eq!(run, 0);
    assert_eq!(log.append(Stream::Stdout, b"one\ntw", at(0)).unwrap(), 4);
    assert_eq!(log.append(Stream::Stderr, b"err\n", at(1)).unwrap(), 4);
    assert_eq!(log.append(Stream::Stdout, b"o\nthree", at(2)).unwrap(), 8);
    log.finish(at(3)).unwrap();
    assert_eq!(
        std::fs::read_to_string(&fixture.path).unwrap(),
        r#"{"log":"one\n","stream":"stdout","time":"2023-11-14T22:13:20Z"}
{"log":"err\n","stream":"stderr","time":"2023-11-14T22:13:21Z"}
{"log":"two\n","stream":"stdout","time":"2023-11-14T22:13:22Z"}
{"log":"three","stream":"stdout","time":"2023-11-14T22:13:23Z"}
"#
    );
}

#[tokio::test]
async fn a_long_line_comes_in_parts_of_one_time() {
    let fixture = fixture();
    let (log, _) = Log::begin(&Settings::plain("json-file"), &fixture.path).unwrap();
    let line = [&[b'x'; 40_000][..], b"\nnext\n"].concat();
    for (second, chunk) in line.chunks(5000).enumerate() {
        log.append(Stream::Stdout, chunk, at(i64::try_from(second).unwrap())).unwrap();
    }
    let records = collect(log.source().read(BOTH).unwrap()).await;
    let lengths: Vec<_> = records.iter().map(|record| record.bytes.len()).collect();
    assert_eq!(lengths, [16_384, 16_384, 40_000 - 32_768 + 1, 5]);
    assert_eq!((records[0].time, records[1].time, records[2].time), (at(3), at(3), at(3)));
    assert_eq!(records[3].time, at(8));
}

#[tokio::test]
async fn tail_since_until_and_streams() {
    let fixture = fixture();
    let (log, _) = Log::begin(&Settings::plain("json-file"), &fixture.path).unwrap();
    for second in 0..6 {
        let stream = if second % 2 == 0 { Stream::Stdout } else { Stream::Stderr };
        log.append(stream, format!("{second}\n").as_bytes(), at(second)).unwrap();
    }
    log.finish(at(9)).unwrap();
    let source = || Source::stopped(true, &fixture.path);
    for (options, expected) in [
        (BOTH, "0 1 2 3 4 5"),
        (ReadOptions { tail: Some(2), ..BOTH }, "4 5"),
        (ReadOptions { tail: Some(0), ..BOTH }, ""),
        (ReadOptions { tail: Some(6), ..BOTH }, "0 1 2 3 4 5"),
        (ReadOptions { tail: Some(usize::MAX), ..BOTH }, "0 1 2 3 4 5"),
        (ReadOptions { since: Some(at(2)), until: Some(at(4)), ..BOTH }, "2 3 4"),
        (ReadOptions { stderr: false, tail: Some(3), ..BOTH }, "4"),
        (ReadOptions { stdout: false, ..BOTH }, "1 3 5"),
        (ReadOptions { follow: true, ..BOTH }, "0 1 2 3 4 5"),
    ] {
        let texts = texts(source(), options.clone()).await;
        assert_eq!(
            texts.iter().map(|text| text.trim()).collect::<Vec<_>>().join(" "),
            expected,
            "{options:?}"
        );
    }
}

#[tokio::test]
async fn a_tail_reaches_over_many_blocks() {
    let fixture = fixture();
    let (log, _) = Log::begin(&Settings::plain("json-file"), &fixture.path).unwrap();
    for number in 0..5000 {
        log.append(Stream::Stdout, format!("line {number}\n").as_bytes(), at(0)).unwrap();
    }
    let texts = texts(log.source(), ReadOptions { tail: Some(3000), ..BOTH }).await;
    assert_eq!((texts.len(), texts[0].as_str()), (3000, "line 2000\n"));
}

#[tokio::test]
async fn followers_get_what_comes_and_end_with_the_run() {
    let fixture = fixture();
    let (log, _) = Log::begin(&Settings::plain("json-file"), &fixture.path).unwrap();
    log.append(Stream::Stdout, b"before\n", at(0)).unwrap();
    let mut records = log.source().read(ReadOptions { follow: true, ..BOTH }).unwrap();
    assert_eq!(records.recv().await.unwrap().bytes, "before\n");
    log.append(Stream::Stderr, b"while\nunfin", at(1)).unwrap();
    assert_eq!(records.recv().await.unwrap().bytes, "while\n");
    log.append(Stream::Stderr, b"ished", at(2)).unwrap();
    log.finish(at(3)).unwrap();
    assert_eq!(records.recv().await.unwrap().bytes, "unfinished");
    assert_eq!(records.recv().await, None);
}

#[tokio::test]
async fn a_follower_ends_when_the_log_is_dropped_or_its_time_is_over() {
    let fixture = fixture();
    let (log, _) = Log::begin(&Settings::plain("json-file"), &fixture.path).unwrap();
    let past = ReadOptions { follow: true, until: Some(at(0)), ..BOTH };
    assert_eq!(collect(log.source().read(past).unwrap()).await, []);
    let records = log.source().read(ReadOptions { follow: true, ..BOTH }).unwrap();
    drop(log);
    assert_eq!(collect(records).await, []);
}

#[tokio::test]
async fn a_log_that_is_not_there_is_empty_and_none_cannot_be_read() {
    let fixture = fixture();
    assert!(texts(Source::stopped(true, &fixture.path), BOTH).await.is_empty());
    let (log, _) = Log::begin(&Settings::plain("none"), &fixture.path).unwrap();
    assert_eq!(log.append(Stream::Stdout, b"gone", at(0)).unwrap(), 4);
    assert!(!fixture.path.exists());
    assert_eq!(log.source().read(BOTH).unwrap_err().kind, crate::engine::ErrorKind::NotImplemented);
}

#[test]
fn a_restarted_daemon_counts_only_this_run_and_cuts_a_torn_line() {
    let fixture = fixture();
    let (log, _) = Log::begin(&Settings::plain("json-file"), &fixture.path).unwrap();
    log.append(Stream::Stdout, b"first run\n", at(0)).unwrap();
    log.finish(at(0)).unwrap();
    let (log, run) = Log::begin(&Settings::plain("json-file"), &fixture.path).unwrap();
    log.append(Stream::Stdout, b"abc\n\xff\xfe\n", at(1)).unwrap();
    log.append(Stream::Stderr, b"de\nnot yet", at(1)).unwrap();
    drop(log);
    let mut file = std::fs::OpenOptions::new().append(true).open(&fixture.path).unwrap();
    let whole = file.stream_position().unwrap().max(file.metadata().unwrap().len());
    file.write_all(br#"{"log":"torn\n","stream":"std"#).unwrap();
    let (log, durable) = Log::resume(&Settings::plain("json-file"), &fixture.path, run).unwrap();
    assert_eq!(durable, Durable { stdout: 7, stderr: 3 });
    assert_eq!(file.metadata().unwrap().len(), whole);
    assert_eq!(log.append(Stream::Stdout, b"on\n", at(2)).unwrap(), 10);
    assert!(
        std::fs::read_to_string(&fixture.path)
            .unwrap()
            .ends_with("\"log\":\"on\\n\",\"stream\":\"stdout\",\"time\":\"2023-11-14T22:13:22Z\"}\n")
    );
}

/// Small files, so that a few lines fill one.
fn rotating(max_files: usize, compress: bool) -> Settings {
    let options: BTreeMap<String, String> = [
        ("max-size".to_owned(), "100".to_owned()),
        ("max-file".to_owned(), max_files.to_string()),
        ("compress".to_owned(), compress.to_string()),
    ]
    .into();
    let nobody = Subject { id: "", name: "", image: "", image_id: "", labels: &BTreeMap::new(), env: &[] };
    Settings::of("json-file", &options, &nobody).unwrap()
}

#[tokio::test]
async fn a_log_in_many_files_is_read_as_one() {
    for compress in [false, true] {
        let fixture = fixture();
        let (log, _) = Log::begin(&rotating(4, compress), &fixture.path).unwrap();
        let mut follower = log.source().read(ReadOptions { follow: true, ..BOTH }).unwrap();
        // A line has some seventy bytes: two fill a file.
        for number in 0..10 {
            log.append(Stream::Stdout, format!("line {number}\n").as_bytes(), at(number)).unwrap();
            assert_eq!(follower.recv().await.unwrap().bytes, format!("line {number}\n"));
        }
        log.settle();
        let lines = |from: i32| (from..10).map(|number| format!("line {number}\n")).collect::<Vec<_>>();
        assert_eq!(texts(log.source(), BOTH).await, lines(2), "three full files and the current one");
        for tail in 0..9 {
            let from = i32::try_from(10 - tail.min(8)).unwrap();
            assert_eq!(texts(log.source(), ReadOptions { tail: Some(tail), ..BOTH }).await, lines(from));
        }
        let (frozen, unfinished) = log.snapshot(at(10));
        log.append(Stream::Stdout, b"more\nmore\nmore\n", at(11)).unwrap();
        assert_eq!(unfinished, []);
        assert_eq!(texts(frozen, ReadOptions { tail: Some(1), ..BOTH }).await, lines(9));
        drop(log);
        let all = texts(Source::stopped(true, &fixture.path), BOTH).await;
        assert!(all.ends_with(&["more\n".into(), "more\n".into(), "more\n".into()]), "{all:?}");
    }
}

#[test]
fn what_is_in_full_files_is_still_counted_by_a_restarted_daemon() {
    for max_files in [1, 3] {
        let fixture = fixture();
        let settings = rotating(max_files, false);
        let (log, _) = Log::begin(&settings, &fixture.path).unwrap();
        log.append(Stream::Stdout, b"an earlier run\n", at(0)).unwrap();
        log.finish(at(0)).unwrap();
        let (mut log, run) = Log::begin(&settings, &fixture.path).unwrap();
        let mut sent = Durable::default();
        for number in 0..12 {
            let stream = if number % 3 == 0 { Stream::Stderr } else { Stream::Stdout };
            let safe = log.append(stream, b"twelve bytes\nrest", at(number)).unwrap();
            match stream {
                Stream::Stderr => sent.stderr = safe,
                _ => sent.stdout = safe,
            }
            drop(log);
            let durable;
            (log, durable) = Log::resume(&settings, &fixture.path, run).unwrap();
            assert_eq!(durable, sent, "after line {number}");
        }
        assert!(files::numbers(&fixture.path).unwrap().len() < max_files.max(2));
    }
}

proptest! {
    /// Whatever comes in whatever pieces, and wherever the daemon dies: acknowledged bytes are in the log,
    /// and what the agent sends again makes the log whole.
    #[test]
    fn a_crash_loses_and_doubles_nothing(
        text in "[a-z\n\u{e9}]{0,400}",
        pieces in proptest::collection::vec(1..60_usize, 1..20),
        crash in 0..20_usize,
    ) {
        let fixture = fixture();
        let (mut log, run) = Log::begin(&Settings::plain("json-file"), &fixture.path).unwrap();
        let (mut sent, mut acknowledged) = (0, 0);
        for (number, piece) in pieces.iter().cycle().enumerate() {
            if number == crash {
                drop(log);
                let durable;
                (log, durable) = Log::resume(&Settings::plain("json-file"), &fixture.path, run).unwrap();
                prop_assert!(durable.stdout >= acknowledged);
                sent = usize::try_from(durable.stdout).unwrap();
            }
            let piece = &text.as_bytes()[sent..(sent + piece).min(text.len())];
            if piece.is_empty() && number > crash {
                break;
            }
            sent += piece.len();
            acknowledged = log.append(Stream::Stdout, piece, at(0)).unwrap();
        }
        log.finish(at(0)).unwrap();
        let file = std::fs::read_to_string(&fixture.path).unwrap();
        let logged: Vec<u8> = file.lines().flat_map(|line| format::decode(line.as_bytes()).unwrap().bytes).collect();
        prop_assert_eq!(String::from_utf8(logged).unwrap(), text);
    }
}

#[test]
fn a_client_that_does_not_read_keeps_no_thread() {
    let fixture = fixture();
    let (log, _) = Log::begin(&Settings::plain("json-file"), &fixture.path).unwrap();
    for _ in 0..5000 {
        log.append(Stream::Stdout, b"a line\n", at(0)).unwrap();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build();
    runtime.unwrap().block_on(async {
        let slow = log.source().read(BOTH).unwrap();
        while slow.len() < slow.max_capacity() {
            tokio::task::yield_now().await;
        }
        let other = tokio::time::timeout(std::time::Duration::from_secs(60), texts(log.source(), BOTH));
        assert_eq!(other.await.unwrap().len(), 5000);
        assert_eq!(collect(slow).await.len(), 5000);
    });
}

#[tokio::test]
async fn a_log_of_many_batches_is_read_whole() {
    let fixture = fixture();
    let (log, _) = Log::begin(&Settings::plain("json-file"), &fixture.path).unwrap();
    let line = [&[b'x'; 10_000][..], b"\n"].concat();
    for _ in 0..400 {
        log.append(Stream::Stdout, &line, at(0)).unwrap();
    }
    log.finish(at(1)).unwrap();
    for source in [log.source(), Source::stopped(true, &fixture.path)] {
        let lengths: Vec<_> = texts(source, BOTH).await.iter().map(String::len).collect();
        assert_eq!(lengths, [10_001; 400]);
    }
}
