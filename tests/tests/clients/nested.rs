//! Docker in a container, as CI jobs run it: a daemon of its own, with overlays and networks of its own.

use anyhow::ensure;
use bulkhead_tests::{Host, Suite};

use crate::Test;

/// Makes an image with Debian's dockerd and what it calls.
const IMAGE: &str = r#"
root=$(mktemp -d); trap 'rm -rf "$root"' EXIT
mkdir -p "$root"/bin "$root"/usr/bin "$root"/etc "$root"/tmp "$root"/var/lib "$root"/run
cp /bin/busybox "$root"/bin
for name in sh ls echo cat uname sleep tar ip mkdir; do ln -s busybox "$root/bin/$name"; done
add() {
    file=$(readlink -f "$1"); mkdir -p "$root$(dirname "$2")"; [ -e "$root$2" ] || cp "$file" "$root$2"
    for library in $(ldd "$file" 2>/dev/null | grep -oE '/[^ ]+'); do
        mkdir -p "$root$(dirname "$library")"; [ -e "$root$library" ] || cp "$(readlink -f "$library")" "$root$library"
    done
}
for name in dockerd containerd containerd-shim-runc-v2 runc docker-proxy iptables ip6tables docker; do
    add "$(command -v $name)" /usr/bin/$name
done
mkdir -p "$root"/usr/lib/x86_64-linux-gnu
for libraries in /usr/lib "$(dirname "$(command -v dockerd)")"/../lib; do
    [ ! -d "$libraries"/x86_64-linux-gnu/xtables ] || cp -r "$libraries"/x86_64-linux-gnu/xtables "$root"/usr/lib/x86_64-linux-gnu/
done
echo root:x:0:0:root:/root:/bin/sh >"$root"/etc/passwd; echo root:x:0: >"$root"/etc/group
tar -C "$root" -c . | docker -H "unix://$1" import - "$2"
"#;

#[test]
fn a_docker_in_a_container_runs_containers_and_networks_of_its_own() -> Test {
    let suite = Suite::from_env()?;
    let (docker, host) = (suite.docker(), Host::from_env()?);
    let image = format!("docker-in-docker-{}", std::process::id());
    host.sh(IMAGE, &[&suite.inner_socket, &image])?;
    let volume = format!("{image}-data");
    docker.ok(&["volume", "create", "--opt", "type=disk", "--opt", "size=1g", &volume])?;
    let at = format!("{volume}:/var/lib/docker");
    let script = "dockerd --storage-driver overlay2 >/log 2>&1 || { cat /log; exit 1; }";
    let words = ["--privileged", "-m", "1g", "-v", &at, &image, "sh", "-c", script];
    let outer = docker.run_detached(&words)?;
    let inner = "export PATH=/usr/bin:/bin
        n=0; until docker version >/dev/null 2>&1; do n=$((n + 1)); [ $n -lt 120 ] || { cat /log; exit 1; }; sleep 1; done
        tar -C / -c bin | docker import - inner >/dev/null
        docker run --rm inner /bin/sh -c 'echo inside; uname -r; ip -4 -o addr show eth0'
        docker info --format '{{.Driver}}' 2>/dev/null; docker network create apart >/dev/null
        docker run --rm --network apart inner /bin/echo apart";
    let said = outer.exec(&["sh", "-c", inner]).map_err(|error| {
        let log = outer.docker(&["logs"]).unwrap_or_default();
        error.context(log)
    })?;
    let lines: Vec<&str> = said.lines().collect();
    let kernel = docker.run(&["run", "--rm", "busybox", "uname", "-r"])?;
    ensure!(lines.len() == 5 && lines[0] == "inside" && lines[3..] == ["overlay2", "apart"], "{said}");
    ensure!(lines[1] == kernel.text().trim() && lines[2].contains("172.1"), "{said}");
    outer.docker(&["rm", "-f"])?;
    docker.ok(&["volume", "rm", &volume])?;
    docker.ok(&["rmi", "-f", &image]).map(drop)
}
