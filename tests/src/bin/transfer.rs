//! A program for containers and the host: one end of what is tested and measured of networks. It stands alone, so that
//! rustc makes it a static program for the benchmark.
//!
//!   transfer serve PORT                  answers for ever
//!   transfer send ADDRESS:PORT MIB       sends so much and waits until all of it was read; prints nanoseconds
//!   transfer ask ADDRESS:PORT COUNT      asks so often, one byte each way; prints nanoseconds
//!
//! A connection's first byte says what it is for: `s`, bytes until the end, which one byte answers, or `a`, bytes of
//! which each is answered. Without such a byte:
//!
//!   transfer receive PORT                prints what one connection brings
//!   transfer repeat ADDRESS:PORT COUNT   sends its input so often, each time behind a line with its number

use std::{
    env,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    thread,
    time::Instant,
};

const BLOCK: usize = 128 << 10;

fn serve(mut client: TcpStream) -> std::io::Result<()> {
    client.set_nodelay(true)?;
    let mut kind = [0];
    client.read_exact(&mut kind)?;
    if &kind == b"a" {
        let mut byte = [0];
        while client.read(&mut byte)? > 0 {
            client.write_all(&byte)?;
        }
        return Ok(());
    }
    let mut block = vec![0; BLOCK];
    while client.read(&mut block)? > 0 {}
    client.write_all(b".")
}

fn connect(address: &str, kind: u8) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.write_all(&[kind])?;
    Ok(stream)
}

fn main() -> std::io::Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    let started = match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["serve", port] => {
            let listener = TcpListener::bind(format!("0.0.0.0:{port}"))?;
            println!("up");
            for client in listener.incoming() {
                let client = client?;
                thread::spawn(move || serve(client));
            }
            return Ok(());
        }
        ["send", address, size] => {
            let blocks = size.parse::<usize>().expect("MiB") * (1 << 20) / BLOCK;
            let mut stream = connect(address, b's')?;
            let block = vec![0x5a; BLOCK];
            let started = Instant::now();
            for _ in 0..blocks {
                stream.write_all(&block)?;
            }
            stream.shutdown(Shutdown::Write)?;
            stream.read_exact(&mut [0])?;
            started
        }
        ["ask", address, count] => {
            let mut stream = connect(address, b'a')?;
            let started = Instant::now();
            for _ in 0..count.parse::<u32>().expect("a number") {
                stream.write_all(b"?")?;
                stream.read_exact(&mut [0])?;
            }
            started
        }
        ["receive", port] => {
            let mut stream = TcpListener::bind(format!("0.0.0.0:{port}"))?.accept()?.0;
            let (mut block, mut output) = (vec![0; BLOCK], std::io::stdout().lock());
            loop {
                match stream.read(&mut block)? {
                    0 => return Ok(()),
                    length => output.write_all(&block[..length])?,
                }
            }
        }
        ["repeat", address, count] => {
            let (mut input, count) = (Vec::new(), count.parse::<u32>().expect("a number"));
            std::io::stdin().read_to_end(&mut input)?;
            let mut stream = TcpStream::connect(address)?;
            for number in 0..count {
                stream.write_all(format!("{number}\n").as_bytes())?;
                stream.write_all(&input)?;
            }
            // A container's network ends with it, and with the network what was not sent yet.
            stream.shutdown(Shutdown::Write)?;
            while stream.read(&mut input)? > 0 {}
            return Ok(());
        }
        _ => panic!("serve, send, ask, receive or repeat"),
    };
    println!("{}", started.elapsed().as_nanos());
    Ok(())
}
