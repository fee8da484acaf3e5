//! SQLite of guests and of the host on the same files at the same time: others' locks, others' checks.

use anyhow::ensure;
use bulkhead_tests::{
    Container, Host, Suite,
    host::Scratch,
    image::{Image, LayerBuilder},
    posix, size,
};

use crate::{Test, host};

/// A container with SQLite and a directory of the host at `/db`.
fn start() -> anyhow::Result<(Host, Scratch, String, Container)> {
    let suite = Suite::from_env()?;
    let docker = suite.docker();
    let mut layer = LayerBuilder::new();
    posix::add_programs(&mut layer, &["/usr/bin/sqlite3".into()])?;
    suite.push(&Image::busybox()?.with_layer(layer.finish()?), "storage/sqlite", "1")?;
    docker.ok(&["pull", "-q", "storage/sqlite:1"])?;
    let (host, scratch) = host()?;
    let path = scratch.join("db");
    host.sh("mkdir \"$1\"", &[&path])?;
    let container =
        docker.run_detached(&["-v", &format!("{path}:/db"), "storage/sqlite:1", "sleep", "10000"])?;
    Ok((host, scratch, path, container))
}

/// Adds one to a number and a row to a table, in transactions of its own.
const COUNT: &str = "cd \"$1\"; i=0; while [ $i -lt $2 ]; do echo \"BEGIN IMMEDIATE; UPDATE n SET n = n + 1; \
                     INSERT INTO rows VALUES ('$3', $i, hex(randomblob(500))); COMMIT;\"; i=$((i+1)); done | \
                     sqlite3 -bail -cmd '.timeout 300000' data";

const CHECK: &str = "cd \"$1\"; sqlite3 -cmd '.timeout 60000' data 'PRAGMA integrity_check; SELECT n FROM n; \
                     SELECT count(*) FROM rows;'";

#[test]
fn a_rollback_journal_is_for_guest_and_host_at_once() -> Test {
    let (host, _scratch, path, container) = start()?;
    // Of each side.
    let transactions = size(20, 500);
    let rounds = transactions.to_string();
    host.sh("cd \"$1\"; sqlite3 data 'CREATE TABLE n (n); INSERT INTO n VALUES (0); CREATE TABLE rows (who, i, data);'", &[&path])?;
    let docker = crate::docker()?;
    let guest =
        docker.spawn(&["exec", container.name(), "sh", "-euc", COUNT, "sh", "/db", &rounds, "guest"])?;
    host.sh(COUNT, &[&path, &rounds, "host"])?;
    let guest = guest.wait_with_output()?;
    ensure!(guest.status.success(), "{}", String::from_utf8_lossy(&guest.stderr));
    let all = 2 * transactions;
    let expected = format!("ok\n{all}\n{all}");
    ensure!(host.sh(CHECK, &[&path])? == expected);
    ensure!(container.exec(&["sh", "-c", CHECK, "sh", "/db"])? == expected);
    Ok(())
}

/// Opens the database, says so, and keeps it open until it may go. Who had it before may still be letting go of it.
const HOLD: &str = "cd \"$1\"; { { echo \"INSERT INTO rows VALUES ('$2', 0, ''); SELECT count(*) FROM rows;\"; \
                    while [ ! -e go-$2 ]; do sleep 0.2; done; echo \"INSERT INTO rows VALUES ('$2', 1, '');\"; } | \
                    sqlite3 -bail -cmd '.timeout 60000' data; } >held-$2 2>&1 & while [ ! -s held-$2 ]; do sleep 0.2; done; cat held-$2";

const ONE: &str = "cd \"$1\"; sqlite3 -bail data \"INSERT INTO rows VALUES ('$2', 2, ''); SELECT count(*) FROM rows;\" 2>&1 || true";

/// What SQLite makes of a lock that it does not get of an index: one or the other, by who tries again.
fn is_refusal(told: &str) -> bool {
    told.contains("database is locked") || told.contains("locking protocol")
}

#[test]
fn a_write_ahead_log_is_for_one_kernel_at_a_time() -> Test {
    let (host, _scratch, path, container) = start()?;
    let in_guest = |script: &str, who: &str| container.exec(&["sh", "-euc", script, "sh", "/db", who]);
    let made = "cd \"$1\"; sqlite3 data 'PRAGMA journal_mode=wal; CREATE TABLE rows (who, i, data);'";
    ensure!(in_guest(made, "guest")? == "wal");
    // Processes of one guest have it together; the host does not get in between.
    ensure!(in_guest(HOLD, "guest")? == "1");
    ensure!(in_guest(ONE, "other")? == "2");
    let refused = host.sh(ONE, &[&path, "host"])?;
    ensure!(is_refusal(&refused), "{refused}");
    host.sh(": >\"$1/go-guest\"", &[&path])?;
    let gone = "cd \"$1\"; while [ -e data-shm ]; do sleep 0.2; done";
    host.sh(gone, &[&path])?;
    // And the other way round, with all that was written.
    ensure!(host.sh(HOLD, &[&path, "host"])? == "4");
    let refused = in_guest(ONE, "guest")?;
    ensure!(is_refusal(&refused), "{refused}");
    host.sh(&format!(": >\"$1/go-host\"; {gone}"), &[&path])?;
    ensure!(in_guest(ONE, "guest")? == "6");
    ensure!(
        host.sh("cd \"$1\"; sqlite3 data 'PRAGMA integrity_check; PRAGMA journal_mode'", &[&path])?
            == "ok\nwal"
    );
    Ok(())
}
