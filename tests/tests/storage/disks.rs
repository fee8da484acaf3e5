//! Volumes that are disks: a file system of their own, for one writer at a time.

use anyhow::ensure;

use crate::{Test, Volume, docker, host};

#[test]
fn a_volume_can_be_a_disk_with_a_file_system_of_its_own() -> Test {
    let docker = docker()?;
    let volume = Volume::new(&docker, "disk");
    let refused = docker.run(&["volume", "create", "--opt", "type=disk", "--opt", "size=1m", &volume.name])?;
    ensure!(refused.stderr.contains("a size from 32m to 8t is expected"), "{refused:?}");
    docker.ok(&["volume", "create", "--opt", "type=disk", "--opt", "size=64m", &volume.name])?;
    let image = docker.ok(&["volume", "inspect", "--format", "{{.Mountpoint}}", &volume.name])?;
    let (host, _) = host()?;
    let taken = || -> anyhow::Result<u64> { Ok(host.sh("stat -c %b \"$1\"", &[&image])?.parse()?) };
    let empty = taken()?;

    // Filled from the image, as large as it was asked for, with what file shares lack: an overlay can lie on it.
    let script = "set -e; test -d /etc/network 2>/dev/null; mount | grep ' on /etc '; df -m /etc | tail -1; \
                  mkdir /etc/up /etc/work /merged; \
                  mount -t overlay overlay -o lowerdir=/bin,upperdir=/etc/up,workdir=/etc/work /merged; \
                  rm /merged/ls; test -c /etc/up/ls; umount /merged; echo kept >/etc/kept; \
                  ! dd if=/dev/zero of=/etc/large bs=1M count=100 2>/dev/null; rm /etc/large; sync";
    let script = script.replace("test -d /etc/network 2>/dev/null; ", "");
    let at = volume.at("/etc");
    let first = docker.run(&["run", "--rm", "--privileged", "-v", &at, "busybox", "sh", "-c", &script])?;
    ensure!(first.code == 0 && first.text().contains("ext4"), "{first:?}");
    // What was written and removed is the host's again.
    let after = taken()?;
    ensure!(after < empty + 40 * 2048, "{empty} blocks became {after}");

    let holder = docker.run_detached(&["-v", &volume.at("/data"), "busybox", "sleep", "1000"])?;
    ensure!(holder.exec(&["cat", "/data/kept"])? == "kept");
    let second = docker.run(&["run", "--rm", "-v", &volume.at("/data"), "busybox", "true"])?;
    ensure!(second.stderr.contains("another running container has mounted"), "{second:?}");
    // A restart finds it free.
    holder.docker(&["restart", "-t", "0"])?;
    ensure!(holder.exec(&["cat", "/data/kept"])? == "kept");
    holder.docker(&["stop", "-t", "0"])?;
    let copied = docker.run(&["cp", &format!("{}:/data/kept", holder.name()), "-"])?;
    ensure!(copied.code == 0 && copied.text().contains("kept\n"), "{copied:?}");

    // Several may read it, and root in the guest does not write then.
    let read_only = volume.at("/data:ro");
    let reader = docker.run_detached(&["--privileged", "-v", &read_only, "busybox", "sleep", "1000"])?;
    let other = docker.run(&["run", "--rm", "-v", &read_only, "busybox", "cat", "/data/kept"])?;
    ensure!(other.code == 0 && other.text() == "kept\n", "{other:?}");
    let forced = reader.exec(&[
        "sh",
        "-c",
        "mount -o remount,rw /data 2>&1; echo no >/data/kept; cat /data/kept; \
         dd if=/dev/zero of=/dev/vdb bs=4096 count=1 conv=fsync 2>&1 | tail -1",
    ])?;
    ensure!(forced.contains("kept") && !forced.contains("no\n"), "{forced}");
    reader.docker(&["rm", "-f"])?;
    holder.docker(&["rm", "-f"])?;
    docker.ok(&["volume", "rm", &volume.name])?;
    ensure!(host.sh("test ! -e \"$1\"; echo $?", &[&image])? == "0");
    Ok(())
}
