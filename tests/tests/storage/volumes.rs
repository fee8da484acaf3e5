//! Named and anonymous volumes, from their making to their end.

use anyhow::ensure;
use bulkhead_tests::{
    Suite,
    image::{Image, LayerBuilder},
};
use serde_json::json;

use crate::{Test, Volume, docker, host};

/// An image with content, an owner and a link at its volume.
fn image_with_volume() -> anyhow::Result<Image> {
    let mut layer = LayerBuilder::new();
    layer.directory("data", 0o1770)?;
    layer.directory("data/sub", 0o755)?;
    layer.file("data/sub/file", 0o640, b"from the image\n")?;
    layer.hard_link("data/link", "data/sub/file")?;
    let mut image = Image::busybox()?.with_layer(layer.finish()?);
    image.set("Volumes", json!({"/data": {}}));
    Ok(image)
}

#[test]
fn a_named_volume_is_filled_once_kept_and_shared() -> Test {
    let suite = Suite::from_env()?;
    let docker = suite.docker();
    suite.push(&image_with_volume()?, "storage/volume", "1")?;
    docker.ok(&["pull", "storage/volume:1"])?;
    let volume = Volume::new(&docker, "named");
    let show = "cd /data; stat -c '%a' . sub/file; stat -c %h link; cat link";
    let first = docker.run_detached(&["-v", &volume.at("/data"), "storage/volume:1", "sleep", "1000"])?;
    ensure!(first.exec(&["sh", "-c", show])? == "1770\n640\n2\nfrom the image");
    // Both at once, by other containers too, at another place and read-only.
    first.exec(&[
        "sh",
        "-c",
        "rm /data/sub/file; echo changed >/data/link; mkfifo /data/pipe; ln -s x /data/s",
    ])?;
    let from = format!("{}:ro", first.name());
    let script = "cat /data/link; ls /data; (echo no >/data/new) 2>&1; mount -o remount,rw /data; touch /data/new 2>&1 || true";
    let second = docker.run(&[
        "run",
        "--rm",
        "--privileged",
        "--volumes-from",
        &from,
        "busybox",
        "sh",
        "-c",
        script,
    ])?;
    ensure!(second.text().starts_with("changed\nlink\npipe\ns\nsub\n"), "{second:?}");
    ensure!(second.text().matches("Read-only file system").count() == 2, "{second:?}");

    let in_use = docker.run(&["volume", "rm", &volume.name])?;
    ensure!(in_use.stderr.contains("volume is in use - ["), "{in_use:?}");
    ensure!(
        docker.inspect(first.name(), "{{(index .Mounts 0).Name}} {{(index .Mounts 0).Type}}")?
            == format!("{} volume", volume.name)
    );
    let path = docker.ok(&["volume", "inspect", "--format", "{{.Mountpoint}}", &volume.name])?;
    let (host, _) = host()?;
    ensure!(host.sh("cat \"$1/link\"; echo host >\"$1/from-host\"", &[&path])? == "changed");
    ensure!(first.exec(&["cat", "/data/from-host"])? == "host", "what the host writes is seen at once");
    // A container that has ended shows its volumes to `cp`.
    first.docker(&["kill"])?;
    let copied = docker.run(&["cp", &format!("{}:/data/from-host", first.name()), "-"])?;
    ensure!(copied.code == 0 && copied.text().contains("host\n"), "{copied:?}");
    first.docker(&["rm", "-f"])?;
    docker.ok(&["volume", "rm", &volume.name])?;
    let gone = docker.run(&["volume", "inspect", &volume.name])?;
    ensure!(gone.stderr.contains("no such volume"), "{gone:?}");
    Ok(())
}

#[test]
fn anonymous_volumes_go_with_their_container_and_a_prune_takes_the_rest() -> Test {
    let docker = docker()?;
    let label = format!("t{}", std::process::id());
    let volume = Volume::new(&docker, "labelled");
    docker.ok(&["volume", "create", "--label", &label, &volume.name])?;
    let filter = format!("label={label}");
    ensure!(
        docker.ok(&["volume", "ls", "-q", "--filter", &filter, "--filter", "dangling=true"])? == volume.name
    );

    let dangling =
        || docker.ok(&["volume", "ls", "-q"]).map(|list| list.lines().map(str::to_owned).collect::<Vec<_>>());
    let name = |container: &str| docker.inspect(container, "{{(index .Mounts 0).Name}}");
    let kept = docker.container();
    let mount = format!("type=volume,target=/anonymous,volume-label={label}=1");
    docker.ok(&["create", "--name", kept.name(), "--mount", &mount, "busybox", "true"])?;
    let of_kept = name(kept.name())?;
    ensure!(dangling()?.contains(&of_kept));
    // `--rm` takes its own along, and not that of whom it got it from.
    docker.ok(&[
        "run",
        "--rm",
        "-v",
        "/own",
        "--volumes-from",
        kept.name(),
        "busybox",
        "sh",
        "-c",
        "touch /own/x; head -c 300000 /dev/zero >/anonymous/x; ln /anonymous/x /anonymous/y",
    ])?;
    ensure!(
        docker.ok(&["volume", "ls", "-q", "--filter", "dangling=true"])?.lines().all(|name| name != of_kept)
    );
    let shown = || -> anyhow::Result<String> {
        let table = docker.ok(&["system", "df", "-v"])?;
        let row = table.lines().find(|line| line.starts_with(&of_kept)).unwrap_or_default();
        Ok(row.split_whitespace().skip(1).collect::<Vec<_>>().join(" "))
    };
    ensure!(shown()? == "1 300kB", "{}", shown()?);
    kept.docker(&["rm"])?;
    ensure!(dangling()?.contains(&of_kept), "without -v it stays");
    ensure!(shown()? == "0 300kB", "{}", shown()?);
    let pruned = docker.ok(&["volume", "prune", "-f", "--filter", &format!("label={label}=1")])?;
    ensure!(pruned.contains(&of_kept) && !pruned.contains(&volume.name), "{pruned}");
    ensure!(pruned.contains("Total reclaimed space: 300kB"), "{pruned}");
    let pruned = docker.ok(&["volume", "prune", "-f", "-a", "--filter", &filter])?;
    ensure!(pruned.contains(&volume.name), "{pruned}");
    let gone = docker.container();
    docker.ok(&["create", "--name", gone.name(), "-v", "/anonymous", "busybox", "true"])?;
    let of_gone = name(gone.name())?;
    gone.docker(&["rm", "-v"])?;
    ensure!(!dangling()?.contains(&of_gone));
    Ok(())
}

#[test]
fn what_no_volume_can_be_is_refused() -> Test {
    let docker = docker()?;
    for (args, message) in [
        (&["create", "-d", "nosuch", "vv"][..], "plugin \"nosuch\" not found"),
        (&["create", "a/b"], "includes invalid characters for a local volume name"),
        (&["create", "-o", "type=nfs", "-o", "o=addr=1.2.3.4", "-o", "device=:/x", "vv"], "not supported"),
        (&["create", "-o", "size=1g", "vv"], "no quota support"),
        (&["rm", "nosuchvolume"], "no such volume"),
    ] {
        let output = docker.run(&[&["volume"], args].concat())?;
        ensure!(output.code != 0 && output.stderr.contains(message), "{args:?}: {output:?}");
    }
    for (args, message) in [
        (&["-v", "/a:/b:rx"][..], "invalid mode"),
        (&["-v", "/tmp:/b:rshared"], "cannot be honoured"),
        (&["-v", "v1x:/b", "-v", "v2x:/b"], "Duplicate mount point: /b"),
        (&["--mount", "type=bind,source=/no/such,target=/b"], "bind source path does not exist: /no/such"),
        (&["--volumes-from", "nosuchcontainer"], "No such container: nosuchcontainer"),
    ] {
        let output = docker.run(&[&["create"], args, &["busybox"]].concat())?;
        ensure!(output.code != 0 && output.stderr.contains(message), "{args:?}: {output:?}");
    }
    Ok(())
}
