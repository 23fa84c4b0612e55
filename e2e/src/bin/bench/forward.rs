//! A port-forward over SPDY through the whole runtime, beside a proxy that copies and does nothing else.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::BytesMut;
use stave_e2e::cri::{NamespaceMode, PortForwardRequest};
use stave_e2e::{Config as _, container};
use stave_streaming::spdy::{Encoder, Frame, Headers};

use crate::{Runtime, pod_config, remove, start};

const ROUNDS: usize = 3;

/// `mib` MiB from a server on the host to a client, turn by turn; the pod has the host's network.
pub(crate) async fn run(mib: usize, image: &str, directory: &str, runtimes: &[Runtime]) -> Result<()> {
    let length = mib << 20;
    let port = source(length)?;
    for runtime in runtimes {
        let mut config = pod_config(directory, &runtime.name, 0);
        config.namespaces().network = NamespaceMode::Node as i32;
        config.hostname.clear();
        let mut main = container("main", image, &["sleep", "36000"]);
        main.namespaces().network = NamespaceMode::Node as i32;
        let (pod, _, _) = start(runtime, &config, &main).await?;
        let mut ratios = Vec::new();
        for _ in 0..ROUNDS {
            let request = PortForwardRequest { pod_sandbox_id: pod.clone(), port: vec![] };
            let url = runtime.cri.runtime.clone().port_forward(request).await?.into_inner().url;
            let (plain, forwarded) = tokio::task::spawn_blocking(move || {
                Ok::<_, anyhow::Error>((plain(port, length)?, forwarded(&url, port, length)?))
            })
            .await??;
            let ratio = plain.as_secs_f64() / forwarded.as_secs_f64();
            println!(
                "{:<12} {mib} MiB: plain proxy {:.2} s, port-forward {:.2} s, {ratio:.2} of the rate",
                runtime.name,
                plain.as_secs_f64(),
                forwarded.as_secs_f64()
            );
            ratios.push(ratio);
        }
        ratios.sort_by(f64::total_cmp);
        println!("{:<12} median {:.2}", runtime.name, ratios[ROUNDS / 2]);
        remove(runtime, &pod).await?;
    }
    Ok(())
}

/// A server that sends `length` bytes to each client.
fn source(length: usize) -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        let block = vec![7; 1 << 20];
        for mut stream in listener.incoming().flatten() {
            for _ in 0..length / block.len() {
                if stream.write_all(&block).is_err() {
                    break;
                }
            }
        }
    });
    Ok(port)
}

fn plain(port: u16, length: usize) -> Result<Duration> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || -> std::io::Result<()> {
        let (mut client, _) = listener.accept()?;
        let mut server = TcpStream::connect(("127.0.0.1", port))?;
        // In chunks as a port-forward has them.
        let mut buffer = vec![0; 32 << 10];
        loop {
            match server.read(&mut buffer)? {
                0 => return Ok(()),
                count => client.write_all(&buffer[..count])?,
            }
        }
    });
    let begin = Instant::now();
    receive(&mut TcpStream::connect(address)?, length)?;
    Ok(begin.elapsed())
}

fn receive(stream: &mut TcpStream, mut left: usize) -> Result<()> {
    let mut buffer = vec![0; 64 << 10];
    while left > 0 {
        match stream.read(&mut buffer)? {
            0 => anyhow::bail!("the connection ended {left} bytes early"),
            count => left = left.saturating_sub(count),
        }
    }
    Ok(())
}

/// What comes over the one stream is data in frames; counting all bytes is near enough.
fn forwarded(url: &str, port: u16, length: usize) -> Result<Duration> {
    let rest = url.strip_prefix("http://").context("the URL is not http")?;
    let (host, path) = rest.split_at(rest.find('/').context("the URL has no path")?);
    let mut stream = TcpStream::connect(host.parse::<SocketAddr>()?)?;
    stream.set_nodelay(true)?;
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
         X-Stream-Protocol-Version: portforward.k8s.io\r\n\r\n"
    )?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    ensure!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
    let begin = Instant::now();
    let mut encoder = Encoder::default();
    let port = port.to_string();
    for (id, kind) in [(1, "error"), (3, "data")] {
        let headers = Headers::from([("streamtype", kind), ("port", port.as_str()), ("requestid", "1")]);
        let mut out = BytesMut::new();
        encoder.encode(&Frame::SynStream { id, fin: kind == "error", headers }, &mut out)?;
        stream.write_all(&out)?;
    }
    receive(&mut stream, length)?;
    Ok(begin.elapsed())
}
