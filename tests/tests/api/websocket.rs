//! Attaching over a WebSocket.

use std::io::{Read, Write};

use anyhow::bail;
use bulkhead_tests::http::Stream;
use serde_json::json;

use super::{Created, Test, api, assert_refused};

/// A short frame of a client's: final, binary, masked with zeros, which change nothing.
fn frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).unwrap_or(u8::MAX);
    assert!(length < 126, "a short frame");
    [&[0x80 | opcode, 0x80 | length, 0, 0, 0, 0], payload].concat()
}

/// The next frame of the server's: opcode and payload.
fn read_frame(stream: &mut Stream) -> anyhow::Result<(u8, Vec<u8>)> {
    let mut head = [0; 2];
    stream.read_exact(&mut head)?;
    if head[1] >= 126 {
        bail!("a long frame");
    }
    let mut payload = vec![0; usize::from(head[1])];
    stream.read_exact(&mut payload)?;
    Ok((head[0] & 0x0f, payload))
}

#[test]
fn messages_carry_stdio_until_the_process_ends() -> Test {
    let container = Created::new(&json!({
        "Image": "busybox",
        "Cmd": ["sh", "-c", "echo ready; read line; echo \"got $line\"; exit 4"],
        "OpenStdin": true,
        "StdinOnce": true,
    }))?;
    let upgrade = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    let path = container.path("attach/ws?stream=1&stdin=1&stdout=1&stderr=1");
    let (head, mut socket) = api()?.open("GET", &path, &upgrade, b"")?;
    assert_eq!(head.status, 101);
    assert_eq!(head.header("Sec-WebSocket-Accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
    api()?.request("POST", &container.path("start"), &[], b"")?.success()?;
    assert_eq!(read_frame(&mut socket)?, (2, b"ready\n".to_vec()));
    socket.write_all(&frame(9, b"are you there"))?;
    assert_eq!(read_frame(&mut socket)?, (10, b"are you there".to_vec()));
    socket.write_all(&frame(2, b"a line\n"))?;
    assert_eq!(read_frame(&mut socket)?, (2, b"got a line\n".to_vec()));
    assert_eq!(read_frame(&mut socket)?.0, 8, "the end closes");
    let waited = api()?.request("POST", &container.path("wait"), &[], b"")?.success()?.json()?;
    assert_eq!(waited["StatusCode"], 4);
    Ok(())
}

#[test]
fn what_is_no_handshake_is_refused() -> Test {
    let container = Created::new(&json!({"Image": "busybox"}))?;
    assert_refused(&api()?.request("GET", &container.path("attach/ws?stream=1"), &[], b"")?, 400)?;
    assert_refused(&api()?.request("GET", "/v1.50/containers/ghost/attach/ws", &[], b"")?, 404)?;
    Ok(())
}
