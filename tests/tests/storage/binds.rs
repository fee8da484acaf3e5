//! Directories, files and sockets of the host.

use anyhow::ensure;

use bulkhead_tests::{
    Suite,
    image::{Image, LayerBuilder},
    posix,
};

use crate::{Test, docker, host};

#[test]
fn a_bind_is_the_hosts_own_files_with_their_owners() -> Test {
    let docker = docker()?;
    let (host, scratch) = host()?;
    let path = scratch.join("made/by/daemon");
    let (file, read_only) = (scratch.join("single"), scratch.join("ro"));
    host.sh("echo one >\"$1\"; mkdir -p \"$2/sub\"; echo content >\"$2/sub/f\"", &[&file, &read_only])?;
    let mounts = [
        "-v".to_owned(),
        format!("{path}:/bind"),
        "-v".into(),
        format!("{file}:/etc/single"),
        "-v".into(),
        format!("{read_only}:/ro:ro"),
        // Nested, in whatever order they are given.
        "--mount".into(),
        format!("type=bind,source={file},target=/bind/nested/file"),
        "--tmpfs".into(),
        "/bind/tmp".into(),
    ];
    let mut args: Vec<&str> = mounts.iter().map(String::as_str).collect();
    args.extend(["--cap-add", "SYS_ADMIN", "busybox", "sleep", "1000"]);
    let container = docker.run_detached(&args)?;
    let script = "
        cat /etc/single /bind/nested/file; echo two >/etc/single
        cd /bind; touch a; chown 1234:70000 a; chmod 4755 a; ln a b; mv a c; mkdir -m 2770 d; : >tmp/x
        ! touch /ro/x 2>/dev/null; mount -o remount,rw /ro 2>/dev/null; ! touch /ro/x 2>/dev/null
        ! rm /ro/sub/f 2>/dev/null; cat /ro/sub/f
        exec 3>held; rm held; echo still >&3; stat -c %h /proc/self/fd/3 -L";
    ensure!(container.exec(&["sh", "-euc", script])? == "one\none\ncontent\n0");
    let seen = host.sh(
        "cd \"$1\"; stat -c '%n %u %g %a %h' b c d; ls; cat \"$2\"; ls \"$3\" \"$3/sub\"; ls tmp",
        &[&path, &file, &read_only],
    )?;
    let expected = format!(
        "b 1234 70000 4755 2\nc 1234 70000 4755 2\nd 0 0 2770 2\nb\nc\nd\nnested\ntmp\ntwo\n{read_only}:\nsub\n\n{read_only}/sub:\nf"
    );
    ensure!(seen == expected, "{seen}\n--- instead of\n{expected}");
    // The other way round, and replaced as editors do.
    host.sh("cd \"$1\"; echo three >new; mv new c; mkdir made; rm b", &[&path])?;
    let listed = container.exec(&["sh", "-c", "cat /bind/c; ls -d /bind/made; ls /bind/b 2>&1 || true"])?;
    ensure!(listed.starts_with("three\n/bind/made\n") && listed.contains("No such file"), "{listed}");
    container.docker(&["restart", "-t", "0"])?;
    ensure!(container.exec(&["cat", "/bind/c", "/etc/single"])? == "three\ntwo");
    Ok(())
}

#[test]
fn a_daemons_socket_in_a_container_is_that_daemon() -> Test {
    let suite = Suite::from_env()?;
    let docker = suite.docker();
    // With curl, which speaks to such sockets.
    let mut layer = LayerBuilder::new();
    posix::add_programs(&mut layer, &["/usr/bin/curl".into()])?;
    suite.push(&Image::busybox()?.with_layer(layer.finish()?), "storage/curl", "1")?;
    docker.ok(&["pull", "-q", "storage/curl:1"])?;
    let socket = std::path::Path::new(&suite.inner_socket).to_owned();
    let mount = format!("{}:/var/run/docker.sock", socket.display());
    let container = docker.run_detached(&["-v", &mount, "storage/curl:1", "sleep", "1000"])?;
    // Twice at once.
    let ask = "ask() { curl -sS --unix-socket /var/run/docker.sock http://d/v1.44/containers/$1/json; }; ask \"$1\" & ask \"$1\"; wait";
    let answers = container.exec(&["sh", "-c", ask, "sh", container.name()])?;
    let name = format!("\"Name\":\"/{}\"", container.name());
    ensure!(answers.matches(&name).count() == 2, "{answers}");
    ensure!(container.exec(&["sh", "-c", "test -S /var/run/docker.sock && echo socket"])? == "socket");
    Ok(())
}
