//! What a guest's root sends in somebody else's name does not leave its tap.

use std::{path::Path, process::Command};

use anyhow::{Context, bail};
use bulkhead_tests::image::{Image, LayerBuilder};

use crate::{Background, Network, Test, docker, unique};

/// Builds the program of `frame.rs`, where the host sees it.
pub(crate) fn program() -> anyhow::Result<tempfile::TempDir> {
    let built = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let directory = tempfile::tempdir_in(built)?;
    let program = directory.path().join("frame");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/network/frame.rs");
    let output = Command::new("rustc")
        .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "panic=abort", "-o"])
        .arg(&program)
        .arg(source)
        .output()?;
    if !output.status.success() {
        bail!("rustc: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(directory)
}

/// Loads a busybox with that program.
pub(crate) fn image(docker: &bulkhead_tests::Docker) -> anyhow::Result<String> {
    let directory = program()?;
    let program = directory.path().join("frame");
    let mut layer = LayerBuilder::new();
    layer.file("bin/frame", 0o755, &std::fs::read(&program)?)?;
    let name = format!("{}:latest", unique("frame"));
    let archive = Image::busybox()?.with_layer(layer.finish()?).archive(&name)?;
    docker.run_with(&["load"], archive)?.ok()?;
    Ok(name)
}

fn mac(text: &str) -> Vec<u8> {
    text.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap_or(0)).collect()
}

fn ipv4(text: &str) -> Vec<u8> {
    text.split('.').map(|byte| byte.parse().unwrap_or(0)).collect()
}

/// An Ethernet frame.
fn frame(to: &[u8], from: &[u8], kind: [u8; 2], body: &[&[u8]]) -> Vec<u8> {
    [to, from, &kind, &body.concat()].concat()
}

fn arp(from: &[u8], operation: u8, (mac, ip): (&[u8], &[u8]), target: &[u8], label: &[u8]) -> Vec<u8> {
    let fixed = [0, 1, 8, 0, 6, 4, 0, operation];
    frame(&[0xff; 6], from, [8, 6], &[&fixed, mac, ip, &[0; 6], target, label])
}

fn udp4(ends: (&[u8], &[u8]), from: &[u8], to: &[u8], ports: (u16, u16), label: &[u8]) -> Vec<u8> {
    let length = 8 + label.len() as u16;
    let mut header = vec![0x45, 0];
    header.extend((20 + length).to_be_bytes());
    header.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    header.extend([from, to].concat());
    let words = header.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum = words.sum::<u32>();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut segment = Vec::new();
    for word in [ports.0, ports.1, length, 0] {
        segment.extend(word.to_be_bytes());
    }
    frame(ends.0, ends.1, [8, 0], &[&header, &segment, label])
}

fn icmp6(from_mac: &[u8], from: [u8; 16], kind: u8, target: [u8; 16], label: &[u8]) -> Vec<u8> {
    let all_nodes = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    let length = (24 + label.len() as u16).to_be_bytes();
    let header = [0x60, 0, 0, 0, length[0], length[1], 58, 255];
    let to = [0x33, 0x33, 0, 0, 0, 1];
    let icmp = [kind, 0, 0, 0, 0x20, 0, 0, 0];
    frame(&to, from_mac, [0x86, 0xdd], &[&header, &from, &all_nodes, &icmp, &target, label])
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn forged_frames_stay_in_their_tap() -> Test {
    let docker = docker()?;
    let image = image(&docker)?;
    let network =
        Network::create(&docker, &["--ipv6", "--subnet", "fd00:66::/64", "--subnet", "10.217.0.0/24"])?;
    let on = ["--network", network.name.as_str()];
    let end = "cb00714d";
    let victim = docker
        .run_detached(&[&on, [image.as_str(), "frame"].as_slice(), &["listen", "eth0", end]].concat())?;
    while victim.docker(&["logs"])?.lines().next() != Some("listening") {}
    let attacker = docker.run_detached(&[&on, [image.as_str(), "sleep", "1000"].as_slice()].concat())?;
    let field = |name: &str, field: &str| {
        docker.inspect(name, &format!("{{{{range .NetworkSettings.Networks}}}}{{{{.{field}}}}}{{{{end}}}}"))
    };
    let of = |name: &str| anyhow::Ok((mac(&field(name, "MacAddress")?), ipv4(&field(name, "IPAddress")?)));
    let (my_mac, my_ip) = of(attacker.name())?;
    let (its_mac, its_ip) = of(victim.name())?;
    let gateway = ipv4("10.217.0.1");
    let stranger = ipv4("10.217.0.99");
    let other_mac = mac("02:de:ad:be:ef:01");
    let link_local: [u8; 16] = [
        &[0xfe, 0x80, 0, 0, 0, 0, 0, 0][..],
        &[my_mac[0] ^ 2, my_mac[1], my_mac[2], 0xff, 0xfe, my_mac[3], my_mac[4], my_mac[5]],
    ]
    .concat()
    .try_into()
    .ok()
    .context("an address")?;
    let mut gateway6 = [0; 16];
    gateway6[..4].copy_from_slice(&[0xfd, 0, 0, 0x66]);
    gateway6[15] = 1;
    let ends = (its_mac.as_slice(), my_mac.as_slice());
    let label = |text: &str| format!("FORGED-{text}").into_bytes();
    let tagged = {
        let honest = udp4(ends, &my_ip, &its_ip, (1, 2), &label("vlan"));
        [&honest[..12], &[0x81, 0, 0, 5], &honest[12..]].concat()
    };
    let forged = [
        ("mac", udp4((&its_mac, &other_mac), &my_ip, &its_ip, (1, 2), &label("mac"))),
        ("source", udp4(ends, &stranger, &its_ip, (1, 2), &label("source"))),
        ("gateway's ARP", arp(&my_mac, 2, (&my_mac, &gateway), &its_ip, &label("arp"))),
        ("ARP of another MAC", arp(&my_mac, 1, (&other_mac, &my_ip), &its_ip, &label("arp2"))),
        ("router", icmp6(&my_mac, link_local, 134, [0; 16], &label("ra"))),
        ("gateway's neighbour advertisement", icmp6(&my_mac, link_local, 136, gateway6, &label("na"))),
        ("redirect", icmp6(&my_mac, link_local, 137, gateway6, &label("redirect"))),
        ("IPv6 source", icmp6(&my_mac, gateway6, 128, [0; 16], &label("source6"))),
        ("DHCP server", udp4((&[0xff; 6], &my_mac), &my_ip, &[255; 4], (67, 68), &label("dhcp"))),
        ("VLAN", tagged),
        ("LLDP", frame(&[0xff; 6], &my_mac, [0x88, 0xcc], &[&label("lldp")])),
    ];
    let honest = udp4(ends, &my_ip, &its_ip, (1, 2), b"HONEST");
    let last = arp(&my_mac, 1, (&my_mac, &my_ip), &[0xcb, 0, 0x71, 0x4d], b"");
    let mut words = vec!["frame".to_owned(), "send".into(), "eth0".into()];
    words.extend(forged.iter().map(|(_, frame)| hex(frame)));
    words.extend([hex(&honest), hex(&last)]);
    attacker.exec(&words.iter().map(String::as_str).collect::<Vec<_>>())?;
    victim.docker(&["wait"])?;
    let seen = victim.docker(&["logs"])?;
    assert!(seen.contains(&hex(b"HONEST")), "what is honest must come through: {seen}");
    assert!(seen.lines().last().is_some_and(|line| line.contains(end)));
    for (what, frame) in &forged {
        assert!(!seen.contains(&hex(&frame[frame.len() - 8..])), "{what} came through: {seen}");
    }
    assert!(!seen.contains(&hex(b"FORGED")), "{seen}");
    docker.ok(&["rmi", "-f", &image]).map(drop)
}

#[test]
fn an_interface_with_a_changed_address_reaches_nobody_and_the_metadata_service_is_out_of_reach() -> Test {
    let docker = docker()?;
    let script = "gw=$(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p'); ping -c 1 $gw >/dev/null && echo before; \
                  ip addr add 172.31.255.254/32 dev eth0; ping -c 1 -W 3 -I 172.31.255.254 $gw >/dev/null && echo forged; \
                  ip link set eth0 down; ip link set eth0 address 02:de:ad:be:ef:02; ip link set eth0 up; \
                  ip route add default via $gw; ping -c 1 -W 3 $gw >/dev/null && echo moved; true";
    let text = docker.ok(&["run", "--rm", "--cap-add", "NET_ADMIN", "busybox", "sh", "-c", script])?;
    assert_eq!(text, "before");
    let host = crate::host()?;
    host.sh("ip addr add 169.254.169.254/32 dev lo", &[])?;
    let served = Background::start("exec busybox httpd -f -p 169.254.169.254:80 -h /etc");
    let url = "http://169.254.169.254/hostname";
    let fetched = docker.run(&["run", "--rm", "busybox", "timeout", "5", "wget", "-qO-", url]);
    let here = host.sh("busybox wget -qO- \"$1\"", &[url]);
    host.sh("ip addr del 169.254.169.254/32 dev lo", &[])?;
    drop((served, here?));
    assert_ne!(fetched?.code, 0);
    Ok(())
}
